"""Train the embedded feature network and write it into the package: a quarter of an hour on one core.

Run: python tools/train_scene_network.py [--images N] [--out FILE]
     python tools/train_scene_network.py --measure [--out FILE]       what a written network can do, and no training
Not part of the package: the file that it writes is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F

from ditscale.dit.data import EmojiScenes, emoji_vocabulary, to_float
from ditscale.dit.evaluation.captions import CANDIDATES, matched
from ditscale.dit.evaluation.scene_network import NAME, SIZE, SceneNetwork, read_network, word_targets

BATCH = 128
# Words in fewer captions than this are left out: nobody could learn them from a few looks.
LEAST_SHARE = 1 / 1000
# Of scenes that training, whose stream has seed 1000, never showed.
TEST_SEEDS, TEST_SCENES = (1001, 1002), 4000


def batch(stream: EmojiScenes, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [-1, 1] and tokens; half of the images went down to 16 pixels and up again, as small models' would."""
    scenes = stream.batch(start, count)
    images = torch.from_numpy(to_float(scenes.images))
    half = images[::2]
    small = F.interpolate(half, (16, 16), mode="area")
    images[::2] = F.interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=False)
    images[1::2] = images[1::2] + 0.05 * torch.randn(images[1::2].shape)
    return images, torch.from_numpy(scenes.tokens)


@torch.no_grad()
def measured(network: SceneNetwork) -> dict[str, Any]:
    """Nats a caption on fresh scenes, and the share of them whose caption is found among 32: for fresh scenes of the emoji
    that training showed, and for those of emoji that it held out, with each of two seeds."""
    network, words = network.eval(), network.words
    found: dict[str, Any] = {"candidates": CANDIDATES}
    for split in ("train", "validation"):
        shares = []
        for seed in TEST_SEEDS:
            scenes = EmojiScenes(split, SIZE, seed=seed).batch(0, TEST_SCENES)
            images, tokens = torch.from_numpy(scenes.images), torch.from_numpy(scenes.tokens)
            shares.append(round(matched(images, tokens, CANDIDATES, 0, network), 4))
            if (split, seed) == ("train", TEST_SEEDS[0]):
                pixels = torch.from_numpy(to_float(scenes.images)).split(500)
                odds = torch.cat([network.log_odds(network(part)) for part in pixels])
                targets = word_targets(tokens, words).float()
                test = F.binary_cross_entropy_with_logits(odds, targets, reduction="none").sum(1).mean()
                rates = network.base_rates.expand_as(targets)
                blind = F.binary_cross_entropy(rates, targets, reduction="none").sum(1).mean()
                found |= {"nats_a_caption": round(float(test), 3), "nats_by_base_rates": round(float(blind), 3)}
        found[f"caption_match_{split}"] = shares
    return found


def main() -> None:
    """Train, test on scenes that were not seen, and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=300_000)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "dit/evaluation/assets/scene_network.safetensors"
    )
    parser.add_argument("--measure", action="store_true", help="measure the file --out and train nothing")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(read_network(options.out.read_bytes()))))
        return
    torch.manual_seed(0)
    stream = EmojiScenes("train", SIZE, seed=1000)
    tokens = torch.cat([torch.from_numpy(stream.batch(i * 1000, 1000).tokens) for i in range(40)])
    every = torch.arange(2, len(emoji_vocabulary()))
    rates = word_targets(tokens, every).float().mean(0)
    words = every[rates >= LEAST_SHARE]
    network = SceneNetwork(words, rates[rates >= LEAST_SHARE])
    with torch.no_grad():
        network.head.bias.copy_(torch.logit(network.base_rates, 1e-6))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-4)
    steps, began = options.images // BATCH, time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 200, 2 * (1 - step / steps))
        images, tokens = batch(stream, step * BATCH, BATCH)
        loss = (
            F.binary_cross_entropy_with_logits(
                network.log_odds(network(images)), word_targets(tokens, words).float(), reduction="none"
            )
            .sum(1)
            .mean()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            print(
                f"step {step} of {steps}, loss {float(loss.detach()):.3f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    card = {
        "name": NAME, "trained_on": stream.name, "data_sha256": stream.sha256, "images": steps * BATCH,
        "words": len(words), **measured(network), "torch": torch.__version__,
        "command": "python tools/train_scene_network.py",
    }  # fmt: skip
    tensors = {
        name: t.half() if t.is_floating_point() and name != "base_rates" else t
        for name, t in network.state_dict().items()
    }
    tensors["words"] = tensors["words"].to(torch.int16)
    options.out.write_bytes(safetensors.torch.save(tensors, metadata={"ditscale": json.dumps(card)}))
    print(json.dumps(card), options.out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
