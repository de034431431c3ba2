"""Every variant against a second statement of it, against the ledger, and against what its parts promise."""

from __future__ import annotations

import contextlib
import functools
import random
from typing import Any

import pytest
import torch
from flops_measuring import QuickProducts
from model_variants import TINY, VARIANTS, config_of, inputs_of, randomised
from restated_dit import Restated
from torch.utils.flop_counter import FlopCounterMode

from ditscale.dit import DiT, DiTConfig, embed, joint, layers, moe
from ditscale.dit.flops import condition_tokens, count
from ditscale.dit.routing import kept_tokens
from ditscale.errors import InputError
from ditscale.kernels import dispatch, linear

every_variant = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(params=["pytorch", "onednn", "cpu"])
def products(request, monkeypatch):
    """Who makes the products of linear layers: PyTorch of such small ones; others, as of large ones on some processors."""
    name = request.param
    if name != "pytorch":
        reason = dispatch.unavailable_reason("linear", name, "cpu")
        if reason:
            pytest.skip(reason)
        for module in (embed, joint, layers, moe):
            monkeypatch.setattr(module, "linear", functools.partial(linear, backend=name))
    return name


def test_who_makes_the_products(products):
    config = config_of("joint, then single")
    model, inputs = randomised(config), inputs_of(config)
    with FlopCounterMode(display=False) as counter:
        model(*inputs).sum().backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    own = {"onednn": "ditscale_onednn.product", "cpu": "ditscale.product"}
    made = [name for name, operator in own.items() if counts.get(operator, 0)]
    if counts.get("aten.addmm", 0) + counts.get("aten.mm", 0):
        made.append("pytorch")
    assert made == [products], counts


@every_variant
def test_a_model_from_the_meta_device_is_as_any_other(name):
    config = config_of(name)
    wanted = DiT(config)
    with torch.device("meta"):
        model = DiT(config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(float("nan"))  # what a new piece of memory may hold
    torch.manual_seed(3)
    model.reset_parameters()
    made, expected = (dict(m.named_buffers()) for m in (model, wanted))
    assert made.keys() == expected.keys() and all(torch.equal(made[key], expected[key]) for key in expected)
    fixed = {key for key, p in wanted.named_parameters() if p.detach().unique().numel() == 1}  # zeros and ones
    made, expected = dict(model.named_parameters()), dict(wanted.named_parameters())
    assert all(torch.equal(made[key], expected[key]) for key in fixed)
    torch.manual_seed(3)
    wanted.reset_parameters()
    assert all(torch.equal(made[key], expected[key]) for key in expected)
    assert list(model.state_dict()) == list(wanted.state_dict())


@every_variant
def test_forward_and_gradients_are_the_papers(name, products):
    config = config_of(name)
    model, (x, t, y) = randomised(config), inputs_of(config)
    weights = {key: value.detach().double() for key, value in model.state_dict().items()}
    for key, _ in model.named_parameters():
        weights[key].requires_grad_()
    exact, out = Restated(weights, config, routes_of(config, x, t))(x, t, y), model(x, t, y)
    assert (out.detach().double() - exact.detach()).abs().max() < 2e-6 * exact.detach().abs().max()
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * direction).mean().backward()
    (exact * direction).mean().backward()
    for key, parameter in model.named_parameters():
        truth = torch.zeros_like(weights[key]) if weights[key].grad is None else weights[key].grad
        # Float32 sums over a few hundred terms, and waves of a time of 1,000, which float32 knows to 6e-5.
        assert (parameter.grad.double() - truth).abs().max() < 2e-5 * truth.abs().max() + 1e-9, key


def routes_of(config: DiTConfig, x: torch.Tensor, t: torch.Tensor) -> dict[int, torch.Tensor]:
    """The tokens that each block keeps of each sample; blocks of one share that follow each other keep the same."""
    routes: dict[int, torch.Tensor] = {}
    for i, share in enumerate(config.token_keep):
        if share < 1:
            again = i > 0 and config.token_keep[i - 1] == share
            count = max(1, int(share * config.tokens))
            routes[i] = routes[i - 1] if again else kept_tokens(t, x, config.tokens, count, salt=i)
    return routes


