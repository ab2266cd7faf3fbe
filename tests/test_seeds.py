import hashlib

import numpy as np

from vaura.seeds import seed_of, share_of


def test_seeds_are_the_same_on_every_machine_and_fit_a_generator():
    number = int(hashlib.sha256(b"7/clips/dog_01/3").hexdigest()[:16], 16)
    assert seed_of(7, "clips/dog_01", 3) == number // 2 < 2**63


def test_seeds_belong_to_their_names():
    seeds = {seed_of(seed, clip, sample) for seed in range(10) for clip in "abcdefghij" for sample in range(10)}
    assert len(seeds) == 1000


def test_shares_are_spread_evenly():
    shares = np.sort([share_of(f"clip {n}") for n in range(4000)])
    assert 0 <= shares[0] <= shares[-1] < 1
    assert np.abs(shares - np.arange(4000) / 4000).max() < 1.63 / 4000**0.5  # Kolmogorov-Smirnov at 1 %


def test_a_name_that_is_not_utf8_has_a_seed_too():
    assert seed_of("br\udce9k") != seed_of("brek")
