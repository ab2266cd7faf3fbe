"""Training end to end, tiny: what is interrupted goes on as if it had not been, and what cannot work is told in a sentence."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vaura.command import is_follower, translate
from vaura.config import compose
from vaura.data.clips import ClipDataset
from vaura.launch import run
from vaura.media.mux import write_video
from vaura.run_folder import start_time
from vaura.task.token_prediction import TokenPrediction

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN = f"config={REPOSITORY / 'configs' / 'train.yaml'}"
TINY = (
    "lm.num_layers=1 lm.dim=32 lm.num_heads=2 lm.channels=16 encoder.dim=16 encoder.width=8 encoder.size=32 "
    "contrast.trainer.max_steps=2 contrast.batch_size=2 contrast.task.crop=0.32 contrast.task.instants=4 "
    "tokenizer.codebook_size=16 tokenizer.num_codebooks=2 trainer.accelerator=cpu trainer.max_steps=8 "
    "trainer.val_check_interval=4 trainer.log_every_n_steps=1 data.workers=0 data.duration=0.64 data.batch_size=2 "
    "logging.preview_clips=1 task.hide_history=0.5 task.drop_condition=0.3"
)
ONE, TWO = "trainer.devices=1", "trainer.devices=2"
STILL = ["lm.dropout=0", "task.drop_condition=0", "task.hide_history=0"]  # nothing random but the data

pytestmark = pytest.mark.usefixtures("alone")


def clip(path: Path, seed: int, duration: float = 0.8, sound: bool = True) -> None:
    draw = torch.Generator().manual_seed(seed)
    picture = torch.randint(0, 255, (round(25 * duration), 3, 8, 8), generator=draw, dtype=torch.uint8)
    t = torch.arange(round(16000 * duration)) / 16000
    wav = (0.3 * torch.sin(2 * math.pi * (200 + 50 * seed) * t) * (7 * t % 1)).unsqueeze(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, picture.repeat_interleave(4, 2).repeat_interleave(4, 3), 25, wav if sound else None, 16000)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Twelve videos of 0.8 s, 11 of which are trained on: epochs of 5 batches of 2."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(12):
        clip(folder / f"clip_{number}.mp4", number)
    return folder


def start(*argv: str) -> subprocess.CompletedProcess[str]:
    """`python main.py ARGV` in a process of its own."""
    return subprocess.run(command(*argv), capture_output=True, text=True, timeout=200, env=environment(), check=False)


def command(*argv: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "main.py"), *argv]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def first(clips, tmp_path_factory) -> subprocess.CompletedProcess[str]:
    """A run from nothing; `args` ends with its folder."""
    folder = tmp_path_factory.mktemp("first") / "experiment"
    return start(TRAIN, f"data.data_dir={clips}", *TINY.split(), ONE, f"hydra.run.dir={folder}")


@pytest.fixture(scope="module")
def experiment(first) -> Path:
    assert first.returncode == 0, first.stderr
    return Path(first.args[-1].partition("=")[2])


@pytest.fixture(scope="module")
def fixed(clips, experiment) -> list[str]:
    """A run whose tokenizer and encoder are there already, on one process unless said otherwise."""
    weights = [f"{part}.weights={experiment / part}.safetensors" for part in ("tokenizer", "encoder")]
    return [TRAIN, f"data.data_dir={clips}", *TINY.split(), ONE, *weights]


@pytest.fixture
def batches(monkeypatch):
    """What every training step saw: epoch, index, clips and where they begin. `batches.stop` is told before each."""

    class Seen(list):
        stop = staticmethod(lambda step: None)

    seen, real = Seen(), TokenPrediction.training_step

    def training_step(self, batch, index):
        seen.append((self.trainer.current_epoch, index, batch["id"], batch["start"].tolist()))
        seen.stop(len(seen))
        return real(self, batch, index)

    monkeypatch.setattr(TokenPrediction, "training_step", training_step)
    return seen


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """The last value written for every step, over all event files of a run."""
    if not (folder / "tensorboard").is_dir():
        return {}
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}


def figures(folder: Path) -> dict[str, dict[int, float]]:
    """All but how fast it went."""
    return {tag: values for tag, values in scalars(folder).items() if not tag.startswith("throughput/")}


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights, optimizer, schedule and figures, bit by bit."""
    a, b = checkpoint(one), checkpoint(other)
    assert a["global_step"] == b["global_step"]
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer_states"], b["optimizer_states"], rtol=0, atol=0)
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert figures(one) == figures(other)
    assert kept(one) == kept(other)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


