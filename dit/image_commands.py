"""What is done with trained models on the command line: sample, evaluate, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ditscale.dit.config import DiTConfig

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
RunPath = Annotated[Path, typer.Argument(help="A run's folder, or its weights.safetensors.")]


def sample(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="The PNG to write; a video's frames stand side by side.")],
    caption: Annotated[list[str] | None, typer.Option(help="A caption; give it again for more images.")] = None,
    label: Annotated[list[int] | None, typer.Option(help="A class; give it again for more images.")] = None,
    count: Annotated[int, typer.Option(help="Images, where no caption or label says how many.")] = 16,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 25,
    sampler: Annotated[str, typer.Option(help="euler, heun, ddim or ddpm.")] = "heun",
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 means none.")] = 2.0,
    guidance_from: Annotated[float, typer.Option(help="Least share of noise at which to guide.")] = 0.0,
    guidance_to: Annotated[float, typer.Option(help="Greatest share of noise at which to guide.")] = 1.0,
    guided_channels: Annotated[int | None, typer.Option(help="Guide these first channels only. Default: all.")] = None,
    clip: Annotated[
        float | None,
        typer.Option(help="Clamp the clean image to +-this at every step. Default: 1 for DDPM on pixels, else none."),
    ] = None,
    shift: Annotated[float, typer.Option(help="Above 1: more steps at high noise.")] = 1.0,
    eta: Annotated[float, typer.Option(help="Noise of ddim, 0 to 1.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    vae: Annotated[Path | None, typer.Option(help="A diffusers AutoencoderKL's folder, for models of latents.")] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="A CLIP or T5 folder, for models that read its features.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw images from a trained model."""
    import torch

    from ditscale.dit.pictures import save_grid
    from ditscale.dit.sampling import draw_samples
    from ditscale.dit.weights import load_weights
    from ditscale.errors import InputError

    model, objective = load_weights(weights_path(run))
    config = model.config
    given = {"caption": caption, "class": label}.get(config.condition)
    if (caption and config.condition != "caption") or (label and config.condition != "class"):
        raise InputError(f"--caption, --label: expected what the model takes ({config.condition}), got the other")
    if config.condition != "none" and not given:
        raise InputError(
            f"--{'caption' if config.condition == 'caption' else 'label'}: expected at least one, got none"
        )
    if not given and count < 1:
        raise InputError(f"--count: expected at least 1, got {count}")
    if config.latent_factor > 1 and vae is None:
        raise InputError("--vae: expected the autoencoder of a model of latents, got none")
    y = condition_tensor(config, given, text_encoder)
    number = count if not given else len(given)
    noise = torch.randn(number, *config.input_shape, generator=torch.Generator().manual_seed(seed))
    images = draw_samples(
        model,
        noise,
        y,
        objective=objective,
        steps=steps,
        sampler=sampler,
        guidance=guidance if y is not None else 1.0,
        guidance_interval=(guidance_from, guidance_to),
        guided_channels=guided_channels,
        clip=1.0 if clip is None and objective.name == "ddpm" and config.latent_factor == 1 else clip,
        shift=shift,
        eta=eta,
        seed=seed,
    )
    if vae is not None:
        from ditscale.dit.encoding import Autoencoder

        images = Autoencoder.load(vae).decode(images)
    save_grid(out, images)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "images": number, "steps": steps, "sampler": sampler, "seed": seed}))
    else:
        typer.echo(f"{number} {'videos' if config.is_video else 'images'} in {out}")


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    images: Annotated[int | None, typer.Option(help="Validation images. Default: as the run did.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of images and noise. Default: as the run did.")] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a finished run's averaged weights on the fixed validation set."""
    import math

    from ditscale.dit.checkpoint import read_json
    from ditscale.dit.training import TrainConfig, validation_set
    from ditscale.dit.weights import load_weights

    plan = TrainConfig.from_dict(read_json(run / "config.json"))
    changes = {"evaluation_images": images, "evaluation_seed": seed}
    plan = TrainConfig.from_dict(plan.to_dict() | {k: v for k, v in changes.items() if v is not None})
    validation = validation_set(plan)
    model, objective = load_weights(weights_path(run))
    by_time = validation.loss(model, objective)
    loss = math.fsum(by_time) / len(by_time)
    if as_json:
        content = {"loss": loss, "loss_kind": objective.loss_kind, "images": plan.evaluation_images}
        typer.echo(json.dumps(content | {"timesteps": validation.times.tolist(), "loss_by_timestep": by_time}))
    else:
        typer.echo(f"{objective.loss_kind} {loss:.5f} on {plan.evaluation_images} images at {len(by_time)} times")


