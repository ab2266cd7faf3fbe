"""Engines against the model itself, in float32 to rounding, in the other formats to what these can hold."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from vaura.errors import InputError
from vaura.lm import engine as engines
from vaura.lm import native
from vaura.lm.engine import NativeEngine, TorchEngine, engine_for
from vaura.lm.generation import generate, generate_slow
from vaura.lm.llama import TokenLM
from vaura.lm.native import NoLibrary, build, library, load, quantise
from vaura.lm.sampling import Sampler
from vaura.protocols import ABSENT, Condition

try:
    library()
    REASON = ""
except NoLibrary as reason:
    REASON = f"no CPU kernel: {reason}"
needs_kernel = pytest.mark.skipif(bool(REASON), reason=REASON or "there is one")

# Shapes that fill no stripe, no vector and no group of inputs to its end, and one that fills all.
SHAPES = [
    {"num_codebooks": 3, "codebook_size": 13, "num_layers": 2, "dim": 24, "num_heads": 2, "channels": 8, "ffn_multiple": 8},
    {"num_codebooks": 2, "codebook_size": 50, "num_layers": 1, "dim": 40, "num_heads": 1, "channels": 0, "ffn_multiple": 8},
    {"num_codebooks": 4, "codebook_size": 64, "num_layers": 2, "dim": 128, "num_heads": 4, "channels": 64, "ffn_multiple": 64},
    {"num_codebooks": 2, "codebook_size": 32, "num_layers": 0, "dim": 64, "num_heads": 4, "channels": 32},
    {"num_codebooks": 9, "codebook_size": 32, "num_layers": 1, "dim": 96, "num_heads": 2, "channels": 32, "code_dim": 8},
]


def make(shape: dict, seed: int = 0) -> TokenLM:
    torch.manual_seed(seed)
    lm = TokenLM(**shape)
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3 if parameter.ndim == 1 else 0.15)
    return lm.eval()


def read_all(engine, lm: TokenLM, tokens: torch.Tensor, channel: torch.Tensor | None, pieces: list[int]) -> torch.Tensor:
    """Logits (R, K, S, V) of everything, read in pieces of these lengths."""
    stream = engine.open(len(tokens), tokens.shape[2])
    read, start = [], 0
    for count in pieces:
        shown = None if channel is None else channel[:, start : start + count]
        read.append(stream.read(tokens[:, :, start : start + count], shown, every=True))
        start += count
        assert int(stream.at) == start
    return torch.cat(read, dim=1).transpose(1, 2)


def something(lm: TokenLM, rows: int, steps: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    tokens = torch.randint(-1, lm.codebook_size, (rows, lm.num_codebooks, steps))
    assert ABSENT == -1
    return tokens, torch.randn(rows, steps, lm.channels) if lm.channels else None


def distance(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())


@pytest.fixture(scope="module", params=["native", "v3", "oldest"])
def kernel(request, tmp_path_factory):
    """The kernel for this processor, and for those without its widest instructions."""
    if REASON:
        pytest.skip(REASON)
    if request.param == "native":
        return library()
    targets = {"v3": "x86-64-v3", "oldest": "x86-64"}
    try:
        return load(build(f"g++ -march={targets[request.param]}", tmp_path_factory.mktemp("kernel")))
    except NoLibrary as reason:
        pytest.skip(f"no compiler for {request.param}: {reason}")


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 9, 20, 40])
@pytest.mark.parametrize("pieces", [[1] * 5, [5], [3, 1, 1]], ids=["steps", "prompt", "both"])
@torch.no_grad()
def test_the_kernel_in_float32_is_the_model(kernel, shape, rows, pieces):
    lm = make(shape)
    tokens, channel = something(lm, rows, 5)
    truth = lm.step(tokens, Condition(channel))
    ours = read_all(NativeEngine(lm, "float32", kernel), lm, tokens, channel, pieces)
    torch.testing.assert_close(ours, truth, atol=2e-5 * float(truth.abs().max()), rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 9, 20, 40])
@pytest.mark.parametrize("pieces", [[1] * 5, [5]], ids=["steps", "prompt"])
@torch.no_grad()
def test_the_kernel_in_bfloat16_is_as_near_as_pytorch(kernel, shape, rows, pieces):
    lm = make(shape)
    tokens, channel = something(lm, rows, 5)
    truth = lm.step(tokens, Condition(channel))
    ours = distance(read_all(NativeEngine(lm, "bfloat16", kernel), lm, tokens, channel, pieces), truth)
    theirs = distance(read_all(TorchEngine(lm, "bfloat16"), lm, tokens, channel, pieces), truth)
    assert ours < 1.2 * theirs + 1e-3
    assert theirs > 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 9, 20, 40])
@torch.no_grad()
def test_int8_is_the_model_with_rounded_weights(kernel, shape, rows):
    """But for keys and values in bfloat16, the kernel adds nothing to the rounding of the weights."""
    lm, rounded = make(shape), make(shape)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            values, scale = quantise(module.weight)
            module.weight.copy_(values * scale.unsqueeze(1))
    tokens, channel = something(lm, rows, 5)
    truth = rounded.step(tokens, Condition(channel))
    ours = read_all(NativeEngine(lm, "int8", kernel), lm, tokens, channel, [1] * 5)
    assert distance(ours, truth) < (1e-2 if lm.blocks else 1e-3)


def test_rounding_to_int8_errs_by_half_a_step():
    weight = torch.randn(7, 33) * torch.logspace(-3, 3, 7).unsqueeze(1)
    weight[3] = 0
    values, scale = quantise(weight)
    assert values.dtype == torch.int8
    assert values.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    assert ((values * scale.unsqueeze(1) - weight).abs() <= scale.unsqueeze(1) * 0.5001).all()


@torch.no_grad()
def test_pytorch_in_int8_is_the_model_with_rounded_weights():
    lm, rounded = make(SHAPES[2]), make(SHAPES[2])
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            values, scale = quantise(module.weight)
            module.weight.copy_(values * scale.unsqueeze(1))
    tokens, channel = something(lm, 2, 5)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    ours = read_all(TorchEngine(lm, "int8"), lm, tokens, channel, [2, 1, 1, 1])
    assert distance(ours, rounded.step(tokens, Condition(channel))) < 2e-2
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())


@needs_kernel
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@torch.no_grad()
def test_sounds_are_drawn_in_every_format(precision):
    lm = make(SHAPES[2])
    how = {"seeds": [1, 2], "sampler": Sampler(1.0, top_k=8), "guidance": 2.0}
    condition = Condition(torch.randn(4, 30, lm.channels))
    codes = generate(NativeEngine(lm, precision), condition, 30, **how)
    assert codes.shape == (2, 4, 30)
    assert 0 <= codes.min() <= codes.max() < lm.codebook_size
    assert torch.equal(codes, generate(NativeEngine(lm, precision), condition, 30, **how))


@torch.no_grad()
def test_rows_that_leave_do_not_change_those_that_stay(kernel):
    lm = make(SHAPES[0])
    tokens, channel = something(lm, 6, 8)
    for engine in (TorchEngine(lm), NativeEngine(lm, "float32", kernel)):
        stream = engine.open(6, 8)
        stream.read(tokens[:, :, :4], channel[:, :4])
        for s in range(4, 8):
            logits = stream.read(tokens[:2, :, s : s + 1], channel[:2, s : s + 1])
        truth = lm.step(tokens[:2], Condition(channel[:2]))[:, :, -1]
        torch.testing.assert_close(logits, truth, atol=1e-5, rtol=1e-5)


def test_a_full_cache_says_so():
    lm = make(SHAPES[0])
    tokens, channel = something(lm, 1, 9)
    for engine in [TorchEngine(lm)] + ([] if REASON else [NativeEngine(lm)]):
        stream = engine.open(1, 8)
        with pytest.raises(ValueError, match="cache of 8 slots"):
            stream.read(tokens, channel)


def test_threads_change_nothing(kernel):
    lm = make(SHAPES[2])
    tokens, channel = something(lm, 3, 5)
    before = torch.get_num_threads()
    try:
        read = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            read.append(read_all(NativeEngine(lm, "float32", kernel), lm, tokens, channel, [3, 1, 1]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(read[0], read[1])
    assert torch.equal(read[0], read[2])


GUARDED = """
import ctypes, itertools, mmap
import torch
from vaura.lm.engine import NativeEngine
from vaura.lm.llama import TokenLM