def measured(config: DiTConfig, batch: int, quick: bool = True) -> tuple[int, int, int]:
    """Forward and backward FLOPs by torch's counter on the meta device, and parameters; by torch's own meta kernels unless
    ``quick``.
    """
    with torch.device("meta"):
        model = DiT(config)
    inputs = [to_meta(value) for value in inputs_of(config, batch)]
    shapes = QuickProducts() if quick else contextlib.nullcontext()
    with shapes, FlopCounterMode(display=False) as counter:
        out = model(*inputs)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward, sum(p.numel() for p in model.parameters())


def to_meta(value: Any) -> Any:
    return tuple(map(to_meta, value)) if isinstance(value, tuple) else value if value is None else value.to("meta")


def counted(config: DiTConfig, batch: int) -> tuple[int, int, int]:
    report = count(config, batch=batch)
    return report.forward, report.backward, report.params.total


@every_variant
def test_the_ledger_counts_the_model_that_is_built(name):
    deeper = {} if "token_keep" in VARIANTS[name] else {"depth": 3}
    for changes in ({}, {"mlp_hidden": 7, **deeper}):
        config = config_of(name, **changes)
        assert measured(config, 3) == counted(config, 3)


def test_quick_shapes_change_no_count():
    for name in ("adaln-zero", "joint, then single", "mixture with room", "routed, in context"):
        assert measured(config_of(name), 2) == measured(config_of(name), 2, quick=False)


def drawn(number: int) -> DiTConfig:
    """A random configuration that can be built."""
    pick = random.Random(f"model {number}").choice
    while True:
        experts, heads, width = pick((0, 0, 1, 3)), pick((1, 2, 3)), pick((4, 6, 8))
        context = pick(("pooled", "in-context", "cross-attention", "joint"))
        fields = TINY | {
            "image_size": pick((2, 4, 6)), "image_width": pick((None, 4)), "patch": pick((1, 2)), "heads": heads,
            "width": heads * width, "depth": pick((1, 2, 3)), "kv_heads": pick((None, 1, heads)), "context": context,
            "modulation": pick(("adaln-zero", "adaln", "adaln-single", "none")), "mlp": pick(("gelu", "swiglu")),
            "condition": pick(("class", "caption", "none")), "vocabulary_size": pick((0, 11)), "caption_tokens": 4,
            "caption_layers": pick((1, 2)), "learn_sigma": pick((True, False)), "norm": pick(("layer", "rms")),
            "single_depth": pick((0, 1, 2)) if context == "joint" else 0, "pooled_width": pick((0, 5)),
            "guidance_embed": pick((True, False)), "qk_norm": pick(("none", "head", "width")),
            "positions": pick(("sincos", "learned", "none")), "rope": pick((True, False)),
            "cross_norm": pick((True, False)), "frames": pick((1, 2, 4)), "patch_frames": pick((1, 2)),
            "attention": pick(("full", "space-time", "alternating")), "experts": experts,
        }  # fmt: skip
        if experts:
            fields |= {
                "experts_per_token": pick((1, 2, 3)), "expert_capacity": pick((None, 0.5, 1.5)),
                "shared_experts": pick((0, 1)), "moe_every": pick((1, 2)),
            }  # fmt: skip
        fields["token_keep"] = pick(((), (), [pick((0.2, 0.5, 1.0)) for _ in range(fields["depth"])]))
        try:
            config = DiTConfig(**fields)
            config.need_trainable()
        except InputError:  # fields that do not go together
            continue
        return config


@pytest.mark.parametrize("start", range(0, 30, 10))
def test_the_ledger_counts_random_models(start):
    for number in range(start, start + 10):
        config = drawn(number)
        assert measured(config, 2) == counted(config, 2), config


@every_variant
def test_a_new_model_predicts_zero_and_learns(name):
    config = config_of(name)
    torch.manual_seed(0)
    model, (x, t, y) = DiT(config), inputs_of(config)
    assert not model(x, t, y).any()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (model(x, t, y) - x.repeat(1, 1 + config.learn_sigma, *[1] * (x.ndim - 2))).square().mean().backward()
        optimizer.step()
    # By then every weight has been reached, through everything that starts at zero: but for experts that nobody chose,
    # queries of a caption that nobody reads, and queries that have one key to look at.
    idle = ["experts", "blocks.1.context.attn.q_norm"]
    if config.context == "cross-attention" and condition_tokens(config) + (config.modulation == "none") == 1:
        idle += ["cross_attn.q", "cross_norm"]
    reached = [p.grad.any() for key, p in model.named_parameters() if not any(part in key for part in idle)]
    assert all(reached)


