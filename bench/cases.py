"""What is measured, as data: operator, pass, shape, dtype and cache state; with FLOPs and bytes from the rooms' cost modules.

B batch, T tokens, D width, H heads, K head width, F mlp width, L layers. FLOP = one addition or one multiplication. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ditscale.errors import InputError
from ditscale.kernels.adaln import cost as adaln
from ditscale.kernels.aot import SIZE
from ditscale.kernels.attn import cost as attention
from ditscale.kernels.gelu import cost as gelu
from ditscale.kernels.matmul import cost as matmul
from ditscale.kernels.rotary import cost as rotary

# Width and heads of the DiT family (arXiv:2212.09748, table 1).
MODELS = {"S": (384, 6), "B": (768, 12), "L": (1024, 16), "XL": (1152, 16)}
TOKENS = (256, 1024, 4096)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

ADALN_OPS = ("layernorm_modulate", "gate_residual", "gate_residual_layernorm_modulate")
ATTENTION_OPS = ("attention", "qk_norm_rope")
PASSES = ("forward", "backward", "forward_backward")


class Work(NamedTuple):
    """One piece of a case: FLOPs of matrix products, all FLOPs, compulsory bytes."""

    matmul_flops: int
    flops: int
    bytes_moved: int


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        suite: "adaln", "attention", "block", "step", "fit", "flops" or "host".
        op: what is called.
        passes: one of ``PASSES``, or "step" and "call" where there is nothing to split.
        dtype: of the tensors.
        dims: sizes by letter, in order.
        cache: "rotating" (buffer sets larger than the last-level cache take turns) or "resident" (one set).
        label: model's name, or what the case stands for.
    """

    suite: str
    op: str
    passes: str
    dtype: str
    dims: tuple[tuple[str, int], ...]
    cache: str = "rotating"
    label: str = ""

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by letter."""
        return dict(self.dims)

    @property
    def id(self) -> str:
        """What rows of two files are matched by."""
        sizes = " ".join(f"{k}{v}" for k, v in self.dims)
        return "/".join(part for part in (self.op, self.passes, self.dtype, sizes, self.cache) if part)

    def work(self) -> tuple[Work, ...]:
        """FLOPs and bytes, piece by piece; empty where the case is not about a device's arithmetic."""
        return tuple(_WORK[self.op](self)) if self.op in _WORK else ()


def _memory_work(case: Case) -> Iterable[Work]:
    s, size = case.shape, SIZE[case.dtype]
    flops = bytes_moved = 0
    for direction in _directions(case.passes):
        if case.op == "bias_gelu":
            rows, width = s["B"] * s["T"], s["F"]
            flops += getattr(gelu, f"bias_gelu_flops_{direction}")(rows, width)
            bytes_moved += getattr(gelu, f"bias_gelu_bytes_{direction}")(rows, width, size, size)
        elif case.op == "qk_norm_rope":
            sizes = (s["B"], s["H"], s["T"], s["K"])
            flops += getattr(rotary, f"qk_norm_rope_flops_{direction}")(*sizes)
            bytes_moved += getattr(rotary, f"qk_norm_rope_bytes_{direction}")(*sizes, size)
        else:
            flops += getattr(adaln, f"{case.op}_flops_{direction}")(s["B"], s["T"], s["D"])
            # Inference keeps no statistics.
            more = {} if case.op == "gate_residual" else {"save_stats": case.passes != "forward"}
            bytes_moved += getattr(adaln, f"{case.op}_bytes_{direction}")(s["B"], s["T"], s["D"], size, size, **more)
    yield Work(0, flops, bytes_moved)


def _attention_work(case: Case) -> Iterable[Work]:
    s, size = case.shape, SIZE[case.dtype]
    B, H, T, K = (s[k] for k in "BHTK")
    for direction in _directions(case.passes):
        flops = getattr(attention, f"attention_flops_{direction}")(B, H, T, T, K)
        if direction == "forward":
            moved = attention.attention_bytes_forward(B, H, T, T, K, size, save_stats=case.passes != "forward")
        else:
            moved = attention.attention_bytes_backward(B, H, T, T, K, size)
        yield Work(flops, flops, moved)


