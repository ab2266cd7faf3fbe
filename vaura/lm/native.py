"""The door to `native.cpp`: built once by the machine's own C++ compiler, kept, and called with packed weights.

Where there is no such compiler, or its program does not run, `library` says why, and generation goes on in PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
from ctypes import POINTER, Structure, c_double, c_float, c_int64, c_void_p
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vaura.errors import InputError
from vaura.files import cache_folder, write_aside
from vaura.lm.llama import TokenLM

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC", "-w")

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
GROUP = {"float32": 1, "bfloat16": 2, "int8": 4}
STRIPE, INPUTS, CHANNELS = 32, 64, 16  # what outputs, inputs and the channels of a head are padded to
WIDEST = 512  # channels of a head
AHEAD = 8192  # bytes behind the weights: alignment, and what is asked for beforehand
ALIGNED = 64  # bytes, of memory that the kernel works in

BUILT_IN = 120
"""Seconds that the compiler may take."""


class Matrix(Structure):
    _fields_ = [(name, c_void_p) for name in ("weight", "scale", "sum")] + [("outputs", c_int64), ("inputs", c_int64)]


class Layer(Structure):
    _fields_ = [
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
        ("attention_norm", c_void_p),
        ("ffn_norm", c_void_p),
    ]


class Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("format", "layers", "dim", "heads", "hidden", "logits")),
        ("layer", POINTER(Layer)),
        ("head", Matrix),
        ("norm", c_void_p),
        ("eps", c_double),
    ]


class Cache(Structure):
    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("sequences", c_int64), ("slots", c_int64)]


class Rows(Structure):
    _fields_ = [
        ("count", c_int64),
        ("x", c_void_p),
        ("rotation", c_void_p),
        ("sequence", c_void_p),
        ("slot", c_void_p),
        ("seen", c_void_p),
        ("shared", c_int64),
        ("wanted", c_void_p),
        ("num_wanted", c_int64),
    ]


class NoLibrary(Exception):
    """Why `native.cpp` cannot be used on this machine, in a clause."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled `native.cpp`. Raises NoLibrary."""
    if os.environ.get("VAURA_NATIVE") == "0":
        raise NoLibrary("VAURA_NATIVE=0 says so")
    return load(build())


def load(path: Path) -> ctypes.CDLL:
    """What `build` made. Raises NoLibrary where it does not run here."""
    if sys.byteorder != "little":
        raise NoLibrary("it is written for processors that store the low byte first")
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoLibrary(f"what was compiled does not load ({error})") from error
    found.vaura_room.argtypes, found.vaura_room.restype = [POINTER(Model), c_int64, c_int64, c_int64], c_int64
    found.vaura_step.argtypes = [POINTER(Model), POINTER(Cache), POINTER(Rows), c_void_p, c_void_p, c_int64]
    found.vaura_step.restype = None
    found.vaura_huge_pages.argtypes, found.vaura_huge_pages.restype = [c_void_p, c_int64], None
    found.vaura_read.argtypes, found.vaura_read.restype = [c_void_p, c_int64, c_int64], c_float
    return found


def build(compiler: str | None = None, folder: Path | None = None) -> Path:
    """Compile `native.cpp` for this processor, unless that was done before; returns the shared library.

    Args:
        compiler: a command; None: $CXX, c++, g++ or clang++, the first there is.
        folder: where it is kept; None: below the cache of the house.
    """
    asked = compiler or os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "")
    try:
        words = shlex.split(asked)
    except ValueError as error:
        raise NoLibrary(f"the compiler {asked} is no command ({error})") from error
    if not words or shutil.which(words[0]) is None:
        raise NoLibrary(f"there is no C++ compiler{' ' + words[0] if words else ''} (install g++, or set CXX)")
    named = list(itertools.takewhile(lambda word: not word.startswith("-"), words))  # as "ccache g++"
    command = [*named, *FLAGS, *words[len(named) :]]  # the options that a person sets come last and win
    try:
        version = subprocess.run([*named, "--version"], capture_output=True, timeout=BUILT_IN, check=True).stdout
        key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, " ".join(command).encode(), _processor()]))
        me = os.getuid() if hasattr(os, "getuid") else 0
        # users may share the folder, but nobody runs what another has put there
        path = (folder or cache_folder("native")) / f"{key.hexdigest()[:16]}-{me}.so"
        if path.is_file() and hasattr(os, "getuid") and path.stat().st_uid != me:
            raise NoLibrary(f"{path} was put there by another user; delete it, or set VAURA_CACHE to a folder of your own")
        if not path.is_file():
            with write_aside(path) as aside:
                subprocess.run([*command, str(SOURCE), "-o", str(aside)], capture_output=True, timeout=BUILT_IN, check=True)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        raise NoLibrary(f"{words[0]} cannot compile it ({said[0] if said else error})") from error
    except (OSError, RuntimeError, InputError, subprocess.TimeoutExpired) as error:  # RuntimeError: nobody's home is known
        raise NoLibrary(f"it cannot be compiled ({error})") from error
    return path


