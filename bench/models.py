"""The block and step cases: our DiT beside the plain one of ``plain_dit.py``, with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditscale.bench.cases import Case, model_config
from ditscale.bench.plain_dit import PlainBlock, PlainDiT, PlainTrainer
from ditscale.bench.subjects import DTYPES, Candidate, Results, Subject, fresh_compile, generator

_EXACT_ROWS = 2048  # tokens that a float64 model is given at once
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _randomised(module: nn.Module, device: str, seed: int = 1) -> nn.Module:
    """Weights that make every path matter: as initialised, the modulation is zero and blocks do nothing."""
    g = generator(seed, "cpu")
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = 0.3 if p.ndim == 1 or "embedding" in name else p[0].numel() ** -0.5
            p.copy_(scale * torch.randn(p.shape, generator=g))
    return module.to(device)


def _grads(outputs: dict[str, Tensor], module: nn.Module, inputs: dict[str, Tensor], dy: Tensor | None) -> Results:
    leaves = inputs | dict(module.named_parameters())
    loss = next(iter(outputs.values()))
    found = torch.autograd.grad(loss, list(leaves.values()), dy)
    return {k: v.detach() for k, v in outputs.items()} | {f"d{k}": g for k, g in zip(leaves, found, strict=True)}


def _same_weights(model: nn.Module, plain: nn.Module) -> nn.Module:
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    if unexpected or any("pos_embed" not in name for name in missing):
        raise RuntimeError(f"the two models have different parameters: {(missing + unexpected)[:3]}")
    return model


def block_subject(case: Case, device: str) -> Subject:
    """One block, gradients of its input, condition and weights included."""
    from ditscale.dit import DiTConfig
    from ditscale.dit.block import DiTBlock
    from ditscale.dit.layers import settle

    B, T, D, H = (case.shape[k] for k in "BTDH")
    dtype = DTYPES[case.dtype]
    g = generator(0, device)
    x, c, dy = (torch.randn(*shape, generator=g, device=device).to(dtype) for shape in ((B, T, D), (B, D), (B, T, D)))
    plain = _randomised(PlainBlock(D, H, 4 * D), device).to(dtype)
    ours = _same_weights(DiTBlock(DiTConfig(width=D, heads=H)).to(device, dtype), plain)

    def fused(x: Tensor, c: Tensor) -> Tensor:
        # Our block leaves its last gated branch to the next block's fused operator; alone it must add it itself.
        return settle(*ours(x, None, F.silu(c)))

    def candidate(forward: Callable[[Tensor, Tensor], Tensor], module: nn.Module, **more: Any) -> Candidate:
        leaves = [x.clone().requires_grad_(), c.clone().requires_grad_(), *module.parameters()]

        def call(place: int) -> Any:
            if case.passes == "forward":
                with torch.no_grad():
                    return forward(leaves[0], leaves[1])
            y = forward(leaves[0], leaves[1])
            return y, torch.autograd.grad(y, leaves, dy)

        def results() -> Results:
            return _grads({"y": forward(leaves[0], leaves[1])}, module, {"x": leaves[0], "c": leaves[1]}, dy)

        return Candidate(call, results, **more)

    def exact() -> Results:
        wide = PlainBlock(D, H, 4 * D).to(device, torch.float64)
        wide.load_state_dict({k: v.double() for k, v in plain.state_dict().items()})
        xs = {"x": x.double().requires_grad_(), "c": c.double().requires_grad_()}
        return _grads({"y": wide(xs["x"], xs["c"])}, wide, xs, dy.double())

    build = {
        "eager": lambda: candidate(plain, plain),
        "compile": lambda: candidate(fresh_compile(plain), plain),
        "ours": lambda: candidate(fused, ours, auto=True),
        "ours-compile": lambda: candidate(fresh_compile(fused), ours),
    }
    return Subject(case, 1, 0, build, exact)


def _batches(case: Case, device: str, count: int) -> list[Batch]:
    s = case.shape
    side = 2 * round(s["T"] ** 0.5)
    shape = (s["B"], s.get("C", 3), side, side)
    found = []
    for seed in range(count):
        g = generator(seed, device)
        x_0, eps = (torch.randn(shape, generator=g, device=device) for _ in range(2))
        t = torch.sigmoid(torch.randn(s["B"], generator=g, device=device))
        y = torch.randint(10, (s["B"],), generator=g, device=device)
        found.append((x_0, y, eps, t, torch.rand(s["B"], generator=g, device=device) < 0.1))
    return found


class OurTrainer:
    """The trainer's own step."""

    def __init__(self, model: nn.Module, source: Any, dtype: torch.dtype) -> None:
        from ditscale.dit.flow import RectifiedFlow
        from ditscale.dit.optim import parameter_groups
        from ditscale.dit.training.step import Stepper
        from ditscale.dit.update import Updater, UpdateRule

        updater = Updater(source, parameter_groups(source, lr=1e-4), UpdateRule())
        precision = str(dtype).removeprefix("torch.")
        self.stepper = Stepper(source, RectifiedFlow(), updater, called=model, precision=precision)

    def loss(self, x_0: Tensor, y: Tensor, eps: Tensor, t: Tensor, drop: Tensor) -> Tensor:
        """The flow's mean loss."""
        from ditscale.dit.training.batches import StepInputs

        return self.stepper.loss(StepInputs(x_0, y, eps, t, drop))

    def step(self, x_0: Tensor, y: Tensor, eps: Tensor, t: Tensor, drop: Tensor) -> float:
        """One step; returns the loss."""
        from ditscale.dit.training.batches import StepInputs

        return self.stepper(StepInputs(x_0, y, eps, t, drop))


