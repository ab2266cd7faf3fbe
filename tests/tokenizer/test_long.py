"""Memory beyond the sound itself does not grow with its length, measured in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from vaura.tokenizer import encodec
from vaura.tokenizer.dac_network import Codec, Sizes

SCRIPT = """
import resource, sys, torch
from vaura.tokenizer.{module} import {name}
from vaura.vocoder.griffin_lim import GriffinLim

mel = {{"n_mels": 64, "n_fft": 512, "hop_length": 160, "floor": 1e-3}}
tokenizer = {make}
tokenizer.piece = {piece}
megabyte = 2**20

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / megabyte

def work(seconds):
    frames = tokenizer.num_frames(seconds)
    if "{verb}" == "decode":
        given = torch.randint(tokenizer.codebook_size, (1, tokenizer.num_codebooks, frames))
    else:
        given = torch.zeros(1, 1, int(seconds * tokenizer.sample_rate)).uniform_(-0.1, 0.1)
    made = getattr(tokenizer, "{verb}")(given)
    return sum(x.numel() * x.element_size() for x in (given, made)) / megabyte

short = work({seconds}), peak()
long = work(8 * {seconds}), peak()
print(long[1] - short[1] - (long[0] - short[0]), long[0])
"""

KINDS = {
    "mel": (
        "mel_kmeans",
        "MelKMeans",
        "MelKMeans(GriffinLim(16000, **mel, iterations=2), **mel);"
        "tokenizer.fit([0.1 * torch.randn(1, 64_000)], sample=500, sweeps=1)",
        2.0,
        30,
    ),
    "dac": ("dac", "DAC", "DAC('44khz', sys.argv[1])", 1.0, 8),
    "encodec": ("encodec", "EnCodec", "EnCodec('24khz', 1.5, sys.argv[1])", 0.5, 2),
}


@pytest.mark.parametrize("verb", ["encode", "decode"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_length(kind, verb, tmp_path):
    module, name, make, piece, seconds = KINDS[kind]
    if kind == "dac":
        torch.save({"state_dict": Codec(Sizes(8, (2, 4, 4), 16, 64, (4, 4, 2), 2, 16, 4)).state_dict()}, tmp_path / "w")
    if kind == "encodec":
        torch.save(encodec.build("24khz").state_dict(), tmp_path / "w")
    script = SCRIPT.format(module=module, name=name, make=make, piece=piece, seconds=seconds, verb=verb)
    told = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "w")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    grown, held = map(float, told.stdout.split())
    assert grown < 0.1 * held + 6, f"{grown:.1f} MB more beside {held:.1f} MB of codes and sound"
