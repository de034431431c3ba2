"""Published scaling laws, as printed: their constants, units, rounding, range and source.

A published law is a quotation. It may hold any of: power laws of compute (N_opt, D_opt, loss, quality), a
loss surface, and hyper-parameter laws. ``checks`` are numbers that the source prints and the quoted constants
must give back.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ditscale.errors import InputError


@dataclass(frozen=True)
class Power:
    """``floor + coefficient * prod(inputs ** exponents)``; one input is compute unless named otherwise.

    Attributes:
        coefficient, floor: of the law, in the unit of ``unit``.
        exponents: input name -> exponent.
        unit: of the result.
        digits: significant digits of the coefficient as printed: it is no better known than that.
        scale: input name -> what one unit of the input stands for (1e9 where a paper counts in billions).
    """

    coefficient: float
    exponents: Mapping[str, float]
    unit: str
    digits: int
    floor: float = 0.0
    scale: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, **inputs: Any) -> Any:
        value: Any = self.coefficient
        for name, exponent in self.exponents.items():
            if inputs.get(name) is None:
                raise InputError(f"{name}: this law needs {', '.join(self.exponents)}")
            value = value * (np.asarray(inputs[name], dtype=float) / self.scale.get(name, 1.0)) ** exponent
        value = value + self.floor
        return float(value) if np.ndim(value) == 0 else value

    @property
    def formula(self) -> str:
        """In plain text."""
        terms = " ".join(
            (f"({x}/{self.scale[x]:g})" if x in self.scale else x) + f"^{e:g}" for x, e in self.exponents.items()
        )
        floor = f"{self.floor:g} + " if self.floor else ""
        return f"{floor}{self.coefficient:g} {terms} [{self.unit}]"


def compute_power(coefficient: float, exponent: float, unit: str, digits: int, floor: float = 0.0) -> Power:
    """A power law of compute in FLOPs."""
    return Power(coefficient, {"flops": exponent}, unit, digits, floor)


@dataclass(frozen=True)
class Surface:
    """``L = E + A / N^alpha + B / D^beta``, D in tokens and N as the law counts it.

    Attributes:
        E, A, B, alpha, beta: as printed.
        digits: significant digits of the exponents as printed: 0.28 for 0.2849 moves a term by 13 % at 1e11 tokens.
        cost: a run costs ``cost * N * D`` FLOPs: 6 where N is parameters, 1 where it is FLOPs per token.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    digits: int
    cost: float = 6.0

    def loss(self, params: Any, tokens: Any) -> Any:
        """The loss of a run."""
        return (
            self.E
            + self.A / np.asarray(params, dtype=float) ** self.alpha
            + self.B / np.asarray(tokens, dtype=float) ** self.beta
        )

    def optimum(self, flops: Any) -> tuple[Any, Any]:
        """N and D of least loss for a budget."""
        a = self.beta / (self.alpha + self.beta)
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        n = g * (np.asarray(flops, dtype=float) / self.cost) ** a
        return n, np.asarray(flops, dtype=float) / (self.cost * n)


@dataclass(frozen=True)
class Check:
    """A number that the source prints.

    Attributes:
        quantity: "params", "tokens", "loss", "fid", "batch_tokens", "lr", "ratio" (D/N), ...
        at: inputs.
        value, tolerance: as printed, and how far rounding lets the constants miss it, relative.
    """

    quantity: str
    at: Mapping[str, float]
    value: float
    tolerance: float


