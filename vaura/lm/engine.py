"""What runs a token LM step by step: PyTorch on any device, or a CPU kernel that reads every weight once a step.

    engine = engine_for(lm, precision="auto")   # weights made ready once
    stream = engine.open(rows, max_steps)       # rows that are read together, each with keys and values of its own
    logits = stream.read(tokens, channel)       # of what comes after them; the stream moves on

On CUDA a whole step, drawing included, is captured as a graph once and then replayed: see `Engine.repeater`. Every shape is
fixed beforehand and the position lies on the device, so nothing is compiled or captured anew as the sound grows.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from ctypes import CDLL
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaura.errors import InputError, nearest
from vaura.lm.attention import KVCache, rotary_table
from vaura.lm.llama import FactorisedEmbedding, TokenLM
from vaura.lm.lora import merged
from vaura.lm.native import DTYPES, NativeCache, NoLibrary, Packed, quantise
from vaura.precision import can_compile, multiplies_bfloat16
from vaura.protocols import ABSENT

PRECISIONS = ("auto", *DTYPES)
"""Number formats of the weights, and of what is multiplied with them. int8 is that of the weights alone."""

ENGINES = ("auto", "native", "torch")

AT_ONCE = 512
"""Positions, over all rows, that a prompt is read in at once: more would only take more memory."""

TABLE = 1024
"""Positions whose rotations are made beforehand."""

SLOTS = 256
"""Steps whose multiples a compiled step's cache is rounded up to: clips shorter than a window would each be compiled anew."""

SHAPES = 64
"""Shapes, of rows and caches, for which a step may be compiled; PyTorch would give up after 8, and go on uncompiled."""


class Stream(Protocol):
    """Rows of one LM, read in step."""

    at: Tensor  # (1,) int64: the position that is read next

    def read(self, tokens: Tensor, channel: Tensor | None, every: bool = False) -> Tensor:
        """Read n positions of the first R rows; logits (R, K, V) float32 of what comes after the last of them.

        Args:
            tokens: what the positions read, (R, K, n), ABSENT where that is nothing.
            channel: their channel condition (R, n, C).
            every: give the logits after each of them, (R, n, K, V).
        """
        ...

    def restart(self, prefix: Tensor | None = None) -> None:
        """Go back to position 0, behind a prefix (R, P, D) where there is one; what was read is forgotten."""
        ...


Repeater = Callable[[Callable[[], None]], None]
"""Called as repeater(step), with the same step every time, which works on tensors that stay where they are."""


class Engine(Protocol):
    """A token LM made ready to run."""

    lm: TokenLM
    name: str
    device: torch.device

    def open(self, rows: int, max_steps: int, reach: int | None = None) -> Stream:
        """A stream of `rows` rows and at most `max_steps` positions, those of a prefix included.

        With a `reach` it forgets and goes on for ever, without a prefix.
        """
        ...

    def repeater(self) -> Repeater | None:
        """What makes a step that is taken many times quick; None: nothing, the step is to be called as it is."""
        ...


def engine_for(lm: TokenLM, precision: str = "auto", engine: str = "auto", compiled: bool = False) -> Engine:
    """`lm` made ready to generate on its device.

    Args:
        precision: float32, bfloat16, int8 (weights alone), or auto: bfloat16 where the machine multiplies it fast.
        engine: native (CPU, needs a C++ compiler once), torch, or auto: native where it can be.
        compiled: let torch.compile fuse each step; takes a minute once, and pays on CUDA.

    Raises InputError for what does not exist, for engine=native where it cannot be, and for weights that are not finite.
    """
    for key, value, known in (("precision", precision, PRECISIONS), ("engine", engine, ENGINES)):
        if value not in known:
            raise InputError(f"{key}={value} is none of {', '.join(known)}.{nearest(value, known)}")
    lm = merged(lm)
    check_finite(lm)
    device = lm.norm.weight.device
    if precision == "auto":
        precision = "bfloat16" if multiplies_bfloat16(device) else "float32"
    if engine == "native" and device.type != "cpu":
        raise InputError(f"engine=native runs on the CPU, and the model is on {device}; set engine=torch or device=cpu")
    if engine != "torch" and device.type == "cpu":
        try:
            return NativeEngine(lm, precision)
        except NoLibrary as reason:
            if engine == "native":
                raise InputError(f"engine=native cannot run here: {reason}; set engine=torch") from reason
            warnings.warn(f"the CPU kernel is left aside, generation is slower without: {reason}", stacklevel=2)
    return TorchEngine(lm, precision, compiled and can_compile("compile is true"))


