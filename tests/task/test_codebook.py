"""Stage one, with codecs small enough to learn here."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vaura.command import CONFIGS
from vaura.components import instantiate
from vaura.errors import InputError
from vaura.task.adversary import Adam, Adversary
from vaura.task.codebook import CodebookLearning
from vaura.task.codebook_preview import GAP, CodebookPreview, pictures
from vaura.task.discriminators import MultiResolution, PatchDiscriminator
from vaura.task.reconstruction import MelReconstruction, SoundReconstruction
from vaura.tokenizer.quantiser import Coded

BANDS, FRAMES, RATE = 8, 16, 1600


class Silence(nn.Module):
    """A vocoder with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.5))

    def forward(self, mel: Tensor) -> Tensor:
        return self.level * torch.ones(len(mel), 1, 10 * mel.shape[-1])


class Tiny(nn.Module):
    """A codec of one layer either way: of mels (B, 8, M), or of sound (B, 1, N) in frames of 8 samples; a code for 4 frames."""

    num_codebooks, codebook_size, sample_rate = 1, 4, RATE

    def __init__(self, signal: str = "mel") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.signal, self.revived = signal, []
        self.encoder, self.decoder = nn.Conv1d(BANDS, 6, 4, 4), nn.ConvTranspose1d(6, BANDS, 4, 4)
        self.codebook = nn.Parameter(0.1 * torch.randn(self.codebook_size, 6))
        self.vocoder = Silence()

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.weight

    def mel(self, wav: Tensor) -> Tensor:
        frames = 1 + wav.shape[-1] // 10
        return wav.abs().mean(-1)[:, None, None].expand(-1, BANDS, frames)

    def forward(self, given: Tensor) -> Coded:
        x = given if self.signal == "mel" else given[:, 0].unflatten(-1, (-1, BANDS)).transpose(1, 2)
        latents = self.encoder(x)
        flat = latents.transpose(1, 2).flatten(0, 1)
        codes = torch.cdist(flat, self.codebook).argmin(1)
        entries = self.codebook[codes].view(len(given), -1, 6).transpose(1, 2)
        commitment = (entries.detach() - latents).square().mean() + (entries - latents.detach()).square().mean()
        back = self.decoder(latents + (entries - latents).detach())
        back = back if self.signal == "mel" else back.transpose(1, 2).flatten(1).unsqueeze(1)
        return Coded(back, codes.view(len(given), 1, -1), commitment, torch.tensor(1.5), latents)

    def revive(self, vectors: Tensor) -> int:
        self.revived.append(vectors)
        return 1

    def save(self, path: str | Path) -> None:
        save_file({"codebook": self.codebook.detach()}, path)


def make(
    signal: str = "mel", start: int = 0, revive_every: int | None = None, lr: float = 0.02, **adversary: Any
) -> CodebookLearning:
    codec = Tiny(signal)
    reconstruction = MelReconstruction() if signal == "mel" else SoundReconstruction(windows=(64, 16))
    torch.manual_seed(1)
    discriminator = PatchDiscriminator(4, layers=1) if signal == "mel" else MultiResolution((64, 32), width=2)
    judge = Adversary(discriminator, start=start, **adversary)
    return CodebookLearning(codec, reconstruction, Adam(lr), judge, revive_every=revive_every)


def some_clips(number: int, signal: str = "mel") -> list[dict]:
    """Clips of two kinds, soft and loud, with a little noise."""
    generator = torch.Generator().manual_seed(2)
    items = []
    for index in range(number):
        level = 0.2 + 0.6 * (index % 2)
        kind = torch.full((BANDS, FRAMES), level) if signal == "mel" else level * torch.tensor([1.0, -1.0]).repeat(160)[None]
        items.append({"id": str(index), signal: kind + 0.02 * torch.randn(kind.shape, generator=generator)})
    return items


