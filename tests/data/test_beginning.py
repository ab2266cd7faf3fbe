from types import SimpleNamespace

import pytest
import soundfile
import torch

from vaura.data.beginning import Beginning
from vaura.data.manifest import Clip
from vaura.data.wanted import ArrayClip
from vaura.errors import InputError

NOTHING = {"prompt": None, "prepend_gt_audio": False, "prompt_duration": 0.5, "remove_prompts": False}
CPU = torch.device("cpu")


class Tokenizer:
    """Ten token frames a second; the code of a column is what stands in the mel."""

    sample_rate, channels, frame_rate, stride = 100, 1, 10.0, 2

    def encode_mel(self, mel):
        return mel[:, :, :: self.stride].long()


def asked(**more):
    return Beginning.of(SimpleNamespace(**NOTHING | more), Tokenizer())


def stored(tmp_path):
    return ArrayClip("dog/one", tmp_path / "one_mel.npy", 2.0, read=lambda: {"mel": torch.arange(40.0).expand(3, 40)})


def test_a_sound_begins_with_nothing_unless_asked(tmp_path):
    clip = stored(tmp_path)
    assert asked().prompt(clip, Tokenizer(), CPU) is None
    assert asked().seconds(clip, Tokenizer()) == 0


def test_it_begins_with_a_file(tmp_path):
    soundfile.write(tmp_path / "p.wav", torch.linspace(-0.5, 0.5, 37).numpy(), 100, subtype="FLOAT")
    begin = asked(prompt=str(tmp_path / "p.wav"))
    clip = Clip("one", tmp_path / "one.mp4", 2.0)
    assert begin.prompt(clip, Tokenizer(), CPU).shape == (1, 1, 37)
    assert begin.seconds(clip, Tokenizer()) == 0.37


def test_of_its_own_mel_it_begins_with_whole_token_frames(tmp_path):
    begin, clip = asked(prepend_gt_audio=True, prompt_duration=0.58), stored(tmp_path)
    codes = begin.prompt(clip, Tokenizer(), CPU)
    assert codes.tolist() == [[[0, 2, 4, 6, 8]] * 3]
    assert begin.seconds(clip, Tokenizer()) == 0.5
    with pytest.raises(InputError, match=r"prompt_duration=0\.05 fills no token frame, which lasts 0\.100 s"):
        asked(prepend_gt_audio=True, prompt_duration=0.05).prompt(clip, Tokenizer(), CPU)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompt": "a.wav", "prepend_gt_audio": True}, "give one of the two"),
        ({"prepend_gt_audio": True, "prompt_duration": 0.0}, "prompt_duration=0 is no length"),
        ({"prepend_gt_audio": True, "prompt_duration": float("nan")}, "is no length"),
        ({"prompt": "nowhere.wav"}, "nowhere.wav"),
    ],
)
def test_what_is_no_beginning_is_refused(more, said):
    with pytest.raises(InputError) as error:
        asked(**more)
    assert said in str(error.value)
