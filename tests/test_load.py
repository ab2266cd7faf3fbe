import subprocess
import sys

import av
import numpy as np
import pytest
import soundfile
import torch

import vaura
from vaura.errors import InputError
from vaura.launch import run


@pytest.fixture(scope="module")
def model(tiny):
    return vaura.load(tiny.folder, device="cpu")


def test_it_generates_what_the_command_line_writes(model, tiny, tmp_path):
    """Sample for sample, in the wav; and what it saves is byte for byte the same wav."""
    video = tiny.videos[0]
    asked = ["duration=1.2", "start=0.25", "seed=3", "samples_per_video=2", f"out={tmp_path}/line"]
    assert run(["config=generate", f"experiment_path={tiny.folder}", f"video={video}", "device=cpu", *asked]) == 0
    for number, sound in enumerate(model.generate(video, 1.2, start=0.25, seed=3, samples=2), 1):
        saved = sound.save(tmp_path / "library", f"own_{number}")
        wav, rate = soundfile.read(tmp_path / f"line/{video.stem}_{number}.wav")
        assert rate == sound.sample_rate == 16_000
        assert np.array_equal(np.round(sound.wav[0].numpy() * 2**15) / 2**15, wav) or np.allclose(
            sound.wav[0], wav, atol=2**-15
        )
        assert saved.with_suffix(".wav").read_bytes() == (tmp_path / f"line/{video.stem}_{number}.wav").read_bytes()


def test_one_sound_is_saved_under_the_videos_name(model, tiny, tmp_path):
    saved = model.generate(str(tiny.videos[0])).save(str(tmp_path / "deep" / "out"))
    assert saved == tmp_path / "deep/out" / f"{tiny.videos[0].stem}.mp4"
    with av.open(str(saved)) as file:
        assert {stream.type for stream in file.streams} == {"video", "audio"}
        assert file.duration / av.time_base == pytest.approx(1.92, abs=0.04)


def test_the_first_of_several_samples_is_the_one(model, tiny):
    one, several = (model.generate(tiny.videos[0], 0.5, samples=samples) for samples in (1, 3))
    assert torch.equal(one.wav, several[0].wav)
    assert not torch.equal(several[0].wav, several[1].wav)
    assert one.wav.shape == (1, 8000)


def test_a_checkpoint_can_be_chosen(tiny):
    """Of two checkpoints, the one with the lower loss in its name is loaded unless another is named."""
    paths = sorted((tiny.folder / "checkpoints").glob("epoch*.ckpt"), key=lambda path: path.stem.rpartition("=")[2])
    assert len(paths) == 2
    for given, expected in ((None, paths[0]), (paths[1], paths[1])):
        state = torch.load(expected, weights_only=True)["state_dict"]
        loaded = vaura.load(tiny.folder, given, "cpu").task.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
    with pytest.raises(InputError, match="no experiment"):
        vaura.load(tiny.folder / "checkpoints")


def test_the_version_is_told_without_torch():
    code = "import sys, vaura; print(vaura.__version__, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=vaura.__path__[0] + "/..", capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{vaura.__version__} False\n"