protect = ctypes.CDLL(None).mprotect
protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

class Room:
    def __init__(self, size):
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = torch.frombuffer(mmap.mmap(-1, pages + 2**18), dtype=torch.uint8)
        assert protect(self.memory.data_ptr() + pages, 2**18, 0) == 0
        self.begin = self.memory.data_ptr() + pages - size
    def numel(self):
        return 2**60
    def data_ptr(self):
        return self.begin

for precision in ("float32", "bfloat16", "int8"):
    lm = TokenLM(3, 13, num_layers=2, dim=24, num_heads=2, channels=8, ffn_multiple=8)
    engine = NativeEngine(lm, precision)
    for rows, count, threads in itertools.product((1, 2, 5, 9, 20), (1, 2, 9, 40), (1, 2, 5)):
        torch.set_num_threads(threads)
        stream = engine.open(rows, count)
        stream.cache.room = Room(engine.packed.library.vaura_room(engine.packed.model, rows * count, count, threads))
        stream.read(torch.randint(-1, 13, (rows, 3, count)), torch.randn(rows, count, 8))
print("within")
"""


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
def test_a_step_stays_within_its_memory():
    """Behind it lies a page that nobody may read: whoever does is stopped."""
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert done.stdout == "within\n", f"exit status {done.returncode}: {done.stderr[-500:]}"


# --- which engine ---


def test_without_a_compiler_pytorch_goes_on_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("VAURA_CACHE", str(tmp_path / "cache"))
    library.cache_clear()
    try:
        lm = make(SHAPES[0])
        with pytest.warns(UserWarning, match="there is no C\\+\\+ compiler"):
            engine = engine_for(lm, "float32")
        assert isinstance(engine, TorchEngine)
        with pytest.raises(InputError, match=r"engine=native cannot run here: there is no C\+\+ compiler .*set engine=torch"):
            engine_for(lm, "float32", "native")
    finally:
        library.cache_clear()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_compiler_that_fails_is_told(tmp_path):
    with pytest.raises(NoLibrary, match="cannot compile it"):
        build("g++ -march=there-is-none", tmp_path)
    assert not list(tmp_path.rglob("*.so"))
    with pytest.raises(NoLibrary, match="there is no C\\+\\+ compiler there-is-none"):
        build("there-is-none", tmp_path)
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    with pytest.raises(NoLibrary, match="does not load"):
        load(broken)


@pytest.mark.skipif(shutil.which("g++") is None or not hasattr(os, "getuid"), reason="no g++, or no users")
def test_a_program_of_another_user_is_not_run(tmp_path, monkeypatch):
    path = build("g++", tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    other = path.with_name(path.name.replace(path.stem.rpartition("-")[2], "12345"))
    other.write_bytes(path.read_bytes())
    with pytest.raises(NoLibrary, match="was put there by another user; delete it"):
        build("g++", tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told(value):
    lm = make(SHAPES[0])
    with torch.no_grad():
        lm.blocks[0].ffn.down.weight[1, 2] = value
    with pytest.raises(InputError, match=r"lm\.blocks\.0\.ffn\.down\.weight are not all finite.*take an earlier checkpoint"):
        engine_for(lm)


def a_script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@needs_kernel
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_compiler_may_stand_behind_another_command(tmp_path):
    wrapper = a_script(tmp_path / "wrapper", '[ "${1#-}" = "$1" ] && exec "$@"')
    load(build(f"{wrapper} g++ -O1", tmp_path / "kernel"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_a_kernel_that_cannot_be_kept_is_told(tmp_path, monkeypatch):
    compiler = str(a_script(tmp_path / "compiler", "exit 0"))
    with pytest.raises(NoLibrary, match=r"cannot be compiled .*cannot write"):  # it wrote nothing, as where the disk is full
        build(compiler, tmp_path / "kernel")
    (tmp_path / "file").touch()
    with pytest.raises(NoLibrary, match=r"cannot be compiled .*folder"):
        build(compiler, tmp_path / "file")
    with pytest.raises(NoLibrary, match="No closing quotation"):
        build("g++ 'here")

    def nobody(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("VAURA_CACHE", raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", nobody)
    with pytest.raises(NoLibrary, match="home"):
        build(compiler)


@needs_kernel
def test_it_is_compiled_once(tmp_path):
    first = build(folder=tmp_path)
    made = first.stat().st_mtime_ns
    assert build(folder=tmp_path) == first
    assert first.stat().st_mtime_ns == made


@needs_kernel
def test_the_environment_can_leave_it_aside(monkeypatch):
    monkeypatch.setenv("VAURA_NATIVE", "0")
    library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="VAURA_NATIVE=0"):
            assert isinstance(engine_for(make(SHAPES[0])), TorchEngine)
    finally:
        library.cache_clear()


def test_what_does_not_exist_is_refused():
    lm = make(SHAPES[0])
    with pytest.raises(InputError, match=r"precision=bfloat is none of .*bfloat16"):
        engine_for(lm, "bfloat")
    with pytest.raises(InputError, match=r"engine=nativ is none of .*Did you mean 'native'"):
        engine_for(lm, "float32", "nativ")


def test_auto_is_bfloat16_where_products_of_it_are_fast(monkeypatch):
    lm = make(SHAPES[0])
    for fast, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(engines, "multiplies_bfloat16", lambda device, fast=fast: fast)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert engine_for(lm).name.endswith(name)


def test_wide_heads_are_left_to_pytorch():
    lm = TokenLM(2, 8, num_layers=1, dim=2 * (native.WIDEST + 2), num_heads=1, ffn_multiple=8)
    if not REASON:
        with pytest.raises(NoLibrary, match="channels wide"):
            NativeEngine(lm)


def test_without_a_compiler_nothing_is_compiled_and_that_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    lm = make(SHAPES[0])
    with pytest.warns(UserWarning, match="compile is true, but there is no C\\+\\+ compiler"):
        engine = engine_for(lm, "float32", "torch", compiled=True)
    assert generate(engine, Condition(torch.randn(1, 5, lm.channels)), 5, seeds=[0], sampler=Sampler()).shape == (1, 3, 5)


def test_clips_of_many_lengths_share_one_compiled_step(monkeypatch):
    lm, compiled = make(SHAPES[0]), []

    def count(graph, _):
        compiled.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function, backend=count, dynamic=False))
    torch._dynamo.reset()
    engine = TorchEngine(lm, "float32", compiled=True)
    for frames in range(4, 14):
        condition = Condition(torch.randn(1, frames, lm.channels))
        how = {"seeds": [1], "sampler": Sampler(1.0)}
        assert torch.equal(generate(engine, condition, frames, **how), generate_slow(lm, condition, frames, **how))
    assert len(compiled) == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8"])
@torch.no_grad()
def test_a_compiled_step_is_the_step(precision):
    """To the last digits in float32; in int8 to those of bfloat16, which the compiler keeps in more digits between products."""
    lm = make(SHAPES[2])
    tokens, channel = something(lm, 2, 6)
    compiled, plain = (
        read_all(TorchEngine(lm, precision, compiled), lm, tokens, channel, [1] * 6) for compiled in (True, False)
    )
    assert distance(compiled, plain) < (1e-5 if precision == "float32" else 2e-2)


# --- CUDA ---


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_captured_step_gives_the_tokens_of_the_slow_loop(compiled, guidance):
    lm = make(SHAPES[2]).cuda()
    engine = TorchEngine(lm, "float32", compiled)
    for seed in (1, 2):  # the second time the graph is there
        condition = Condition(torch.randn(2 if guidance == 1.0 else 4, 20, lm.channels, device="cuda"))
        how = {"seeds": [seed, seed + 1], "sampler": Sampler(1.0, top_k=8), "guidance": guidance}
        assert torch.equal(generate(engine, condition, 20, **how), generate_slow(lm, condition, 20, **how))