def _processor() -> bytes:
    """What tells this processor's instructions from another's: a folder may be shared by several machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    told = [next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags", "Features")]
    return "\n".join([platform.machine(), platform.processor(), *told]).encode()


class Packed:
    """The weights of a token LM as `native.cpp` reads them, in one piece of memory; `lm` itself is not kept.

    Args:
        precision: float32, bfloat16, or int8 with one scale an output, the nearest of 255 steps (no calibration).
        kernel: what `load` gave; None: the library of this machine.

    Raises NoLibrary where there is none, or the model is none that it can run.
    """

    def __init__(self, lm: TokenLM, precision: str, kernel: ctypes.CDLL | None = None) -> None:
        if lm.style != "llama" or lm.shared_codebook:
            raise NoLibrary("it runs LLaMA's blocks over codebooks of their own, and this model has others")
        head_dim = lm.dim // lm.num_heads
        if head_dim > WIDEST:
            raise NoLibrary(f"heads are {head_dim} channels wide, more than {WIDEST}")
        self.library, self.precision, self.dtype = kernel or library(), precision, DTYPES[precision]
        self.num_codebooks, self.codebook_size = lm.num_codebooks, lm.codebook_size
        self.num_layers, self.dim, self.num_heads, self.head_dim = len(lm.blocks), lm.dim, lm.num_heads, head_dim
        self.rope_base = lm.rope_base
        # a stripe of gate and up is 16 outputs of each
        self.hidden = max((_up(block.ffn.down.in_features, STRIPE) for block in lm.blocks), default=0)
        self._kept: list[Tensor] = []
        with torch.no_grad():
            self._pack(lm)

    def _pack(self, lm: TokenLM) -> None:
        shapes = [(3 * self.dim, self.dim), (self.dim, self.dim), (2 * self.hidden, self.dim), (self.dim, self.hidden)]
        head = (self.num_codebooks * self.codebook_size, self.dim)
        self.memory = self._memory(sum(self._size(*shape) for shape in [*shapes * self.num_layers, head]))
        self._filled = 0
        layers = (Layer * self.num_layers)()
        for layer, block in zip(layers, lm.blocks, strict=True):
            layer.qkv = self._matrix(block.attention.qkv.weight)
            layer.out = self._matrix(block.attention.out.weight)
            layer.gate_up = self._matrix(self._interleaved(block.ffn.gate.weight, block.ffn.up.weight))
            layer.down = self._matrix(block.ffn.down.weight)
            layer.attention_norm = self._keep(block.attention_norm.weight.float())
            layer.ffn_norm = self._keep(block.ffn_norm.weight.float())
        self.model = Model(
            format=FORMATS[self.precision],
            layers=self.num_layers,
            dim=self.dim,
            heads=self.num_heads,
            hidden=self.hidden,
            logits=head[0],
            layer=layers,
            head=self._matrix(torch.cat([one.weight for one in lm.heads])),
            norm=self._keep(lm.norm.weight.float()),
            eps=lm.norm.eps,
        )

    def step(
        self,
        cache: NativeCache,
        x: Tensor,
        rotation: Tensor,
        sequence: Tensor,
        slot: Tensor,
        seen: Tensor,
        wanted: Tensor,
        shared: bool,
    ) -> Tensor:
        """x (R, D) float32, of R positions, -> logits (len(wanted), K, V) float32 of the `wanted` ones; the cache is written.

        Args:
            rotation: (R, D/H/2, 2) float32.
            sequence, slot, seen, wanted: int32; whose a position is, where its key and value go, how many slots it looks at.
            shared: whether several positions are of one sequence.
        """
        count, threads = len(x), torch.get_num_threads()
        needed = self.library.vaura_room(self.model, count, cache.slots, threads) + ALIGNED
        if cache.room.numel() < needed:
            cache.room = torch.empty(needed, dtype=torch.uint8)
        logits = torch.empty(len(wanted), self.num_codebooks, self.codebook_size)
        kept = [tensor.contiguous() for tensor in (x, rotation, sequence, slot, seen, wanted)]
        x_, rotation_, sequence_, slot_, seen_, wanted_ = (tensor.data_ptr() for tensor in kept)
        rows = Rows(count, x_, rotation_, sequence_, slot_, seen_, shared, wanted_, len(wanted))
        room = _up(cache.room.data_ptr(), ALIGNED)
        self.library.vaura_step(self.model, cache.struct, rows, logits.data_ptr(), room, threads)
        return logits

    @property
    def weight_bytes(self) -> int:
        """What a step reads."""
        return self.memory.numel()

    def read(self, threads: int) -> None:
        """Read all weights and do nothing with them: what no step can be faster than."""
        self.library.vaura_read(self.memory.data_ptr(), self.memory.numel(), threads)

    def _memory(self, size: int) -> Tensor:
        memory = torch.empty(size + AHEAD, dtype=torch.uint8)
        self.library.vaura_huge_pages(memory.data_ptr(), memory.numel())
        return memory[-memory.data_ptr() % ALIGNED :][:size]

    def _size(self, outputs: int, inputs: int) -> int:
        return _up(outputs, STRIPE) * _up(inputs, INPUTS) * self.dtype.itemsize

    def _matrix(self, weight: Tensor) -> Matrix:
        """Pack a weight (outputs, inputs) into the next piece of the memory."""
        outputs, inputs = weight.shape
        padded = F.pad(weight.float(), (0, _up(inputs, INPUTS) - inputs, 0, _up(outputs, STRIPE) - outputs))
        scale = total = None
        if self.precision == "int8":
            padded, scales = quantise(padded)
            scale, total = self._keep(scales), self._keep(padded.sum(1, dtype=torch.int32))
        stripes = padded.view(len(padded) // STRIPE, STRIPE, -1, GROUP[self.precision]).transpose(1, 2)
        size = self._size(outputs, inputs)
        place = self.memory[self._filled : self._filled + size]
        place.view(self.dtype).view(stripes.shape).copy_(stripes)
        self._filled += size
        return Matrix(place.data_ptr(), scale, total, *padded.shape)

    def _interleaved(self, gate: Tensor, up: Tensor) -> Tensor:
        """Both halves of the SwiGLU's first product, 16 outputs of each in turn."""
        both = torch.stack([F.pad(half, (0, 0, 0, self.hidden - len(half))) for half in (gate, up)])
        return both.view(2, -1, STRIPE // 2, self.dim).transpose(0, 1).reshape(-1, self.dim)

    def _keep(self, value: Tensor) -> int:
        """The address of a copy that lives as long as this."""
        self._kept.append(value.detach().clone().contiguous())
        return self._kept[-1].data_ptr()


class NativeCache:
    """Keys and values (layers, sequences, heads, slots, channels of a head padded to 16), and the memory that steps work in."""

    def __init__(self, packed: Packed, sequences: int, slots: int) -> None:
        shape = (packed.num_layers, sequences, packed.num_heads, slots, _up(packed.head_dim, CHANNELS))
        dtype = torch.float32 if packed.precision == "float32" else torch.bfloat16
        self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        self.sequences, self.slots = sequences, slots
        self.struct = Cache(self.keys.data_ptr(), self.values.data_ptr(), sequences, slots)
        self.room = torch.empty(0, dtype=torch.uint8)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (outputs, inputs) -> int8 and the scale of each output, by which they are multiplied again."""
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale


def _up(number: int, to: int) -> int:
    return -(-number // to) * to