def export(
    run: Annotated[
        Path, typer.Argument(help="A run's folder, a weights file, or with --layout another project's checkpoint.")
    ],
    out: Annotated[Path, typer.Option(help="The safetensors file to write; for diffusers the folder.")],
    form: Annotated[
        str,
        typer.Option(
            "--format", help="ditscale; dit, the released DiT's and SiT's names; or diffusers, DiTTransformer2DModel."
        ),
    ] = "ditscale",
    layout: Annotated[
        str | None, typer.Option(help="What is read, where it is not ditscale's own: dit, sit or diffusers.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, where a checkpoint does not tell.")] = None,
    classes: Annotated[int | None, typer.Option(help="Classes, where the checkpoint has no row for no label.")] = None,
    as_json: Json = False,
) -> None:
    """Write a model's averaged weights in another layout, or read one: safetensors, never a pickle."""
    from ditscale.dit.foreign import LAYOUTS, load_foreign, save_diffusers, save_released
    from ditscale.dit.weights import load_weights, save_weights
    from ditscale.errors import InputError

    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"--layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout is None:
        model, objective = load_weights(weights_path(run))
    else:
        model, objective = load_foreign(run, layout, heads=heads, num_classes=classes)
    if form == "ditscale":
        save_weights(out, dict(model.named_parameters()), model.config, objective)
    elif form == "dit":
        save_released(out, model)
    elif form == "diffusers":
        save_diffusers(out, model)
    else:
        raise InputError(f"--format: expected ditscale, dit or diffusers, got {form!r}")
    tensors = len(model.state_dict())
    if as_json:
        typer.echo(json.dumps({"out": str(out), "format": form, "tensors": tensors, "objective": objective.to_dict()}))
    else:
        typer.echo(f"{tensors} tensors in {out}, format {form}, objective {objective.name}")


def weights_path(run: Path) -> Path:
    """The weights of a run's folder, or the path itself where it names a file."""
    return run / "weights.safetensors" if run.is_dir() else run


def condition_tensor(config: DiTConfig, given: list[Any] | None, text_encoder: Path | None = None) -> Any:
    """Captions or labels as the model takes them; None for a model without condition."""
    import torch

    from ditscale.errors import InputError

    if config.condition == "none" or given is None:
        return None
    if config.condition == "class":
        bad = [label for label in given if not 0 <= label < config.num_classes]
        if bad:
            raise InputError(f"--label: expected 0 to {config.num_classes - 1}, got {bad[0]}")
        return torch.tensor(given)
    if not config.vocabulary_size:
        from ditscale.dit.encoding import TextEncoder

        if text_encoder is None:
            raise InputError("--text-encoder: expected the encoder whose features the model reads, got none")
        return TextEncoder.load(text_encoder).condition(given, config)
    from ditscale.dit.data import clip_vocabulary, emoji_vocabulary
    from ditscale.dit.data.scenes import CAPTION_LENGTH

    vocabulary = clip_vocabulary() if config.is_video else emoji_vocabulary()
    if len(vocabulary) != config.vocabulary_size:
        message = (
            f"expected the embedded vocabulary of {len(vocabulary)} words, got a model of {config.vocabulary_size}"
        )
        raise InputError(f"--caption: {message}")
    length = CAPTION_LENGTH if config.context == "pooled" else config.caption_tokens
    return torch.from_numpy(vocabulary.encode(given, length))
