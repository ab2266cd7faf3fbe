"""Arrays of numbers in pickles, read without unpickling: nothing in the file is imported, called or trusted.

A pickle is a program for a small machine with a stack. This is such a machine, which knows only the few instructions that an
array of NumPy is written with (protocols 3 to 5), and only the names they mention; whatever else a file asks for is refused.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from pickletools import genops
from typing import Any

import numpy as np

from vaura.errors import InputError

NUMBER = re.compile(r"[fiu][1248]|b1")  # how NumPy writes its types: floats, integers and truth values

PUSHED = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}
PUSHED |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
KEEP = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
RECALL = {"BINGET", "LONG_BINGET"}
IDLE = {"PROTO", "FRAME"}
MARK = object()


def read_array(path: str | Path) -> np.ndarray:
    """The array in the pickle at `path`, not to be written to.

    Raises InputError where the file is missing, cut off, holds anything but an array of numbers, or asks for a name that is not
    NumPy's own for one.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; check the path") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    try:
        found = _run(genops(data), str(path))
        array = found.array if isinstance(found, _Array) else None
    except InputError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is no pickle of an array, or is cut off ({error}); replace the file") from error
    if array is None:
        raise InputError(f"{path} is a pickle of something else than an array of numbers; replace the file")
    return array


class _Type:
    """A data type on its way: `f4`, and then in which order its bytes stand."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not NUMBER.fullmatch(code):
            raise ValueError(f"its type {code!r} is no number's")
        self.dtype = np.dtype(code)

    def build(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array on its way: empty, and then all of it."""

    array: np.ndarray | None = None

    def build(self, state: tuple) -> None:
        _, shape, kind, fortran, content = state
        self.array = _laid_out(content, kind, shape, "F" if fortran else "C")


def _laid_out(content: bytes, kind: _Type, shape: tuple[int, ...], order: str) -> np.ndarray:
    if len(content) != math.prod(shape) * kind.dtype.itemsize:
        raise ValueError(f"{len(content)} bytes are not an array of {shape}")
    array = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if order == "F" else "C")
    array.flags.writeable = False
    return array


def _empty(*_: Any) -> _Array:
    return _Array()


def _of_bytes(content: bytes, kind: _Type, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.array = _laid_out(content, kind, shape, order)
    return array


CALLED: dict[str, Callable[..., Any]] = {"numpy dtype": _Type, "numpy ndarray": _empty}
for module in ("numpy.core", "numpy._core"):  # before NumPy 2, and since
    CALLED[f"{module}.multiarray _reconstruct"] = _empty
    CALLED[f"{module}.numeric _frombuffer"] = _of_bytes


def _run(program: Iterable[tuple[Any, Any, Any]], path: str) -> Any:
    """What the program leaves on the stack."""
    stack: list[Any] = []
    memory: dict[int, Any] = {}
    for operation, given, _ in program:
        name = operation.name
        if name in PUSHED:
            stack.append(given)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "MARK":
            stack.append(MARK)
        elif name == "TUPLE":
            start = len(stack) - 1 - stack[::-1].index(MARK)
            stack[start:] = [tuple(stack[start + 1 :])]
        elif name in TUPLES:
            length = TUPLES[name]
            stack[len(stack) - length :] = [tuple(stack[len(stack) - length :])]
        elif name in KEEP:
            memory[len(memory) if name == "MEMOIZE" else given] = stack[-1]
        elif name in RECALL:
            stack.append(memory[given])
        elif name == "GLOBAL":
            stack.append(_named(given, path))
        elif name == "STACK_GLOBAL":
            last, module = stack.pop(), stack.pop()
            stack.append(_named(f"{module} {last}", path))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            if called not in CALLED.values():
                raise ValueError("it calls what is no name")
            stack.append(called(*arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].build(state)
        elif name == "STOP":
            return stack.pop()
        elif name not in IDLE:
            raise ValueError(f"an array needs no {name}")
    raise ValueError("it has no end")


def _named(name: str, path: str) -> Callable[..., Any]:
    if name not in CALLED:
        raise InputError(
            f"{path} holds {name.replace(' ', '.')} and is not read, because reading that would run code; give one of an array"
        )
    return CALLED[name]


def array_as_pickle(array: np.ndarray, protocol: int = 3) -> bytes:
    """The pickle of an array of numbers that NumPy of any age reads; protocol 3, as SpecVQGAN's, to 5.

    The instructions are those that `read_array` follows, spelt for NumPy before 2, whose names its successors still know.
    """
    array = np.asarray(array, order="C")
    code = array.dtype.str[1:]
    if not NUMBER.fullmatch(code):
        raise ValueError(f"an array of {array.dtype} is not one of numbers")
    order = array.dtype.str[:1]
    whole = b"(K\x01(" + b"".join(_long(side) for side in array.shape) + b"t"
    kind = b"cnumpy\ndtype\n" + _text(code) + b"\x89\x88\x87R(K\x03" + _text(order) + b"NNN" + 2 * _int(-1) + b"K\x00tb"
    content = array.tobytes()
    if len(content) >= 2**32:
        raise ValueError(f"an array of {len(content):,} bytes is too large for a pickle")
    held = b"B" + struct.pack("<I", len(content))
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    return b"\x80" + bytes([protocol]) + empty + whole + kind + b"\x89" + held + content + b"tb."


def _int(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _long(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


def _text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()
