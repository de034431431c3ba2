"""Several processes train one model: the curves of one process, checkpoints for any number of processes, the same bits again.

Real processes over gloo, two and then four; what each launch should show is gathered first, since starting them takes longer
than all their training.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from ditscale.dit import DiTConfig
from ditscale.dit.checkpoint import read_metrics
from ditscale.dit.data import emoji_vocabulary
from ditscale.dit.files import read_json
from ditscale.dit.training import Execution, Stopped, TrainConfig, train
from ditscale.errors import InputError

PROGRAM = Path(__file__).resolve().parents[1] / "ranks_program.py"
STEPS = 8


def config(**changes):
    # Width 20 is no multiple of 8: with four ranks some shards are smaller than others.
    model = DiTConfig(
        image_size=16, latent_factor=1, in_channels=3, patch=4, width=20, depth=2, heads=2, frequency_width=16,
        condition="caption", vocabulary_size=len(emoji_vocabulary()), caption_width=8, learn_sigma=False,
    )  # fmt: skip
    settings = {"model": model, "batch": 8, "images": 8 * STEPS, "evaluation_images": 7, "lr": 1e-2, "clip": 0.15}
    return TrainConfig(**{**settings, **changes})


POWER = {"ema": "power", "ema_snapshots": 2}
# What looks at the averaged weights on the way.
LOOKS = {"validate_every": 3, "sample_every": 4}


def scenario(out, config, stop_after=None, **execution):
    execution = {"checkpoint_seconds": 1e9, **execution}
    return {"config": config.to_dict(), "execution": execution, "out": str(out), "stop_after": stop_after}


def launch(tmp, *launches):
    (tmp / "launches.json").write_text(json.dumps(launches))
    command = [sys.executable, str(PROGRAM), str(tmp / "launches.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "view tensor" not in done.stderr, "a warning of FSDP that is about nothing here"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every run of this file: name -> folder."""
    tmp = tmp_path_factory.mktemp("ranks")
    names = ("one", "ddp", "fsdp", "parts", "pieces", "muon", "muon-one", "to-one", "to-four", "hsdp")
    folders = {name: tmp / name for name in names}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train(config(), folders["one"], execution=Execution(**LOOKS))
    train(config(optimizer="muon", **POWER), folders["muon-one"])
    two = [
        scenario(folders["ddp"], config(), **LOOKS),
        scenario(folders["fsdp"], config(), parallel="fsdp", **LOOKS),
        scenario(folders["pieces"], config(), parallel="fsdp", microbatch=2, recompute="block", **LOOKS),
        scenario(folders["parts"], config(), 3, parallel="fsdp", **LOOKS),
        scenario(folders["parts"], config(), 2, parallel="fsdp", **LOOKS),
        scenario(folders["parts"], config(), parallel="fsdp", **LOOKS),
        scenario(folders["muon"], config(optimizer="muon", **POWER), parallel="fsdp"),
        scenario(folders["to-one"], config(), 4, parallel="fsdp"),
    ]
    four = [
        scenario(folders["to-four"], config(), parallel="fsdp"),
        scenario(folders["hsdp"], config(), parallel="hsdp", shard_ranks=2, **LOOKS),
    ]
    launch(
        tmp,
        {"ranks": 2, "copy": None, "scenarios": two},
        {"ranks": 4, "copy": [str(folders["to-one"]), str(folders["to-four"])], "scenarios": four},
    )
    train(config(), folders["to-one"])
    torch.set_num_threads(before)
    return folders


def weights(folder):
    return safetensors.torch.load_file(folder / "weights.safetensors")


def curve(folder):
    """The loss and the gradient's norm of every step."""
    rows = read_metrics(folder / "metrics.jsonl")
    return torch.tensor([[row["train_loss"], row["gradient_norm"]] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "pieces", "parts", "hsdp", "to-one", "to-four", "muon"])
