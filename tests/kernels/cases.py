"""Calls of the adaLN family for tests: inputs of a kind, the operator on a backend, plain PyTorch's lines, the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from oracles import Adaln, judge_draws, wide
from torch import Tensor

from ditscale import kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAME = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}

# (B, T, D) and why it is here.
SHAPES = {
    "one-number": (1, 1, 1),  # every reduction is over one element; variance 0
    "one-token": (3, 1, 64),  # modulation rows shared by one row only
    "narrow": (2, 5, 3),  # less than any vector
    "odd": (2, 7, 13),  # primes: nothing aligned, a tail in every loop
    "vector-and-tail": (2, 9, 67),  # whole vectors and a rest of 3
    "two-chunks": (2, 70, 24),  # tokens are cut in several chunks, the last one shorter
    "dit-s": (2, 37, 384),  # the model's width, a prime number of tokens
    "dit-xl": (1, 17, 1152),  # 4.5 warps of 16-byte vectors
}
FEW = ("one-number", "odd", "two-chunks", "dit-s")


def rows(m: Tensor) -> Tensor:
    return m.unsqueeze(1) if m.dim() == 2 else m


@dataclass
class Call:
    """One fused call: leaves in, cotangents in, and what is switched on."""

    x: Tensor
    branch: Tensor | None
    gate: Tensor | None
    shift: Tensor
    scale: Tensor
    dy: Tensor
    dx_new: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    rms: bool = False
    eps: float = 1e-6

    @property
    def leaves(self) -> dict[str, Tensor]:
        names = ("x", "branch", "gate", "shift", "scale", "weight", "bias")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    def _gradients(self, outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        cotangents = {"y": self.dy, "x_new": self.dx_new}
        used = [n for n in outputs if cotangents[n] is not None]
        found = torch.autograd.grad([outputs[n] for n in used], list(leaves.values()), [cotangents[n] for n in used])
        return {**outputs, **{f"d{n}": g for n, g in zip(leaves, found, strict=True)}}

    def _fresh(self) -> dict[str, Tensor]:
        return {n: t.detach().requires_grad_() for n, t in self.leaves.items()}

    def run(self, backend: str, **options: object) -> dict[str, Tensor]:
        """The operator under test, outputs and gradients by name."""
        v = self._fresh()
        more = {
            "weight": v.get("weight"),
            "bias": v.get("bias"),
            "norm": "rms" if self.rms else "layer",
            "eps": self.eps,
        }
        if "branch" not in v:
            y = kernels.layernorm_modulate(v["x"], v["shift"], v["scale"], backend=backend, **more, **options)
            return self._gradients({"y": y}, v)
        x_new, y = kernels.gate_residual_layernorm_modulate(
            v["x"], v["branch"], v["gate"], v["shift"], v["scale"], backend=backend, **more, **options
        )
        return self._gradients({"x_new": x_new, "y": y}, v)

    def plain(self) -> dict[str, Tensor]:
        """The lines that a model has today, at the same dtype, differentiated by autograd."""
        v = self._fresh()
        x, outputs = v["x"], {}
        if "branch" in v:
            x = x + rows(v["gate"]) * v["branch"]
            outputs["x_new"] = x
        D = x.shape[-1]
        if self.rms:
            n = F.rms_norm(x, (D,), v.get("weight"), self.eps)
            n = n if "bias" not in v else n + v["bias"]
        else:
            n = F.layer_norm(x, (D,), v.get("weight"), v.get("bias"), self.eps)
        outputs["y"] = n * (1 + rows(v["scale"])) + rows(v["shift"])
        return self._gradients(outputs, v)

    def oracle(self) -> Adaln:
        return Adaln(
            **{n: wide(t) for n, t in self.leaves.items()},
            eps=self.eps,
            rms=self.rms,
            dy=wide(self.dy),
            dx_new=wide(self.dx_new),
        )

    def check(self, backend: str, **options: object) -> None:
        """Outputs and every gradient obey the rule of ``judge``."""
        check_all([self], backend, **options)


def check_all(calls: list[Call], backend: str, **options: object) -> None:
    """The rule over the pooled errors of calls that differ in their numbers only."""
    oracles = [c.oracle() for c in calls]
    runs = [(c.run(backend, **options), o.run(), c.plain(), o.terms) for c, o in zip(calls, oracles, strict=True)]
    names = set(runs[0][1])
    for got, exact, plain, _ in runs:
        assert set(got) == set(exact) == set(plain) == names
    for name in names:
        draws = []
        for got, exact, plain, terms in runs:
            assert got[name].dtype == plain[name].dtype, name
            draws.append((got[name], exact[name], plain[name], terms.get(name, 0.0)))
        judge_draws(name, draws)


def modulation(B: int, T: int, D: int, mode: str, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Shift, scale, gate: chunks of one tensor, as a model makes them (row stride count * D)."""
    lead = {"shared": (), "per_sample": (B,), "per_token": (B, T)}[mode]
    return list(torch.randn(*lead, count * D, dtype=torch.float64).to(dtype).chunk(count, dim=-1))