@dataclass(frozen=True)
class PublishedLaw:
    """One published law.

    Attributes:
        name: as the command line takes it.
        title: what it is about.
        source: paper and where in it.
        reading: how the constants came here: "paper", "authors' code", "secondary notes", with what
            disagrees.
        laws: quantity -> Power: "params" (N_opt), "tokens" (D_opt), "loss", "fid", "batch_tokens", "lr".
        surface: a loss surface, or None.
        flop_convention: what C counts.
        params_kind: what N counts.
        budget_range: least and greatest compute behind the law, or None.
        checks: see :class:`Check`.
        notes: what a user of the law must know.
    """

    name: str
    title: str
    source: str
    reading: str
    laws: Mapping[str, Power] = field(default_factory=dict)
    surface: Surface | None = None
    flop_convention: str = "6ND"
    params_kind: str = "as in the paper"
    budget_range: tuple[float, float] | None = None
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()

    def optimum(self, flops: float) -> dict[str, float]:
        """What the law says for a budget: params, tokens, loss and quality, as far as it speaks of them."""
        out: dict[str, float] = {}
        if self.surface is not None:
            n, d = self.surface.optimum(flops)
            out = {"params": float(n), "tokens": float(d), "loss": float(self.surface.loss(n, d))}
        for name, law in self.laws.items():
            if set(law.exponents) == {"flops"}:
                out[name] = law(flops=flops)
        if "params" in out and "tokens" not in out and self.flop_convention == "6ND":
            out["tokens"] = flops / (6.0 * out["params"])
        return out

    def evaluate(self, check: Check) -> float:
        """What the constants give for a printed number."""
        at = dict(check.at)
        if check.quantity in self.laws and set(self.laws[check.quantity].exponents) == set(at):
            return float(self.laws[check.quantity](**at))
        best = self.optimum(at["flops"])
        if check.quantity == "ratio":
            return best["tokens"] / best["params"]
        if check.quantity == "6ND/C":
            return 6.0 * best["params"] * best["tokens"] / at["flops"]
        return best[check.quantity]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "title": self.title,
            "source": self.source,
            "reading": self.reading,
            "laws": {k: {"formula": v.formula, "digits": v.digits} for k, v in self.laws.items()},
            "surface": self.surface.__dict__ if self.surface else None,
            "flop_convention": self.flop_convention,
            "params_kind": self.params_kind,
            "budget_range": list(self.budget_range) if self.budget_range else None,
            "notes": list(self.notes),
        }


def video_flops_per_token(params: float, context: float, width: float) -> float:
    """Training FLOPs of one token of Yin et al.'s video DiT: ``(3/4) N (7 + context/width)``.

    With N = 16 L D² (self-attention 4 D², cross-attention 4 D², feed-forward 8 D²) that is
    84 L D² + 12 L context D: forward and backward, attention in both directions; text keys and values, modulation
    and embeddings left out.

    Args:
        params: N of the blocks.
        context: tokens that attention sees.
        width: D.
    """
    return 0.75 * params * (7.0 + context / width)