def learn(
    module: CodebookLearning,
    folder: Path,
    steps: int = 6,
    callbacks: tuple[Callback, ...] = (),
    clips: list[dict] | None = None,
    resume: Path | None = None,
    **settings: Any,
) -> None:
    known = {"max_epochs": -1, "max_steps": steps, "accelerator": "cpu", "log_every_n_steps": 1, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    when = {"check_val_every_n_epoch": None, "val_check_interval": steps}
    logger = TensorBoardLogger(folder, name="", version="")
    given = DataLoader(some_clips(4, module.codec.signal) if clips is None else clips, 2)
    trainer = Trainer(**(known | quiet | when | settings), default_root_dir=folder, logger=logger, callbacks=list(callbacks))
    trainer.fit(module, given, given, ckpt_path=resume, weights_only=True)


def told(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def values(folder: Path, name: str) -> list[float]:
    return [scalar.value for scalar in told(folder).Scalars(name)]


@pytest.mark.parametrize("signal", ["mel", "audio"])
def test_a_codec_learns(signal: str, tmp_path: Path):
    module = make(signal, start=20, adaptive=signal == "mel", matching=0.0 if signal == "mel" else 1.0, weight=0.1)
    learn(module, tmp_path, 50)
    rec = values(tmp_path, "train/rec")
    assert sum(rec[-5:]) < 0.7 * sum(rec[:5])
    assert values(tmp_path, "train/d_loss")
    first = {"loss", "rec", "vq", "d_weight", "perplexity"}
    later = {"g_loss", "d_loss", "logits_real", "logits_fake"}
    names = {tag.removeprefix("train/") for tag in told(tmp_path).Tags()["scalars"] if tag.startswith("train/")}
    assert first | later <= names
    assert {"val/loss", "val/rec", "val/vq", "val/g_loss", "val/d_loss", "val/codes_used", "val/perplexity"} <= set(
        told(tmp_path).Tags()["scalars"]
    )
    assert "val/d_weight" not in told(tmp_path).Tags()["scalars"]  # it is measured by gradients, of which validation has none


class Watch(Callback):
    """The discriminator's first weight and the steps, behind every batch."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.weights.append(module.adversary.discriminator.main[0].weight.detach().clone())
        self.steps.append(trainer.global_step)


def test_the_adversary_starts_in_its_batch(tmp_path: Path):
    module, watch = make(start=3), Watch()
    begin = module.adversary.discriminator.main[0].weight.detach().clone()
    learn(module, tmp_path, 6, (watch,))
    assert watch.steps == [1, 2, 3, 4, 5, 6]  # a step is a batch, with two networks too
    assert [torch.equal(weight, begin) for weight in watch.weights] == [True, True, True, False, False, False]
    assert values(tmp_path, "train/d_weight")[:3] == [0, 0, 0]
    assert len(values(tmp_path, "train/d_loss")) == 3
    state = module.optimizers().optimizer.state
    assert {int(state[p]["step"]) for p in module.codec.parameters() if p.requires_grad} == {6}
    assert {int(state[p]["step"]) for p in module.adversary.parameters()} == {3}


def test_batches_are_counted_where_gradients_are_accumulated(tmp_path: Path):
    module, watch = make(start=3), Watch()
    learn(module, tmp_path, 3, (watch,), accumulate_grad_batches=2)
    assert module.batches == 6
    assert watch.steps == [0, 1, 1, 2, 2, 3]
    assert [torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:], strict=False)] == [
        True,
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("until", [2, 4])
def test_a_training_that_goes_on_is_the_same(until: int, tmp_path: Path):
    """Stopped before or behind the batch in which the adversary starts."""
    whole = make(start=3)
    learn(whole, tmp_path / "whole", 6, (Save(tmp_path / "part.ckpt", until),), clips=some_clips(2))
    again = make(start=3)
    learn(again, tmp_path / "again", 6, clips=some_clips(2), resume=tmp_path / "part.ckpt")
    assert again.batches == whole.batches == 6
    assert len(values(tmp_path / "again", "train/d_loss")) == min(3, 6 - until)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, msg=key)


class Save(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_what_a_checkpoint_holds():
    module = make()
    state = module.state_dict()
    assert "codec.codebook" in state
    assert "adversary.discriminator.main.0.weight" in state
    assert not any("vocoder" in key for key in state)
    assert not module.codec.vocoder.level.requires_grad
    assert not module.train().codec.vocoder.training
    other = make()
    other.codec.codebook.data.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.codec.codebook, module.codec.codebook)
    with pytest.raises(RuntimeError, match=r"missing keys: \['codec.codebook'\]"):
        other.load_state_dict({key: value for key, value in state.items() if key != "codec.codebook"})


def test_the_codec_is_saved_alone(tmp_path: Path):
    module = make()
    module.save_codec(tmp_path / "codec.safetensors")
    assert torch.equal(load_file(tmp_path / "codec.safetensors")["codebook"], module.codec.codebook)


def test_mels_are_made_of_sound_by_the_codecs_own_chain():
    module = make()
    wav = torch.full((2, 2, 160), 0.5)
    torch.testing.assert_close(module.signal_of({"id": ["a", "b"], "audio": wav}), torch.full((2, BANDS, 16), 0.5))
    mel = torch.rand(2, BANDS, 16)
    assert module.signal_of({"mel": mel, "audio": wav}) is mel
    with pytest.raises(InputError, match="learns from audio, and the clips have id, mel"):
        make("audio").signal_of({"id": ["a"], "mel": mel})


def test_maker_and_judge_learn_as_each_would_alone():
    """The gradients of one backward pass are those of two losses on their own."""
    module, mel = make(), torch.rand(2, BANDS, FRAMES)
    module.eval()
    loss, _, _ = module.losses({"mel": mel}, "train")
    loss.backward()
    got = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    coded, judge = module.codec(mel), module.adversary.discriminator
    real, fake = 2 * mel[:, None] - 1, 2 * coded.reconstruction[:, None] - 1
    nll, g = (real - fake).abs().mean(), -judge(fake)[0][-1].mean()
    norms = [torch.autograd.grad(x, module.codec.last_layer, retain_graph=True)[0].norm() for x in (nll, g)]
    total = nll + 0.8 * (norms[0] / (norms[1] + 1e-4)).detach() * g + coded.commitment
    makes = {f"codec.{name}": p for name, p in module.codec.named_parameters() if p.requires_grad}
    want = dict(zip(makes, torch.autograd.grad(total, list(makes.values()), retain_graph=True), strict=True))
    hinge = (nn.functional.relu(1 - judge(real)[0][-1]).mean() + nn.functional.relu(1 + judge(fake.detach())[0][-1]).mean()) / 2
    judges = {f"adversary.{name}": p for name, p in module.adversary.named_parameters()}
    want |= dict(zip(judges, torch.autograd.grad(hinge, list(judges.values())), strict=True))
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_where_nothing_can_be_read(tmp_path: Path):
    module = make()
    assert module.training_step(None, 0) == 0
    learn(module, tmp_path, 1)
    before = module.latest["mel"]
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    assert module.training_step(None, 1) > 0  # processes meet in the midst of a step: it learns from the batch before again
    assert module.latest["mel"] is before


def test_no_process_steps_before_all_have_something_to_learn_from(tmp_path: Path, monkeypatch):
    """One that goes on alone would wait within its pass for those that have nothing, batch norms for instance."""
    asked: list[bool] = []

    def agree(self: Any, ready: bool, all: bool = True) -> bool:
        asked.append(ready)
        return len(asked) > 2  # another process can read its third batch only

    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", agree)
    module, seen = make(), []
    first = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.codec.register_forward_pre_hook(lambda *_: seen.append(module.batches) if module.training else None)
    learn(module, tmp_path, 2, limit_val_batches=0)
    assert not seen
    assert all(torch.equal(p, first[name]) for name, p in module.named_parameters())
    learn(module, tmp_path, 2, limit_val_batches=0)
    assert seen == [2, 3]
    assert asked == [True] * 3  # once all have begun nobody need be asked


def test_of_nothing_nothing_is_learnt():
    assert make().training_step({}, 0) == 0


class Fixed(Tiny):
    """Names everything as it is told, of two codebooks."""

    num_codebooks = 2

    def forward(self, given: Tensor) -> Coded:
        codes = torch.tensor([[0, 0, 0, 1], [2, 2, 2, 2]]).expand(len(given), -1, -1)
        return super().forward(given)._replace(codes=codes)


@pytest.mark.parametrize("shared", [False, True])
def test_use_of_codes(shared: bool, tmp_path: Path):
    codec = Fixed()
    codec.shared_codebook = shared
    learn(CodebookLearning(codec, MelReconstruction(), Adam(0.0)), tmp_path, 1)

    def perplexity(*counts: int) -> float:
        return math.prod((n / sum(counts)) ** (-n / sum(counts)) for n in counts)

    want = (3 / 4, perplexity(3, 1, 4)) if shared else ((2 + 1) / 8, (perplexity(3, 1) + 1) / 2)
    assert values(tmp_path, "val/codes_used") == pytest.approx([want[0]])
    assert values(tmp_path, "val/perplexity") == pytest.approx([want[1]])


def test_dead_codes_are_revived(tmp_path: Path):
    module = make(revive_every=2)
    learn(module, tmp_path, 5)
    assert [tuple(vectors.shape) for vectors in module.codec.revived] == [(2, 6, 4)] * 2
    assert values(tmp_path, "train/revived") == [1, 1]


def test_codes_that_live_outlive_a_resumption(tmp_path: Path):
    """What was used before a checkpoint is forgotten with it: the interval begins with the training that goes on."""
    learn(make(revive_every=4), tmp_path / "first", 3, (Save(tmp_path / "part.ckpt", 3),))
    again = make(revive_every=4)
    learn(again, tmp_path / "again", 6, resume=tmp_path / "part.ckpt")
    assert again.codec.revived == []
    learn(more := make(revive_every=4), tmp_path / "more", 7, resume=tmp_path / "part.ckpt")
    assert len(more.codec.revived) == 1


def test_each_networks_gradient_is_clipped_for_itself():
    module = make()
    optimizer = module.configure_optimizers()
    for group, size in zip(optimizer.param_groups, (7.0, 0.5), strict=True):
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, size)
    module.configure_gradient_clipping(optimizer, 1.0, "norm")
    norms = [torch.stack([p.grad.norm() for p in group["params"]]).norm() for group in optimizer.param_groups]
    assert [float(norm) for norm in norms] == pytest.approx([1.0, 1.0], rel=1e-3)
    module.configure_gradient_clipping(optimizer, 1e-3, "value")
    assert max(float(p.grad.abs().max()) for group in optimizer.param_groups for p in group["params"]) <= 1e-3 + 1e-9


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(InputError, match="tokenizer Linear cannot be trained by this task"):
        CodebookLearning(nn.Linear(1, 1), MelReconstruction(), Adam(0.1))
    with pytest.raises(InputError, match="revive_every=0 is no number of batches"):
        make(revive_every=0)
    with pytest.raises(InputError, match="perceptual_weight=1 weighs an LPAPS that is not there"):
        MelReconstruction(perceptual_weight=1.0)


def test_mels_are_compared_in_the_networks_space():
    a, b = torch.rand(2, 4, 6), torch.rand(2, 4, 6)
    loss, terms = MelReconstruction()(a, b)
    torch.testing.assert_close(loss, ((2 * a - 1) - (2 * b - 1)).abs().mean())
    assert set(terms) == {"rec"}
    assert MelReconstruction().seen(a).shape == (2, 1, 4, 6)


def test_sounds_are_compared_in_time_and_in_spectrum():
    time = torch.arange(4000) / RATE
    tone, quieter = torch.sin(2 * math.pi * 200 * time)[None, None], 0.5 * torch.sin(2 * math.pi * 200 * time)[None, None]
    ours = SoundReconstruction(time=2.0, spectral=3.0, windows=(256, 64))
    loss, terms = ours(tone, quieter)
    torch.testing.assert_close(loss, 2 * terms["time"] + 3 * terms["spectral"])
    assert ours(tone, tone).loss == 0
    late = torch.sin(2 * math.pi * 200 * time + math.pi)[None, None]  # the same sound but for its phase
    assert ours(tone, late).terms["spectral"] < 0.1 * ours(tone, late).terms["time"]
    assert ours(tone, quieter).terms["spectral"] > ours(tone, 0.9 * tone).terms["spectral"]
    assert ours.seen(torch.zeros(2, 2, 5)).shape == (4, 1, 5)


@pytest.mark.parametrize("signal", ["mel", "audio"])
def test_reconstructions_are_shown_and_heard(signal: str, tmp_path: Path):
    learn(make(signal), tmp_path, 4, (CodebookPreview(1),), val_check_interval=2)
    tags = told(tmp_path).Tags()
    assert sorted(tags["audio"]) == ["0/reconstructed", "0/true"]
    assert tags["images"] == (["0/mel"] if signal == "mel" else ["0/true", "0/reconstructed"])
    assert [len(told(tmp_path).Audio(name)) for name in ("0/true", "0/reconstructed")] == [1, 2]


@pytest.mark.filterwarnings("ignore:no sound is previewed")
def test_reconstructions_are_only_shown_where_the_vocoder_would_make_noise(tmp_path: Path):
    module = make()
    module.codec.vocoder.taught = False
    learn(module, tmp_path, 4, (CodebookPreview(1),), val_check_interval=2)
    tags = told(tmp_path).Tags()
    assert tags["images"] == ["0/mel"]
    assert not tags["audio"]


def test_one_picture_over_the_other():
    mel, other = torch.zeros(2, 5), torch.ones(2, 5)
    mel[0] = 0.25  # the lowest band
    picture = pictures(mel, other)
    assert picture.shape == (1, 6 + GAP + 6, 5)
    assert (picture[0, 3:6] == 0.25).all()
    assert (picture[0, :3] == 0).all()
    assert (picture[0, 6:] == 1).all()


@pytest.mark.parametrize(("name", "signal"), [("codebook", "mel"), ("codebook_wave", "audio")])
def test_the_configs_describe_it(name: str, signal: str):
    config = OmegaConf.load(CONFIGS / "task" / f"{name}.yaml")
    config.codec = None
    module = instantiate(config, codec=Tiny(signal))
    assert isinstance(module, CodebookLearning)
    assert module.reconstruction.seen(torch.zeros(1, 1 if signal == "audio" else BANDS, FRAMES)).ndim >= 3
    if signal == "mel":
        assert module.reconstruction.perceptual is None
        config.reconstruction.perceptual_weight = 1.0
        with pytest.raises(InputError, match="LPAPS has no weights for trunk"):
            instantiate(config, codec=Tiny(signal))