@every_variant
def test_the_batch_changes_no_sample(name):
    config = config_of(name)
    if config.expert_capacity is not None:
        pytest.skip("samples share the experts' room")
    model, (x, t, y) = randomised(config).eval(), inputs_of(config)
    together = model(x, t, y)
    for i in range(3):
        one = tuple(part[i : i + 1] for part in y) if isinstance(y, tuple) else None if y is None else y[i : i + 1]
        assert torch.allclose(model(x[i : i + 1], t[i : i + 1], one), together[i : i + 1], atol=1e-5)


@pytest.mark.parametrize("name", [n for n in VARIANTS if config_of(n).condition != "none"])
def test_a_dropped_condition_is_that_of_nobody(name):
    config = config_of(name)
    model, (x, t, y) = randomised(config).eval(), inputs_of(config)
    everyone, nobody = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    other = tuple(part.roll(1, 0) for part in y) if isinstance(y, tuple) else y.roll(1, 0)
    assert torch.equal(model(x, t, y, drop=everyone), model(x, t, other, drop=everyone))
    assert torch.equal(model(x, t, y, drop=nobody), model(x, t, y))
    mixed = model(x, t, y, drop=torch.tensor([True, False, False]))
    assert torch.allclose(mixed[1:], model(x, t, y)[1:], atol=1e-5) or config.expert_capacity is not None
    assert not torch.allclose(mixed[0], model(x, t, y)[0], atol=1e-6)


def test_guidance_is_told_where_the_model_was_distilled():
    config = config_of("joint, then single")
    model, (x, t, y) = randomised(config).eval(), inputs_of(config)
    guidance = torch.tensor([1.0, 2.5, 4.0])
    exact = Restated(model.state_dict(), config)(x, t, y, guidance)
    out = model(x, t, y, guidance=guidance)
    assert (out.double() - exact).abs().max() < 2e-6 * exact.abs().max()
    assert torch.equal(model(x, t, y), model(x, t, y, guidance=torch.ones(3)))
    assert not torch.allclose(out[1:], model(x, t, y)[1:])


@pytest.mark.parametrize("name", ["adaln-zero", "joint", "mixture", "adaln-single, cross-attention"])
def test_half_precision_is_near(name):
    config = config_of(name, width=48, in_channels=4)
    model, (x, t, y) = randomised(config, scale=0.02).eval(), inputs_of(config)
    full = model(x, t, y)
    half = model.bfloat16()(x.bfloat16(), t, y)
    assert half.dtype is torch.bfloat16
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max()


