"""Checkpoints of other projects: names and shapes, numbers, and that nothing but tensors is ever read."""

from __future__ import annotations

import argparse
import json
import os
import warnings

import pytest
import safetensors.torch
import torch
from model_variants import config_of, inputs_of, randomised
from restated_dit import Restated

from ditscale.dit import DDPM, DiTConfig, draw_samples
from ditscale.dit.flow import RectifiedFlow
from ditscale.dit.foreign import infer_config, load_foreign, read_tensors, save_diffusers, save_released
from ditscale.dit.image_commands import export
from ditscale.dit.weights import load_weights
from ditscale.errors import InputError


def released_shapes(width=1152, depth=28, tokens=256, patch=2, channels=4, classes=1000):
    """The tensors of facebookresearch/DiT, written down from that repository."""
    both = {"weight": lambda o, i: (o, i), "bias": lambda o, i: (o,)}
    shapes = {"pos_embed": (1, tokens, width), "y_embedder.embedding_table.weight": (classes + 1, width)}
    shapes |= {"x_embedder.proj.weight": (width, channels, patch, patch), "x_embedder.proj.bias": (width,)}
    linears = {
        "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (2 * channels * patch**2, width), "final_layer.adaLN_modulation.1": (2 * width, width),
    }  # fmt: skip
    for i in range(depth):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width), f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }  # fmt: skip
    return shapes | {f"{name}.{kind}": f(*shape) for name, shape in linears.items() for kind, f in both.items()}


def light(shapes):
    """Tensors of those shapes over one number each: files of a few kilobytes."""
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("tokens", "preset"), [(256, {}), (1024, {"image_size": 512})])
@pytest.mark.parametrize("trained", [False, True])
def test_a_file_of_the_released_names_and_shapes_is_dit_xl_2(tmp_path, tokens, preset, trained):
    shapes = released_shapes(tokens=tokens)
    assert len(shapes) == 292
    content = light(shapes)
    if trained:  # what its training script writes
        args = argparse.Namespace(model="DiT-XL/2", global_batch_size=256)
        other = {name: tensor + 1 for name, tensor in light({"pos_embed": (1,)}).items()}
        content = {"model": other, "ema": content, "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "args": args}
    torch.save(content, tmp_path / "DiT.pt")
    assert (tmp_path / "DiT.pt").stat().st_size < 300_000
    tensors = read_tensors(tmp_path / "DiT.pt")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes
    assert infer_config(tensors) == DiTConfig.preset("DiT-XL/2", **preset)


@pytest.mark.slow
def test_a_whole_dit_xl_2_is_loaded_and_run(tmp_path):
    """2.7 GB: the released file's size."""
    generator = torch.Generator().manual_seed(0)
    torch.save(
        {n: 0.02 * torch.randn(s, generator=generator) for n, s in released_shapes().items()}, tmp_path / "DiT.pt"
    )
    model, objective = load_foreign(tmp_path / "DiT.pt", "dit")
    assert sum(p.numel() for p in model.parameters()) == 674_834_720 and objective == DDPM()
    with torch.no_grad():
        out = model(torch.randn(1, 4, 32, 32), torch.tensor([500.0]), torch.tensor([207]))
    assert out.shape == (1, 8, 32, 32) and bool(out.isfinite().all()) and bool(out.any())


SMALL = {"width": 24, "depth": 2, "tokens": 16, "classes": 5}


def small_tensors(**changes):
    generator = torch.Generator().manual_seed(3)
    shapes = released_shapes(**{**SMALL, **changes})
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in sorted(shapes.items())}


def restated_with_positions(tensors, config, x, t, y):
    """The restatement with the file's positions, which need not be sines and cosines."""
    return Restated(tensors, config.replace(positions="learned"))(x, t, y)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_loaded_dit_computes_what_the_released_code_does(tmp_path, ending):
    tensors, path = small_tensors(), tmp_path / f"small{ending}"
    torch.save(tensors, path) if ending == ".pt" else safetensors.torch.save_file(tensors, path)
    model, objective = load_foreign(path, "dit", heads=3)
    assert objective == DDPM() and model.config.image_size == 64 and model.config.learn_sigma
    x, t, y = inputs_of(model.config)
    exact = restated_with_positions(tensors, model.config, x, t, y)
    # Float32 knows the angle of a time of 999 to 6e-5, and 256 waves of it are summed.
    assert (model(x, t, y).double() - exact).abs().max() < 5e-5 * exact.abs().max()


