"""A constructor is the schema of its component: what binds can be built, what does not is refused."""

import sys
import types

import hydra
import pytest
from omegaconf import OmegaConf

from vaura.components import check_components
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
