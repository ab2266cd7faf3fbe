"""Randomness that belongs to a thing, not to a moment: seeds derived from names."""

from __future__ import annotations

import hashlib


def seed_of(*names: object) -> int:
    """A 63-bit seed of its own for these names, the same on every machine: `seed_of(run_seed, clip_id, sample)`."""
    digest = hashlib.sha256("/".join(map(str, names)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def share_of(*names: object) -> float:
    """A number in [0, 1) that these names always get."""
    return seed_of(*names) / 2**63
