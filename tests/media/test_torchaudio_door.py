import subprocess
import sys

import pytest

BROKEN = """
import importlib.abc, importlib.machinery, sys

class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "torchaudio._extension" else None
    def exec_module(self, module):
        raise OSError("libcudart.so: cannot open shared object file")

sys.meta_path.insert(0, Broken())
"""
PLAIN = """
try:
    import torchaudio
except OSError as error:
    print("broken:", error)
for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
    del sys.modules[name]
"""
USE = """
import torch
from vaura.media.torchaudio_door import torchaudio

time = torch.arange(44100) / 44100
tone = torchaudio.functional.resample(torch.sin(2 * torch.pi * 440 * time)[None], 44100, 16000)[0]
expected = torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
assert (tone - expected)[100:-100].abs().max() < 1e-3
mel = torchaudio.transforms.MelSpectrogram(16000, n_fft=512, hop_length=160, n_mels=40)(tone)
assert mel.shape == (40, 101) and mel.mean(1).argmax() < 15
assert torchaudio.compliance.kaldi.fbank(tone[None], num_mel_bins=23).shape[1] == 23
import torchaudio as again
assert again is torchaudio
print("works")
"""


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_torchaudio_opens_where_its_native_library_does_not():
    done = run(BROKEN + PLAIN + USE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["broken: libcudart.so: cannot open shared object file", "works"]


def test_torchaudio_opens_here():
    done = run(USE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "call", ["lfilter(torch.zeros(1, 8), torch.ones(2), torch.ones(2))", "forced_align(*[torch.zeros(1, 4)] * 2)"]
)
def test_what_needs_the_native_library_never_answers_wrongly(call):
    use = "import torch\nfrom vaura.media.torchaudio_door import torchaudio\n"
    done = run(BROKEN + use + f"print('finite', torchaudio.functional.{call})")
    assert "finite" in done.stdout or "native library" in done.stderr, done.stderr
