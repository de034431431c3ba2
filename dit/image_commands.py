"""What is done with trained models on the command line: sample, evaluate, export."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditscale.dit.commands import Json, progress_bar, use_device, use_threads
from ditscale.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ditscale.dit.config import DiTConfig
    from ditscale.dit.encoding import Autoencoder
    from ditscale.dit.evaluation.quality import QualitySettings
    from ditscale.dit.rundata import RunData

_MOST_IMAGES = 65_536  # in one picture

Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")]
Steps = Annotated[int | None, typer.Option(help="Steps of the sampler. Default: 25, or those of a shorter chain.")]
RunPath = Annotated[Path, typer.Argument(help="A run's folder, its weights.safetensors, or what export made of it.")]


def sample(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="The PNG to write; a video's frames stand side by side.")],
    caption: Annotated[list[str] | None, typer.Option(help="A caption; give it again for more images.")] = None,
    label: Annotated[list[int] | None, typer.Option(help="A class; give it again for more images.")] = None,
    count: Annotated[
        int | None, typer.Option(help="Images, where no caption or label says how many. Default: 16.")
    ] = None,
    steps: Steps = None,
    sampler: Annotated[str, typer.Option(help="euler, heun, ddim or ddpm.")] = "heun",
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance; 1 means none. Default: 2, or 1 by a model that never went without its condition "
            "or that is told the guidance."
        ),
    ] = None,
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
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw images from a trained model."""
    import torch

    from ditscale.dit.condition import each
    from ditscale.dit.encoding import Autoencoder
    from ditscale.dit.pictures import save_grid
    from ditscale.dit.rundata import RunData
    from ditscale.dit.sampling import default_clip, default_steps, draw_samples
    from ditscale.dit.weights import load_weights

    where = use_device(device)
    model, objective = load_weights(weights_path(run))
    model, config = model.to(where), model.config
    given, number = _asked(config, caption, label, count)
    guidance = _default_guidance(run, config) if guidance is None else guidance
    if guided_channels is not None and guidance == 1:
        raise InputError("--guided-channels: expected none with --guidance 1, which guides nothing, got some")
    if text_encoder is not None and (config.condition != "caption" or config.vocabulary_size):
        raise InputError("--text-encoder: expected none for a model that reads no encoder's features, got one")
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"--seed: expected a whole number of 64 bits, got {seed}")
    autoencoder = None if vae is None else Autoencoder.load(vae, device=where)
    _check_decoding(config, autoencoder)
    data = RunData.read(run)
    steps = default_steps(objective) if steps is None else steps
    y = each(condition_tensor(config, given, text_encoder, data), lambda tensor: tensor.to(where))
    noise = torch.randn(number, *config.input_shape, generator=torch.Generator().manual_seed(seed))
    guidance = guidance if y is not None else 1.0
    images = draw_samples(
        model,
        noise.to(where),
        y,
        objective=objective,
        steps=steps,
        sampler=sampler,
        guidance=guidance,
        guidance_interval=(guidance_from, guidance_to),
        guided_channels=guided_channels,
        clip=default_clip(objective, config, data) if clip is None else clip,
        shift=shift,
        eta=eta,
        seed=seed,
    )
    save_grid(out, _decode(autoencoder, data, images).cpu())
    if as_json:
        how = {"steps": steps, "sampler": sampler, "guidance": guidance, "seed": seed}
        typer.echo(json.dumps({"out": str(out), "images": number, **how}))
    else:
        typer.echo(f"{number} {'videos' if config.is_video else 'images'} in {out}")


def _asked(
    config: DiTConfig, caption: list[str] | None, label: list[int] | None, count: int | None
) -> tuple[list[Any] | None, int]:
    """The captions or labels to draw, if the model takes any, and how many images."""
    given: list[Any] | None = {"caption": caption, "class": label}.get(config.condition)
    if (caption and config.condition != "caption") or (label and config.condition != "class"):
        raise InputError(f"--caption, --label: expected what the model takes ({config.condition}), got the other")
    if config.condition != "none" and not given:
        raise InputError(
            f"--{'caption' if config.condition == 'caption' else 'label'}: expected at least one, got none"
        )
    if given and count is not None:
        raise InputError(f"--count: expected none beside captions or labels, one image each, got {count}")
    number = len(given) if given else 16 if count is None else count
    if not 1 <= number <= _MOST_IMAGES:
        raise InputError(f"--count: expected 1 to {_MOST_IMAGES:,}, got {number}")
    return given, number


