"""Training from kept codes and features, tiny: the same run as from the files, resumed and shared like any other."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vaura.data import clips
from vaura.errors import InputError
from vaura.launch import run
from vaura.task.callbacks import Preview
from vaura.task.token_prediction import TokenPrediction

REPOSITORY = Path(__file__).resolve().parents[1]
SETTINGS = (
    "lm.num_layers=1 lm.dim=32 lm.num_heads=2 lm.channels=16 encoder.dim=16 encoder.width=8 encoder.size=32 "
    "tokenizer.codebook_size=16 tokenizer.num_codebooks=2 trainer.accelerator=cpu trainer.max_steps=6 "
    "trainer.val_check_interval=3 trainer.log_every_n_steps=1 data.workers=0 data.duration=0.64 data.batch_size=1 "
    "data.random_start=true data.random_crop=true data.flip=0.5 logging.preview_clips=0 task.hide_history=0.5 "
    "task.drop_condition=0.3 task.optimizer.lr=0.03 task.optimizer.schedule.warmup=1"
)
ONE, TWO = "trainer.devices=1", "trainer.devices=2"

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def command(tiny) -> list[str]:
    """Two epochs of three clips of 1.92 s, with a tokenizer and an encoder that are there already."""
    parts = [f"{part}.weights={tiny.folder / part}.safetensors" for part in ("tokenizer", "encoder")]
    return [f"config={REPOSITORY / 'configs' / 'train.yaml'}", f"data.manifest={tiny.manifest}", *SETTINGS.split(), *parts]


def losses(folder: Path) -> dict[str, list[float]]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {tag: [event.value for event in board.Scalars(tag)] for tag in ("train/loss", "val/loss")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same_run(one: Path, other: Path, tolerance: float) -> None:
    ours, theirs = losses(one), losses(other)
    assert len(ours["train/loss"]) == 6
    assert len(ours["val/loss"]) == 2
    for tag in ours:
        assert ours[tag] == pytest.approx(theirs[tag], abs=tolerance)
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=tolerance)


def no_files(monkeypatch) -> None:
    for name in ("read_video", "read_audio"):
        monkeypatch.setattr(clips, name, lambda *_, **__: pytest.fail("a file is read"))
    real = TokenPrediction.tokenise

    def given(self, batch):
        assert "codes" in batch
        return real(self, batch)

    monkeypatch.setattr(TokenPrediction, "tokenise", given)


def test_kept_tokens_train_what_the_files_train(command, tmp_path, monkeypatch):
    """Two epochs at other places each: the same losses and weights; and again without opening a file."""
    cache = [f"data.cache={tmp_path / 'cache'}", "data.takes=2"]
    assert run([*command, ONE, f"hydra.run.dir={tmp_path / 'files'}"]) == 0
    assert run([*command, ONE, *cache, f"hydra.run.dir={tmp_path / 'kept'}"]) == 0
    assert_same_run(tmp_path / "kept", tmp_path / "files", 1e-5)
    no_files(monkeypatch)
    assert run([*command, ONE, *cache, f"hydra.run.dir={tmp_path / 'again'}"]) == 0
    assert_same_run(tmp_path / "again", tmp_path / "kept", 0)


def test_nothing_to_learn_from_is_told(command, tmp_path, monkeypatch, capsys):
    """And not trained on, in empty batches."""

    def damaged(path, *_, **__):
        raise InputError(f"{path} is damaged")

    monkeypatch.setattr(clips, "read_video", damaged)
    with pytest.warns(UserWarning, match="is damaged"):
        assert (
            run([*command, ONE, f"data.cache={tmp_path / 'cache'}", "data.takes=2", f"hydra.run.dir={tmp_path / 'run'}"]) == 2
        )
    assert re.search(r"none of the train clips of .* can be read; see the warnings above", capsys.readouterr().err)


def test_a_preview_is_not_counted_in_the_pace(command, tmp_path, monkeypatch):
    """Two of 4 s in a training of six steps that take some hundredths of a second each."""
    monkeypatch.setattr(Preview, "on_validation_end", lambda *_: time.sleep(4))
    assert run([*command, ONE, "logging.peak_flops=1e12", f"hydra.run.dir={tmp_path}"]) == 0
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    pace = [event.value for event in board.Scalars("throughput/frames_per_second")]
    assert len(pace) == 6
    assert pace[3] > 32 / 3  # of the step behind the first validation: its clip has 32 token frames


def test_fewer_takes_are_another_training(command, tmp_path):
    with pytest.warns(UserWarning, match=r"data\.takes=1 keeps one span"):
        assert run([*command, ONE, f"data.cache={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    assert run([*command, ONE, f"hydra.run.dir={tmp_path / 'files'}"]) == 0
    one, files = (losses(tmp_path / name)["train/loss"] for name in ("one", "files"))
    assert one[:3] == pytest.approx(files[:3], abs=1e-5)
    assert one[3:] != pytest.approx(files[3:], abs=1e-3)


def test_stopped_in_an_epoch_it_goes_on_as_if_it_had_not_been(command, tmp_path, monkeypatch):
    both = [*command, ONE, f"data.cache={tmp_path / 'cache'}", "data.takes=2", "logging.last_every=1"]
    assert run([*both, f"hydra.run.dir={tmp_path / 'whole'}"]) == 0
    steps, real = [], TokenPrediction.training_step

    def training_step(self, batch, index):
        steps.append(batch["id"])
        if len(steps) == 5:
            raise KeyboardInterrupt
        return real(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(TokenPrediction, "training_step", training_step)
        assert run([*both, f"hydra.run.dir={tmp_path / 'parts'}"]) == 130
    no_files(monkeypatch)
    assert run([*both, f"hydra.run.dir={tmp_path / 'parts'}"]) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 0)


def test_a_corrupt_cache_is_told_and_made_again(command, tmp_path):
    both = [*command, ONE, f"data.cache={tmp_path / 'cache'}", "data.takes=2"]
    assert run([*both, f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="are broken .* made again"):
        assert run([*both, f"hydra.run.dir={tmp_path / 'two'}"]) == 0
    assert_same_run(tmp_path / "two", tmp_path / "one", 0)


def test_segments_of_av_clip_and_dac_are_kept(original, tiny, tmp_path, monkeypatch):
    weights = [f"encoder.weights={original.avclip}", f"tokenizer.weights={original.dac}"]
    small = "lm.num_layers=1 lm.dim=32 lm.num_heads=2 lm.channels=16 trainer.accelerator=cpu trainer.max_steps=2 data.workers=0"
    more = "data.duration=1.28 data.batch_size=2 data.takes=2 trainer.val_check_interval=1 logging.preview_clips=0"
    command = [f"config={REPOSITORY / 'configs' / 'train.yaml'}", "encoder=avclip", "tokenizer=dac_44khz", *weights, ONE]
    command += [f"data.manifest={tiny.manifest}", *small.split(), *more.split(), f"data.cache={tmp_path / 'cache'}"]
    assert run([*command, f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    no_files(monkeypatch)
    assert run([*command, f"hydra.run.dir={tmp_path / 'two'}"]) == 0


def start(*argv: str) -> None:
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_share_the_work_and_learn_the_same(command, tmp_path):
    main = [str(REPOSITORY / "main.py"), *command, TWO, "trainer.strategy=ddp"]
    start(*main, f"hydra.run.dir={tmp_path / 'files'}")
    start(*main, f"data.cache={tmp_path / 'cache'}", "data.takes=6", f"hydra.run.dir={tmp_path / 'kept'}")
    assert_same_run(tmp_path / "kept", tmp_path / "files", 1e-5)
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) >= 3  # both wrote


@pytest.mark.slow
def test_processes_that_taught_an_encoder_together_share_a_cache(command, tmp_path):
    new = [argument for argument in command if ".weights=" not in argument]
    teach = ["contrast.trainer.max_steps=2", "contrast.batch_size=1", "contrast.task.crop=0.32", "contrast.task.instants=4"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(REPOSITORY / "main.py"), *new, *teach]
    cache = [f"data.cache={tmp_path / 'cache'}", "data.takes=2"]
    start(*launch, TWO, "trainer.strategy=ddp", *cache, f"hydra.run.dir={tmp_path / 'run'}")
    assert len(list((tmp_path / "cache").glob("*/made_by.json"))) == 1
    assert len(losses(tmp_path / "run")["train/loss"]) == 6