def check_finite(lm: TokenLM) -> None:
    """Raise InputError where a weight is NaN or infinite: every code would be drawn as 0, and nothing else would tell."""
    names, weights = zip(*lm.named_parameters(), strict=True)
    finite = torch.stack([weight.detach().sum(dtype=torch.float64) for weight in weights]).isfinite()
    if not finite.all():
        name = names[int(finite.long().argmin())]
        raise InputError(f"the weights of lm.{name} are not all finite: the training diverged; take an earlier checkpoint")


# --- PyTorch ---


class TorchEngine:
    """The model itself, in a number format of its own where that differs, with keys and values in place."""

    def __init__(self, lm: TokenLM, precision: str = "float32", compiled: bool = False) -> None:
        self.lm, self.device = lm, lm.norm.weight.device
        self.name = f"torch, {precision}{', compiled' if compiled else ''}"
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        if lm.norm.weight.dtype != dtype or precision == "int8":
            self.lm = copy.deepcopy(lm).to(dtype)
        if precision == "int8":
            _replace_linears(lm, self.lm)
        self.compiled, self.predict = compiled, predict
        if compiled:
            torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, SHAPES)
            self.predict = torch.compile(predict, mode="max-autotune-no-cudagraphs", dynamic=False)

    def open(self, rows: int, max_steps: int, reach: int | None = None) -> TorchStream:
        if reach is None:
            self.lm.check_positions(max_steps)
        if self.compiled and reach is None:
            max_steps = -(-max_steps // SLOTS) * SLOTS
        return TorchStream(self, rows, max_steps, reach)

    def repeater(self) -> Repeater | None:
        return Graph(self.device) if self.device.type == "cuda" else None


def predict(lm: TokenLM, tokens: Tensor, channel: Tensor | None, position: Tensor, cache: KVCache) -> Tensor:
    """What is compiled: tokens (R, K, n) -> logits (R, K, n, V) float32."""
    return lm.predict(lm.embed(tokens, channel), position, cache).float()


class TorchStream:
    def __init__(self, engine: TorchEngine, rows: int, max_steps: int, reach: int | None) -> None:
        self.engine, self.cache = engine, engine.lm.new_cache(rows, max_steps, reach)
        self.rows, self.at = rows, torch.zeros(1, dtype=torch.int64, device=engine.device)
        self.before = 0  # vectors of the prefix

    @torch.no_grad()
    def restart(self, prefix: Tensor | None = None) -> None:
        self.at.zero_()
        self.before = 0 if prefix is None else prefix.shape[1]
        if prefix is not None:
            self.cache.check_room(0, self.before)
            cache = self.cache if len(prefix) == self.rows else self.cache.first(len(prefix))
            lm = self.engine.lm
            lm.predict(prefix.to(lm.norm.weight), torch.arange(self.before, device=self.at.device), cache)

    @torch.no_grad()
    def read(self, tokens: Tensor, channel: Tensor | None, every: bool = False) -> Tensor:
        rows, _, count = tokens.shape
        cache = self.cache if rows == self.rows else self.cache.first(rows)
        if count == 1:
            logits = self.engine.predict(self.engine.lm, tokens, channel, self.at + self.before, cache)
            self.at += 1
            return logits.transpose(1, 2) if every else logits[:, :, -1]
        start = int(self.at) + self.before
        if cache.keys:
            cache.check_room(start, count)
        position = torch.arange(start, start + count, device=self.at.device)
        logits = predict(self.engine.lm, tokens, channel, position, cache)
        self.at += count
        return logits.transpose(1, 2) if every else logits[:, :, -1]


class Graph:
    """A step on CUDA: called as it is while the libraries make their choices, then captured, and replayed ever after.

    The step is not kept: whoever owns this would otherwise hold itself, and its memory would outlive it.
    """

    WARM = 3

    def __init__(self, device: torch.device) -> None:
        self.device, self.calls, self.graph = device, 0, None
        self.side = torch.cuda.Stream(device)

    def __call__(self, step: Callable[[], None]) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        self.calls += 1
        with torch.cuda.device(self.device):
            if self.calls <= self.WARM:
                self.side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.side):
                    step()
                torch.cuda.current_stream().wait_stream(self.side)
                return
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # thread_local: a thread that pins what a DataLoader brings must not end the capture
            with torch.cuda.graph(graph, stream=self.side, capture_error_mode="thread_local"):  # records, and does nothing
                step()
            self.graph = graph
            graph.replay()