def test_guided_noise_is_the_released_forward_with_cfg(tmp_path):
    torch.save(small_tensors(), tmp_path / "small.pt")
    model, objective = load_foreign(tmp_path / "small.pt", "dit", heads=3)
    x, _, y = inputs_of(model.config)
    asked = []
    one_step = draw_samples(
        model, x, y, objective=objective, steps=1, sampler="ddim", guidance=4.0, guided_channels=3,
        progress=lambda *_: asked.append(1),
    )  # fmt: skip
    t, null = torch.full((3,), 999.0), torch.full((3,), 5)
    # z = sigma x, which the path turns into sqrt(1 - abar) x before the network sees it.
    sigma = objective.chain.sigma[-1]
    seen = (sigma / (1 + sigma**2).sqrt()).float() * x
    conditional, unconditional = model(seen, t, y), model(seen, t, null)
    eps = torch.cat([unconditional[:, :3] + 4 * (conditional - unconditional)[:, :3], conditional[:, 3:4]], 1)
    assert torch.allclose(one_step, (sigma * (x - eps)).float(), rtol=1e-3, atol=1e-2) and asked == [1]


def test_a_loaded_sit_is_spoken_to_in_its_own_way(tmp_path):
    tensors = small_tensors()
    torch.save({"ema": tensors, "model": {}}, tmp_path / "sit.pt")
    model, objective = load_foreign(tmp_path / "sit.pt", "sit", heads=3)
    assert objective == RectifiedFlow(network="sit")
    x, _, y = inputs_of(model.config)
    t = torch.tensor([0.1, 0.5, 0.9])
    # SiT counts its time from noise to data, in whole units, and says data minus noise in the first half of its channels.
    theirs = restated_with_positions(tensors, model.config, x, 1 - t, y)[:, :4]
    ours = objective.velocity(model, x, t, y).double()
    assert (ours + theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_a_model_without_a_no_label_row_gets_one(tmp_path):
    tensors = small_tensors()
    torch.save(tensors, tmp_path / "all.pt")
    model, _ = load_foreign(tmp_path / "all.pt", "dit", heads=3, num_classes=6)
    table = model.y_embedder.embedding_table.weight
    assert torch.equal(table[:6], tensors["y_embedder.embedding_table.weight"]) and not table[6].any()


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_stranger_s_pickle_is_run(tmp_path):
    torch.save({"model": Evil(tmp_path / "harm")}, tmp_path / "evil.pt")
    with pytest.raises(
        InputError, match="evil.pt: expected a file of tensors and plain values, got an object of (posix|nt).system"
    ):
        load_foreign(tmp_path / "evil.pt", "dit")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", b"a,b\n1,2\n", b"[model]\nwidth = 3\n", {"epoch": 3}, {"model": {"w": "text"}}],
    ids=str,
)
def test_files_that_hold_something_else_are_named(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "x.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match="x.pt: expected"):
        read_tensors(tmp_path / "x.pt")
    with pytest.raises(InputError, match="nowhere.safetensors"):
        read_tensors(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("blocks.1.attn.qkv.bias"), r"blocks.1.attn.qkv.bias: expected \[72\], got none"),
        (lambda t: t.update(extra=torch.zeros(2)), r"extra: expected no such tensor, got \[2\]"),
        (
            lambda t: t.update({"t_embedder.mlp.2.bias": torch.zeros(3)}),
            r"t_embedder.mlp.2.bias: expected \[24\], got \[3\]",
        ),
        (lambda t: t.pop("pos_embed"), "expected the tensors of a released DiT"),
        (lambda t: t.update(pos_embed=torch.zeros(5)), "another shape of pos_embed"),
        (lambda t: t.update({"t_embedder.mlp.0.weight": torch.zeros(4)}), "another shape of t_embedder.mlp.0.weight"),
        (lambda t: t.update({"y_embedder.embedding_table.weight": torch.tensor(1.0)}), "another shape of y_embedder"),
        (lambda t: t.update({"blocks.0.attn.proj.weight": torch.eye(24).to_sparse()}), "proj.weight: expected a dense"),
        (lambda t: t.update({"blocks.99999999.x": torch.zeros(1)}), r"blocks.2.+: expected \[144\], got none"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, named):
    tensors = small_tensors()
    change(tensors)
    torch.save(tensors, tmp_path / "small.pt")
    with pytest.raises(InputError, match=named):
        load_foreign(tmp_path / "small.pt", "dit", heads=3)


def test_heads_must_be_known(tmp_path):
    torch.save(small_tensors(), tmp_path / "small.pt")
    with pytest.raises(InputError, match="heads: expected the number"):
        load_foreign(tmp_path / "small.pt", "dit")


def class_model(**changes):
    return randomised(config_of("adaln-zero", frequency_width=256, in_channels=4, caption_width=64, **changes))


@pytest.mark.parametrize("name", ["x.safetensors", "x.dit"])  # the command line writes to any name
def test_what_is_written_under_the_released_names_is_read_back(tmp_path, name):
    model = class_model()
    save_released(tmp_path / name, model, RectifiedFlow(shift=2.0))
    back, objective = load_foreign(tmp_path / name, "dit", heads=3, latent_factor=1)
    assert objective == RectifiedFlow(shift=2.0)
    assert back.config == model.config
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["adaln", "adaln-zero, words", "grouped queries", "mixture", "video"])
def test_variants_that_the_released_layout_cannot_hold_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="for the released DiT's layout"):
        save_released(tmp_path / "x.safetensors", randomised(config_of(name)))


