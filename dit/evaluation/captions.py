"""Whether an emoji scene shows what its caption says, judged by the embedded network's words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditscale.dit.data import ImageStream
from ditscale.dit.evaluation.networks import as_floats
from ditscale.dit.evaluation.scene_network import SceneNetwork, scene_network, word_targets
from ditscale.errors import InputError

CANDIDATES = 32


@torch.no_grad()
def caption_match(
    images: Tensor, prompts: ImageStream, *, candidates: int = CANDIDATES, seed: int = 0
) -> dict[str, Any]:
    """How often the network finds an image's own caption among others.

    For each image the caption that it was drawn for stands beside ``candidates - 1`` captions of other images. The network
    gives each the sum, over its words, of how much more likely the image makes the word than it is anywhere. Chance is
    ``1 / candidates``; what real scenes reach is measured beside it.

    Args:
        images: uint8 [n, 3, H, W], drawn for the first n captions of ``prompts``.
        prompts: a stream of emoji scenes.
        candidates: captions to choose from. Default: 32.
        seed: of the choice of the others. Default: 0.

    Returns:
        ``caption_match`` and ``caption_match_real``, shares from 0 to 1, and ``caption_candidates``.

    Raises:
        InputError: fewer images than candidates.
    """
    if len(images) < candidates or candidates < 2:
        raise InputError(f"samples: expected at least {max(candidates, 2)} to choose captions among, got {len(images)}")
    scenes = prompts.batch(0, len(images))
    tokens = torch.from_numpy(scenes.tokens)
    return {
        "caption_match": matched(images, tokens, candidates, seed),
        "caption_match_real": matched(torch.from_numpy(scenes.images), tokens, candidates, seed),
        "caption_candidates": candidates,
    }


@torch.no_grad()
def matched(images: Tensor, tokens: Tensor, candidates: int, seed: int, network: SceneNetwork | None = None) -> float:
    """Share of images uint8 [n, 3, H, W] whose own caption, tokens [n, K], scores above those of ``candidates - 1`` others.

    ``network`` judges. Default: the shipped one.
    """
    network = network or scene_network()
    said = word_targets(tokens, network.words).float()
    evidence = torch.cat([network.log_odds(network(as_floats(part, "cpu"))) for part in images.split(256)])
    evidence = evidence - torch.logit(network.base_rates, 1e-6)
    generator = torch.Generator().manual_seed(seed)
    own = (evidence * said).sum(1)
    hits = 0
    for i in range(len(images)):
        others = (i + 1 + torch.randperm(len(images) - 1, generator=generator)[: candidates - 1]) % len(images)
        # The same words again are no other caption.
        others = others[(said[others] != said[i]).any(1)]
        hits += bool((said[others] @ evidence[i] < own[i]).all())
    return hits / len(images)