class Int8Linear(nn.Module):
    """A linear map with weights in int8 and one scale an output."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        values, scale = quantise(weight.float())
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale  # type: ignore[operator]


def _replace_linears(source: nn.Module, target: nn.Module) -> None:
    """Put an Int8Linear of the weights in `source` in place of every linear map of its copy `target`."""
    for name, child in source.named_children():
        if isinstance(child, nn.Linear):
            setattr(target, name, Int8Linear(child.weight.detach()))
        else:
            _replace_linears(child, getattr(target, name))


# --- the CPU kernel ---


class NativeEngine:
    """The CPU kernel on packed weights. Raises NoLibrary where it cannot run."""

    device = torch.device("cpu")

    def __init__(self, lm: TokenLM, precision: str = "float32", kernel: CDLL | None = None) -> None:
        self.packed, self.lm, self.name = Packed(lm, precision, kernel), lm, f"native, {precision}"
        # all codebooks in one table, so that a step looks its codes up at once
        with torch.no_grad():
            tables = [_table(embedding).float() for embedding in lm.embeddings]
        self.table = torch.cat(tables)
        self.offsets = torch.arange(len(tables)).unsqueeze(1) * (lm.codebook_size + 1)

    def open(self, rows: int, max_steps: int, reach: int | None = None) -> NativeStream:
        return NativeStream(self, rows, max_steps if reach is None else min(max_steps, 1 + reach), reach)

    def repeater(self) -> None:
        return None

    def embed(self, tokens: Tensor, channel: Tensor | None) -> Tensor:
        """tokens (R, K, n) beside channel (R, n, C) -> (R n, D) float32."""
        ids = torch.where(tokens == ABSENT, self.lm.special, tokens) + self.offsets
        x = F.embedding_bag(ids.transpose(1, 2).flatten(0, 1), self.table, mode="sum")
        return x if channel is None else torch.cat([channel.flatten(0, 1).float(), x], dim=1)


class NativeStream:
    def __init__(self, engine: NativeEngine, rows: int, slots: int, reach: int | None) -> None:
        self.engine, self.slots, self.reach = engine, slots, reach
        self.cache = NativeCache(engine.packed, rows, slots)
        self.at, self.one = torch.zeros(1, dtype=torch.int64), torch.arange(rows, dtype=torch.int32)
        self.restart()

    @torch.no_grad()
    def restart(self, prefix: Tensor | None = None) -> None:
        self.position, self.table_start = 0, -TABLE
        if prefix is not None:
            for piece in prefix.float().split(max(AT_ONCE // len(prefix), 1), dim=1):
                self._step(piece.contiguous(), every=False)
        self.at.zero_()

    @torch.no_grad()
    def read(self, tokens: Tensor, channel: Tensor | None, every: bool = False) -> Tensor:
        rows, _, count = tokens.shape
        if self.position + count > self.slots and (self.reach is None or count > 1):
            raise ValueError(f"{count} steps at {self.position} do not fit into a cache of {self.slots} slots at once")
        x = self.engine.embed(tokens, channel).view(rows, count, -1)
        if count == 1:
            logits = self._step(x, every=False)
            return logits.unsqueeze(1) if every else logits
        pieces = x.split(max(AT_ONCE // rows, 1), dim=1)
        logits = [self._step(piece, every) for piece in pieces]
        return torch.cat(logits, dim=1) if every else logits[-1]

    def _step(self, x: Tensor, every: bool) -> Tensor:
        rows, count, _ = x.shape
        sequence = self.one[:rows] if count == 1 else self.one[:rows].repeat_interleave(count)
        position = torch.arange(self.position, self.position + count, dtype=torch.int32)
        slot = position if self.position + count <= self.slots else 1 + (position - 1) % max(self.slots - 1, 1)
        wanted = self.one[:rows] if count == 1 else torch.arange(0 if every else count - 1, rows * count, 1 if every else count)
        logits = self.engine.packed.step(
            self.cache,
            x.flatten(0, 1),
            self._rotation(count).repeat(rows, 1, 1),
            sequence,
            slot.repeat(rows),
            (position + 1).clamp_(max=self.slots).repeat(rows),
            wanted.int(),
            shared=count > 1,
        )
        self.position += count
        self.at += count
        return logits.unflatten(0, (rows, count)) if every else logits

    def _rotation(self, count: int) -> Tensor:
        """Rotations of the next positions, (n, D/H/2, 2)."""
        first = self.position - self.table_start
        if first < 0 or first + count > TABLE:
            packed = self.engine.packed
            self.table_start, first = self.position, 0
            positions = torch.arange(self.position, self.position + max(count, TABLE))
            self.table = rotary_table(positions, packed.head_dim, packed.rope_base)
        return self.table[first : first + count]


def _table(embedding: nn.Module) -> Tensor:
    """The vectors of all codes of a codebook, (V + 1, D - C)."""
    if isinstance(embedding, FactorisedEmbedding):
        return embedding(torch.arange(embedding.table.num_embeddings))
    return embedding.weight.detach()  # type: ignore[return-value]
