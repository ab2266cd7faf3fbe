import copy
import math

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vaura.command import CONFIGS
from vaura.components import instantiate
from vaura.errors import InputError
from vaura.media.mel import DecibelMel
from vaura.task.adversary import Adversary
from vaura.task.callbacks import FiniteLoss, GradientNorm
from vaura.task.discriminators import MelGANDiscriminator
from vaura.task.optimizer import Optimizer
from vaura.task.vocoding import Exponential, Vocoding
from vaura.vocoder.hifigan import HiFiGAN
from vaura.vocoder.learnt import LearntVocoder
from vaura.vocoder.melgan import MelGAN

RATE, BANDS, STEPS = 22_050, 20, 40
MEL = {"n_mels": BANDS, "width": 8}
VOCODERS = {
    "melgan": lambda: MelGAN(**MEL, residual_layers=2, rates=(8, 8, 4)),
    "hifigan": lambda: HiFiGAN(
        n_mels=BANDS, width=64, rates=(8, 8, 4), kernels=(16, 16, 8), residual_kernels=(3,), dilations=(1, 3)
    ),
}


def make(kind: str = "melgan", lr: float = 2e-3, adversary: dict | None = None, **settings: object) -> Vocoding:
    torch.manual_seed(0)
    judge = Adversary(
        MelGANDiscriminator(scales=2, width=4, layers=2),
        **{"adaptive": False, "weight": 1.0, "matching": 1.0, **(adversary or {})},
    )
    optimizer = Optimizer(lr=lr, betas=(0.5, 0.9))
    settings = {"segment": 2048, "mel_weight": 45.0, **settings}
    return Vocoding(VOCODERS[kind](), DecibelMel(n_mels=BANDS), judge, optimizer, optimizer, **settings)