@pytest.fixture(scope="module")
def diffusers_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        diffusers = pytest.importorskip("diffusers")
        return diffusers.DiTTransformer2DModel


def their_output(model, x, t, y, *, frequencies_of_the_release):
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0 if frequencies_of_the_release else 1
    with torch.no_grad():
        return model.eval()(x, t, y).sample


def test_diffusers_reads_an_export_and_computes_the_same(tmp_path, diffusers_model):
    model = class_model().eval()
    save_diffusers(tmp_path / "out", model)
    theirs = diffusers_model.from_pretrained(tmp_path / "out")
    x, t, y = inputs_of(model.config)
    with torch.no_grad():
        ours = model(x, t, y)
    same = their_output(theirs, x, t, y, frequencies_of_the_release=True)
    assert (same - ours).abs().max() < 2e-6 * ours.abs().max()
    # Diffusers' own frequencies are others; at time 0 that makes no difference.
    other = their_output(theirs, x, t, y, frequencies_of_the_release=False)
    assert (other - ours).abs().max() > 1e-3 * ours.abs().max()
    with torch.no_grad():
        at_zero = model(x, 0 * t, y)
    same = their_output(theirs, x, 0 * t, y, frequencies_of_the_release=False)
    assert (same - at_zero).abs().max() < 2e-6 * at_zero.abs().max()


