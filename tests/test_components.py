"""A constructor is the schema of its component: what binds can be built, what does not is refused."""

import sys
import types

import hydra
import pytest
from omegaconf import OmegaConf

from vaura.components import check_components, instantiate
from vaura.errors import InputError


class Codec:
    def __init__(self, rate: int, gain: float = 1.0, name: str | None = None, causal: bool = False) -> None:
        self.given = rate, gain, name, causal


def optimizer(params, *, lr: float, **extra):
    return params, lr, extra


@pytest.fixture
def parts(monkeypatch):
    room = types.ModuleType("fake_room")
    room.Codec, room.optimizer = Codec, optimizer
    for part in (Codec, optimizer):
        monkeypatch.setattr(part, "__module__", "fake_room")
    monkeypatch.setitem(sys.modules, "fake_room", room)
    monkeypatch.setenv("VAURA_TARGETS", "fake_room, fractions")


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
        {"_target_": "vaura.lm.lama.TokenLM"},
        "a._target_ is 'vaura.lm.lama.TokenLM', which does not exist: no 'vaura.lm.lama'. Did you mean 'vaura.lm.llama'?",
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


# --- what a stranger's config may not run ---

FORBIDDEN = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "torch.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "lightning.pytorch.cli.instantiate_class",
    "lightning.pytorch.cli.LightningCLI",
    "lightning.LightningModule.load_from_checkpoint",
    "hydra.utils.call",
    "vaura.launch.run",
    "vaura.weights.fetch",
    "vauras.lm.llama.TokenLM",  # a name that begins alike
    # what is reached through an allowed module but is not its own
    "vaura.data.clips.warnings.os.system",
    "vaura.tokenizer.encodec.Path",
    "vaura.task.contrast.LightningModule.load_from_checkpoint",
    "vaura.task.token_prediction.TokenPrediction.load_from_checkpoint",
    "lightning.pytorch.callbacks.model_checkpoint.os.system",
    "lightning.pytorch.callbacks.model_checkpoint.shutil.rmtree",
    "torch.nn.modules.module.torch.load",
    "torch.nn.Linear.__init__",
    "torch.nn.Module.__init__.__globals__",
    # functions of our own: a component is a class
    "vaura.media.audio.write_wav",
    "vaura.data.world.build",
    "torch.nn.init.zeros_",
]
ALLOWED = [
    {"_target_": "torch.nn.Identity"},
    {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3},
    {"_target_": "vaura.lm.sampling.Sampler", "temperature": 0.5},
    {"_target_": "lightning.Trainer", "max_steps": 1, "logger": False, "accelerator": "cpu"},
    {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss"},
]


@pytest.mark.parametrize("target", FORBIDDEN)
@pytest.mark.parametrize("plain", [True, False])
def test_what_a_config_cannot_run_is_neither_checked_nor_built(target, plain):
    node = {"fine": {"_target_": "torch.nn.Identity"}, "deep": [{"_target_": target}]}
    for build in (check_components, instantiate):
        with pytest.raises(
            InputError, match=rf"^deep\.0\._target_ is '{target}', which a config cannot run: .* VAURA_TARGETS$"
        ):
            build(node if plain and build is instantiate else OmegaConf.create(node))


@pytest.mark.parametrize("node", ALLOWED)
def test_what_a_config_can_run(node):
    check_components(OmegaConf.create({"a": node}))
    assert type(instantiate(OmegaConf.create(node))).__name__ == node["_target_"].rpartition(".")[2]


def test_a_forbidden_module_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise RuntimeError('was run')\nclass Codec: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="cannot run"):
        instantiate({"_target_": "stranger.Codec"})
    monkeypatch.setenv("VAURA_TARGETS", "stranger")
    with pytest.raises(RuntimeError, match="was run"):
        check_components(OmegaConf.create({"a": {"_target_": "stranger.Codec"}}))


def test_a_reference_is_no_way_round():
    cfg = OmegaConf.create({"hidden": {"_target_": "os.system", "command": "true"}, "task": {"codec": "${hidden}"}})
    with pytest.raises(InputError, match=r"^codec\._target_ is 'os.system'"):
        instantiate(cfg.task)
    cfg = OmegaConf.create({"name": "os.system", "task": {"_target_": "${name}"}})
    with pytest.raises(InputError, match=r"^_target_ is 'os.system'"):
        instantiate(cfg.task)


def test_a_package_of_ones_own_is_named_in_the_environment(parts, monkeypatch):
    node = {"_target_": "fake_room.Codec", "rate": 3}
    assert instantiate(node).given[0] == 3
    monkeypatch.setenv("VAURA_TARGETS", "fake_room.inner,fake")
    with pytest.raises(InputError, match="cannot run"):
        instantiate(node)
    monkeypatch.delenv("VAURA_TARGETS")
    with pytest.raises(InputError, match="cannot run"):
        instantiate(node)
