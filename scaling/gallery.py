"""What the models of a study draw: the same prompts and the same noise for each size, so that only the size differs."""

from __future__ import annotations

from ditscale.dit.files import write_json
from ditscale.scaling.study import PlannedRun, Study

_PICTURES = 8


def draw_gallery(study: Study, target: PlannedRun) -> None:
    """Write samples.png and samples.json into the folders of the largest budget's runs and of the predicted run.

    Prompts are captions of the validation split, whose base images no model has seen. Models of latents are drawn where
    the study's ``execution.vae`` names the autoencoder that decodes them, and left out without.
    """
    import torch

    from ditscale.dit.pictures import save_grid
    from ditscale.dit.rundata import RunData
    from ditscale.dit.sampling import default_clip, draw_samples
    from ditscale.dit.training import TrainConfig, batch_tensors, open_stream, picture_settings
    from ditscale.dit.weights import load_weights

    largest = max(study.config.budgets)
    for run in [*(run for run in study.grid if run.budget == largest), target]:
        folder = study.run_folder(run.run_id)
        path = folder / "samples.png"
        weights = folder / "weights.safetensors"
        plan = TrainConfig.from_dict(run.training)
        vae = study.config.execution.get("vae")
        if path.exists() or not weights.exists() or (plan.model.latent_factor > 1 and vae is None):
            continue
        trained = RunData.read(folder)
        stream = open_stream(plan, "validation", trained)
        prompts = stream.batch(0, _PICTURES)
        _, y = batch_tensors(prompts, plan.model, None if trained is None else trained.vocabulary)
        generator = torch.Generator().manual_seed(study.config.seed)
        noise = torch.randn(_PICTURES, *plan.model.input_shape, generator=generator)
        steps, guidance = picture_settings(plan)
        model, objective = load_weights(weights)
        data = trained or RunData.of(stream)
        clip = default_clip(objective, plan.model, data)
        images = draw_samples(model, noise, y, objective=objective, steps=steps, guidance=guidance, clip=clip)
        images = data.unscaled(images)
        if vae is not None and plan.model.latent_factor > 1:
            from ditscale.dit.encoding import Autoencoder

            autoencoder = Autoencoder.load(vae)
            autoencoder.check_model(plan.model)
            images = autoencoder.decode(images)
        settings = {"sampler": "heun", "steps": steps, "guidance": guidance, "captions": list(prompts.captions)}
        write_json(folder / "samples.json", settings)
        save_grid(path, images, columns=_PICTURES)
