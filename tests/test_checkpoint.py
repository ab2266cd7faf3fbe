"""Checkpoint files: which is the best, what is read of one, and that nothing in one is run."""

import collections
import io
import os
import pathlib
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from vaura.checkpoint import FOREIGN, Record, best_checkpoint, folded, load_exactly, plain, read_checkpoint, tensors_in
from vaura.errors import InputError

# as torch.save writes since 1.6, and as it wrote before
WAYS = pytest.mark.parametrize("way", [True, False], ids=["zip", "old"])


def folder_with(root: Path, *names: str) -> Path:
    """An experiment of empty files, each a minute younger than the one before."""
    (root / "checkpoints").mkdir(parents=True)
    for minute, name in enumerate(names):
        (root / "checkpoints" / name).touch()
        os.utime(root / "checkpoints" / name, (60 * minute, 60 * minute))
    return root


def refusal(call: Callable, *args) -> str:
    """What a call is refused with: short, one line, and no advice to run the file."""
    with pytest.raises(InputError) as caught:
        call(*args)
    said = str(caught.value)
    assert len(said) < 400
    assert "\n" not in said
    assert "weights_only" not in said
    return said


# --- which checkpoint ---


@pytest.mark.parametrize(
    ("names", "best"),
    [
        # numbers, not words: 10 is more than 9
        (["epoch=0-step=4-val_loss=10.000.ckpt", "epoch=1-step=8-val_loss=9.500.ckpt", "last.ckpt"], 1),
        # Lightning's suffix for a name that was there already
        (["epoch=0-step=4-val_loss=2.100.ckpt", "epoch=0-step=4-val_loss=2.099-v1.ckpt"], 1),
        # equal to three digits: the later step, by number
        (["epoch=0-step=900-val_loss=2.000.ckpt", "epoch=1-step=1000-val_loss=2.000.ckpt"], 1),
        (["epoch=1-step=1000-val_loss=2.000-v10.ckpt", "epoch=1-step=1000-val_loss=2.000-v9.ckpt"], 0),
        (["epoch=1-step=1000-val_loss=2.000.ckpt", "epoch=1-step=1000-val_loss=2.000-v1.ckpt"], 1),
        (["last.ckpt"], 0),
        # without validation: the last one
        (["epoch=3-step=8.ckpt", "last.ckpt", "zeroth.ckpt"], 1),
        # of several last ones the younger, whichever its name
        (["last.ckpt", "last-v1.ckpt", "zeroth.ckpt"], 1),
        (["last-v2.ckpt", "last-v1.ckpt", "last.ckpt", "lasting.ckpt"], 2),
        # none of them called so: the youngest
        (["b.ckpt", "a.ckpt"], 1),
        # what an import writes is as good
        (["epoch=0-step=4-val_loss=2.100.ckpt", "epoch=0-step=4-val_loss=2.099-v1.safetensors", "last.ckpt"], 1),
        (["zeroth.ckpt", "last.safetensors", "first.ckpt"], 1),
        # neither half a file nor anything else
        (["a.ckpt", ".last.17-beef.ckpt", "last.part", "notes.txt"], 0),
    ],
)
def test_the_best_checkpoint_has_the_lowest_validation_loss(tmp_path, names, best):
    assert best_checkpoint(folder_with(tmp_path, *names)).name == names[best]


@pytest.mark.parametrize("names", [[], [".last.17-beef.ckpt", "last.part"]])
def test_an_experiment_without_checkpoint_says_so(tmp_path, names):
    said = refusal(best_checkpoint, folder_with(tmp_path, *names))
    assert said == f"{tmp_path} holds no checkpoint in checkpoints/; train it first, or give checkpoint=FILE"
    assert refusal(best_checkpoint, tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'} holds no checkpoint")


# --- what is read ---


@WAYS
def test_a_torch_file_arrives_as_it_was_saved(tmp_path, way):
    shared = torch.arange(6.0)
    content = {
        "state_dict": {"a": shared.view(2, 3), "b": shared[2:4], "half": torch.ones(2).bfloat16(), "count": torch.tensor(7)},
        "loops": {"fit": {"done": True, "steps": [1, 2], "none": None, ("a", 1): b"bytes"}},
        "seen": collections.defaultdict(list, {"x": [1.5]}),
    }
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=way)
    read = read_checkpoint(str(tmp_path / "a.ckpt"))
    assert list(read) == list(content)
    assert read["loops"] == content["loops"]
    assert read["seen"] == {"x": [1.5]}
    for key, value in content["state_dict"].items():
        torch.testing.assert_close(read["state_dict"][key], value, atol=0.0, rtol=0.0)
    # written to in memory, the file stays as it is
    read["state_dict"]["a"].zero_()
    torch.testing.assert_close(read_checkpoint(tmp_path / "a.ckpt")["state_dict"]["a"], shared.view(2, 3), atol=0.0, rtol=0.0)


