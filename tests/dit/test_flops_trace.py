"""Counting any torch model: what torch's own counter misses is repaired, and what nobody can count is an
error.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ditscale.dit import DiT, DiTConfig
from ditscale.dit.flops import count, trace
from ditscale.dit.torch_costs import matmul_formulas
from ditscale.errors import InputError

SMALL = DiTConfig(image_size=8, latent_factor=1, width=8, depth=2, heads=2, num_classes=3)


def dit_inputs(batch: int = 2) -> tuple[Tensor, ...]:
    return torch.zeros(batch, 4, 8, 8), torch.zeros(batch), torch.zeros(batch, dtype=torch.int64)


class Calls(nn.Module):
    """A function as a model with one parameter, so that there is something to differentiate."""

    def __init__(self, function, *shape: int) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros(*shape))

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return self.function(self.weight, *inputs, **named)


def test_agrees_with_the_ledger_and_leaves_the_model_alone() -> None:
    model = DiT(SMALL)
    before = copy.deepcopy(model.state_dict())
    report, ledger = trace(model, *dit_inputs()), count(SMALL, batch=2)
    assert (report.forward, report.backward) == (ledger.forward, ledger.backward)
    assert report.params == report.trainable == ledger.params.total
    qkv = [report.module(f"blocks.{i}.attn.qkv") for i in range(2)]
    line = ledger.line("blocks.attn.qkv")
    assert (sum(f for f, _ in qkv), sum(b for _, b in qkv)) == (line.forward, line.backward)
    assert report.module("DiT") == (report.forward, report.backward)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    json.dumps(report.to_json())
    assert "blocks.1.attn.qkv" in str(report)


def test_twin_of_a_huge_model_takes_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 16, 1 << 17), nn.Linear(1 << 17, 1 << 16))
    assert trace(model, torch.empty(1, 1 << 16, device="meta"), backward=False).forward == 4 << 33


def test_hardware_counts_scores_again_only_in_fused_attention() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, 2, 5, 3))

        def forward(self) -> Tensor:
            q = self.weight
            return torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)[0]

    once = 2 * 2 * 5 * 5 * 3
    assert trace(Fused()).backward == 4 * once
    assert trace(Fused(), convention="hardware").backward == 5 * once


CPU_ATTENTION = (torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 7, 4))


def test_repairs_attention_on_the_cpu() -> None:
    """Torch 2.13 counts nothing for its own fused attention on CPU tensors."""
    q, k = (t.clone().requires_grad_() for t in CPU_ATTENTION)
    once = 2 * 2 * 3 * 5 * 7 * 4

    def run(counter: FlopCounterMode) -> int:
        with counter:
            F.scaled_dot_product_attention(q, k, k).sum().backward()
        return counter.get_total_flops()

    assert run(FlopCounterMode(display=False)) in (0, 6 * once, 7 * once)  # 0 until torch 2.15
    assert run(FlopCounterMode(display=False, custom_mapping=matmul_formulas())) == 6 * once
    assert run(FlopCounterMode(display=False, custom_mapping=matmul_formulas(hardware=True))) == 7 * once


@pytest.mark.parametrize(
    ("function", "shape", "inputs", "forward", "backward"),
    [
        (
            lambda w, x: w @ x,
            (5, 7),
            ((7,),),
            2 * 35,
            0,
        ),  # matrix times vector; its gradient is an outer product
        (lambda w, x: torch.dot(w, x), (9,), ((9,),), 18, 0),
        (lambda w, x: torch.addmv(x, w, w[0]), (4, 4), ((4,),), 32, 32),
        (lambda w, x: torch.addbmm(w, x, x), (3, 3), ((5, 3, 3),), 2 * 5 * 27, 0),
        (lambda w, x: F.linear(x, w, w[:, 0]), (6, 3), ((4, 2, 3),), 2 * 8 * 18, 2 * 8 * 18),
        (lambda w, x: torch.einsum("bid,jd->bij", x, w), (6, 3), ((4, 2, 3),), 2 * 8 * 18, 2 * 8 * 18),
    ],
)
def test_repairs_products_of_vectors(function, shape, inputs, forward, backward) -> None:  # type: ignore[no-untyped-def]
    report = trace(Calls(function, *shape), *(torch.zeros(*s) for s in inputs))
    assert (report.forward, report.backward) == (forward, backward)


@pytest.mark.parametrize("name", ["addmm_", "baddbmm_", "addbmm_", "addmv_"])
def test_repairs_products_written_in_place(name: str) -> None:
    """Torch's counter knows none of them, and took their work for nothing."""
    x, w, v = (torch.zeros(*shape) for shape in ((2, 4, 4), (4, 4), (4,)))
    into, a, b = {"addmm_": (w, w, w), "baddbmm_": (x, x, x), "addbmm_": (w, x, x), "addmv_": (v, w, v)}[name]
    products = 2 * a.numel() * (1 if name == "addmv_" else 4)
    with FlopCounterMode(display=False, custom_mapping=matmul_formulas()) as counter:
        getattr(into.clone(), name)(a, b)
    assert counter.get_total_flops() == products
    model = Calls(lambda w, into, a, b: getattr(into * w, name)(a, b), 1)
    assert trace(model, into, a, b, backward=False).forward == products
    assert trace(model, into, a, b, backward=False, convention="all").forward == products + 2 * into.numel()