def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    images: Annotated[int | None, typer.Option(help="Validation images. Default: as the run did.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of images and noise. Default: as the run did.")] = None,
    samples: Annotated[
        int, typer.Option(help="Draw so many images and measure them too; the numbers enter the run's record.")
    ] = 0,
    features: Annotated[
        str, typer.Option(help="Whose features are compared: scenes, inception:FILE, clip:FOLDER or dinov2:FOLDER.")
    ] = "scenes",
    reference: Annotated[int, typer.Option(help="Images of the data to compare with.")] = 10_000,
    steps: Steps = None,
    sampler: Annotated[str, typer.Option(help="euler, heun, ddim or ddpm.")] = "heun",
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 means none.")] = 1.0,
    guidance_from: Annotated[float, typer.Option(help="Least share of noise at which to guide.")] = 0.0,
    guidance_to: Annotated[float, typer.Option(help="Greatest share of noise at which to guide.")] = 1.0,
    sample_seed: Annotated[int, typer.Option(help="Of prompts and of the noise of samples.")] = 0,
    vae: Annotated[Path | None, typer.Option(help="A diffusers AutoencoderKL's folder, for models of latents.")] = None,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: OMP_NUM_THREADS, else all cores.")] = None,
    as_json: Json = False,
) -> None:
    """Evaluate finished runs' averaged weights: the loss on the fixed validation set and, with --samples, their images."""
    from ditscale.dit.encoding import Autoencoder
    from ditscale.dit.evaluation.quality import QualitySettings

    use_threads(threads)
    where = use_device(device)
    autoencoder = None if vae is None else Autoencoder.load(vae, device=where)
    settings = None
    if samples:
        settings = QualitySettings(
            samples=samples,
            reference=reference,
            features=features,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            guidance_interval=(guidance_from, guidance_to),
            seed=sample_seed,
        )
    given = {"evaluation_images": images, "evaluation_seed": seed}
    changes = {name: value for name, value in given.items() if value is not None}
    results = []
    for run in runs:
        results.append(_evaluated(run, changes, settings, autoencoder, where, show=not as_json))
        if not as_json:
            typer.echo(_told(results[-1]))
    if as_json:
        typer.echo(json.dumps(results[0] if len(results) == 1 else {"runs": results}))


def _evaluated(
    run: Path,
    changes: dict[str, Any],
    settings: QualitySettings | None,
    autoencoder: Autoencoder | None,
    device: str,
    *,
    show: bool,
) -> dict[str, Any]:
    """What the evaluation of a run gives; what its images are like enters its record too. ``changes``: of its configuration."""
    from ditscale.dit.evaluation.quality import FIELDS, Decoder, measure_quality
    from ditscale.dit.files import read_json, write_json
    from ditscale.dit.rundata import RunData
    from ditscale.dit.training import TrainConfig, check_record, validation_set
    from ditscale.dit.weights import load_weights

    plan = TrainConfig.from_dict(read_json(run / "config.json"))
    plan = TrainConfig.from_dict(plan.to_dict() | changes)
    model, objective = load_weights(weights_path(run))
    model = model.to(device)
    if settings is not None:
        _check_decoding(model.config, autoencoder)
    data = RunData.read(run)
    validation = validation_set(plan, data)
    by_time = validation.loss(model, objective)
    result: dict[str, Any] = {"run": run.name, "loss": math.fsum(by_time) / len(by_time)}
    result |= {"loss_kind": objective.loss_kind, "images": plan.evaluation_images}
    result |= {"timesteps": validation.times.tolist(), "loss_by_timestep": by_time}
    if settings is None:
        return result
    record = check_record(run / "run.json")
    decoder = None
    if autoencoder is not None:
        decode = functools.partial(_decode, autoencoder, data)
        scaling = autoencoder.scale, autoencoder.shift
        decoder = Decoder(autoencoder.name, autoencoder.sha256, decode, scaling)
    with progress_bar(f"samples of {run.name}", show=show) as advance:
        quality = measure_quality(
            model,
            objective,
            plan,
            settings,
            trained=data,
            decoder=decoder,
            device=device,
            progress=lambda n, of: advance(n, of, math.nan),
        )
    kept = {name: value for name, value in record.items() if name not in FIELDS}
    write_json(run / "run.json", {**kept, **quality})
    return result | quality