def test_state_dict_has_the_released_names():
    config = DiTConfig.preset("DiT-XL/2")
    with torch.device("meta"):
        state = DiT(config).state_dict()
    assert len(state) == 292
    assert state["blocks.27.adaLN_modulation.1.weight"].shape == (6912, 1152)
    assert state["x_embedder.proj.weight"].shape == (1152, 4, 2, 2)
    assert state["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert state["pos_embed"].shape == (1, 256, 1152)
    assert state["final_layer.linear.weight"].shape == (32, 1152)


@pytest.mark.parametrize("preset", ["PixArt-alpha-256", "SD3-2B", "Flux-dev", "Wan2.1-1.3B", "Latte-XL/2", "Liang-15"])
def test_published_models_are_built_with_the_ledger_s_parameters(preset):
    config = DiTConfig.preset(preset)
    with torch.device("meta"):
        total = sum(p.numel() for p in DiT(config).parameters())
    assert total == count(config).params.total


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("adaln-zero", lambda x, t, y: (x[:, :2], t, y), "x:"),
        ("adaln-zero", lambda x, t, y: (x, t[:2], y), "t:"),
        ("adaln-zero", lambda x, t, y: (x, t, None), "y:"),
        ("adaln-zero", lambda x, t, y: (x, t, y[:, None]), "y:"),
        ("adaln-zero", lambda x, t, y: (x, t, y.float()), "y: expected whole numbers"),
        ("adaln-zero", lambda x, t, y: (x, t, y.tolist()), "y: expected a tensor"),
        ("adaln-zero", lambda x, t, y: (x, t, y + 3), "y: expected labels from 0 to 5, got 3 to 7"),
        ("adaln-zero, words", lambda x, t, y: (x, t, y - 1), "y: expected words from 0 to 10, got -1 to 6"),
        ("joint, words", lambda x, t, y: (x, t, y + 9), "y: expected words"),
        ("adaln-zero, unconditional", lambda x, t, y: (x, t, torch.tensor([1, 2, 3])), "y: expected None"),
        ("in-context, words", lambda x, t, y: (x, t, y[:, :3]), r"y: expected shape \[3, 4\]"),
        ("in-context with adaln-zero", lambda x, t, y: (x, t, y[..., :5]), r"y: expected shape \[3, 4, 6\]"),
        ("joint", lambda x, t, y: (x, t, y[0]), "y: expected a pair"),
        ("joint", lambda x, t, y: (x, t, (y[0], y[1][:, :6])), r"y\[1\]: expected shape \[3, 7\]"),
        ("video", lambda x, t, y: (x[:, :, 0], t, y), r"x: expected shape \[B, 3, 4, 4, 4\]"),
    ],
)
def test_bad_input_is_named(name, change, named):
    config = config_of(name)
    with pytest.raises(InputError, match=named):
        DiT(config)(*change(*inputs_of(config)))
    x, t, y = inputs_of(config)
    for field in ("drop", "guidance"):
        with pytest.raises(InputError, match=rf"{field}: expected shape \[3\], got \[1\]"):
            DiT(config)(x, t, y, **{field: torch.ones(1, dtype=torch.bool)})


@pytest.mark.parametrize("name", ["adaln-zero", "joint, words"])
def test_what_is_only_counted_is_refused(name):
    config = config_of(name, pooled_width=3)
    assert count(config).train > 0
    with pytest.raises(InputError, match="pooled_width"):
        DiT(config)


def test_kept_tokens_are_even_and_each_sample_s_own():
    t = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 1000
    x = torch.randn(4000, 2, 3, generator=torch.Generator().manual_seed(1))
    kept = kept_tokens(t, x, 16, 5, salt=1)
    assert bool((kept.diff(dim=1) > 0).all()) and int(kept.min()) >= 0 and int(kept.max()) < 16
    shares = torch.bincount(kept.flatten(), minlength=16) / (4000 * 5 / 16)
    assert float((shares - 1).abs().max()) < 0.15
    together = (kept.unsqueeze(-1) == torch.arange(16)).any(1).float()
    pairs = together.T @ together / 4000  # 5 / 16 on the diagonal, 5 * 4 / (16 * 15) beside it
    assert float((pairs - torch.eye(16) * (5 / 16 - 1 / 12) - 1 / 12).abs().max()) < 0.025
    assert torch.equal(kept[7:9], kept_tokens(t[7:9], x[7:9], 16, 5, salt=1))
    assert (kept_tokens(t, x, 16, 5, salt=2) != kept).any(1).float().mean() > 0.95
    near = kept_tokens(torch.tensor([500.0, 500.00003]), x[:1].expand(2, 2, 3), 16, 5, salt=1)
    assert not torch.equal(near[0], near[1])
    # A chain of whole steps gives many samples one time: their tokens are as even, and as much their own.
    kept = kept_tokens(torch.full((4000,), 500.0), x, 16, 5, salt=1)
    shares = torch.bincount(kept.flatten(), minlength=16) / (4000 * 5 / 16)
    assert float((shares - 1).abs().max()) < 0.15 and len(kept.unique(dim=0)) > 2000  # of 4,368


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.startswith("routed")])
def test_all_tokens_work_outside_training(name):
    config = config_of(name)
    model, (x, t, y) = randomised(config), inputs_of(config)
    exact = Restated(model.state_dict(), config)(x, t, y)
    assert (model.eval()(x, t, y).double() - exact).abs().max() < 2e-6 * exact.abs().max()
    assert not torch.allclose(model.train()(x, t, y).double(), exact, atol=1e-3)