def _linear_work(case: Case) -> Iterable[Work]:
    s, size = case.shape, SIZE[case.dtype]
    sizes = (s["B"] * s["T"], s["D"], s["F"])
    for direction in _directions(case.passes):
        flops = getattr(matmul, f"linear_flops_{direction}")(*sizes)
        yield Work(flops, flops, getattr(matmul, f"linear_bytes_{direction}")(*sizes, size))


def _model_work(case: Case) -> Iterable[Work]:
    from ditscale.dit.flops import count

    s = case.shape
    report = count(model_config(case), batch=s["B"], convention="all", dtype_bytes=SIZE[case.dtype])
    for line in report.ledger:
        if case.suite == "block" and not line.name.startswith("blocks."):
            continue
        product = line.operation == "matmul" or line.name.endswith((".scores", ".values"))
        for direction in _directions("forward_backward" if case.passes == "step" else case.passes):
            flops = getattr(line, direction)
            yield Work(flops if product else 0, flops, getattr(line, f"bytes_{direction}"))


_WORK = {
    **dict.fromkeys((*ADALN_OPS, "bias_gelu", "qk_norm_rope"), _memory_work),
    "attention": _attention_work,
    "linear": _linear_work,
    "dit_block": _model_work,
    "training_step": _model_work,
}


def _directions(passes: str) -> tuple[str, ...]:
    return ("forward", "backward") if passes == "forward_backward" else (passes,)


def model_config(case: Case) -> Any:
    """The DiT of a block or step case: pixels, patch 2, as many pixels as give T tokens; a class condition."""
    from ditscale.dit.config import DiTConfig

    s = case.shape
    side = round(s["T"] ** 0.5)
    if side * side != s["T"]:
        raise InputError(f"T: expected a square number of tokens, got {s['T']}")
    return DiTConfig(
        image_size=2 * side,
        latent_factor=1,
        in_channels=s.get("C", 3),
        patch=2,
        width=s["D"],
        depth=s.get("L", 1),
        heads=s["H"],
        num_classes=10,
        learn_sigma=False,
        name=case.label,
    )


def grid(
    op: str,
    passes: str,
    dtype: str,
    models: Iterable[str] = MODELS,
    tokens: Iterable[int] = TOKENS,
    batches: Iterable[int] = BATCHES,
    *,
    rows: tuple[int, int] = (1, 1 << 40),
    cache: str = "rotating",
) -> list[Case]:
    """Cases of one operator over models, tokens and batches, those whose B * T lies within ``rows``."""
    found = []
    for name in models:
        width, heads = MODELS[name]
        for t in tokens:
            for b in batches:
                if rows[0] <= b * t <= rows[1]:
                    found.append(operator_case(op, passes, dtype, b, t, width, heads, cache=cache, label=f"DiT-{name}"))
    return found