def test_the_curve_is_that_of_one_process(runs, name):
    one = runs["muon-one" if name == "muon" else "one"]
    assert len(curve(one)) == STEPS and (curve(one)[:, 1] > config().clip).sum() > STEPS / 2  # clipping takes part
    torch.testing.assert_close(curve(runs[name]), curve(one), rtol=1e-5, atol=0)
    mine, theirs = read_json(runs[name] / "run.json"), read_json(one / "run.json")
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for key, value in weights(one).items():
        # Adam divides by the root of small squares: where those are rounding, so is the step.
        torch.testing.assert_close(weights(runs[name])[key], value, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "pieces", "parts", "hsdp"])
def test_what_is_seen_on_the_way_is_what_one_process_sees(runs, name):
    """That looking changes nothing, the curves tell: these are of the averaged weights at their steps."""
    seen, theirs = (
        {row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row}
        for folder in (runs[name], runs["one"])
    )
    assert list(seen) == [3, 6] and seen == pytest.approx(theirs, rel=1e-5)
    for picture in ("step-000000004.png", "step-000000008.png"):
        ours, one = (np.asarray(Image.open(runs[n] / "samples" / picture), dtype=int) for n in (name, "one"))
        assert np.abs(ours - one).max() <= 1


def test_the_record_says_how(runs):
    told = {name: read_json(folder / "run.json") for name, folder in runs.items()}
    assert [told[n]["parallel"] for n in ("one", "ddp", "fsdp", "hsdp")] == ["none", "ddp", "fsdp", "hsdp"]
    assert [told[n]["ranks"] for n in ("one", "ddp", "to-one", "to-four")] == [1, 2, 1, 4]
    assert told["pieces"]["recompute"] == "block" and told["pieces"]["microbatch"] == 2
    assert told["pieces"]["flops"] == told["one"]["flops"] < told["pieces"]["flops_hardware"]
    assert all(r["flops"] == told["one"]["flops"] and r["images"] == 8 * STEPS for r in told.values())


def test_two_processes_resume_to_the_same_bits(runs):
    ours, theirs = weights(runs["parts"]), weights(runs["fsdp"])
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(curve(runs["parts"]), curve(runs["fsdp"]))


def test_averages_kept_by_sharded_ranks_are_whole(runs):
    kept = sorted(path.name for path in (runs["muon"] / "averages").iterdir())
    assert kept == sorted(path.name for path in (runs["muon-one"] / "averages").iterdir()) and len(kept) == 4
    for name in kept:
        ours, theirs = (safetensors.torch.load_file(runs[n] / "averages" / name) for n in ("muon", "muon-one"))
        assert all(torch.allclose(ours[key], theirs[key], rtol=1e-3, atol=2e-4) for key in theirs)


def test_ranks_wait_for_the_first_one_s_work_longer_than_for_each_other(tmp_path):
    """It reads all data once to hash it, which takes as long as it takes."""
    launch(tmp_path, {"ranks": 2, "copy": None, "scenarios": [], "patience": [3, 6]})


def test_shares_must_be_even(tmp_path):
    with pytest.raises(InputError, match="execution.microbatch: expected a divisor of 8"):
        train(config(), tmp_path, execution=Execution(microbatch=3))


def test_passes_over_parts_of_the_batch_are_the_whole_step(runs, tmp_path):
    """In one process too; and a checkpoint that one process wrote is one file, which the record does not keep."""
    seen = []
    with pytest.raises(Stopped):
        train(
            config(), tmp_path, execution=Execution(microbatch=2), should_stop=lambda: seen.append(1) or len(seen) == 3
        )
    assert len(list(tmp_path.glob("checkpoint-*/*"))) == 1
    train(config(), tmp_path, execution=Execution(microbatch=2))
    torch.testing.assert_close(curve(tmp_path), curve(runs["one"]), rtol=1e-5, atol=0)
    assert not list(tmp_path.glob("checkpoint-*"))