@torch.no_grad()
def test_weights_are_drawn_as_documented():
    torch.manual_seed(0)
    wide = {"width": 192, "heads": 4, "depth": 1}
    model = DiT(config_of("adaln-single, cross-attention", **wide))
    assert not model.blocks[0].cross_attn.proj.weight.any() and not model.blocks[0].scale_shift_table.any()
    assert not model.t_block.linear.weight.any() and not model.final_layer.linear.weight.any()
    assert float(model.t_embedder.mlp[0].weight.std()) == pytest.approx(0.02, rel=0.1)
    qkv = model.blocks[0].attn.qkv.weight
    assert float(qkv.abs().max()) == pytest.approx((6 / (192 + 576)) ** 0.5, rel=0.01)  # Xavier-uniform's bound
    mixed = DiT(config_of("mixture", **wide, mup_base_width=48, positions="learned"))
    router, experts = mixed.blocks[0].mlp.router.weight, mixed.blocks[0].mlp.experts
    assert float(router.std()) == pytest.approx(1 / 192, rel=0.1)
    for weight in (experts.fc1_weight, experts.fc2_weight):
        assert float(weight[3].abs().max()) == pytest.approx((6 / (192 + 768)) ** 0.5, rel=0.01)
    assert not experts.fc1_bias.any() and not experts.fc2_bias.any()
    assert float(mixed.pos_embed.std()) == pytest.approx(0.02, rel=0.1)
    # Under muP the time layers follow their width.
    assert float(mixed.t_embedder.mlp[2].weight.abs().max()) == pytest.approx((6 / 384) ** 0.5, rel=0.01)


def test_an_exported_batch_is_free():
    config = config_of("joint", depth=1)
    model = randomised(config).eval()
    given, other = inputs_of(config, 3), inputs_of(config, 5)
    batch = {0: torch.export.Dim("batch")}
    shapes = torch.utils._pytree.tree_map(lambda _: batch, dict(zip("xty", given, strict=True)))
    program = torch.export.export(model, given, dynamic_shapes=shapes, strict=False)
    with torch.no_grad():
        assert torch.allclose(program.module()(*other), model(*other), atol=1e-5)


class Adapted(torch.nn.Module):
    """Shows the weight of the layer that it adds something of low rank to, as adapters do."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.down, self.up = (torch.randn(*shape) * 0.5 for shape in ((2, layer.in_features), (layer.out_features, 2)))

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize(
    "name", ["adaln-zero", "joint, then single", "joint, then single, swiglu", "rms, swiglu, qk-norm, rope"]
)
@torch.no_grad()
def test_an_adapter_counts_on_every_linear_layer(name):
    config = config_of(name, depth=1)
    model, inputs = randomised(config).eval(), inputs_of(config)
    for place in [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]:
        layer, (parent, _, leaf) = model.get_submodule(place), place.rpartition(".")
        adapted = Adapted(layer)
        setattr(model.get_submodule(parent), leaf, adapted)
        got = model(*inputs)
        setattr(model.get_submodule(parent), leaf, layer)
        before = layer.weight.clone()
        layer.weight += adapted.up @ adapted.down
        assert torch.allclose(got, model(*inputs), atol=1e-4), place
        layer.weight.copy_(before)


@pytest.mark.parametrize("name", ["adaln-zero", "joint, then single", "video"])
@torch.no_grad()
def test_what_stands_around_a_layer_is_called(name):
    config, seen = config_of(name, depth=1), set()
    model, inputs = randomised(config).eval(), inputs_of(config)
    want = model(*inputs)
    layers_of = {n: m for n, m in model.named_modules() if hasattr(m, "in_features") or hasattr(m, "in_channels")}
    for number, (place, layer) in enumerate(layers_of.items()):
        see = functools.partial(lambda place, forward, *given: (seen.add(place), forward(*given))[1], place)
        if number % 2:
            layer.register_forward_hook(functools.partial(see, lambda *_: None))
        else:  # as offloading does
            layer.forward = functools.partial(see, layer.forward)
    assert torch.allclose(model(*inputs), want, atol=1e-5)
    assert seen == set(layers_of)