def operator_case(
    op: str,
    passes: str,
    dtype: str,
    B: int,
    T: int,
    D: int,
    H: int,
    *,
    cache: str = "rotating",
    label: str = "",
) -> Case:
    """A case of one operator, with the sizes that it is said in."""
    suite = "attention" if op in ATTENTION_OPS else "block" if op == "linear" else "adaln"
    if op in ATTENTION_OPS:
        dims: tuple[tuple[str, int], ...] = (("B", B), ("H", H), ("T", T), ("K", D // H))
    elif op == "bias_gelu":
        dims = (("B", B), ("T", T), ("F", 4 * D))
    elif op == "linear":
        dims = (("B", B), ("T", T), ("D", D), ("F", 4 * D))
    else:
        dims = (("B", B), ("T", T), ("D", D))
    return Case(suite, op, passes, dtype, dims, cache, label)


def block_case(
    B: int,
    T: int,
    D: int,
    H: int,
    *,
    dtype: str = "float32",
    passes: str = "forward_backward",
    label: str = "",
) -> Case:
    """One DiT block."""
    return Case("block", "dit_block", passes, dtype, (("B", B), ("T", T), ("D", D), ("H", H)), "resident", label)


def step_case(B: int, T: int, D: int, H: int, L: int, *, C: int = 3, dtype: str = "float32", label: str = "") -> Case:
    """One training step of a whole DiT."""
    dims = (("B", B), ("T", T), ("D", D), ("H", H), ("L", L), ("C", C))
    return Case("step", "training_step", "step", dtype, dims, "resident", label)


def _cpu() -> dict[str, list[Case]]:
    """What two cores can measure in ten minutes, the compiler's time included; in each suite the most telling first."""
    two = ("forward", "forward_backward")
    fused, modulate = "gate_residual_layernorm_modulate", "layernorm_modulate"

    def at(op: str, passes: str, B: int, T: int, model: str, dtype: str = "float32", cache: str = "rotating") -> Case:
        D, H = MODELS[model]
        return operator_case(op, passes, dtype, B, T, D, H, cache=cache, label=f"DiT-{model}")

    # Of 2,048 to 16,384 rows.
    shapes = ((32, 256, "S"), (8, 256, "XL"), (8, 1024, "B"), (4, 1024, "L"), (4, 4096, "XL"))
    adaln_cases = [at(op, p, *shape) for shape in shapes for op in (modulate, fused) for p in two]
    # In the caches: x of 1.5 MiB, as in the demo's study.
    adaln_cases += [at(op, p, 4, 256, "S", cache="resident") for op in (modulate, fused) for p in two]
    adaln_cases += [at(fused, "forward_backward", 32, 256, "S", "bfloat16")]
    adaln_cases += [at("bias_gelu", p, 8, 256, "S") for p in two]
    adaln_cases += [at("gate_residual", "forward_backward", 32, 256, "S")]

    attention_cases = [at("attention", p, 32, 256, "S") for p in two]
    attention_cases += [at("attention", p, 8, 256, "XL") for p in two]
    attention_cases += [at("attention", p, 16, 64, "S", cache="resident") for p in two]
    attention_cases += [
        at("attention", "forward_backward", 16, 64, "XL"),
        at("attention", "forward_backward", 4, 1024, "B"),
    ]
    attention_cases += [at("attention", "forward_backward", 2, 1024, "XL")]
    attention_cases += [at("qk_norm_rope", p, 8, 256, "XL") for p in two]
    attention_cases += [at("qk_norm_rope", "forward_backward", 32, 256, "S")]

    return {
        "adaln": adaln_cases,
        "attention": attention_cases,
        "block": [
            block_case(8, 256, 384, 6, label="DiT-S"),
            block_case(2, 256, 1152, 16, label="DiT-XL"),
            block_case(16, 64, 256, 8, label="width 256"),
            at("linear", "forward", 8, 256, "S"),
            at("linear", "forward_backward", 8, 256, "S"),
            # Few rows by a large weight, as modulation is made.
            at("linear", "forward", 4, 1, "XL"),
            at("linear", "forward_backward", 4, 1, "XL"),
        ],
        "step": [
            step_case(16, 64, 256, 8, 6, label="width 256, depth 6"),
            step_case(8, 64, 48, 6, 3, label="demo size"),
            step_case(4, 256, 384, 6, 12, C=4, label="DiT-S/2"),
        ],
    }


def _cuda() -> dict[str, list[Case]]:
    """What a GPU is asked first: bfloat16, all four widths at 8,192 tokens, then few and many tokens."""
    fused, modulate = "gate_residual_layernorm_modulate", "layernorm_modulate"
    two = ("forward", "forward_backward")
    adaln_cases: list[Case] = []
    for op in (fused, modulate):
        for p in PASSES:
            adaln_cases += grid(op, p, "bfloat16", ("XL",), (256,), (32,))
    for op in (fused, modulate, "bias_gelu", "gate_residual"):
        for p in two:
            adaln_cases += grid(op, p, "bfloat16", tokens=(256,), batches=(32,))
    for op in (fused, modulate):
        for p in two:
            adaln_cases += grid(op, p, "bfloat16", ("S", "XL"), (256,), (1, 256))
            adaln_cases += grid(op, p, "bfloat16", ("S", "XL"), (1024, 4096), (8,))
    adaln_cases += grid(fused, "forward_backward", "float32", ("S", "XL"), (256,), (32,))
    attention_cases: list[Case] = []
    for tokens, batches in ((256, (32,)), (1024, (8,)), (4096, (2,))):
        for p in two:
            # Head widths of 64, 72 and, for a model of 16 such heads, 128.
            attention_cases += grid("attention", p, "bfloat16", ("XL", "B"), (tokens,), batches)
            attention_cases += [
                operator_case("attention", p, "bfloat16", b, tokens, 2048, 16, label="K = 128") for b in batches
            ]
    for p in two:
        attention_cases += grid("qk_norm_rope", p, "bfloat16", ("XL", "B"), (256,), (32,))
    blocks = [
        block_case(b, t, *MODELS[m], dtype="bfloat16", label=f"DiT-{m}")
        for m, b, t in (
            ("XL", 32, 256),
            ("S", 256, 256),
            ("L", 32, 256),
            ("B", 64, 256),
            ("XL", 8, 1024),
            ("XL", 2, 4096),
        )
    ]
    steps = [
        step_case(64, 256, 1152, 16, 28, C=4, dtype="bfloat16", label="DiT-XL/2"),
        step_case(256, 256, 384, 6, 12, C=4, dtype="bfloat16", label="DiT-S/2"),
    ]
    return {
        "adaln": list(dict.fromkeys(adaln_cases)),
        "attention": attention_cases,
        "block": blocks,
        "step": steps,
    }


def _grid(device: str) -> dict[str, list[Case]]:
    """Every model, token count and batch: B * T from 256 to 16,384 rows on a processor, to 131,072 on a GPU."""
    dtype, most = ("float32", 16_384) if device == "cpu" else ("bfloat16", 131_072)
    found: dict[str, list[Case]] = {"adaln": [], "attention": []}
    for op in (*ADALN_OPS, "bias_gelu", *ATTENTION_OPS):
        for p in ("forward", "forward_backward"):
            of_op = grid(op, p, dtype, rows=(256, most))
            found[of_op[0].suite] += of_op
    return found


def _tiny(device: str) -> dict[str, list[Case]]:
    """Every kind of case at sizes that take milliseconds, for tests and dry runs."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    small: list[Case] = [
        operator_case(op, p, dtype, 2, 16, 32, 2, label="tiny")
        for op in (*ADALN_OPS, "bias_gelu")
        for p in ("forward", "forward_backward")
    ]
    small += [operator_case("layernorm_modulate", "backward", dtype, 2, 16, 32, 2, cache="resident", label="tiny")]
    heads = [operator_case(op, p, dtype, 2, 16, 32, 2, label="tiny") for op in ATTENTION_OPS for p in PASSES]
    return {
        "adaln": small,
        "attention": heads,
        "block": [
            block_case(2, 16, 32, 2, dtype=dtype, label="tiny"),
            operator_case("linear", "forward_backward", dtype, 2, 16, 32, 2, label="tiny"),
        ],
        "step": [step_case(2, 16, 32, 2, 2, dtype=dtype, label="tiny")],
    }


def cases(suite: str, device: str, *, tiny: bool = False, whole_grid: bool = False) -> list[Case]:
    """The cases of a suite on "cpu" or "cuda", the most telling first.

    Args:
        suite: "adaln", "attention", "block" or "step".
        device: "cpu" or "cuda".
        tiny: sizes of milliseconds. Default: False.
        whole_grid: every model at 256, 1,024 and 4,096 tokens and batches of 1 to 256, as far as a device goes; of the
            operators' suites only. Default: False.

    Raises:
        InputError: no such suite.
    """
    table = _tiny(device) if tiny else _grid(device) if whole_grid else _cuda() if device == "cuda" else _cpu()
    if suite not in table:
        raise InputError(f"suite: expected one of {', '.join(table)}, got {suite!r}")
    return table[suite]