def tones(clips: int, seconds: float = 0.4, seed: int = 0) -> dict:
    """Three partials of a pitch of its own, in noise, each clip 8 dB louder than the one before."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(round(seconds * RATE)) / RATE
    pitch = 200 + 1500 * torch.rand(clips, 1, 1, generator=generator)
    wav = sum(torch.sin(2 * math.pi * pitch * n * t) / n for n in (1, 2, 3))
    wav = wav + 0.1 * torch.randn(wav.shape, generator=generator)
    return {"id": [f"tone{n}" for n in range(clips)], "audio": 0.4 * wav * 0.4 ** torch.arange(clips).flip(0)[:, None, None]}


def trainer(folder, steps: int, **settings: object) -> Trainer:
    return Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="tensorboard", version=""),
        callbacks=[GradientNorm(), FiniteLoss()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **settings,
    )


def batches(count: int, clips: int = 4) -> DataLoader:
    return DataLoader([tones(clips, seed=1 + n) for n in range(count)], batch_size=None)  # type: ignore[arg-type]


@torch.no_grad()
def heard(task: Vocoding, batch: dict) -> tuple[float, Tensor]:
    """The mean distance of the mels of true and made sound, and how loud the made ones are, in mel."""
    mel = task.mel(batch["audio"][:, 0])[..., :-1]
    made = task.mel(task.vocoder(mel)[:, 0])[..., :-1]
    return float((made - mel).abs().mean()), made.mean((1, 2))


@pytest.mark.parametrize("kind", VOCODERS)
def test_learns_to_sound_like_the_mel(kind, tmp_path):
    loss = "squares" if kind == "hifigan" else "hinge"
    task, unseen = make(kind, peak=0.0, gain=(1.0, 1.0), adversary={"loss": loss}), tones(4, seed=99)
    before, _ = heard(task, unseen)
    engine = trainer(tmp_path, STEPS)
    engine.fit(task, batches(STEPS), DataLoader([unseen], batch_size=None))  # type: ignore[arg-type]
    assert engine.global_step == STEPS
    found, levels = heard(task, unseen)
    assert found < 0.5 * before
    assert levels.diff().min() > 0.01
    assert float(engine.callback_metrics["val/loss"]) == pytest.approx(found, abs=0.02)

    task.save_vocoder(tmp_path / "vocoder.safetensors")
    settings = {name: value for name, value in task.vocoder.settings.items() if name != "sample_rate"}
    again = type(task.vocoder)(weights=str(tmp_path / "vocoder.safetensors"), **settings)
    mel = torch.rand(1, BANDS, 12)
    torch.testing.assert_close(again(mel), task.vocoder(mel))


def test_sound_and_mels_go_to_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    task = make()
    task.preview = 2
    trainer(tmp_path, 1).fit(task, batches(1), DataLoader([tones(3)], batch_size=None))  # type: ignore[arg-type]
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"audio": 0, "images": 0})
    events.Reload()
    wanted = {f"tone{n}/{kind}" for n in range(2) for kind in ("true", "generated")}
    assert set(events.Tags()["audio"]) == set(events.Tags()["images"]) == wanted
    (sound,) = events.Audio("tone0/true")
    assert (sound.sample_rate, sound.length_frames) == (RATE, math.ceil(0.4 * RATE / 256) * 256)
    (image,) = events.Images("tone0/true")
    assert (image.height, image.width) == (3 * BANDS, math.ceil(0.4 * RATE / 256))
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/discriminator", "train/adversarial", "train/features", "train/mel", "val/loss"} <= scalars


def test_a_step_is_melgan_s():
    """Both updates written out as the original has them: sums over scales and layers, the discriminator first."""
    scales, layers, lr = 2, 2, 1e-3
    matching = 10 * 4 / (layers + 1) / scales
    task = make(lr=lr, adversary={"weight": scales, "matching": matching * scales * (layers + 2)}, mel_weight=0.0)
    vocoder, judge = copy.deepcopy(task.vocoder), copy.deepcopy(task.adversary.discriminator)
    real = task.levelled(tones(3)["audio"])[..., 2048:4096]
    task.cut = lambda wav: real  # type: ignore[method-assign]

    made = vocoder(task.mel(real[:, 0])[..., :8])
    adam = torch.optim.Adam(judge.parameters(), lr, betas=(0.5, 0.9))
    sum(
        (1 - a[-1]).relu().mean() + (1 + b[-1]).relu().mean() for a, b in zip(judge(real), judge(made.detach()), strict=True)
    ).backward()
    adam.step()
    judge.requires_grad_(False)
    true, seen = judge(real), judge(made)
    loss = -sum(one[-1].mean() for one in seen)
    for a, b in zip(true, seen, strict=True):
        loss = loss + matching * sum((x.detach() - y).abs().mean() for x, y in zip(a[:-1], b[:-1], strict=True))
    adam = torch.optim.Adam(vocoder.parameters(), lr, betas=(0.5, 0.9))
    loss.backward()
    adam.step()

    one_step(task, tones(3))
    for ours, theirs in ((task.adversary.discriminator, judge), (task.vocoder, vocoder)):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            clear = (
                b.grad.abs() > 1e-5
            )  # of the gradient Adam's first step knows but the sign, unless it is as small as its eps
            assert not clear.any() or (a - b)[clear].abs().max() < 0.02 * lr, name


def test_the_recipe_of_hifigan_weighs_its_layers_as_the_authors_do():
    """Their sums: the L1 of every layer of every network, logits too, times 2; of every network's squares; the mel times 45."""
    config = OmegaConf.load(CONFIGS / "task/vocoder_hifigan.yaml").adversary
    config.discriminator.discriminators[0].width, config.discriminator.discriminators[1].width = 2, 16
    judge = instantiate(config)
    real, fake = torch.randn(2, 1, 1, 2000, generator=torch.Generator().manual_seed(0)).unbind()
    judge.discriminator.eval()  # a spectral norm moves with every look in training
    with torch.no_grad():
        asked = judge.judge(real, fake, torch.tensor(0.0), None)
        true, seen = judge.discriminator(real), judge.discriminator(fake)
    assert [len(network) for network in seen] == 5 * [6] + 3 * [8]
    matching = 2 * sum((a - b).abs().mean() for x, y in zip(true, seen, strict=True) for a, b in zip(x, y, strict=True))
    passing = sum((1 - network[-1]).square().mean() for network in seen)
    torch.testing.assert_close(asked.loss, matching + passing)


