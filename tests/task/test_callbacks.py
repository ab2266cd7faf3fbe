"""What watches a training, each alone, over a module of one weight."""

import math
import signal
import types
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from vaura.errors import InputError
from vaura.task.callbacks import FiniteLoss, GradientNorm, LastCheckpoint, StepSeeds, spectrogram


class Line(LightningModule):
    """loss = weight . (3, 4): the gradient is (3, 4) throughout, of norm 5."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.drawn: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch, index):
        self.drawn.append(float(torch.rand(())))
        return self.weight @ torch.tensor([3.0, 4.0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_end(self, *_):
        self.norms.append(float(self.trainer.callback_metrics.get("train/gradient_norm", math.nan)))


def train(folder: Path, *watchers: Callback, batches: int = 6, **settings) -> Line:
    module = Line()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=any(isinstance(watcher, LastCheckpoint) for watcher in watchers),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(watchers),
        **{"max_epochs": 1, **settings},
    )
    trainer.fit(module, DataLoader(range(batches), batch_size=1))
    return module


def test_the_gradient_norm_is_that_before_clipping(tmp_path):
    module = train(tmp_path, GradientNorm(), gradient_clip_val=0.5)
    assert module.norms == pytest.approx([5.0] * 6)
    # clipped to length 0.5: six steps of 0.1 * 0.5 against (3, 4) / 5
    torch.testing.assert_close(module.weight.detach(), -6 * 0.1 * 0.5 * torch.tensor([0.6, 0.8]), rtol=1e-4, atol=0)


def test_a_step_draws_by_its_own_seed(tmp_path):
    """Whatever was drawn before; another step, epoch, process or run draws otherwise."""
    draws = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        draws.append(train(tmp_path, StepSeeds(7), max_epochs=2).drawn)
    assert draws[0] == draws[1]
    assert len(set(draws[0])) == 12
    assert set(draws[0]).isdisjoint(train(tmp_path, StepSeeds(8), max_epochs=2).drawn)
    alone, other = (types.SimpleNamespace(current_epoch=0, global_rank=rank) for rank in (0, 1))
    StepSeeds(7).on_train_batch_start(alone, None, None, 0)
    assert float(torch.rand(())) == draws[0][0]
    StepSeeds(7).on_train_batch_start(other, None, None, 0)
    assert float(torch.rand(())) != draws[0][0]


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_a_strange_loss_stops_before_it_is_kept(tmp_path, strange):
    class Broken(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 3:
                module.weight.data.fill_(strange)

    last = LastCheckpoint(tmp_path, 1)
    with pytest.raises(InputError, match=r"training loss is no longer a finite number at step 4; lower contrast"):
        train(tmp_path, Broken(), FiniteLoss(), last)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({}, [4, 6]),  # every 4, and the last
        ({"max_steps": 5, "max_epochs": -1}, [4, 5]),
        ({"max_epochs": 2}, [4, 8, 12]),
        # the fourth step takes two batches, and half of its gradients are in no checkpoint
        ({"accumulate_grad_batches": 2, "max_epochs": 2}, [4, 6]),
    ],
)
def test_the_last_checkpoint_is_written_behind_whole_steps(tmp_path, monkeypatch, settings, saved):
    written = []
    real = Trainer.save_checkpoint

    def save_checkpoint(self, path, *args, **kwargs):
        written.append((self.global_step, Path(path).name))
        real(self, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", save_checkpoint)
    train(tmp_path, LastCheckpoint(tmp_path, 4), **settings)
    assert written == [(step, "last.part") for step in saved]
    assert [path.name for path in tmp_path.glob("last.*")] == ["last.ckpt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_waits_for_the_end_of_the_step(tmp_path, number):
    """Ctrl-C and the scheduler's SIGTERM alike; afterwards both mean again what they meant before."""

    class Ask(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 2:
                signal.raise_signal(number)

    before = [signal.signal(kind, signal.default_int_handler) for kind in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(SystemExit):  # Lightning's answer to KeyboardInterrupt
            train(tmp_path, Ask(), LastCheckpoint(tmp_path, 100))
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        for kind, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(kind, handler)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_a_second_ctrl_c_is_obeyed_at_once(tmp_path):
    class Ask(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            train(tmp_path, Ask(), LastCheckpoint(tmp_path, 100))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "last.ckpt").exists()


def test_a_spectrogram_shows_a_tone_where_it_sounds():
    """1 kHz of 8 kHz lies at a quarter of the height from the bottom; 70 dB below the loudest is black, and so is silence."""
    rate = 16000
    wav = torch.sin(2 * math.pi * 1000 * torch.arange(rate) / rate)
    wav[rate // 2 :] = 0
    picture = spectrogram(wav, rate)
    height, width = picture.shape[1:]
    assert (picture.shape[0], width) == (1, 101)
    assert float(picture.min()) >= 0
    assert float(picture.max()) <= 1
    brightest = picture[0, :, 20].argmax().item()
    assert brightest == height - 1 - round(1000 / (rate / 2) * (height - 1))
    assert float(picture[0, brightest, 20]) == pytest.approx(1, abs=0.02)
    assert float(picture[0, :, 70:].max()) == 0
    assert not spectrogram(torch.zeros(rate), rate).any()