def make(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    fused: bool = True,
    mode: str = "per_sample",
    affine: bool = False,
    rms: bool = False,
    stream_gradient: bool = True,
    size: float = 1.0,
    fill: Callable[[Tensor], Tensor] | None = None,
) -> Call:
    """A random call. ``size`` multiplies x and branch."""
    B, T, D = shape

    def draw(*dims: int, by: float = 1.0) -> Tensor:
        return (by * torch.randn(*dims, dtype=torch.float64)).to(dtype)

    shift, scale, gate = modulation(B, T, D, mode, 3, dtype)
    x = draw(B, T, D, by=size)
    return Call(
        x=fill(x) if fill else x,
        branch=draw(B, T, D, by=size) if fused else None,
        gate=gate if fused else None,
        shift=shift,
        scale=scale,
        dy=draw(B, T, D),
        dx_new=draw(B, T, D) if fused and stream_gradient else None,
        weight=draw(D) if affine else None,
        bias=draw(D) if affine else None,
        rms=rms,
    )


# What a block of a model does, with all four operators, for tests that are about what stands around them.
B, T, D = 2, 33, 24


def block(x: Tensor, branch: Tensor, table: Tensor, bias: Tensor, backend: str) -> Tensor:
    shift, scale, gate = table.chunk(3, dim=-1)
    x, y = kernels.gate_residual_layernorm_modulate(x, branch, gate, shift, scale, backend=backend)
    y = kernels.layernorm_modulate(y, shift, scale, backend=backend)
    y = kernels.bias_gelu(y, bias, backend=backend)
    return kernels.gate_residual(x, y, gate, backend=backend)


def plain_block(x: Tensor, branch: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    shift, scale, gate = (rows(t) for t in table.chunk(3, dim=-1))
    x = x + gate * branch
    y = plain_norm(plain_norm(x) * (1 + scale) + shift) * (1 + scale) + shift
    y = F.gelu(y + bias, approximate="tanh")
    return x + gate * y


def plain_norm(x: Tensor) -> Tensor:
    """Line by line: PyTorch's own is wrong where a tangent, or a second derivative, is differentiated."""
    x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def block_inputs(batch: int = B, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(*s, dtype=dtype).requires_grad_() for s in ((batch, T, D), (batch, T, D), (batch, 3 * D), (D,))]


def close(got: Iterable[Tensor], want: Iterable[Tensor], tolerance: float = 2e-5) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def gradients(f: Callable[..., Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The result of ``f`` and its gradients for a fixed cotangent."""
    out = f(*leaves)
    weight = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape).to(out.dtype)
    return (out, *torch.autograd.grad(out, leaves, weight))


def exact(f: Callable[..., Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same in float64."""
    return gradients(f, [t.detach().double().requires_grad_() for t in leaves])