def _check_decoding(config: DiTConfig, autoencoder: Autoencoder | None) -> None:
    """Raise InputError unless what a model draws can be made into pictures."""
    if autoencoder is not None:
        autoencoder.check_model(config)
    elif config.latent_factor > 1:
        raise InputError("--vae: expected the autoencoder of a model of latents, got none")
    elif config.in_channels != 3:
        raise InputError(f"model.in_channels: expected the 3 of pictures without --vae, got {config.in_channels}")


def _decode(autoencoder: Autoencoder | None, data: RunData | None, images: Tensor) -> Tensor:
    """From what a model draws to pixels, by what its run knows of the scale of latents or of pixels in shards."""
    images = images if data is None else data.unscaled(images)
    return images if autoencoder is None else autoencoder.decode(images)


def _told(result: dict[str, Any]) -> str:
    """An evaluation in a sentence or two."""
    text = f"{result['run']}: {result['loss_kind']} {result['loss']:.5f} on {result['images']} validation images"
    if "frechet_distance" not in result:
        return text
    how = f"{result['sampler']} {result['sampler_steps']} steps, guidance {result['guidance']:g}"
    text += (
        f"\nFréchet distance {result['frechet_distance']:.4g} on {result['feature_network']} features "
        f"({result['real_images']} real images to {result['real_reference_images']} others: "
        f"{result['frechet_distance_real']:.4g}), precision {result['precision']:.3f}, recall {result['recall']:.3f}; "
        f"{result['quality_samples']} samples, {how}"
    )
    if "caption_match" in result:
        text += (
            f"\ncaption found among {result['caption_candidates']} for {result['caption_match']:.1%} of samples "
            f"(real scenes: {result['caption_match_real']:.1%})"
        )
    return text


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
    from ditscale.dit.rundata import RunData
    from ditscale.dit.weights import load_weights, save_weights

    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"--layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    for option, value in (("--heads", heads), ("--classes", classes)):
        if layout is None and value is not None:
            raise InputError(f"{option}: expected none without --layout, as the weights tell it, got {value}")
    if layout is None:
        model, objective = load_weights(weights_path(run))
    else:
        model, objective = load_foreign(run, layout, heads=heads, num_classes=classes)
    if form == "ditscale":
        # Away from the run's folder, the words, classes and scale that the model was trained with go in the file.
        data = RunData.read(run) if layout is None else None
        save_weights(out, dict(model.named_parameters()), model.config, objective, data)
    elif form == "dit":
        save_released(out, model, objective)
    elif form == "diffusers":
        save_diffusers(out, model, objective)
    else:
        raise InputError(f"--format: expected ditscale, dit or diffusers, got {form!r}")
    tensors = len(model.state_dict())
    if as_json:
        typer.echo(json.dumps({"out": str(out), "format": form, "tensors": tensors, "objective": objective.to_dict()}))
    else:
        typer.echo(f"{tensors} tensors in {out}, format {form}, objective {objective.name}")


def _default_guidance(run: Path, config: DiTConfig) -> float:
    """As pictures on the way are guided: not by what a model never learned."""
    from ditscale.dit.files import read_json
    from ditscale.dit.training import TrainConfig, picture_settings

    # An export does not tell how it was trained; a run's folder does.
    trained = weights_path(run).parent / "config.json"
    if weights_path(run).name == "weights.safetensors" and trained.is_file():
        return picture_settings(TrainConfig.from_dict(read_json(trained)))[1]
    return 1.0 if config.condition == "none" or config.guidance_embed else 2.0


def weights_path(run: Path) -> Path:
    """The weights of a run's folder, or the path itself where it names a file."""
    return run / "weights.safetensors" if run.is_dir() else run


def condition_tensor(
    config: DiTConfig, given: list[Any] | None, text_encoder: Path | None = None, data: RunData | None = None
) -> Any:
    """Captions or labels as the model takes them; None for a model without condition. ``data``: of its training."""
    import torch

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

    embedded = clip_vocabulary() if config.is_video else emoji_vocabulary()
    vocabulary = embedded if data is None else data.vocabulary
    if len(vocabulary) != config.vocabulary_size:
        raise InputError(
            f"--caption: expected a run's folder, whose data.json knows the words, or an export of it, or a model of the "
            f"{len(vocabulary)} embedded ones, got a model of {config.vocabulary_size}"
        )
    length = CAPTION_LENGTH if config.context == "pooled" else config.caption_tokens
    return torch.from_numpy(vocabulary.encode(given, length))