def test_a_safetensors_file_is_a_state_dict(tmp_path):
    save_file({"a.b": torch.arange(3)}, tmp_path / "a.safetensors")
    read = read_checkpoint(tmp_path / "a.safetensors")
    assert list(read) == ["state_dict"]
    assert list(read["state_dict"]) == ["a.b"]
    assert read["state_dict"]["a.b"].tolist() == [0, 1, 2]


@WAYS
def test_strangers_arrive_inert(tmp_path, monkeypatch, way):
    parameter = nn.Parameter(torch.zeros(2))
    strangers = {
        "config": OmegaConf.create({"a": [1]}),
        "optimizers": [torch.optim.AdamW([parameter], lr=0.25), torch.optim.Adam([parameter])],
        "path": pathlib.PosixPath("/some/where"),
    }
    torch.save(strangers, tmp_path / "a.ckpt", _use_new_zipfile_serialization=way)

    def run(self, *_):
        raise AssertionError(f"{type(self)} was run")

    for stranger in (type(strangers["config"]), torch.optim.AdamW, torch.optim.Adam, torch.optim.Optimizer):
        monkeypatch.setattr(stranger, "__setstate__", run)
        monkeypatch.setattr(stranger, "__init__", run)
    read = read_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(read["config"], Record)
    assert all(isinstance(optimizer, Record) for optimizer in read["optimizers"])
    assert read["optimizers"][0].state["param_groups"][0]["lr"] == 0.25
    assert plain(read) == {"config": {"a": [1]}, "optimizers": [None, None], "path": "/some/where"}


def test_a_path_of_any_python_arrives(tmp_path):
    """Python 3.13 calls the class by another name."""

    def named(module: str) -> bytes:
        return f"\x80\x02}}X\x01\x00\x00\x00pc{module}\nPosixPath\nX\x01\x00\x00\x00a\x85Rs.".encode("latin1")

    for module in ("pathlib", "pathlib._local"):
        assert f"{module}.PosixPath" in FOREIGN
        write_archive(tmp_path / "a.ckpt", {"data.pkl": named(module)})
        assert plain(read_checkpoint(tmp_path / "a.ckpt")) == {"p": "a"}


def test_reading_leaves_the_process_as_trustful_as_it_was(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"a": OmegaConf.create({})}, tmp_path / "a.ckpt")
    read_checkpoint(tmp_path / "a.ckpt")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.ckpt", weights_only=True)


# --- what is refused ---


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    """A zip as torch lays it out, with members of one's own."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in ({"byteorder": b"little", "version": b"3\n"} | members).items():
            archive.writestr(f"archive/{name}", content)


class Stranger:
    """A class that no checkpoint of the house or of V-AURA holds."""

    def __setstate__(self, state: dict) -> None:
        os._exit(3)


class Reduced:
    """Pickles as a call."""

    def __init__(self, call: Callable, *args) -> None:
        self.call = call, args

    def __reduce__(self):
        return self.call


@WAYS
@pytest.mark.parametrize("kind", ["system", "eval", "method", "class"])
def test_a_pickle_that_would_run_code_is_refused_by_what_it_holds(tmp_path, way, kind):
    harm = tmp_path / "harm"
    stranger = Stranger()
    stranger.state = 1  # type: ignore[attr-defined]
    held, told = {
        "system": (Reduced(os.system, f"touch {harm}"), r"(posix|nt)\.system"),
        "eval": (Reduced(eval, f"open({str(harm)!r}, 'w')"), r"(builtins\.)?eval"),
        "method": (Reduced(Path.touch, harm), r"(builtins\.)?getattr|pathlib\.Path\.touch"),
        "class": (stranger, rf"{re.escape(__name__)}\.Stranger"),
    }[kind]
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(2), "b": held}}, path, _use_new_zipfile_serialization=way)
    for read in (read_checkpoint, tensors_in):
        said = refusal(read, path)
        assert re.fullmatch(
            rf"checkpoint {re.escape(str(path))} holds ({told}) and is not read, because reading that would run code; "
            "give one of tensors and numbers",
            said,
        )
    assert not harm.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_refused(tmp_path, protocol):
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps(Reduced(os.system, f"touch {tmp_path / 'harm'}"), protocol))
    assert re.search(
        r"is not read, because|cannot be read; it is cut off, or not a ch", refusal(read_checkpoint, tmp_path / "a.ckpt")
    )
    assert not (tmp_path / "harm").exists()


def test_programs_and_tar_files_are_refused_before_torch_sees_them(tmp_path, monkeypatch):
    """Torch before 2.6 starts the one and unpacks the other."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch saw it"))
    write_archive(tmp_path / "a.pt", {"data.pkl": b"\x80\x02}.", "constants.pkl": b"\x80\x02)."})
    assert "a.pt holds a TorchScript program and is not read" in refusal(read_checkpoint, tmp_path / "a.pt")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert "a.tar holds a tar archive and is not read" in refusal(read_checkpoint, tmp_path / "a.tar")