def published(name: str) -> PublishedLaw:
    """A published law by its name.

    Raises:
        InputError: none of that name; lists the nearest and all.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    near = difflib.get_close_matches(str(name), PUBLISHED, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"law: expected a fit's file or one of {', '.join(PUBLISHED)}, got {name!r}{hint}")


_BILLION = {"params": 1e9, "tokens": 1e9}
_GIDD_SOURCE = "von Ruette et al., arXiv:2512.10858"


def _gidd(noise: str, a: float, alpha: float, b: float, beta: float, e: float) -> PublishedLaw:
    return PublishedLaw(
        name=f"vonruette2025-{noise}",
        title=f"discrete diffusion language models, {noise} noise",
        source=_GIDD_SOURCE,
        reading="authors' notebook (gidd-easydel, scaling_laws_run_bootstrap)",
        surface=Surface(e, a, b, alpha, beta, 3, cost=1.0),
        laws={"batch_tokens": Power(3.614098626e-3, {"tokens": 0.8179}, "tokens", 4)},
        flop_convention="C = M * D with M the FLOPs of one token: 'params' here are FLOPs per token",
        params_kind="FLOPs per token (M), not parameters",
        budget_range=(5e17, 2e20),
        notes=("size is counted in FLOPs per token; a plan in parameters needs the model's own ledger",),
    )


_ALL = (
    PublishedLaw(
        name="liang2024",
        title="image diffusion transformers (in-context text and time tokens), rectified flow, LAION-Aesthetic",
        source="Liang et al., Scaling Laws For Diffusion Transformers, arXiv:2410.08184",
        reading="secondary notes and reviews agree; one review prints 3.3943 for the loss coefficient, a slip",
        laws={
            "params": compute_power(0.0009, 0.5681, "parameters", 1),
            "tokens": compute_power(186.8535, 0.4319, "tokens", 7),
            "loss": compute_power(2.3943, -0.0273, "velocity mean squared error (training, smoothed)", 5),
            "fid": compute_power(2.2566e6, -0.234, "FID (CLIP ViT-L/14 features)", 5),
        },
        params_kind="all parameters; no adaLN, so each one works on every token",
        budget_range=(1e17, 6e18),
        checks=(
            Check("params", {"flops": 1.5e21}, 958.3e6, 0.01),
            Check("6ND/C", {"flops": 1e21}, 1.00901, 1e-4),
            Check("loss", {"flops": 1e17}, 0.8224, 1e-4),
            Check("loss", {"flops": 6e18}, 0.7354, 1e-4),
            Check("loss", {"flops": 1.5e21}, 0.6325, 1e-4),
            Check("fid", {"flops": 1e18}, 138.5, 1e-3),
            Check("fid", {"flops": 1.5e21}, 25.0, 2e-3),
        ),
        notes=(
            "0.0009 has one significant digit: N is uncertain by 5.6 % from rounding alone, and 6ND misses C by 0.9 %",
            "the loss law has no floor; FID is on CLIP features and compares with no Inception FID",
            "the image resolution behind its tokens is not published",
        ),
    ),
    PublishedLaw(
        name="yin2024-video",
        title="video diffusion transformers, optimal hyper-parameters (the isoFLOP law, equation 14)",
        source="Yin et al., Towards Precise Scaling Laws for Video Diffusion Transformers, arXiv:2411.17470",
        reading="secondary notes agree; units found by matching the paper's figure 4",
        laws={
            "params": compute_power(0.8705, 0.4294, "parameters", 4),
            "batch_tokens": Power(2.1797e4, {"tokens": 0.8080, "params": 0.1906}, "tokens", 5, scale=_BILLION),
            "lr": Power(0.0002, {"tokens": -0.0453, "params": -0.1619}, "peak learning rate", 1, scale=_BILLION),
        },
        flop_convention="tokens * (3/4) N (7 + n_ctx/d): forward and backward, attention in both directions counted",
        budget_range=(2e17, 2e19),
        checks=(
            Check("params", {"flops": 1e22}, 2.43e9, 0.01),
            Check("batch_tokens", {"params": 1.07e9, "tokens": 4e9}, 6.77e4, 0.01),
            Check("lr", {"params": 1.07e9, "tokens": 4e9}, 1.86e-4, 0.01),
        ),
        notes=(
            "within +-30 % of N the loss changes by less than 1 %",
            "tokens depend on the autoencoder's compression: counts of two tokenisers do not compare",
        ),
    ),
    PublishedLaw(
        name="yin2024-video-surface",
        title="video diffusion transformers, N_opt from the fitted L(T, N) (equation 10)",
        source="Yin et al., arXiv:2411.17470, equation 10",
        reading="secondary notes agree; the constants of L(T, N) itself were not found",
        laws={"params": compute_power(1.5787, 0.4146, "parameters", 5)},
        flop_convention="as yin2024-video",
        checks=(Check("params", {"flops": 1e22}, 2.09e9, 0.01),),
    ),
    PublishedLaw(
        name="yin2024-video-fixed",
        title="the same with fixed, not tuned, batch and learning rate: what untuned hyper-parameters cost",
        source="Yin et al., arXiv:2411.17470, figure 6c",
        reading="derived: exponent 30.26 % above 0.4294 as stated, coefficient from 4.04e9 parameters at 1e22",
        laws={"params": compute_power(0.0020, 0.4294 * 1.3026, "parameters", 2)},
        flop_convention="as yin2024-video",
        checks=(Check("params", {"flops": 1e22}, 4.04e9, 0.01),),
        notes=("a warning, not a plan: tuned hyper-parameters ask for a 39.9 % smaller model at 1e22",),
    ),
    PublishedLaw(
        name="hoffmann2022",
        title="Chinchilla, approach 3 (constants of the TeX source)",
        source="Hoffmann et al., arXiv:2203.15556",
        reading="TeX source as quoted by Epoch's notebook",
        surface=Surface(1.69337368, 406.401018, 410.722827, 0.33917084, 0.2849083, 7),
        checks=(
            Check("ratio", {"flops": 1e21}, 34.0, 0.02),
            Check("ratio", {"flops": 5.76e23}, 59.0, 0.02),
        ),
        notes=("found to be an early-stopped fit (arXiv:2404.10102): prefer besiroglu2024",),
    ),
    PublishedLaw(
        name="hoffmann2022-rounded",
        title="Chinchilla, approach 3, as printed in the paper",
        source="Hoffmann et al., arXiv:2203.15556, equation 10",
        reading="paper",
        surface=Surface(1.69, 406.4, 410.7, 0.34, 0.28, 2),
        checks=(Check("tokens", {"flops": 1e24}, 4.035835e12, 1e-6),),
        notes=("0.28 for 0.2849 moves the data term by about 13 % at 1e11 tokens",),
    ),
    PublishedLaw(
        name="besiroglu2024",
        title="the Chinchilla surface refitted to the paper's own points",
        source="Besiroglu et al., arXiv:2404.10102",
        reading="paper; the point estimate is in effect a least-absolute-deviation fit",
        surface=Surface(1.8172, 482.01, 2085.43, 0.3478, 0.3658, 4),
        checks=(
            Check("params", {"flops": 5.76e23}, 7.2e10, 0.02),
            Check("ratio", {"flops": 5.76e23}, 18.4, 0.02),
        ),
    ),
    PublishedLaw(
        name="muennighoff2023",
        title="language models on repeated data, the base law",
        source="Muennighoff et al., arXiv:2305.16264",
        reading="secondary notes; R*_D = 15.39 and R*_N = 5.31 stand in more_laws.py",
        surface=Surface(1.87, 521.0, 1488.0, 0.353, 0.353, 3),
    ),
    PublishedLaw(
        name="llama3",
        title="Llama 3 isoFLOP law",
        source="Grattafiori et al., arXiv:2407.21783",
        reading="gidd notebook; reproduced from digitised points",
        laws={
            "params": compute_power(0.6, 0.463, "parameters", 1),
            "tokens": compute_power(0.299, 0.537, "tokens", 3),
        },
    ),
    PublishedLaw(
        name="deepseek2024",
        title="DeepSeek LLM: size in FLOPs per token, batch and learning rate by compute",
        source="DeepSeek-AI, arXiv:2401.02954",
        reading="ten secondary notes agree",
        laws={
            "flops_per_token": compute_power(0.1715, 0.5243, "non-embedding FLOPs per token", 4),
            "tokens": compute_power(5.8316, 0.4757, "tokens", 5),
            "lr": compute_power(0.3118, -0.1250, "peak learning rate", 4),
            "batch_tokens": compute_power(0.2920, 0.3271, "tokens", 4),
        },
        flop_convention="C = M D with M = 72 L d^2 + 12 L d n",
        notes=("size is FLOPs per token, not parameters",),
    ),
    PublishedLaw(
        name="steplaw2025",
        title="Step Law: learning rate and batch of language models",
        source="Li et al., arXiv:2503.04715",
        reading="means of the released 1000 bootstrap rows",
        laws={
            "lr": Power(1.7973, {"params": -0.71292, "tokens": 0.30749}, "peak learning rate", 5),
            "batch_tokens": Power(0.5807, {"tokens": 0.57094}, "tokens", 4),
        },
        notes=("hyper-parameters only: use it with --hparams",),
    ),
    PublishedLaw(
        name="nie2024-mdm",
        title="masked diffusion language models",
        source="Nie et al., arXiv:2410.18514",
        reading="gidd notebook",
        laws={
            "params": compute_power(0.0001029, 0.634, "parameters", 4),
            "tokens": compute_power(1619.0, 0.366, "tokens", 4),
        },
    ),
    PublishedLaw(
        name="dol2025-edm2",
        title="EDM2 loss against compute with the optimal diffusion loss as floor",
        source="Diagnosing and Improving Diffusion Models by Estimating the Optimal Loss Value, arXiv:2506.13763",
        reading="secondary notes; the unit of F was not read",
        laws={"loss_of_F": Power(0.3675, {"F": -0.014}, "diffusion loss", 4, floor=0.015)},
        flop_convention="F in an unit that was not read",
        checks=(Check("loss_of_F", {"F": 1.0}, 0.3825, 1e-9),),
        notes=("a form, not a plan: the unit of its compute is not known here",),
    ),
    _gidd("masked", 222, 0.292, 1920, 0.367, 2.17),
    _gidd("low-uniform", 477, 0.335, 1880, 0.365, 2.25),
    _gidd("balanced", 626, 0.35, 1520, 0.353, 2.27),
    _gidd("high-uniform", 303, 0.307, 1500, 0.352, 2.21),
    _gidd("uniform", 294, 0.305, 1340, 0.346, 2.19),
)
PUBLISHED: dict[str, PublishedLaw] = {law.name: law for law in _ALL}
