"""The command line in-process, against a small folder of configs and a verb that only remembers what it was given."""

import logging
import sys
import types
from pathlib import Path

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vaura import config
from vaura.config import check_components, compose, load_config, run, run_dir, runnable, save_config
from vaura.errors import InputError

TRAIN = """\
# trains a small thing
defaults:
  - schema: train
  - house
  - tokenizer: encodec_24khz
  - lm: small
  - _self_
name: hello
data:
  batch_size: 4
  root: here
  betas: [0.9, 0.95]
encoder: null
logging: null
conditioner: null
task: null
trainer:
  max_steps: 3
"""
FILES = {
    "train.yaml": TRAIN,
    "resumed.yaml": TRAIN.replace("name: hello", "name: again\nhydra:\n  run:\n    dir: ${resume_or_new:logs/${name}}"),
    "twin.yaml": TRAIN.replace("name: hello", "name: again\nhydra:\n  run:\n    dir: ${resume_or_new:logs/${name}}"),
    "open.yaml": TRAIN.replace("root: here", "root: ???  # the folder of clips"),
    "stranger.yaml": TRAIN + "trainr: 3\n",
    "mistyped.yaml": TRAIN + "seed: many\n",
    "broken.yaml": "a: 1\nb: c: d\n",
    "bare.yaml": TRAIN.replace("  - schema: train\n", ""),
    "lm/small.yaml": "num_layers: 2\ndim: ${data.batch_size}\n",
    "lm/large.yaml": "num_layers: 24\ndim: ${data.batch_size}\n",
    "tokenizer/encodec_24khz.yaml": "bandwidth: 6.0\n",
    "experiments/system/main.yaml": "# @package _global_\n# the published one\ndefaults:\n  - /train\n  - override /lm: large\n"
    "  - _self_\nname: main\nseed: 7\n",
    "experiments/system/lost.yaml": "defaults:\n  - /train\n  - _self_\nname: lost\n",
}


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """The small folder of configs, in a repository that is the working folder."""
    for name, text in FILES.items():
        path = tmp_path / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "configs/house.yaml").write_text((config.CONFIGS / "house.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["main.py"])
    handlers = logging.root.handlers[:]
    yield tmp_path / "configs"
    logging.root.handlers[:] = handlers


@pytest.fixture
def seen(monkeypatch):
    """Every call of a verb: the config, the experiment folder, and the command line as the verb saw it."""
    calls = []

    def verb(cfg: DictConfig) -> None:
        calls.append(types.SimpleNamespace(cfg=cfg, folder=run_dir(), argv=sys.argv[1:]))

    monkeypatch.setitem(sys.modules, "fake_verb", types.SimpleNamespace(verb=verb))
    for action in config.VERBS:
        monkeypatch.setitem(config.VERBS, action, "fake_verb:verb")
    return calls


def refusal(capsys, configs, *argv):
    """The sentence with which a command line is refused."""
    assert run(argv, configs) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert "HYDRA_FULL_ERROR" not in err
    return err.removeprefix("error: ").rstrip("\n")


# --- finding and composing a config ---


@pytest.mark.parametrize("given", ["configs/train.yaml", "{absolute}/train.yaml", "train", "configs/train"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_config_is_found_from_any_folder(configs, seen, tmp_path, monkeypatch, given, elsewhere):
    if elsewhere:
        (tmp_path / "other place").mkdir()
        monkeypatch.chdir(tmp_path / "other place")
    assert run([f"config={given.format(absolute=configs)}", "lm=large"], configs) == 0
    assert (seen[0].cfg.name, seen[0].cfg.lm.num_layers) == ("hello", 24)
    assert seen[0].folder.parent == Path.cwd() / "logs/hello"


def test_an_experiment_inherits_and_overrides(configs, seen):
    assert run(["config=configs/experiments/system/main.yaml", "trainer.max_steps=5"], configs) == 0
    cfg = seen[0].cfg
    assert (cfg.name, cfg.seed, cfg.lm.num_layers, cfg.trainer.max_steps) == ("main", 7, 24, 5)


def test_a_saved_experiment_runs_again_and_overrides_reach_its_references(configs, seen, tmp_path):
    run(["config=train", "lm=large", "seed=3"], configs)
    saved = tmp_path / "moved, with space" / "config.yaml"
    save_config(seen[0].cfg, saved)
    assert load_config(saved) == seen[0].cfg
    assert run([f"config={saved}", "data.batch_size=9"], configs) == 0
    cfg = seen[1].cfg
    assert (cfg.seed, cfg.lm.num_layers, cfg.lm.dim) == (3, 24, 9)
    assert OmegaConf.get_type(cfg) is config.TrainRun
    assert seen[1].folder.parent == tmp_path / "logs/hello"
    assert run([f"config={saved}", "trainer.max_stepss=1"], configs) == 2


def test_compose_gives_what_the_verb_gets(configs, seen):
    argv = ["lm=large", "dataloader.batch_size=8"]
    run(["config=train", *argv], configs)
    assert compose("train", argv, configs) == seen[0].cfg


def test_published_spellings(configs, seen):
    published = ["dataloader.batch_size=7", "trainer.seed=666", "trainer.experiment_name=vgg"]
    assert run(["config=train", *published], configs) == 0
    cfg = seen[0].cfg
    assert (cfg.data.batch_size, cfg.seed, cfg.name) == (7, 666, "vgg")
    (configs / "generate.yaml").write_text("defaults: [{schema: generate}, house, _self_]\nsampler: null\n")
    given = ["experiment_path=e", "video=v", "cfg_scale=6", "overridden_hparams.feature_extractor_config.params.ckpt_path=x.pt"]
    assert run(["config=generate", *given], configs) == 0
    assert seen[1].cfg.guidance == 6
    assert seen[1].cfg.overridden_hparams == {"feature_extractor_config": {"params": {"ckpt_path": "x.pt"}}}


# --- Hydra's own doors stay open ---


def test_show_without_running(configs, seen, capsys):
    assert run(["config=train", "--cfg", "job", "seed=8"], configs) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.seed, shown.lm.dim) == (8, 4)
    assert OmegaConf.is_interpolation(shown.lm, "dim")
    assert not seen


def test_a_sweep_runs_every_job_in_a_folder_of_its_own(configs, seen):
    assert run(["config=train", "lm=large", "--multirun", "seed=1,2"], configs) == 0
    assert [call.cfg.seed for call in seen] == [1, 2]
    assert seen[0].folder != seen[1].folder
    assert [call.argv[1:] for call in seen] == [["lm=large", "seed=1"], ["lm=large", "seed=2"]]


def test_lightning_starts_the_same_command_for_a_second_device(configs, seen, monkeypatch):
    from lightning.fabric.strategies.launchers.subprocess_script import _hydra_subprocess_cmd

    relaunched = []

    def verb(cfg: DictConfig) -> None:
        command, _ = _hydra_subprocess_cmd(local_rank=1)
        relaunched.append(list(command[command.index("config=train") :]))

    monkeypatch.setitem(sys.modules, "launching_verb", types.SimpleNamespace(verb=verb))
    monkeypatch.setitem(config.VERBS, "train", "launching_verb:verb")
    argv = ["config=train", "dataloader.batch_size=5", "seed=2"]
    monkeypatch.setattr(sys, "argv", ["main.py", *argv])
    assert run(argv, configs) == 0
    folders = set(Path("logs/hello").iterdir())
    monkeypatch.setitem(config.VERBS, "train", "fake_verb:verb")
    assert run(relaunched[0], configs) == 0
    assert (seen[0].cfg.data.batch_size, seen[0].cfg.seed) == (5, 2)
    assert {seen[0].folder} == {folder.absolute() for folder in folders}


def test_the_ranks_of_torchrun_share_one_folder(configs, seen, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run(["config=train"], configs) == 0
    assert [run.folder for run in seen] == [Path("logs/hello/run-7").absolute()] * 2


# --- the same command resumes ---


def test_the_same_command_resumes_until_it_is_finished(configs, seen):
    def folder(*argv: str) -> Path:
        assert run(argv, configs) == 0
        return seen[-1].folder

    command = ["config=resumed", "lm.dim=${data.batch_size}", "seed=1"]
    first = folder(*command)
    assert first.parent == Path.cwd() / "logs/again"
    assert folder(*command) == first
    other = folder("config=resumed", "seed=2")
    assert other != first
    assert folder("config=twin", "seed=2") not in (first, other)
    assert folder(*command) == first
    (first / "finished").touch()
    second = folder(*command)
    assert second not in (first, other)
    assert folder(*command) == second
    (configs / "lm/small.yaml").write_text("num_layers: 3\ndim: 8\n")
    assert folder(*command) not in (first, second)


def test_the_folder_of_a_run_does_not_change_while_it_runs(configs, seen, monkeypatch):
    told = []

    def verb(cfg: DictConfig) -> None:
        told.append(HydraConfig.get().run.dir)
        (run_dir() / "finished").touch()
        told.append(HydraConfig.get().run.dir)

    monkeypatch.setattr(sys.modules["fake_verb"], "verb", verb)
    assert run(["config=resumed"], configs) == 0
    assert told[0] == told[1]
    assert Path(told[0]).resolve() == Path(told[0], "finished").resolve().parent


@pytest.mark.parametrize("stop", [KeyboardInterrupt, "lightning"])
def test_interrupted(configs, seen, monkeypatch, capsys, stop):
    def verb(cfg: DictConfig) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if stop == "lightning":  # its Trainer turns Ctrl-C into sys.exit(1)
                sys.exit(1)
            raise

    monkeypatch.setattr(sys.modules["fake_verb"], "verb", verb)
    assert run(["config=resumed"], configs) == 130
    (folder,) = Path("logs/again").iterdir()
    assert capsys.readouterr().err == f"interrupted; the same command resumes in {folder}\n"
    assert run(["config=train"], configs) == 130
    assert capsys.readouterr().err == "interrupted\n"


# --- refusals ---


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["trainer.max_stepss=3"], "unknown key 'trainer.max_stepss'. Did you mean 'trainer.max_steps'?"),
        (["lm=large", "lm.num_layer=3"], "unknown key 'lm.num_layer'. Did you mean 'lm.num_layers'?"),
        (["batch_sise=3"], "unknown key 'batch_sise'. Did you mean 'data.batch_size'?"),
        (["+sed=1"], "unknown key 'sed'. Did you mean 'seed'?"),
        (["++foo.bar=1"], "unknown key 'foo'. --cfg job shows every key."),
        (["hydra.runn.dir=x"], "unknown key 'hydra.runn.dir'. --cfg hydra shows every key."),
        (["seed=abc"], "seed takes a whole number, not 'abc'"),
        (["--multirun", "seed=1,abc"], "seed takes a whole number, not 'abc'"),
        (["name=null"], "name takes a value, not null"),
        (["seed"], "'seed' is no override; write seed=VALUE"),
        (["seed=1,2"], "'seed=1,2' gives several values; write seed=[1,2] for a list, or add --multirun to run each"),
        (
            ["lm.dim=${data.batch_sise}"],
            "lm.dim refers to ${data.batch_sise}, which does not exist. Did you mean 'data.batch_size'?",
        ),
        (["~lm"], "lm (predicts codes): no value given; add lm=VALUE"),
        (["name=???"], "name (the experiment's name: its folder is logs/NAME/TIME): no value given; add name=VALUE"),
        (["action=trian"], "unknown action 'trian'; there are train, generate, evaluate, quickstart. Did you mean 'train'?"),
        (
            ["tokenizer=encodek_24khz"],
            "there is no tokenizer 'encodek_24khz'; there are encodec_24khz. Did you mean 'encodec_24khz'?",
        ),
    ],
)
def test_a_wrong_word_is_refused_in_one_sentence(configs, seen, capsys, argv, sentence):
    assert refusal(capsys, configs, "config=train", *argv) == sentence
    assert not seen
    assert not list(Path().glob("logs/**/config.yaml"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("configs/tran.yaml", "there is no config 'configs/tran.yaml'. Did you mean 'configs/train.yaml'?"),
        ("nowhere/train.yml", "there is no config 'nowhere/train.yml'. Did you mean 'configs/train.yaml'?"),
        ("stranger", "in stranger.yaml, unknown key 'trainr'. Did you mean 'trainer'?"),
        ("mistyped", "in mistyped.yaml, seed takes a whole number, not 'many'"),
        ("broken", "{configs}/broken.yaml, line 2 is not YAML: mapping values are not allowed here"),
        ("open", "data.root (the folder of clips): no value given; add data.root=VALUE"),
        (
            "bare",
            "{configs}/bare.yaml names no schema: its defaults list begins with one of train, quickstart, generate, evaluate,"
            " as '- schema: train'",
        ),
        (
            "experiments/system/lost",
            "{configs}/experiments/system/lost.yaml needs '# @package _global_' as its first line, because it lies in a"
            " subfolder of {configs}",
        ),
    ],
)
def test_a_wrong_config_is_refused_in_one_sentence(configs, seen, capsys, name, sentence):
    assert refusal(capsys, configs, f"config={name}") == sentence.format(configs=configs)
    assert not seen


def test_no_config_lists_those_there_are(configs, capsys):
    listed = refusal(capsys, configs, "seed=1").splitlines()
    assert listed[0] == "say which config to run: python main.py config=PATH"
    told = dict(line.strip().removeprefix("config=").split(maxsplit=1) for line in listed if line.endswith(("thing", "one")))
    assert told["configs/train.yaml"] == "trains a small thing"
    assert told["configs/experiments/system/main.yaml"] == "the published one"
    assert not any("house" in line or "lm/" in line for line in listed)


def test_an_error_of_the_person_has_a_sentence_and_a_defect_of_ours_a_traceback(configs, seen, monkeypatch, capsys):
    def verb(cfg: DictConfig) -> None:
        raise (InputError if cfg.seed else ValueError)("clip.mp4 has no sound; choose another clip")

    monkeypatch.setattr(sys.modules["fake_verb"], "verb", verb)
    assert refusal(capsys, configs, "config=train", "seed=1") == "clip.mp4 has no sound; choose another clip"
    with pytest.raises(ValueError, match=r"clip\.mp4"):
        run(["config=train", "seed=0"], configs)


# --- components ---


class Codec:
    def __init__(self, rate: int, gain: float = 1.0, name: str | None = None, causal: bool = False) -> None:
        self.given = rate, gain, name, causal


def optimizer(params, *, lr: float, **extra):
    return params, lr, extra


@pytest.fixture
def parts(monkeypatch):
    room = types.ModuleType("fake_room")
    room.Codec, room.optimizer = Codec, optimizer
    monkeypatch.setitem(sys.modules, "fake_room", room)


GOOD = [
    {"_target_": "fake_room.Codec", "rate": 1},
    {"_target_": "fake_room.Codec", "rate": 1, "gain": 2, "name": None, "causal": True, "_convert_": "all"},
    {"_target_": "fake_room.Codec", "_args_": [3], "name": "x"},
    {"_target_": "fake_room.Codec", "_partial_": True},
    {"_target_": "fake_room.optimizer", "params": [1], "lr": 0.1, "anything": 1},
    {"_target_": "fractions.Fraction", "numerator": 1},
]
BAD = [
    ({"_target_": "fake_room.Codec", "rate": 1, "gian": 2}, "unknown key 'a.gian'. Did you mean 'a.gain'?"),
    ({"_target_": "fake_room.Codec", "rate": 1, "zzz": 2}, "unknown key 'a.zzz'. It takes rate, gain, name, causal."),
    ({"_target_": "fake_room.Codec", "_partial_": True, "gian": 2}, "unknown key 'a.gian'. Did you mean 'a.gain'?"),
    ({"_target_": "fake_room.Codec", "gain": 2}, "a lacks 'rate', which fake_room.Codec needs; add a.rate=VALUE"),
    ({"_target_": "fake_room.optimizer", "params": 1}, "a lacks 'lr', which fake_room.optimizer needs; add a.lr=VALUE"),
    (
        {"_target_": "fake_room.Codek", "rate": 1},
        "a._target_ is 'fake_room.Codek', which does not exist: no 'fake_room.Codek'. Did you mean 'fake_room.Codec'?",
    ),
    (
        {"_target_": "json.decodr.JSONDecoder"},
        "a._target_ is 'json.decodr.JSONDecoder', which does not exist: no 'json.decodr'. Did you mean 'json.decoder'?",
    ),
]


@pytest.mark.parametrize("node", GOOD)
def test_what_binds_can_be_built(parts, node):
    check_components(OmegaConf.create({"a": node}))
    hydra.utils.instantiate(node)


@pytest.mark.parametrize(("node", "sentence"), BAD)
def test_what_does_not_bind_is_refused_though_nothing_is_built(parts, node, sentence):
    with pytest.raises(InputError) as caught:
        check_components(OmegaConf.create({"a": node}))
    assert str(caught.value) == sentence
    with pytest.raises((hydra.errors.InstantiationException, TypeError)):
        hydra.utils.instantiate(node)()  # a partial fails where it is called


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("rate", "many", "a whole number"),
        ("rate", 1.5, "a whole number"),
        ("gain", True, "a number"),
        ("causal", 1, "true or false"),
    ],
)
def test_a_plain_value_of_the_wrong_type(parts, key, value, wanted):
    node = {"_target_": "fake_room.Codec", "rate": 1} | {key: value}
    with pytest.raises(InputError, match=rf"^lm\.{key} takes {wanted}, not '{value}'$"):
        check_components(OmegaConf.create({"lm": node}))


