import pytest
import torch
from torch import nn

from vaura import precision
from vaura.errors import InputError
from vaura.precision import can_compile, compile_in_place, has_compiler, name_of, precision_of


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_names_of_formats(name):
    assert precision_of(name, "x") == getattr(torch, name)
    assert name_of(precision_of(name, "x")) == name


def test_another_name_is_refused_in_a_sentence():
    with pytest.raises(InputError, match=r"^encoder\.precision is 'half'; choose from float32, bfloat16, float16, auto$"):
        precision_of("half", "encoder.precision")


def test_auto_is_what_the_machine_multiplies_fast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for amx, avx, want in ((True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx, raising=False)
        assert name_of(precision_of("auto", "x")) == want
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, want in (((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert name_of(precision_of("auto", "x")) == want


def test_a_compiler_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not has_compiler()
    (tmp_path / "mine").write_text("#!/bin/sh\n")
    (tmp_path / "mine").chmod(0o755)
    monkeypatch.setenv("CXX", "mine")
    assert has_compiler()


def test_a_module_stays_what_it_prints_and_holds(monkeypatch):
    module = nn.Linear(2, 2)
    before = str(module), list(module.state_dict())
    monkeypatch.setattr(precision, "has_compiler", lambda: True)
    assert compile_in_place(module, "x.compile", dynamic=False)
    assert (str(module), list(module.state_dict())) == before


def test_what_is_missing_to_compile_is_one_sentence(monkeypatch):
    monkeypatch.setattr(precision, "has_compiler", lambda: False)
    with pytest.warns(UserWarning, match=r"^x is blocks, but there is no C\+\+ compiler here .*: running uncompiled$"):
        assert not can_compile("x is blocks", torch.device("cpu"))
    monkeypatch.setattr(precision, "has_compiler", lambda: True)

    def broken(*_):
        raise RuntimeError("Triton is missing\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match=r"^x is blocks, but torch cannot compile for cpu \(Triton is missing\): running"):
        assert not can_compile("x is blocks", torch.device("cpu"))
    assert can_compile("x is true")