@WAYS
@pytest.mark.parametrize("kept", [0, 40, 0.5, -4])
def test_a_file_that_was_cut_off_is_refused(tmp_path, way, kept):
    whole, cut = tmp_path / "whole.ckpt", tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, whole, _use_new_zipfile_serialization=way)
    data = whole.read_bytes()
    cut.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    assert re.fullmatch(
        rf"checkpoint {re.escape(str(cut))} cannot be read( \(.+\))?; it is cut off, or not a checkpoint",
        refusal(read_checkpoint, cut),
    )


@pytest.mark.parametrize("kept", [0, 5, -4])
def test_a_safetensors_file_that_was_cut_off_is_refused(tmp_path, kept):
    save_file({"a": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:kept])
    assert re.fullmatch(
        rf"checkpoint {re.escape(str(cut))} cannot be read( \(.+\))?; it is cut off, or no safetensors file",
        refusal(read_checkpoint, cut),
    )


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>404</html>", b"hello", b"\x1f\x8b\x08\x00abc", b"PK\x03\x04"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    said = refusal(read_checkpoint, tmp_path / "a.ckpt")
    assert said.endswith("it is cut off, or not a checkpoint")
    assert "()" not in said


def test_a_zip_of_another_kind_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("a.txt", "a")
    assert "a.ckpt cannot be read (file in archive is not in a subdirectory" in refusal(read_checkpoint, tmp_path / "a.ckpt")


def test_a_file_that_is_not_there_is_told_with_its_nearest(tmp_path):
    (tmp_path / "epoch_best.pt").touch()
    path = tmp_path / "epoch_bets.pt"
    said = f"checkpoint {path} does not exist; check the path. Did you mean 'epoch_best.pt'?"
    assert refusal(read_checkpoint, path) == said
    assert refusal(tensors_in, path) == said
    assert "does not exist; check the path." in refusal(read_checkpoint, tmp_path / "no" / "where.ckpt")
    assert refusal(read_checkpoint, tmp_path) == f"checkpoint {tmp_path} is a folder; name a file"


def test_a_file_that_one_may_not_read_is_told(tmp_path, monkeypatch):
    def forbid(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.ckpt").touch()
    monkeypatch.setattr(Path, "open", forbid)  # root may read everything
    assert "a.ckpt cannot be read (Permission denied); ask its owner" in refusal(read_checkpoint, tmp_path / "a.ckpt")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), "text", None, OmegaConf.create({"state_dict": {}})])
def test_a_file_that_is_no_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    said = refusal(read_checkpoint, tmp_path / "a.ckpt")
    assert said == f"{tmp_path / 'a.ckpt'} is no checkpoint of a training run: it holds no state_dict"


# --- plain values ---


def through_a_file(value: object, folder: Path) -> object:
    torch.save({"value": value}, folder / "a.ckpt")
    return plain(read_checkpoint(folder / "a.ckpt")["value"])


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": {"b": {"c": 1}}, "d": [1, [2.5, {"e": True}], "text"], "f": None},
        [],
        [[], {}, [None]],
        {"missing": "???", "a": 3, "same": "${a}", "words": "is ${a} ${oc.env:HOME}"},
        {1: "a", 2.5: "b", False: "c"},
    ],
)
def test_nested_containers_become_plain_ones_unresolved(tmp_path, value):
    found = through_a_file(OmegaConf.create(value), tmp_path)
    assert found == value == OmegaConf.to_container(OmegaConf.create(value), resolve=False)
    assert type(found) is type(value)


def test_containers_of_nothing_become_none_or_what_stands_for_them(tmp_path):
    config = OmegaConf.create({"a": {"b": 1}, "c": [1], "d": {"e": 1}})
    config.a, config.c, config.d = None, None, "???"
    assert through_a_file(config, tmp_path) == {"a": None, "c": None, "d": "???"}
    typed = OmegaConf.create({"a": 1, "b": "x", "c": 0.5, "d": False})
    assert through_a_file([typed, (typed.a, {"t": (1, 2)})], tmp_path) == [OmegaConf.to_container(typed), [1, {"t": [1, 2]}]]


def test_a_part_of_a_config_comes_without_the_rest(tmp_path):
    config = OmegaConf.create({"a": {"b": ["${x}"]}, "x": 1})
    assert through_a_file(config.a, tmp_path) == {"b": ["${x}"]}


def test_plain_values_stay(tmp_path):
    value = {("a", 1): {"b": [1, "c", None, 2.5, True]}}
    assert plain(value) == value
    tensor = torch.zeros(2)
    assert plain({"a": tensor})["a"] is tensor