def test_components_are_found_at_any_depth_and_references_followed(parts):
    cfg = OmegaConf.create({"base": {"_target_": "fake_room.Codec", "rate": "${fast}"}, "fast": "x", "again": "${base}"})
    with pytest.raises(InputError, match="'x'"):
        check_components(cfg)
    cfg = OmegaConf.create({"a": [{"b": {"_target_": "fake_room.Codec", "rate": 1, "c": 1}}]})
    with pytest.raises(InputError, match=r"unknown key 'a\.0\.b\.c'"):
        check_components(cfg)
    cfg = OmegaConf.create({"a": {"_target_": "fake_room.Codec"}, "b": {"_target_": "fake_room.Codec", "rate": "???"}})
    check_components(cfg, supplied={"a": {"rate"}})
    check_components(cfg, complete=False)


# --- the house's own configs ---

OPTIONS = [path for path in sorted(config.CONFIGS.glob("*/**/*.yaml")) if "experiments" not in path.parts]


@pytest.mark.parametrize("path", runnable(), ids=lambda path: path.relative_to(config.CONFIGS).as_posix())
def test_every_config_composes_and_binds(path):
    check_components(compose(path))


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.relative_to(config.CONFIGS).as_posix())
def test_every_option_of_a_group_binds(path):
    check_components(load_config(path), complete=False)