def test_scaled_products_of_both_kinds() -> None:
    x, one = torch.zeros(32, 32).to(torch.float8_e4m3fn), torch.ones(())
    old = Calls(lambda w, x, s: w * torch._scaled_mm(x, x.t(), s, s, out_dtype=torch.bfloat16), 1)
    assert trace(old, x, one, backward=False).forward == 2 * 32**3
    if hasattr(F, "scaled_mm"):  # torch 2.10
        kind = F.ScalingType.TensorWise
        new = Calls(lambda w, x, s: w * F.scaled_mm(x, x.t(), s, kind, s, kind, output_dtype=torch.bfloat16), 1)
        assert trace(new, x, one, backward=False).forward == 2 * 32**3


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: F.pixel_shuffle(w, 2),
        lambda w, x: F.interpolate(w, scale_factor=2, mode="bilinear", antialias=True),
        lambda w, x: F.pad(w, (1, 1, 1, 1, 1, 1), mode="replicate"),
        lambda w, x: F.prelu(w, x),
        lambda w, x: torch.view_as_real(torch.polar(x, x)) * w[0, 0, 0, 0],
    ],
    ids=["pixel shuffle", "antialias", "padding", "prelu", "polar"],
)
def test_light_work_of_image_models(function: Callable[..., Tensor]) -> None:
    assert trace(Calls(function, 2, 4, 6, 6), torch.zeros(4)).train == 0


