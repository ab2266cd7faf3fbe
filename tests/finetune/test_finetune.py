"""Fine-tuning end to end, tiny: the new experiment stands alone, says what became of it, and refuses what cannot be learnt."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import vaura
from vaura import experiment
from vaura.config import compose, load_config
from vaura.data.world import SECOND, World, build
from vaura.errors import InputError
from vaura.finetune.beginning import begin, join
from vaura.finetune.comparison import rows_of, table, verdict
from vaura.finetune.verb import check_fit
from vaura.launch import run
from vaura.lm.lora import LowRank
from vaura.media.content import content_hash

STEPS = "trainer.max_steps=4 trainer.val_check_interval=2 task.optimizer.schedule.total=4 task.optimizer.schedule.warmup=1"
FEW = (
    f"trainer.accelerator=cpu trainer.devices=1 data.batch_size=2 data.workers=0 data.takes=2 measures.clips=2 {STEPS}".split()
)

pytestmark = pytest.mark.usefixtures("alone")


class Tuned(NamedTuple):
    """An experiment that went on from a copy of the tiny one, which is gone."""

    folder: Path
    base: Path
    command: list[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Clips of other materials."""
    seeds = {"train": range(3), "val": range(10, 12), "test": range(20, 22)}
    return build(tmp_path_factory.mktemp("second"), seeds, World(materials=SECOND, size=64, duration=1.92), workers=1)