def one_step(task: Vocoding, batch: dict) -> None:
    engine = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    engine.fit(task, DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    assert engine.global_step == 1


def test_a_batch_without_a_readable_clip_changes_nothing():
    task = make()
    before = copy.deepcopy(task.state_dict())
    step = task.training_step
    task.training_step = lambda batch, batch_idx: step(None, batch_idx)  # type: ignore[method-assign]
    one_step(task, tones(3))
    for key, value in task.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    task.validation_step(None, 0)


def test_the_adversary_can_begin_later():
    task = make(adversary={"start": 1})
    before = copy.deepcopy(task.state_dict())
    one_step(task, tones(3))
    changed = {key.split(".")[0] for key, value in task.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"vocoder"}


def test_clips_are_brought_to_one_peak():
    task = make(peak=0.95)
    wav = torch.randn(3, 2, 500) * torch.tensor([1.0, 1e-3, 0.0])[:, None, None]
    level = task.levelled(wav)
    assert level.shape == (3, 1, 500)
    torch.testing.assert_close(level.abs().amax((1, 2)), torch.tensor([0.95, 0.95, 0.0]))
    torch.testing.assert_close(make(peak=0.0).levelled(wav), wav.mean(1, keepdim=True))


@pytest.mark.parametrize("samples", [1, 2047, 2048, 2049, 5000])
def test_segments_lie_anywhere_in_the_clip(samples):
    task, starts, gains = make(gain=(0.3, 1.0)), set(), []
    wav = torch.arange(1.0, samples + 1).expand(4, 1, -1).contiguous()
    for seed in range(40):
        torch.manual_seed(seed)
        for segment in task.cut(wav)[:, 0]:
            own = segment[: min(samples, 2048)]
            gain = float((own[-1] - own[0]) / max(len(own) - 1, 1)) if len(own) > 1 else float(own[0])
            assert 0.3 <= gain <= 1.0
            torch.testing.assert_close(own / gain, (own[0] / gain).round() + torch.arange(len(own)), rtol=1e-3, atol=0.3)
            assert not segment[samples:].any()
            starts.add(round(float(own[0]) / gain))
            gains.append(gain)
    assert max(gains) - min(gains) > 0.6
    assert 1 <= min(starts) <= max(starts) <= max(1, samples - 2047)
    assert len(starts) == min(max(1, samples - 2047), len(starts))
    assert (len(starts) > 30) == (samples == 5000)


def test_the_mel_has_a_frame_for_every_hop_of_a_segment():
    task, wav = make(), tones(2)["audio"][..., :2048]
    whole = DecibelMel(n_mels=BANDS)(wav[:, 0])
    assert whole.shape[-1] == 9
    torch.testing.assert_close(task.mel_of(wav), whole[..., :8])


def test_a_rate_shrinks_as_pytorch_s_does():
    parameter = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], 2e-4)
    theirs, ours = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9), Exponential(0.9, every=3)
    for step in range(12):
        assert ours.rate(step, 2e-4, math.inf) == pytest.approx(sgd.param_groups[0]["lr"])
        if step % 3 == 2:
            sgd.step()
            theirs.step()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"segment": 2000}, r"task\.segment=2000 is no number of whole mel frames; set task\.segment=1792"),
        ({"adversary": {"adaptive": True}}, r"task\.adversary\.adaptive"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, told):
    with pytest.raises(InputError, match=told):
        make(**settings)


def test_a_mel_of_another_hop_is_refused():
    task = make()
    optimizer = Optimizer(lr=1e-3)
    with pytest.raises(InputError, match=r"task\.mel\.hop_length is 128; set it to 256"):
        Vocoding(VOCODERS["melgan"](), DecibelMel(n_mels=BANDS, hop_length=128), task.adversary, optimizer, optimizer)


def test_only_what_learns_is_in_a_checkpoint():
    task = make()
    assert {key.split(".")[0] for key in task.state_dict()} == {"vocoder", "adversary"}
    assert isinstance(task.vocoder, LearntVocoder)
    assert all(isinstance(value, Tensor) for value in task.state_dict().values())