# --- tensors by their prefix ---


STATE = {"model.a.weight": torch.ones(1), "model.b": torch.ones(2), "ema.b": torch.ones(3), "ema.model.c": torch.ones(4)}


@pytest.mark.parametrize(
    ("prefixes", "sizes"),
    [
        (("",), {"model.a.weight": 1, "model.b": 2, "ema.b": 3, "ema.model.c": 4}),
        (("model.",), {"a.weight": 1, "b": 2}),
        (("ema.", "model."), {"b": 3, "model.c": 4}),  # the first one wins, whole
        (("model.", "ema."), {"a.weight": 1, "b": 2}),
        (("nothing.", "ema.model.", ""), {"c": 4}),
        (("nothing.", ""), {"model.a.weight": 1, "model.b": 2, "ema.b": 3, "ema.model.c": 4}),
    ],
)
@pytest.mark.parametrize("kind", ["state_dict", "bare", "safetensors"])
def test_the_first_prefix_that_is_there_chooses_the_tensors(tmp_path, kind, prefixes, sizes):
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.ckpt")
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save({"state_dict": STATE, "epoch": 3} if kind == "state_dict" else STATE | {"epoch": 3}, path)
    assert {key: len(value) for key, value in tensors_in(path, prefixes).items()} == sizes


def test_a_file_without_those_tensors_is_told_with_what_it_holds(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(STATE, path)
    said = refusal(tensors_in, path, ("encoder.", "tower."))
    assert said == f"{path} holds no weights called 'encoder.*' or 'tower.*'; it holds ema, model"
    torch.save({"epoch": 3}, path)
    assert refusal(tensors_in, path).endswith("it holds no tensor")
    torch.save({"state_dict": [1]}, path)
    assert refusal(tensors_in, path) == f"{path} is no checkpoint of a model: it holds no state_dict"


# --- into a model ---


def a_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_a_state_that_fits_is_loaded(tmp_path):
    state = {key: torch.full_like(value, 2) for key, value in a_model().state_dict().items()}
    model = a_model()
    load_exactly(model, state, "encoder.weights: FILE")
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("0.bias"), "lacks 0.bias; give the file of this very model."),
        (
            lambda s: s.update({"0.bais": s.pop("0.bias")}),
            "lacks 0.bias; give the file of this very model. Did you mean '0.bais'?",
        ),
        # what the model has is no answer
        (lambda s: s.pop("1.running_mean"), "lacks 1.running_mean; give the file of this very model."),
        (
            lambda s: s.update({"2.weight": s["0.weight"]}),
            "holds 2.weight, which this model has not; give the file of this very model",
        ),
        (
            lambda s: s.update({"0.weight": torch.ones(2, 4)}),
            "0.weight has the shape (2, 4) there and (2, 3) here; give the file of ",
        ),
        (
            lambda s: s.update({"1.num_batches_tracked": torch.ones(1)}),
            "1.num_batches_tracked has the shape (1,) there and () here",
        ),
        (lambda s: s.clear(), "lacks 0.weight; "),
    ],
)
def test_a_state_that_does_not_fit_is_told_by_its_first_key_and_changes_nothing(change, told):
    model, state = a_model(), dict(a_model().state_dict())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    change(state)
    said = refusal(load_exactly, model, state, "encoder.weights: FILE")
    assert re.fullmatch(r"encoder\.weights: FILE:? .*", said)
    assert told in said
    assert said.endswith("?") == told.endswith("?")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.ConvTranspose1d])
def test_two_parts_of_a_weight_are_folded_as_torch_normalises(convolution):
    normed = nn.utils.parametrizations.weight_norm(convolution(5, 3, 4))
    g, v = normed.parametrizations.weight.parameters()
    with torch.no_grad():
        g *= 0.3
        v *= 2
    state = {"a.weight_g": g.double(), "a.weight_v": v, "a.bias": normed.bias, "b.out.weight_g": g, "b.out.weight_v": v}
    found = folded(state, "there")
    assert set(found) == {"a.weight", "a.bias", "b.out.weight"}
    assert found["a.weight"].dtype == torch.float32
    torch.testing.assert_close(found["a.weight"], normed.weight)
    assert set(folded(state, "there", apart="out")) == {"a.weight", "a.bias", "b.out.weight_g", "b.out.weight_v"}
    assert folded(found, "there").keys() == found.keys()


@pytest.mark.parametrize("lost", ["a.weight_g", "a.weight_v"])
def test_half_of_a_weight_is_none(lost):
    state = {key: torch.ones(2, 2, 2) for key in ("a.weight_g", "a.weight_v", "a.bias") if key != lost}
    with pytest.raises(InputError, match=rf"there lacks {re.escape(lost)}; give the whole file"):
        folded(state, "there")