@pytest.fixture(scope="module")
def tuned(tiny, world, tmp_path_factory) -> Tuned:
    root = tmp_path_factory.mktemp("tuned")
    shutil.copytree(tiny.folder, root / "base")
    given = [f"experiment_path={root / 'base'}", f"data.manifest={world}", f"hydra.run.dir={root / 'new'}", "adapt=lora"]
    command = ["config=finetune", *given, *FEW]
    argv, sys.argv = sys.argv, ["main.py"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run([*command]) == 0
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    (root / "base").rename(root / "gone")
    return Tuned(root / "new", root / "gone", command)


def test_the_experiment_says_where_it_came_from_and_keeps_what_learnt(tuned):
    config = load_config(tuned.folder / "config.yaml")
    (best,) = [path for path in (tuned.base / "checkpoints").glob("*.ckpt") if path.name == config.origin.checkpoint]
    assert config.origin.digest == content_hash(best)
    assert config.origin.duration == config.data.duration == 0.64
    assert config.task.optimizer.lr == pytest.approx(0.03)  # the tiny one's, a whole share of it
    content = torch.load(tuned.folder / "checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 4
    assert all(key.startswith("conditioner.") or key.endswith((".up", ".down")) for key in content["state_dict"])
    assert any("qkv.up" in key for key in content["state_dict"])


def test_it_stands_alone_and_its_beginning_is_the_model_it_came_from(tuned, world, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(tuned.folder, moved)
    config = load_config(moved / "config.yaml")
    base, _ = experiment.load(tuned.base)
    begun, _ = experiment.load(moved, moved / "start.safetensors")
    assert begun.state_dict().keys() == base.state_dict().keys() == load_file(moved / "start.safetensors").keys()
    assert all(value.equal(base.state_dict()[key]) for key, value in begun.state_dict().items())
    model = vaura.load(moved)
    assert not any(isinstance(module, LowRank) for module in model.task.lm.modules())
    video = next(world.parent.glob("test/*.mp4"))
    assert model.generate(video).wav.shape == vaura.load(tuned.base).generate(video).wav.shape
    assert config.experiment_path == str(tuned.base.with_name("base"))
    best = experiment.best_checkpoint(moved)
    assert run([f"config={moved / 'config.yaml'}", "action=test", f"resume={best}"]) == 0
    assert json.loads((moved / "test.json").read_text())["clips"] == 2


def test_what_became_of_it_is_told(tuned):
    result = json.loads((tuned.folder / "finetune.json").read_text())
    rows = {row.name: row for row in rows_of(result)}
    assert {"validation loss, nats", "onset F1", "envelope correlation", "log-spectral distance, dB"} <= rows.keys()
    assert result["improved"] == (rows["validation loss, nats"].after < rows["validation loss, nats"].before)
    assert result["before"]["split"] == "test"
    assert 0 < result["parameters"]["learning"] < result["parameters"]["all"]
    best = float(result["checkpoint"].partition("val_loss=")[2].removesuffix(".ckpt"))
    assert result["after"]["validation_loss"] == pytest.approx(best, abs=1e-4)  # what Lightning found
    page = (tuned.folder / "report/index.html").read_text()
    assert "test_000020, before" in page
    assert "test_000020, after" in page
    assert len(list((tuned.folder / "samples").rglob("*.mp4"))) == 6


def test_a_loss_that_did_not_fall_is_told_plainly(tmp_path):
    result = {"before": {"validation_loss": 1.0, "onset_f1": 0.5}, "after": {"validation_loss": 1.25, "onset_f1": 0.75}}
    assert "did not improve: 1.0000 before, 1.2500" in verdict(tmp_path, result)
    assert f"checkpoint={tmp_path / 'start.safetensors'}" in verdict(tmp_path, result)
    assert [line.split()[-1] for line in table(rows_of(result)).splitlines()[1:]] == ["worse", "better"]
    result["after"]["validation_loss"] = 0.5
    assert verdict(tmp_path, result) == "The validation loss fell from 1.0000 to 0.5000."


def test_what_the_sounds_say_against_it_is_told(tmp_path):
    before = {"validation_loss": 1.0, "onset_f1": 0.5, "onset_f1_chance": 0.3, "stft_convergence": 0.8}
    after = {"validation_loss": 0.5, "onset_f1": 0.45, "onset_f1_chance": 0.3, "stft_convergence": 0.7}
    told = "The validation loss fell from 1.0000 to 0.5000. The held-out sounds got worse in onset F1."
    assert verdict(tmp_path, {"before": before, "after": after}) == told
    after["intervals"] = {"onset_f1": [0.25, 0.6]}
    chance = " They fall no surer than by chance: onset F1 0.45, against another clip's truth 0.30."
    assert verdict(tmp_path, {"before": before, "after": after}) == told + chance


def test_a_run_that_stopped_goes_on_as_if_it_had_not_and_without_its_base(tuned, tmp_path):
    folder = tmp_path / "again"
    tuned.base.rename(tuned.base.with_name("base"))
    command = [word for word in tuned.command if not word.startswith(("hydra.run.dir", "trainer.max_steps"))]
    command += [f"hydra.run.dir={folder}"]
    try:
        assert run([*command, "trainer.max_steps=2"]) == 0
    finally:
        tuned.base.with_name("base").rename(tuned.base)
    before = json.loads((folder / "finetune.json").read_text())["before"]
    assert run([*command, "trainer.max_steps=4"]) == 0
    one, other = (torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (tuned.folder, folder))
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(value.equal(other["state_dict"][key]) for key, value in one["state_dict"].items())
    assert json.loads((folder / "finetune.json").read_text())["before"] == before
    assert len((folder / "config.yaml").read_text()) > 0


def test_a_folder_of_another_experiment_is_refused(tuned, tiny, tmp_path):
    config = compose("finetune", [f"experiment_path={tiny.folder}"])
    with pytest.raises(InputError, match=r"did not begin with another; give hydra\.run\.dir=NEW_FOLDER"):
        begin(config, tiny.folder)
    with pytest.raises(InputError, match=r"began with .*base, not with"):
        begin(config, tuned.folder)
    other = compose("finetune", [f"experiment_path={tuned.base.with_name('base')}", "adapt=all"])
    with pytest.raises(InputError, match=r"adapt\._target_"):
        begin(other, tuned.folder)


def test_one_of_vauras_own_begins_another(original, tmp_path):
    config = begin(compose("finetune", [f"experiment_path={original.folder}", "adapt=last_blocks", "adapt.blocks=1"]), tmp_path)
    assert {"start.safetensors", "tokenizer.safetensors", "encoder.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert str(original.folder) not in OmegaConf.to_yaml(OmegaConf.masked_copy(config, ["tokenizer", "encoder", "lm", "task"]))
    task, base = experiment.build(config, tmp_path).eval(), experiment.load(original.folder)[0]
    task.become_plain()
    assert all(value.equal(base.state_dict()[key]) for key, value in task.state_dict().items())
    wav = torch.randn(1, 1, 4096)
    assert task.tokenizer.encode(wav).equal(base.tokenizer.encode(wav))
    picture = torch.randint(
        0,
        255,
        (1, 16, 3, *base.encoder.size)
        if isinstance(base.encoder.size, tuple)
        else (1, 16, 3, base.encoder.size, base.encoder.size),
        dtype=torch.uint8,
    )
    assert task.encoder(picture).equal(base.encoder(picture))


def fit(classes: int = 0, positions: int | None = None, data: object = None, **given) -> None:
    lm = SimpleNamespace(
        num_steps=lambda frames: 5 * frames, positions=None if positions is None else [0] * positions, starts_with_prefix=True
    )
    task = SimpleNamespace(
        conditioner=SimpleNamespace(classes=classes, length=3),
        lm=lm,
        tokenizer=SimpleNamespace(num_frames=lambda seconds: round(10 * seconds)),
    )
    config = OmegaConf.create({"data": {"duration": 2.0, **given}, "origin": {"duration": 2.0}})
    check_fit(config, task, data or SimpleNamespace(clips={"val": [1]}))  # type: ignore[arg-type]


def test_clips_that_do_not_fit_are_refused():
    fit()
    with pytest.raises(InputError, match=r"told one of its 8 classes, and the clips of data name none"):
        fit(classes=8)
    fit(positions=102)
    with pytest.raises(InputError, match=r"duration=2 takes 102 positions, .* has learnt 101; lower it to 2 or less"):
        fit(positions=101)
    with pytest.warns(UserWarning, match=r"duration=3 is longer than the 2 s of sound"):
        fit(duration=3.0)
    with pytest.warns(UserWarning, match="no clip validates"):
        fit(data=SimpleNamespace(clips={"val": []}))


def test_settings_of_the_task_are_the_bases_but_for_those_given(tiny):
    base = load_config(tiny.folder / "config.yaml")
    whole = join(compose("finetune", ["experiment_path=e", "task.optimizer.lr=0.5"]), base, {"duration": 0.64})
    assert whole.task.hide_history == base.task.hide_history
    assert (whole.task.optimizer.lr, whole.data.duration) == (0.5, 0.64)
    assert OmegaConf.is_interpolation(whole.task, "adapt")
    with_more = compose("finetune", ["experiment_path=e", "+task.hide_history=0.9"])
    assert join(with_more, base, {}).task.hide_history == 0.9