def step_subject(case: Case, device: str) -> Subject:
    """A training step without the reading of data, which is the same for all."""
    from ditscale.dit.model import DiT

    config = model_config(case)
    dtype = DTYPES[case.dtype]
    batches = _batches(case, device, 4)

    def plain() -> PlainDiT:
        return _randomised(PlainDiT.of(config), device)  # type: ignore[return-value]

    def candidate(trainer: Any, model: nn.Module, **more: Any) -> Candidate:
        # The check comes before the first step, while all providers have the same weights.
        return Candidate(
            lambda place: trainer.step(*batches[place % len(batches)]),
            lambda: _grads({"loss": trainer.loss(*batches[0])}, model, {}, None),
            **more,
        )

    def plain_candidate(*, compiled: bool, tuned: bool, note: str) -> Callable[[], Candidate]:
        def build() -> Candidate:
            model = plain()
            called = fresh_compile(model) if compiled else model
            trainer = PlainTrainer(called, list(model.parameters()), tuned=tuned, dtype=dtype)  # type: ignore[arg-type]
            return candidate(trainer, model, note=note)

        return build

    def ours(*, compiled: bool) -> Callable[[], Candidate]:
        def build() -> Candidate:
            model = DiT(config).to(device)
            _same_weights(model, plain())
            trainer = OurTrainer(fresh_compile(model) if compiled else model, model, dtype)  # type: ignore[arg-type]
            return candidate(trainer, model, auto=not compiled)

        return build

    def exact() -> Results:
        model = plain().double()
        # Time and noise enter in float32 everywhere; what is judged is the model's arithmetic on them. Parts of the batch, for
        # a large model in float64 fits no device: means of parts of one size are the mean of all.
        B = case.shape["B"]
        part = next(n for n in range(min(B, max(1, _EXACT_ROWS // case.shape["T"])), 0, -1) if B % n == 0)
        total: Results = {}
        for start in range(0, B, part):
            x_0, y, eps, t, drop = (tensor[start : start + part] for tensor in batches[0])
            at = t.view(-1, 1, 1, 1)
            predicted = model(((1 - at) * x_0 + at * eps).double(), t * 1000, y, drop)
            loss = F.mse_loss(predicted, (eps - x_0).double())
            for name, value in _grads({"loss": loss}, model, {}, None).items():
                total[name] = total.get(name, 0) + value * (part / B)
        return total

    stock = "AdamW and weight average as the released training script has them"
    tuned = "fused AdamW, grouped weight average"
    build = {
        "eager": plain_candidate(compiled=False, tuned=False, note=stock),
        "eager-tuned": plain_candidate(compiled=False, tuned=True, note=tuned),
        "compile": plain_candidate(compiled=True, tuned=True, note=f"model compiled; {tuned}"),
        "ours": ours(compiled=False),
        "ours-compile": ours(compiled=True),
    }
    return Subject(case, 1, 0, build, exact, graphs=False, apart=_fills(case, device, len(build)))


def _fills(case: Case, device: str, trainers: int) -> bool:
    """Whether trainers with weights, gradients, two moments and an average each leave a GPU no room for activations."""
    if device == "cpu":
        return False
    D, L = case.shape["D"], case.shape["L"]
    weights = 4 * L * 18 * D * D
    return 5 * weights * trainers > 0.4 * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
