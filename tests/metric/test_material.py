"""The ear is fitted on some clips of the world and asked about others, whole, worn, mislabelled and silent."""

import random

import pytest
import torch

from vaura.data.manifest import read_manifest
from vaura.data.world import World, build, imagine, sound
from vaura.media.audio import read_audio
from vaura.metric.material import MaterialEar

RATE = 16_000
WORLD = World(two_objects=0.0)


def clips(seeds):
    scenes = [imagine(seed, WORLD) for seed in seeds]
    wavs = [sound(scene, WORLD)[0] for scene in scenes]
    return wavs, [[i.time for i in scene.impacts] for scene in scenes], [scene.bodies[0].material for scene in scenes]


@pytest.fixture(scope="module")
def ear():
    wavs, times, materials = clips(range(60))
    return MaterialEar.fit(wavs, RATE, times, materials)


def share_right(ear, wavs, materials):
    return sum(ear.hear_clip(wav, RATE) == material for wav, material in zip(wavs, materials, strict=True)) / len(wavs)


def low_pass(wav, hertz):
    spectrum = torch.fft.rfft(wav)
    return torch.fft.irfft(spectrum * (torch.fft.rfftfreq(len(wav), 1 / RATE) < hertz), len(wav))


def test_true_sound_is_named_right_through_mp4(ear, tmp_path):
    manifest = build(tmp_path, {"test": range(1000, 1015)}, World(size=32, two_objects=0.0), workers=1)
    heard = read_manifest(manifest)
    wavs = [read_audio(clip.video, 0, clip.duration, RATE, 1)[0] for clip in heard]
    assert share_right(ear, wavs, [clip.facts["materials"][0] for clip in heard]) == 1


@pytest.mark.parametrize(
    "wear",
    [
        lambda wav: 0.05 * wav,
        lambda wav: low_pass(wav, 3000),
        lambda wav: wav + 0.01 * torch.randn(wav.shape, generator=torch.Generator().manual_seed(1)),
    ],
    ids=["quiet", "dull", "noisy"],
)
def test_worn_sound_is_named_right(ear, wear):
    wavs, _, materials = clips(range(2000, 2040))
    assert share_right(ear, [wear(wav) for wav in wavs], materials) >= 0.95


def test_each_blow_is_named_where_two_materials_sound(ear):
    world = World(two_objects=1.0)
    right = []
    for seed in range(3000, 3020):
        scene = imagine(seed, world)
        heard = ear.hear(sound(scene, world)[0], RATE, [impact.time for impact in scene.impacts])
        right += [name == impact.material for name, impact in zip(heard, scene.impacts, strict=True)]
    assert sum(right) / len(right) > 0.9


def test_it_is_the_labels_that_teach():
    wavs, times, materials = clips(range(60))
    turned = {"metal": "glass", "glass": "wood", "wood": "drum", "drum": "metal"}
    wrong = MaterialEar.fit(wavs, RATE, times, [turned[material] for material in materials])
    wavs, _, materials = clips(range(2000, 2020))
    assert share_right(wrong, wavs, materials) == 0
    assert share_right(wrong, wavs, [turned[material] for material in materials]) > 0.95


def test_the_labels_of_other_clips_score_by_chance(ear):
    wavs, _, materials = clips(range(2000, 2040))
    heard = [ear.hear_clip(wav, RATE) for wav in wavs]
    shares = []
    for seed in range(50):
        others = materials.copy()
        random.Random(seed).shuffle(others)
        shares.append(sum(a == b for a, b in zip(heard, others, strict=True)) / len(heard))
    assert 0.15 < sum(shares) / len(shares) < 0.35


def test_silence_has_no_material(ear):
    assert ear.hear(torch.zeros(RATE), RATE) == []
    assert ear.hear_clip(torch.zeros(RATE), RATE) is None


def test_an_ear_needs_something_to_tell_apart():
    wavs, times, _ = clips(range(3))
    with pytest.raises(ValueError, match="two materials"):
        MaterialEar.fit(wavs, RATE, times, ["metal"] * 3)