# --- interrupted, and gone on ---


def interrupt(step: int, at: int) -> None:
    if step == at:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("at", "options"),
    [
        (3, []),  # in the middle of an epoch
        (5, []),  # at its end
        (4, []),  # where a validation is due
        (2, ["trainer.val_check_interval=1"]),  # where every step is validated
        (3, ["trainer.accumulate_grad_batches=2"]),  # with half of the gradients of a step
        (4, ["data.workers=1"]),  # with batches read ahead
    ],
)
def test_ctrl_c_changes_nothing_of_the_run_that_goes_on(fixed, tmp_path, batches, at, options):
    """Data, cuts, dropout, drops, optimizer, schedule, figures and checkpoints; a run is 8 steps, 5 of them an epoch."""
    whole, parts = (f"hydra.run.dir={tmp_path / name}" for name in ("whole", "parts"))
    assert run([*fixed, *options, whole]) == 0
    uninterrupted = list(batches)
    batches.clear()
    batches.stop = lambda step: interrupt(step, at)
    assert run([*fixed, *options, parts]) == 130
    stopped_after = len(batches)
    assert stopped_after < len(uninterrupted)
    assert run([*fixed, *options, parts, f"resume={tmp_path / 'parts' / 'checkpoints' / 'last.ckpt'}"]) == 0
    assert batches == uninterrupted
    assert len({start for *_, starts in batches for start in starts}) > len(batches)  # the cuts do move
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_crash_goes_on_from_the_last_checkpoint(fixed, tmp_path, batches):
    """Step 7 dies in the middle; last.ckpt is of step 5, so steps 6 and 7 are made again."""

    def die(step):
        if step == 7:
            raise KeyboardInterrupt

    assert run([*fixed, "logging.last_every=5", f"hydra.run.dir={tmp_path / 'whole'}"]) == 0
    uninterrupted = list(batches)
    batches.clear()
    batches.stop = die
    parts = [*fixed, "logging.last_every=5", f"hydra.run.dir={tmp_path / 'parts'}"]
    assert run(parts) == 130
    assert checkpoint(tmp_path / "parts")["global_step"] == 5
    assert run(parts) == 0  # the folder alone says where to go on
    assert batches == uninterrupted[:7] + uninterrupted[5:]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_is_prolonged_as_if_it_had_been_meant_longer(fixed, tmp_path):
    """With a constant rate, 3 steps and then 5 are 8, though 3 steps end in the middle of an epoch."""
    constant = [*fixed, "task.optimizer.schedule.final=1", "trainer.val_check_interval=2"]
    assert run([*constant, f"hydra.run.dir={tmp_path / 'whole'}"]) == 0
    assert run([*constant, f"hydra.run.dir={tmp_path / 'parts'}", "trainer.max_steps=3"]) == 0
    assert run([*constant, f"hydra.run.dir={tmp_path / 'parts'}"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_published_command_goes_on_in_the_experiment(fixed, tmp_path, monkeypatch):
    """`config=EXP/config.yaml trainer.ckpt_path=EXP/checkpoints/last.ckpt`; without ckpt_path it is a new experiment."""
    monkeypatch.chdir(tmp_path)
    folder = Path("logs/ours/one")
    assert run([*fixed, f"hydra.run.dir={folder}", "trainer.max_steps=3"]) == 0
    saved = (folder / "config.yaml").read_text()
    again = [f"config={folder / 'config.yaml'}", "trainer.max_steps=5"]
    assert run([*again, f"trainer.ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"]) == 0
    assert checkpoint(folder)["global_step"] == 5
    assert (folder / "config.yaml").read_text() == saved
    assert [path.name for path in Path("logs").iterdir()] == ["ours"]
    assert run([*again, "name=theirs", "seed=3"]) == 0
    (new,) = Path("logs/theirs").iterdir()
    assert "seed: 3" in (new / "config.yaml").read_text()
    assert checkpoint(new)["global_step"] == 5
    assert checkpoint(folder)["global_step"] == 5


def test_ctrl_c_in_a_terminal_is_obeyed_at_the_end_of_the_step(fixed, tmp_path):
    """Exit status 130, a whole last.ckpt, and a sentence that says how to go on."""
    folder = tmp_path / "experiment"
    with running(folder, *fixed) as process:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == f"interrupted; the same command with hydra.run.dir={folder} goes on"
    assert "Traceback" not in said
    assert 0 < checkpoint(folder)["global_step"] < 100000


@contextmanager
def running(folder: Path, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """`main.py ARGV` in a session of its own, once it has made its first steps in `folder`; nothing of it outlives the test."""
    arguments = command(*argv, f"hydra.run.dir={folder}", "trainer.max_steps=100000", "trainer.val_check_interval=1000")
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True)
    try:
        wait_for(lambda: process.poll() is not None or "train/loss" in scalars(folder))
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(happened: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.2)


# --- what a run leaves behind ---


def test_a_run_says_nothing_but_its_progress(first):
    titles = "look at the videos|read the sounds|listening|fitting codebooks|teach the encoder|train the token LM"
    lines = first.stderr.splitlines()
    assert [line for line in lines if not line.startswith(tuple(f"{title}:" for title in titles.split("|")))] == []
    assert first.stdout.startswith("experiment: ")
    assert len(first.stdout.splitlines()) == 1


def test_checkpoints_hold_only_what_was_trained(experiment):
    paths = sorted(experiment.rglob("*.ckpt"))
    assert {path.parent.parent.name for path in paths} == {"experiment", "encoder"}
    for path in experiment.glob("checkpoints/*.ckpt"):
        keys = list(torch.load(path, weights_only=True)["state_dict"])
        assert keys
        assert not [key for key in keys if key.startswith(("tokenizer.", "encoder."))]
    assert [path.name for path in experiment.glob("encoder/checkpoints/*")] == ["last.ckpt"]


def test_tensorboard_shows_figures_and_sound(experiment):
    board = EventAccumulator(str(experiment / "tensorboard"), size_guidance={"audio": 0, "images": 0})
    board.Reload()
    tags = board.Tags()
    written = scalars(experiment)
    for tag in ("train/loss", "train/loss_codebook_0", "train/loss_codebook_1", "train/gradient_norm", "lr-AdamW/pg1"):
        assert list(written[tag]) == list(range(8)), tag
        assert all(map(math.isfinite, written[tag].values()))
    assert list(written["val/loss"]) == [3, 7]
    for split in ("train", "val"):
        first, second = (written[f"{split}/loss_codebook_{k}"] for k in (0, 1))
        assert written[f"{split}/loss"] == pytest.approx({step: (first[step] + second[step]) / 2 for step in first})
    for kind, times in (("true", 1), ("generated", 2)):
        (sound,) = [tag for tag in tags["audio"] if tag.endswith(f"/{kind}")]
        assert sound in tags["images"]
        heard = board.Audio(sound)
        assert len(heard) == times
        assert (heard[0].sample_rate, heard[0].length_frames) == (16000, 10240)


def test_early_stopping_stops(fixed, tmp_path, batches):
    """A rate of 0 never improves: two validations without a better one than the first."""
    options = ["trainer.max_steps=40", "trainer.val_check_interval=2", "logging.patience=2", "task.optimizer.lr=0"]
    assert run([*fixed, *options, f"hydra.run.dir={tmp_path}"]) == 0
    assert len(batches) == 6
    assert checkpoint(tmp_path)["global_step"] == 6


def test_half_precision_and_batches_larger_than_the_corpus(fixed, tmp_path, batches):
    """11 clips are one batch; the weights stay in single precision."""
    options = ["trainer.precision=bf16-mixed", "data.batch_size=64", "trainer.accumulate_grad_batches=2", "trainer.max_steps=2"]
    assert run([*fixed, *options, f"hydra.run.dir={tmp_path}"]) == 0
    assert [len(ids) for _, _, ids, _ in batches] == [11] * len(batches)
    assert {value.dtype for value in checkpoint(tmp_path)["state_dict"].values()} == {torch.float32}
    assert all(map(math.isfinite, scalars(tmp_path)["train/loss"].values()))


# --- several processes ---


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_twice_the_batch(fixed, tmp_path):
    """Their clips are disjoint, and the average of their gradients is the gradient of both."""
    common = [argument for argument in fixed if argument != ONE] + STILL
    assert run([*common, ONE, "data.batch_size=4", f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    two = start(*common, TWO, "data.batch_size=2", "trainer.strategy=ddp", f"hydra.run.dir={tmp_path / 'two'}")
    assert two.returncode == 0, two.stderr
    a, b = (checkpoint(tmp_path / name)["state_dict"] for name in ("one", "two"))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    losses = [scalars(tmp_path / name)["val/loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.slow
def test_divided_parameters_learn_what_one_process_learns_from_twice_the_batch(fixed, tmp_path):
    """FSDP2 on two processes, with a resume in the middle; its checkpoint is one whole file, as any other."""
    common = [argument for argument in fixed if argument != ONE] + STILL
    assert run([*common, ONE, "data.batch_size=4", f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    two = [*common, TWO, "data.batch_size=2", "trainer.strategy=fsdp2", f"hydra.run.dir={tmp_path / 'two'}"]
    for steps in ("trainer.max_steps=3", "trainer.max_steps=8"):
        done = start(*two, "task.optimizer.schedule.total=8", steps)
        assert done.returncode == 0, done.stderr
    a, b = (checkpoint(tmp_path / name)["state_dict"] for name in ("one", "two"))
    assert list(a) == list(b)
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    losses = [scalars(tmp_path / name)["val/loss"] for name in ("one", "two")]
    assert losses[0][7] == pytest.approx(losses[1][7], abs=1e-5)


def test_every_option_of_speed_trains_goes_on_and_generates(fixed, tmp_path):
    options = ["trainer.precision=bf16-mixed", "task.checkpoint_activations=true", "task.optimizer.fused=true"]
    assert run([*fixed, *options, "trainer.max_steps=3", f"hydra.run.dir={tmp_path}"]) == 0
    assert run([*fixed, *options, f"hydra.run.dir={tmp_path}"]) == 0
    keys = list(checkpoint(tmp_path)["state_dict"])
    assert not [key for key in keys if "_orig_mod" in key]
    written = scalars(tmp_path)
    assert set(written["throughput/frames_per_second"]) == set(range(8))
    assert all(value > 0 for value in written["throughput/mfu"].values())
    assert all(0 <= value <= 1 for value in written["throughput/waiting"].values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_learn_the_same_and_go_on_uncompiled(fixed, tmp_path):
    """Validation and its previews run too; the checkpoint knows nothing of it."""
    still = [*fixed, *STILL, "task.optimizer.schedule.total=8"]
    assert run([*still, "trainer.max_steps=6", f"hydra.run.dir={tmp_path / 'plain'}"]) == 0
    parts = f"hydra.run.dir={tmp_path / 'compiled'}"
    assert run([*still, "task.compile=blocks", "trainer.max_steps=4", parts]) == 0
    assert run([*still, "trainer.max_steps=6", parts]) == 0
    a, b = (checkpoint(tmp_path / name)["state_dict"] for name in ("plain", "compiled"))
    assert list(a) == list(b)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("task.compile=block", "task.compile=block is none of false, blocks"),
        ("task.optimizer.fused=automatic", "task.optimizer.fused=automatic is none of auto, true, false"),
        ("task.checkpoint_activations=-1", "task.checkpoint_activations=-1 is none of"),
    ],
)
def test_options_of_speed_that_do_not_exist(fixed, tmp_path, capsys, change, said):
    assert said in refused(capsys, *fixed, change, f"hydra.run.dir={tmp_path}")


@pytest.mark.slow
def test_torchrun_goes_through_all_stages_in_one_folder(clips, tmp_path):
    """Tokenizer, encoder and token LM, on two processes that share an experiment without being told its folder."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command()[1:]]
    arguments = [TRAIN, f"data.data_dir={clips}", *TINY.split(), TWO, "trainer.strategy=ddp", "trainer.max_steps=4"]
    done = subprocess.run(
        [*launch, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=200, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "logs" / "train").iterdir()
    assert done.stdout.splitlines() == [f"experiment: {tmp_path / folder}"]
    assert {"tokenizer.safetensors", "encoder.safetensors", "config.yaml"} <= {path.name for path in folder.iterdir()}
    assert checkpoint(folder)["global_step"] == 4


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_ctrl_c_ends_all_processes(fixed, tmp_path):
    """A terminal sends Ctrl-C to both at once; they end together, behind one last checkpoint."""
    arguments = [argument for argument in fixed if argument != ONE]
    with running(tmp_path, *arguments, TWO, "trainer.strategy=ddp") as process:
        assert len(members(process.pid)) == 2
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert said.splitlines()[-1] == f"interrupted; the same command with hydra.run.dir={tmp_path} goes on"
        assert said.count("interrupted") == 1
        wait_for(lambda: not members(process.pid), 10)
    assert checkpoint(tmp_path)["global_step"] > 0


def members(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def test_the_processes_of_a_job_agree_on_a_folder_and_on_who_writes(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID", "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    alone = start_time()
    assert not is_follower()
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert start_time() == alone  # a job of one process may hold several runs
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_ID", "2")
    for rank in ("0", "3"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        monkeypatch.setenv("LOCAL_RANK", "0")  # the first of its machine need not be the first of all
        assert start_time() == "job-4711-2" != alone
        assert is_follower() == (rank == "3")
        follows = "hydra.output_subdir=null" in translate([TRAIN]).arguments
        assert follows == (rank == "3")
    monkeypatch.delenv("SLURM_NTASKS")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert start_time() == "run-mine"
    monkeypatch.setenv("RANK", "0")  # torchrun's word goes before SLURM's
    assert not is_follower()


# --- what cannot work ---


def refused(capsys, *argv: str) -> str:
    """The one sentence that a refused command says."""
    capsys.readouterr()
    assert run(list(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    return lines[0]


def test_a_loss_that_is_no_number(fixed, tmp_path, capsys):
    huge = ["task.optimizer.lr=1e30", "task.optimizer.schedule.warmup=0"]
    said = refused(capsys, *fixed, *huge, f"hydra.run.dir={tmp_path}")
    assert "the training loss is no longer a finite number at step 2; lower task.optimizer.lr " in said
    validated = refused(capsys, *fixed, *huge, "trainer.val_check_interval=1", f"hydra.run.dir={tmp_path / 'b'}")
    assert "the validation loss is no longer a finite number at step 1; " in validated
    assert kept(tmp_path / "b") == []


def test_checkpoints_that_cannot_be_gone_on_from(fixed, experiment, tmp_path, capsys):
    good = experiment / "checkpoints" / "last.ckpt"
    cut, alien, bare = (tmp_path / f"{name}.ckpt" for name in ("cut", "alien", "bare"))
    cut.write_bytes(good.read_bytes()[:-1000])
    content = torch.load(good, weights_only=True)
    torch.save({"state_dict": content["state_dict"]}, bare)
    torch.save([1, 2], alien)
    new = f"hydra.run.dir={tmp_path / 'new'}"
    assert f"checkpoint {cut} cannot be read" in refused(capsys, *fixed, new, f"resume={cut}")
    assert f"{alien} is no checkpoint" in refused(capsys, *fixed, new, f"resume={alien}")
    assert "no state of its training" in refused(capsys, *fixed, new, f"resume={bare}")
    said = refused(capsys, *fixed, f"hydra.run.dir={tmp_path / 'other'}", f"resume={good}", "lm.dim=64")
    assert f"checkpoint {good} belongs to another model: " in said
    assert "shape" in said
    said = refused(capsys, *fixed, f"resume={good}", "lm.pattern=parallel")  # would fit, and would be another model
    assert f"{experiment} is an experiment with " in said
    missing = refused(capsys, *fixed, f"hydra.run.dir={tmp_path / 'none'}", f"resume={tmp_path / 'none.ckpt'}")
    assert f"there is no checkpoint {tmp_path / 'none.ckpt'}" in missing
    assert not (tmp_path / "none").exists()


def test_data_that_cannot_be_trained_on(fixed, tmp_path, capsys):
    """Every file that is left out is named with its reason."""
    empty, useless = tmp_path / "empty", tmp_path / "useless"
    empty.mkdir()
    clip(useless / "short.mp4", 0, duration=0.4)
    clip(useless / "mute.mp4", 1, sound=False)
    (useless / "text.mp4").write_text("no video at all")
    arguments = [argument for argument in fixed if not argument.startswith("data.data_dir")]
    said = refused(capsys, *arguments, f"data.data_dir={empty}", f"hydra.run.dir={tmp_path / 'a'}")
    assert f"there is no video below {empty}" in said
    said = refused(capsys, *arguments, f"data.data_dir={useless}", f"hydra.run.dir={tmp_path / 'b'}")
    for name, reason in (("short.mp4", "shorter than the 0.64 s"), ("mute.mp4", "no sound"), ("text.mp4", "")):
        assert f"{useless / name}" in said
        assert reason in said


def test_a_folder_that_cannot_be_written(fixed, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    said = refused(capsys, *fixed, f"hydra.run.dir={tmp_path / 'file' / 'experiment'}")
    assert str(tmp_path / "file") in said


def test_what_the_house_decides_is_not_for_the_config(fixed, tmp_path, capsys):
    said = refused(capsys, *fixed, "+trainer.logger=false", f"hydra.run.dir={tmp_path}")
    assert said.startswith("error: trainer.logger ")


@pytest.mark.parametrize("change", ["trainer.precision=bf16mixed", "trainer.strategy=dpp", "trainer.val_check_interval=0.5"])
def test_a_trainer_that_will_not_do_is_refused_before_the_first_stage(fixed, tmp_path, capsys, change):
    said = refused(capsys, *fixed, change, f"hydra.run.dir={tmp_path / 'run'}")
    assert "the trainer's settings will not do" in said
    assert not (tmp_path / "run" / "tokenizer.safetensors").exists()


def test_validation_clips_of_which_none_can_be_read(tmp_path, capsys, monkeypatch):
    for number, split in enumerate(["train"] * 3 + ["val"]):
        clip(tmp_path / "clips" / split / f"clip_{number}.mp4", number)
    broken = (tmp_path / "clips" / "val").glob("*.mp4")
    real = ClipDataset.__getitem__
    blind = set(broken)

    def getitem(self, key):
        return None if self.clips[key[1]].video in blind else real(self, key)

    monkeypatch.setattr(ClipDataset, "__getitem__", getitem)
    folder = [f"data.data_dir={tmp_path / 'clips'}", f"hydra.run.dir={tmp_path / 'run'}", "logging.preview_clips=0"]
    assert "none of the validation clips can be read" in refused(capsys, TRAIN, *TINY.split(), ONE, *folder)


def test_both_trainers_run_on_the_same_machines():
    config = compose(
        REPOSITORY / "configs" / "train.yaml", ["trainer.num_nodes=2", "trainer.devices=4", "trainer.strategy=ddp"]
    )
    for key in ("num_nodes", "devices", "strategy", "accelerator"):
        assert config.contrast.trainer[key] == config.trainer[key]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_precision_that_would_turn_the_frozen_parts_is_refused(fixed, tmp_path, capsys, precision):
    said = refused(capsys, *fixed, f"trainer.precision={precision}", f"hydra.run.dir={tmp_path / 'run'}")
    assert f"trainer.precision={precision} would turn the frozen codec and encoder too" in said
