"""What watches a training, each alone, over a module of one weight."""

import math
import re
import signal
import types
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from vaura.data.clips import ClipDataset
from vaura.data.manifest import Clip
from vaura.errors import InputError
from vaura.lm.sampling import Sampler
from vaura.media.mel import mel_filters
from vaura.seeds import seed_of
from vaura.task.callbacks import (
    BANDS,
    CodebookChart,
    EarlyStopping,
    FiniteLoss,
    GradientNorm,
    LastCheckpoint,
    Preview,
    StepBar,
    StepSeeds,
    spectrogram,
)
from vaura.task.token_prediction import TokenPrediction


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
    with pytest.raises(InputError, match=r"training loss is no longer a finite number at step 4; lower task"):
        train(tmp_path, Broken(), FiniteLoss(), last)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("saves", [True, False])
def test_a_strange_loss_is_told_with_its_own_step_though_it_is_asked_for_later(tmp_path, saves):
    """At the fifth batch the run is asked to save, or at the sixth it ends; the loss broke at the third."""

    class Broken(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 2:
                module.weight.data.fill_(math.nan)

    watchers = [Broken(), FiniteLoss(), *([LastCheckpoint(tmp_path, 5)] if saves else [])]
    with pytest.raises(InputError, match="training loss is no longer a finite number at step 3;"):
        train(tmp_path, *watchers, log_every_n_steps=50)
    assert not (tmp_path / "last.ckpt").exists()


class Asked(TorchDispatchMode):
    """Counts how often Python asks a tensor for its number, for which a GPU would be waited."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.times += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_loss_is_asked_for_when_figures_are_logged():
    alone = types.SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    trainer = types.SimpleNamespace(strategy=alone, global_step=0, log_every_n_steps=5, callback_metrics={})
    watch = FiniteLoss()
    for step in range(1, 31):
        trainer.global_step = step
        with Asked() as asked:
            watch.on_train_batch_end(trainer, None, {"loss": torch.tensor(1.0)})
        assert asked.times == (step % 5 == 0)
    with Asked() as asked:
        watch.on_train_batch_end(trainer, None, None)  # a step that was skipped
        watch.on_validation_start(trainer, None)
        watch.on_save_checkpoint(trainer, None, {})
    assert asked.times == 2


def test_the_bar_moves_every_step_and_reads_its_figures_twice_a_second(monkeypatch):
    now, read, shown = [0.0], [], []

    class Busy:
        is_global_zero, global_step, estimated_stepping_batches = True, 0, 100

        @property
        def progress_bar_metrics(self):
            read.append(self.global_step)
            return {"loss": torch.tensor(0.5), "v_num": 3}

    monkeypatch.setattr("vaura.task.callbacks.time.monotonic", lambda: now[0])
    trainer, watch = Busy(), StepBar("train")
    watch.on_train_start(trainer, None)
    real = watch.bar.update
    watch.bar.update = lambda done, note: shown.append((done, note)) or real(done, note)
    for step in range(1, 101):
        trainer.global_step, now[0] = step, step / 16
        watch.on_train_batch_end(trainer)
    watch.on_train_end(trainer, None)
    assert [done for done, _ in shown] == list(range(1, 101))
    assert read == [*range(1, 98, 8), 100]
    assert {note for done, note in shown if done in read} == {"loss 0.500"}
    assert watch.bar.note == "loss 0.500"


def test_several_processes_agree_to_stop_within_a_few_steps(tmp_path):
    """They meet every ten steps, and whenever they save."""
    met, saved = [], []
    strategy = types.SimpleNamespace(reduce_boolean_decision=lambda decision, all: met.append(trainer.global_step) or decision)
    trainer = types.SimpleNamespace(
        **{
            "strategy": strategy,
            "world_size": 2,
            "global_step": 0,
            "max_steps": 1000,
            "max_epochs": None,
            "is_global_zero": False,
        },
        **{"should_stop": False, "is_last_batch": False, "save_checkpoint": lambda path: saved.append(trainer.global_step)},
    )
    last = LastCheckpoint(tmp_path, 25)
    for step in range(1, 61):
        last.asked = step >= 51
        trainer.global_step = step
        last.on_train_batch_end(trainer)
    assert met == [10, 20, 25, 30, 40, 50, 60]
    assert saved == [25, 50, 60]
    assert last.stopping


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_that_was_stopped_early_stays_so_unless_it_is_given_more_patience(tmp_path):
    """Validations every two batches; their loss never falls below the first."""

    class Judged(Line):
        def validation_step(self, batch, index):
            self.log("val/loss", torch.tensor(1.0))

    def steps(patience: int) -> int:
        last = LastCheckpoint(tmp_path, 100)
        module, start = Judged(), tmp_path / "last.ckpt"
        trainer = Trainer(
            **{"default_root_dir": tmp_path, "accelerator": "cpu", "devices": 1, "logger": False, "max_steps": 40},
            **{"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
            **{"val_check_interval": 2, "check_val_every_n_epoch": None},
            callbacks=[EarlyStopping("val/loss", patience=patience), last],
        )
        loaders = [DataLoader(range(size), batch_size=1) for size in (5, 1)]
        trainer.fit(module, *loaders, ckpt_path=start if start.exists() else None, weights_only=True)
        return len(module.drawn)

    assert steps(patience=2) == 6
    written = (tmp_path / "last.ckpt").read_bytes()
    assert steps(patience=2) == 0
    assert (tmp_path / "last.ckpt").read_bytes() == written
    assert steps(patience=4) == 4
    assert steps(patience=4) == 0


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

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    try:
        with pytest.raises(SystemExit):
            train(tmp_path, Ask(), LastCheckpoint(tmp_path, 100))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "last.ckpt").exists()


# --- what can be heard and seen ---


class Model(TokenPrediction):
    """Codes are what the video says, times 1 where they are true and the second codebook of what is generated is another."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.tokenizer = types.SimpleNamespace(num_codebooks=2, codebook_size=128, sample_rate=16000, decode=self.decode)
        self.asked: list[dict] = []

    def tokenise(self, batch):
        codes = batch["video"].long().expand(-1, 2, 30)
        return codes, batch["video"].float()

    def sample(self, features, duration, **how):
        self.asked.append({"duration": duration, **how})
        codes = features.long().expand(-1, 2, 30).clone()
        codes[:, 1] += 64
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        assert codes.shape[1:] == (2, 30)
        return codes.float().mean((1, 2), keepdim=True).expand(-1, 1, 10000) / 256


def dataset(*names: str, videos: list[str] | None = None) -> ClipDataset:
    """Clips whose picture and sound are their number."""

    class Numbers(ClipDataset):
        def __getitem__(self, key):
            epoch, index = key
            assert epoch == 0
            video, audio = torch.full((1, 1), float(index)), torch.full((1, 8000), index / 256)
            return None if "broken" in names[index] else {"id": names[index], "start": 0.0, "video": video, "audio": audio}

    clips = [Clip(name, video, "val", 0.0, 1.0) for name, video in zip(names, videos or names, strict=True)]
    return Numbers(clips, 0.5, fps=25, size=8, sample_rate=16000, channels=1)


def follow(folder: Path, preview: Callback, *steps: int) -> tuple[EventAccumulator, Model]:
    """What TensorBoard has to show behind validations at these steps."""
    with SummaryWriter(folder) as board:
        trainer = types.SimpleNamespace(is_global_zero=True, logger=types.SimpleNamespace(experiment=board), global_step=0)
        module = Model()
        for step in steps:
            trainer.global_step = step
            preview.on_train_start(trainer, module)
            preview.on_validation_end(trainer, module)
    found = EventAccumulator(str(folder), size_guidance={"audio": 0, "images": 0, "histograms": 0, "tensors": 0})
    found.Reload()
    return found, module


def test_sound_picture_and_codes_of_the_first_clips(tmp_path):
    found, module = follow(tmp_path, Preview(dataset("a", "b", "c"), 2, Sampler(0.5), 3.0), 4, 8)
    tags = found.Tags()
    both = {f"{clip}/{kind}" for clip in "ab" for kind in ("true", "generated")}
    assert set(tags["audio"]) == set(tags["images"]) == both
    assert set(tags["histograms"]) == {f"codes/codebook_{k}_{kind}" for k in (0, 1) for kind in ("true", "generated")}
    for tag, steps in (("b/true", [4]), ("b/generated", [4, 8])):
        assert [event.step for event in found.Audio(tag)] == [event.step for event in found.Images(tag)] == steps
        assert {(event.sample_rate, event.length_frames) for event in found.Audio(tag)} == {(16000, 8000)}
    # the first codebook's codes are 0 and 1, the second's 64 more where they were generated
    for kind, place in (("true", 0), ("generated", 64)):
        (histogram, *_) = [event.histogram_value for event in found.Histograms(f"codes/codebook_1_{kind}")]
        assert histogram.num == 60
        assert (histogram.min, histogram.max) == (place, place + 1)
        counts = dict(zip(histogram.bucket_limit, histogram.bucket, strict=True))
        assert counts[place + 2] == 60  # two codes share one of 64 bins
    assert [how["seeds"] for how in module.asked] == [[seed_of("preview", clip) for clip in "ab"]] * 2
    assert {how["guidance"] for how in module.asked} == {3.0}
    assert {how[key] for how in module.asked for key in ("duration", "window", "stride")} == {0.5}


def test_nothing_is_shown_where_the_vocoder_would_make_noise(tmp_path, monkeypatch):
    preview = Preview(dataset("a", "b"), 2, Sampler(0.5), 3.0)
    monkeypatch.setattr("vaura.task.callbacks.has_voice", lambda tokenizer: False)
    found, module = follow(tmp_path, preview, 4)
    assert not found.Tags()["audio"]
    assert not module.asked


def test_tracked_clips_are_found_by_id_and_by_file_in_training_as_well(tmp_path):
    val, train = dataset("a", "b"), dataset("x", "y", "a_file", videos=["v/long.mp4", "v/long.mp4", "v/other.mp4"])
    tracked = ["b", "other", "long", "a", "b"]
    preview = Preview(val, 1, Sampler(0.5), 1.0, tracked=tracked, others=[train], histograms=False)
    found, _ = follow(tmp_path, preview, 3)
    assert {tag.split("/")[0] for tag in found.Tags()["audio"]} == {"a", "b", "a_file", "x"}
    assert found.Tags()["histograms"] == []
    with pytest.raises(
        InputError, match=r"logging.tracked names 'othr', but no clip of .* called so, nor its file. Did you mean 'other'"
    ):
        Preview(val, 1, Sampler(0.5), 1.0, tracked=["othr"], others=[train])
    with pytest.raises(InputError, match="names 'x'"):
        Preview(val, 1, Sampler(0.5), 1.0, tracked=["x"])


def test_clips_that_cannot_be_read_are_left_out_and_nothing_is_a_preview_of_nothing(tmp_path):
    found, _ = follow(tmp_path / "some", Preview(dataset("broken", "b"), 2, Sampler(0.5), 1.0), 1)
    assert set(found.Tags()["audio"]) == {"b/true", "b/generated"}
    for folder, clips, number in (("none", dataset("broken"), 1), ("off", dataset("a"), 0)):
        found, module = follow(tmp_path / folder, Preview(clips, number, Sampler(0.5), 1.0), 1)
        assert found.Tags()["audio"] == []
        assert module.asked == []


def test_one_chart_shows_the_losses_of_all_codebooks_and_only_these(tmp_path):
    found, _ = follow(tmp_path, CodebookChart(), 0)
    (event,) = found.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {(part.title, chart.title): chart.multiline.tag for part in layout.category for chart in part.chart}
    tags = ["train/loss", "val/loss", *(f"{split}/loss_codebook_{k}" for split in ("train", "val") for k in (0, 1, 10))]
    shown = {name: [tag for tag in tags if any(re.match(rule, tag) for rule in rules)] for name, rules in charts.items()}
    assert shown == {
        ("loss of each codebook", "train"): tags[2:5],
        ("loss of each codebook", "val"): tags[5:],
        ("loss", "train and val"): tags[:2],
    }


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_a_spectrogram_shows_a_tone_where_it_sounds(rate):
    """In the mel band whose triangle it is the peak of; 70 dB below the loudest is black, and so is silence."""
    filters = mel_filters(rate, BANDS, 4 * rate // 100)
    band = 30
    frequency = float((filters[:, band] * torch.arange(len(filters))).sum() / filters[:, band].sum()) * 25
    wav = torch.sin(2 * math.pi * frequency * torch.arange(rate) / rate)
    wav[rate // 2 :] *= 1e-5
    picture = spectrogram(wav, rate)
    assert picture.shape == (1, 3 * BANDS, 200)
    assert float(picture.min()) == 0
    assert float(picture.max()) == 1
    assert picture[0, :, 20].argmax().item() // 3 == BANDS - 1 - band
    assert picture[0, :, 20].min() < 0.3
    assert not picture[0, :, 106:].any()
    assert not spectrogram(torch.zeros(rate), rate).any()
    torch.testing.assert_close(spectrogram(0.1 * wav, rate), picture, atol=1e-3, rtol=0)  # nothing of it is the level
    filled = mel_filters(rate, BANDS, 4 * rate // 100).sum(0)
    assert (filled > 0).all()  # no band is black for want of a bin
