import math

import pytest
import torch
from torch import Tensor

from vaura.encoder.tiny_avclip import TinyAVCLIP
from vaura.task.contrast import Contrast
from vaura.task.optimizer import Cosine, Optimizer

RATE, FPS = 8000, 25


def make(crop: float = 0.64, fps: float = FPS, sample_rate: int = RATE, instants: int = 8) -> Contrast:
    torch.manual_seed(0)
    encoder = TinyAVCLIP(dim=16, width=4, size=16, fps=fps, mean_frames=5)
    return Contrast(encoder, Optimizer(lr=1e-2, schedule=Cosine(final=0.1)), sample_rate, crop, instants, n_mels=16, n_fft=256)


def world(clips: int, seconds: float, seed: int) -> dict:
    """One number that changes every 0.16 s is the brightness of the picture and the pitch of the sound."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(clips, math.ceil(seconds / 0.16) + 1, generator=generator)
    phase = torch.rand(clips, 1, generator=generator)
    frames, samples = round(seconds * FPS), round(seconds * RATE)
    bright = numbers.gather(1, (torch.arange(frames) / FPS / 0.16 + phase).long())
    video = (255 * bright).to(torch.uint8)[:, :, None, None, None].expand(-1, -1, 3, 16, 16)
    pitch = 300 + 2500 * numbers.gather(1, (torch.arange(samples) / RATE / 0.16 + phase).long())
    wav = 0.3 * torch.sin(2 * math.pi * torch.cumsum(pitch, 1) / RATE)
    return {"id": [str(n) for n in range(clips)], "video": video, "audio": wav.unsqueeze(1)}


@torch.no_grad()
def strangers_in_front(contrast: Contrast, batch: dict) -> float:
    """Share of the other clips whose sound, at the middle instant, lies nearer to a clip's picture than its own does."""
    contrast.eval()
    seen = contrast.encoder(batch["video"])
    heard = contrast.sound_tower(contrast.mel(batch["audio"].mean(1)))
    middle = seen.shape[1] // 2
    alike = seen[:, middle] @ heard[:, middle].T
    nearer = alike > alike.diagonal().unsqueeze(1)
    contrast.train()
    return float(nearer.float().sum() / (len(alike) * (len(alike) - 1)))


def test_picture_and_sound_of_an_instant_find_each_other():
    contrast, unseen = make(), world(40, 0.64, seed=1)
    assert 0.3 < strangers_in_front(contrast, unseen) < 0.7
    made = contrast.optimizer_of(contrast, 80)
    losses = []
    for step in range(80):
        torch.manual_seed(step)
        loss, _ = contrast.loss(contrast._cut(world(8, 0.8, seed=100 + step)))
        losses.append(float(loss.detach()))
        made["optimizer"].zero_grad()
        loss.backward()
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert strangers_in_front(contrast, unseen) < 0.3
    assert sum(losses[-5:]) / 5 < math.log(64) - 1  # of 64 pairs


def test_the_loss_is_the_mean_of_both_ways():
    contrast, batch = make(instants=32), world(1, 0.64, seed=3)  # all instants of the clip: their order does not matter
    contrast.eval()
    with torch.no_grad():
        loss, share = contrast.loss(batch)
        seen = contrast.encoder(batch["video"])[0].double()
        heard = contrast.sound_tower(contrast.mel(batch["audio"].mean(1)))[0, :32].double()
    alike = (10.0 * seen @ heard.T).tolist()
    rows = [math.log(sum(math.exp(x) for x in row)) - row[n] for n, row in enumerate(alike)]
    columns = [math.log(sum(math.exp(row[n]) for row in alike)) - alike[n][n] for n in range(32)]
    assert float(loss) == pytest.approx((sum(rows) + sum(columns)) / 64, rel=1e-4)
    assert float(share) == pytest.approx(sum(max(row) == row[n] for n, row in enumerate(alike)) / 32)


@pytest.mark.parametrize("fps", [25, 30000 / 1001, 12.5])
@pytest.mark.parametrize("sample_rate", [8000, 44100])
@pytest.mark.parametrize("crop", [0.32, 1.0, 9.0])
def test_a_cut_begins_and_ends_at_one_instant_for_picture_and_sound(fps, sample_rate, crop):
    contrast, frames = make(crop, fps, sample_rate), round(2 * fps)
    samples = round(frames / fps * sample_rate)
    numbers = torch.arange(frames, dtype=torch.uint8).view(1, -1, 1, 1, 1)
    batch = {"id": ["a"], "video": numbers, "audio": torch.arange(samples, dtype=torch.float64).view(1, 1, -1)}
    starts = set()
    for seed in range(12):
        torch.manual_seed(seed)
        cut = contrast._cut(batch)
        seen, heard = cut["video"].flatten(), cut["audio"].flatten()
        assert len(seen) == min(math.floor(crop * fps + 0.5), frames)
        assert float(heard[0]) / sample_rate == pytest.approx(int(seen[0]) / fps, abs=0.51 / sample_rate)
        assert float(heard[-1] + 1) / sample_rate == pytest.approx((int(seen[-1]) + 1) / fps, abs=0.51 / sample_rate)
        starts.add(int(seen[0]))
    assert (len(starts) > 3) == (crop < 2)
    assert cut["id"] == ["a"]


def test_instants_that_sound_are_preferred():
    contrast, drawn = make(instants=4), []
    batch = world(1, 1.28, seed=2)
    batch["audio"][..., : RATE * 64 // 100] = 0  # the first half is silent

    def spy(chance: Tensor, instants: int) -> Tensor:
        drawn.append(chance)
        return multinomial(chance, instants)

    multinomial, torch.multinomial = torch.multinomial, spy
    try:
        contrast.loss(batch)
    finally:
        torch.multinomial = multinomial
    (chance,) = drawn[0]
    assert chance.min() > 0
    assert chance[34:].mean() > 3 * chance[:30].mean()


def test_a_batch_without_a_readable_clip_is_passed_over():
    contrast = make()
    assert contrast.training_step(None, 0) == 0
    contrast.validation_step(None, 0)