def test_an_export_comes_back_to_the_bit(tmp_path):
    model = class_model()
    save_diffusers(tmp_path / "out", model)
    for path in (tmp_path / "out", tmp_path / "out/diffusion_pytorch_model.safetensors"):
        back, objective = load_foreign(path, "diffusers", latent_factor=1)
        assert back.config == model.config and objective == DDPM()
        assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_diffusers_wrote_is_loaded(tmp_path, diffusers_model):
    torch.manual_seed(1)
    theirs = diffusers_model(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=7, norm_eps=1e-6,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(InputError, match="expected the values of the other blocks"):
        load_foreign(tmp_path / "theirs", "diffusers")
    for block in theirs.transformer_blocks:  # as in every model that was trained as a DiT
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    model, objective = load_foreign(tmp_path / "theirs", "diffusers")
    assert objective == DDPM() and (model.config.heads, model.config.depth, model.config.num_classes) == (2, 3, 7)
    x, t, y = inputs_of(model.config)
    with torch.no_grad():
        ours = model.eval()(x, t, y)
    same = their_output(theirs, x, t, y, frequencies_of_the_release=True)
    assert (same - ours).abs().max() < 2e-6 * ours.abs().max()


@pytest.mark.parametrize("layout", ["dit", "diffusers"])
def test_an_export_knows_its_objective(tmp_path, layout):
    model, flow = class_model(), RectifiedFlow(shift=2.0)
    path = tmp_path / "x.safetensors" if layout == "dit" else tmp_path
    for objective in (flow, None):
        (save_released if layout == "dit" else save_diffusers)(path, model, objective)
        assert load_foreign(path, layout, heads=3, latent_factor=1)[1] == (objective or DDPM())
    assert load_foreign(path, layout, heads=3)[1] == DDPM()
    if layout == "dit":
        assert load_foreign(path, "sit", heads=3)[1] == RectifiedFlow(network="sit")
        safetensors.torch.save_file(model.state_dict(), path, metadata={"ditscale_objective": "[1]"})
        with pytest.raises(InputError, match="ditscale_objective: expected an objective"):
            load_foreign(path, "dit", heads=3)


def test_diffusers_folders_that_hold_another_model_are_refused(tmp_path):
    save_diffusers(tmp_path, class_model())
    values = json.loads((tmp_path / "config.json").read_text())
    for field, value in {
        "_class_name": "PixArtTransformer2DModel",
        "activation_fn": "gelu",
        "norm_eps": 1e-2,
        "norm_type": ["layer_norm"],
        "patch_size": 0,
        "sample_size": None,
        "num_attention_heads": "3",
        "attention_head_dim": 1.5,
    }.items():
        (tmp_path / "config.json").write_text(json.dumps(values | {field: value}))
        with pytest.raises(InputError, match=f"config.json: {field}: expected"):
            load_foreign(tmp_path, "diffusers")
    older = {"_class_name": "Transformer2DModel", "norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(values | older))
    assert load_foreign(tmp_path, "diffusers", latent_factor=1)[0].config == class_model().config
    with pytest.raises(InputError, match="layout"):
        load_foreign(tmp_path, "megatron")
    with pytest.raises(InputError, match="mlp_ratio"):
        save_diffusers(tmp_path, class_model(mlp_hidden=40))


def test_the_command_line_converts_both_ways(tmp_path, capsys):
    def run(source, out, **options):
        export(run=source, out=out, as_json=True, **options)
        return json.loads(capsys.readouterr().out)

    torch.save(small_tensors(), tmp_path / "released.pt")
    said = run(tmp_path / "released.pt", tmp_path / "ours.safetensors", layout="dit", heads=3)
    assert said["objective"]["name"] == "ddpm" and said["tensors"] == len(small_tensors())
    run(tmp_path / "ours.safetensors", tmp_path / "diffusers", form="diffusers")
    run(tmp_path / "diffusers", tmp_path / "again.safetensors", layout="diffusers")
    run(tmp_path / "ours.safetensors", tmp_path / "names.safetensors", form="dit")
    ours, again = load_weights(tmp_path / "ours.safetensors"), load_weights(tmp_path / "again.safetensors")
    assert ours[1] == again[1] == DDPM() and ours[0].config == again[0].config
    assert all(torch.equal(a, b) for a, b in zip(ours[0].parameters(), again[0].parameters(), strict=True))
    assert read_tensors(tmp_path / "names.safetensors").keys() == small_tensors().keys()
    for options, named in (
        ({"form": "onnx"}, "--format"),
        ({"layout": "onnx"}, "--layout"),
        ({"heads": 5}, "--heads: expected none without --layout"),
        ({"classes": 5}, "--classes: expected none without --layout"),
    ):
        with pytest.raises(InputError, match=named):
            export(run=tmp_path / "ours.safetensors", out=tmp_path / "x", **options)


def test_weights_of_another_project_are_said_to_be_such(tmp_path):
    safetensors.torch.save_file(small_tensors(), tmp_path / "small.safetensors")
    with pytest.raises(
        InputError, match="expected weights written by ditscale, got a safetensors file whose header tells no"
    ):
        load_weights(tmp_path / "small.safetensors")
