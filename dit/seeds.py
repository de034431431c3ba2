"""Seeds of streams of random numbers."""

from __future__ import annotations

import hashlib


def seed_for(seed: int, purpose: str) -> int:
    """A 63-bit seed of its own for every purpose, so that streams of random numbers never overlap by accident."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