def test_forward_mode_inside_a_model() -> None:
    """A product, and in PyTorch's formula of its tangent one for each factor."""

    def along(w: Tensor, x: Tensor) -> Tensor:
        return torch.func.jvp(lambda a: a @ w.detach(), (x,), (x,))[1] + w.sum()

    assert trace(Calls(along, 4, 4), torch.zeros(3, 4), backward=False).forward == 3 * 96


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_repairs_grouped_convolutions(groups: int, transposed: bool) -> None:
    """Torch's formula for the weight's gradient forgets the groups: 11 times too much for 3 x 3 depthwise."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(8, 8, 3, groups=groups, padding=1)
    once = 2 * 3 * 36 * 8 * 8 // groups * 9
    x = torch.zeros(3, 8, 6, 6)
    assert trace(layer, x).forward == trace(layer, x).backward == once
    assert trace(layer, x.requires_grad_()).backward == 2 * once


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_repairs_the_fused_inference_layers(mode: str) -> None:
    """In evaluation torch runs a whole encoder layer as one operation that its counter does not know."""
    b, t, d, f = 2, 5, 8, 20
    layer = nn.TransformerEncoderLayer(d, 2, f, dropout=0.0, batch_first=True)
    getattr(layer, mode)()
    forward = 2 * b * t * d * (4 * d + 2 * f) + 4 * b * t * t * d
    x = torch.zeros(b, t, d)
    assert trace(layer, x, backward=False).forward == forward
    assert trace(layer, x.requires_grad_()).backward == 2 * forward
    attention = nn.MultiheadAttention(d, 2, batch_first=True)
    getattr(attention, mode)()
    assert trace(attention, x, x, x, backward=False).forward == 2 * b * t * d * 4 * d + 4 * b * t * t * d
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=matmul_formulas()) as counter:
        layer.eval()(x.detach())
    assert counter.get_total_flops() == forward
    assert torch.backends.mha.get_fastpath_enabled()


@torch.library.custom_op("ditscale_tests::secret_product", mutates_args=())
def secret_product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@secret_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def test_an_unknown_operation_is_an_error_that_names_it() -> None:
    model = Calls(lambda w, x: secret_product(w.detach(), x) + w.sum(), 3, 4)
    with pytest.raises(InputError, match=r"secret_product \(1\).*formulas"):
        trace(model, torch.zeros(4, 5))
    known = {torch.ops.ditscale_tests.secret_product: lambda a, b, out_val: 2 * a.numel() * b.shape[1]}
    assert trace(model, torch.zeros(4, 5), formulas=known).forward == 120
    assert trace(model, torch.zeros(4, 5), formulas={torch.ops.ditscale_tests.secret_product: 0}).forward == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: (w[:, :, None] * x[None]).sum(1),
        lambda w, x: (w.unsqueeze(-1) * x).mean(dim=-2),
        lambda w, x: (2 * (w[:, :, None] * x).double()).sum(1),
        lambda w, x: (w[:, :, None] * x).transpose(1, 2).reshape(-1, 4).sum(-1),
        lambda w, x: torch.mul(*torch.broadcast_tensors(w[:, :, None], x)).sum(1),
        lambda w, x: torch.cdist(w, x.t().contiguous()),
        lambda w, x: torch.linalg.solve(w @ w.T + torch.eye(3, device=w.device), w),
    ],
    ids=["multiply and sum", "multiply and average", "cast", "copied", "expanded", "distances", "solve"],
)
def test_matrix_products_in_disguise_are_errors(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="expected operations whose cost is known"):
        trace(Calls(function, 3, 4), torch.zeros(4, 5), backward=False)


def test_broadcasts_that_are_no_products_pass() -> None:
    rows = trace(Calls(lambda w, x: (x * w).sum(1), 4), torch.zeros(3, 5, 4))
    table = trace(Calls(lambda w, x: (x[:, None] * w).cos(), 4), torch.zeros(3))
    # Its gradients are sums of products with one that is expanded.
    added = trace(Calls(lambda w, x: (x[:, None] * w + 1).sum(1), 4), torch.zeros(3, requires_grad=True))
    assert rows.train == table.train == added.train == 0


def test_frozen_parameters_take_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    report = trace(model, torch.zeros(3, 4))
    assert report.backward == 96  # the second layer's weight only: nobody needs its input's gradient
    assert (report.params, report.trainable) == (40, 20)
    assert trace(model.requires_grad_(False), torch.zeros(3, 4)).backward == 0


def test_checkpoints_count_as_hardware_work() -> None:
    from torch.utils.checkpoint import checkpoint

    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())

    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    once, again = trace(inner, torch.zeros(3, 4)), trace(Repeats(), torch.zeros(3, 4))
    assert again.forward == once.forward
    assert again.backward == once.backward + once.forward
    assert again.module("inner.2") == (96, 3 * 96)


def test_plain_tensors_hooks_and_wrappers_travel_with_the_twin() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.table = [torch.ones(4), {"deep": torch.ones(4)}]  # neither parameters nor buffers
            self.calls = 0
            self.register_forward_pre_hook(lambda module, args: (args[0] * 2,))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            return {"y": self.linear(x) + self.table[0] + self.table[1]["deep"], "n": torch.zeros(1).long()}

    model = Odd()
    assert trace(model, torch.zeros(3, 4)).forward == 96
    assert model.calls == 0
    assert trace(torch.compile(model), torch.zeros(3, 4)).forward == 96


def test_loss_and_keyword_inputs() -> None:
    model = Calls(lambda w, x, scale: F.linear(x, w) * scale, 2, 4)
    report = trace(model, torch.zeros(3, 4), scale=torch.ones(1), loss=lambda y: y[:1].sum())
    assert (report.forward, report.backward) == (48, 48)


def test_what_cannot_run_on_meta_is_named() -> None:
    with pytest.raises(InputError, match="meta device"):
        trace(Calls(lambda w, x: x[: int(w.sum())], 2), torch.zeros(3))
    with pytest.raises(InputError, match="differentiated"):
        trace(Calls(lambda w, x: x.argmax(), 2), torch.zeros(3))
    with pytest.raises(InputError, match="convention"):
        trace(nn.Linear(2, 2), torch.zeros(2), convention="6ND:total")


def test_all_convention_of_a_model() -> None:
    """By the table: a bias addition an output, GELU 8 and 16, the bias's gradient one addition a row and
    column.
    """
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))
    report = trace(model, torch.zeros(4, 8), convention="all")
    products = 2 * 4 * (8 * 16 + 16 * 3)
    assert report.forward == products + 4 * 16 + 8 * 4 * 16 + 4 * 3
    assert report.backward == 2 * products - 2 * 4 * 8 * 16 + 4 * 16 + 16 * 4 * 16 + 4 * 3
    for look_up in (
        lambda w, x: w[x],
        F.embedding,
        lambda w, x: w.new_zeros(9, 3).index_put((x,), w[:4], accumulate=True),
    ):
        swapped = Calls(lambda w, x, f=look_up: f(x, w) if f is F.embedding else f(w, x), 5, 3)
        assert trace(swapped, torch.zeros(4).long(), convention="all").train == 4 * 3  # each number is added once
    with pytest.raises(InputError, match="native_group_norm"):
        trace(nn.GroupNorm(2, 8), torch.zeros(1, 8, 4), convention="all")
