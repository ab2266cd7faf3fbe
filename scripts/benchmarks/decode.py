"""One step of generation at batch 1 and more, guidance on, beside the reading of its weights and MusicGen's decoder.

Every line is one step: both rows of each clip through the model, guidance, sampling, everything that Python does. The limit
reads the weights once and does nothing with them, with as many threads. MusicGen is transformers' decoder of as many parameters
with its own cache and no cross-attention, without guidance and sampling around it.

    python scripts/benchmark.py decode                                     V-AURA's size, float32, bfloat16 and int8
    python scripts/benchmark.py decode --size 12x768 --slow                beside the loop without a cache, 2.56 s of sound
    python scripts/benchmark.py decode --batch 1,4,16 --precision bfloat16
    python scripts/benchmark.py decode --experiment FOLDER                 what bfloat16 and int8 cost on held-out clips
"""

from __future__ import annotations

import argparse
import gc
import importlib
from collections.abc import Callable

import torch

from benchmarks.measure import Line, Table, interleaved
from vaura.errors import InputError
from vaura.lm.engine import DTYPES, Engine, NativeEngine, TorchEngine
from vaura.lm.generation import Run, generate, generate_slow
from vaura.lm.llama import TokenLM
from vaura.lm.native import NoLibrary
from vaura.lm.pattern import delay, undelay
from vaura.lm.sampling import Guidance, Sampler
from vaura.protocols import ABSENT, Condition

CODEBOOKS, CODES = 9, 1024
FRAMES = 221  # 2.56 s of DAC
READ_FIRST = 96  # steps behind the first that is timed: about the middle, with those that follow
SAMPLER, GUIDANCE = Sampler(1.0, top_k=128), Guidance(6.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="24x1536", help="layers x width, as 24x1536 (V-AURA's) or 12x768")
    parser.add_argument("--batch", default="1", help="clips at once, as 1,4,16")
    parser.add_argument("--precision", default="float32,bfloat16,int8")
    parser.add_argument("--rounds", type=int, default=25, help="steps timed of each alternative")
    parser.add_argument("--compile", action="store_true", help="also PyTorch's step compiled; takes minutes")
    parser.add_argument("--no-peer", action="store_true", help="leave MusicGen out")
    parser.add_argument("--slow", action="store_true", help="whole sounds of 2.56 s beside the loop without a cache")
    parser.add_argument("--experiment", metavar="FOLDER", help="measure what number formats cost this trained model instead")


def run(args: argparse.Namespace) -> list[Table]:
    precisions = _listed(args.precision, DTYPES)
    if args.experiment:
        return [cost(args.experiment, [name for name in precisions if name != "float32"])]
    try:
        layers, dim = (int(part) for part in args.size.split("x"))
        batches = [int(part) for part in args.batch.split(",")]
    except ValueError as error:
        raise InputError(f"--size={args.size} and --batch={args.batch} are read as 24x1536 and 1,4,16") from error
    if min(args.rounds, layers, *batches) < 1 or dim < 64:
        raise InputError("--rounds, --batch and the layers of --size are 1 or more, its width 64 or more")
    lm = random_lm(layers, dim).to(args.device)
    if args.slow:
        return [whole_sounds(lm, precisions)]
    tables = []
    for precision in precisions:
        for batch in batches:
            tables.append(steps(lm, precision, batch, args))
            gc.collect()
    return tables


def random_lm(layers: int, dim: int) -> TokenLM:
    """A model of V-AURA's proportions with random weights."""
    torch.manual_seed(0)
    lm = TokenLM(CODEBOOKS, CODES, layers, dim, max(dim // 96, 1) if dim % 96 == 0 else dim // 64, channels=dim // 3)
    for head in lm.heads:
        torch.nn.init.normal_(head.weight, std=0.02)
    return lm.eval()


# --- one step ---


def steps(lm: TokenLM, precision: str, batch: int, args: argparse.Namespace) -> Table:
    """Alternatives at one number format and batch size, one step of each in turn."""
    runs: dict[str, Callable[[], object]] = {}
    notes: list[str] = []
    weights = sum(p.numel() for name, p in lm.named_parameters() if not name.startswith("embeddings"))
    bytes_read = weights * DTYPES[precision].itemsize
    native = _native(lm, precision, notes) if lm.norm.weight.device.type == "cpu" else None
    if native is not None:
        bytes_read = native.packed.weight_bytes
        runs["reading the weights"] = lambda: native.packed.read(torch.get_num_threads())
        runs["vaura, CPU kernel"] = Steps(native, batch)
    else:
        runs["reading the weights"] = _reading(bytes_read, lm.norm.weight.device)
    if precision != "int8" or lm.norm.weight.device.type == "cuda":
        runs["vaura, PyTorch"] = Steps(TorchEngine(lm, precision), batch)
    if args.compile:
        runs["vaura, PyTorch compiled"] = Steps(TorchEngine(lm, precision, compiled=True), batch)
    if not args.no_peer:
        # MusicGen has no int8: it stands beside that with its bfloat16
        peer = _musicgen(lm, torch.float32 if precision == "float32" else torch.bfloat16, 2 * batch, notes)
        if peer is not None:
            runs["MusicGen"] = peer
    finish = torch.cuda.synchronize if lm.norm.weight.device.type == "cuda" else lambda: None
    lines = interleaved(runs, args.rounds, warm=5, finish=finish)
    pace = bytes_read / lines[0].median
    return Table(
        f"A step at {args.size}, {precision}, batch {batch}: {weights / 1e6:.0f} M parameters, {bytes_read / 1e6:.0f} MB",
        lines,
        limit="reading the weights",
        peer="MusicGen" if "MusicGen" in runs else None,
        notes=[f"The weights are read at {pace / 1e9:.1f} GB/s.", *notes],
    )


class Steps:
    """Steps of generation one after another, around the middle of a window."""

    def __init__(self, engine: Engine, batch: int) -> None:
        lm, total = engine.lm, engine.lm.num_steps(FRAMES)
        self.run = Run(engine, batch, total, SAMPLER, GUIDANCE.on)
        shape = (batch, lm.num_codebooks, total)
        known = torch.arange(total) < READ_FIRST
        self.begin = (
            torch.where(known, torch.randint(lm.codebook_size, shape), ABSENT),
            ~known.expand(shape),
            torch.rand(batch, total, lm.num_codebooks),
            torch.full((batch, total), GUIDANCE.scale),
        )
        self.condition = Condition(torch.randn(2 * batch, FRAMES, lm.channels, device=engine.device))
        self.total, self.begun = total, False

    def __call__(self) -> None:
        if not self.begun or self.run.position == self.total:
            self.run.begin(*self.begin)
            self.run.look(self.condition, 0)
            self.run.read(READ_FIRST)
            self.begun = True
        with torch.no_grad():
            self.run.draw()


def _native(lm: TokenLM, precision: str, notes: list[str]) -> NativeEngine | None:
    try:
        return NativeEngine(lm, precision)
    except NoLibrary as reason:
        notes.append(f"The CPU kernel is left out: {reason}.")
        return None


def _reading(count: int, device: torch.device) -> Callable[[], object]:
    """Read `count` bytes at the pace of a copy, which reads and writes half as many."""
    source = torch.ones(count // 2 // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _musicgen(lm: TokenLM, dtype: torch.dtype, rows: int, notes: list[str]) -> Callable[[], object] | None:
    importlib.import_module("vaura.media.torchaudio_door")  # transformers imports torchaudio, which may not fit this torch
    try:
        from transformers import MusicgenForCausalLM
        from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig
    except ImportError:
        notes.append('MusicGen is left out: there is no transformers (pip install -e ".[bench]").')
        return None
    config = MusicgenDecoderConfig(
        vocab_size=lm.codebook_size,
        num_codebooks=lm.num_codebooks,
        hidden_size=lm.dim,
        num_hidden_layers=len(lm.blocks),
        num_attention_heads=lm.num_heads,
        ffn_dim=lm.blocks[0].ffn.down.in_features * 3 // 2,  # two matrices where SwiGLU has three
        max_position_embeddings=2048,
        pad_token_id=lm.codebook_size,
        bos_token_id=None,
    )
    model = MusicgenForCausalLM(config).eval()
    for layer in model.model.decoder.layers:  # the weights of a cross-attention that is not asked for
        layer.encoder_attn = None
    model = model.to(lm.norm.weight.device, dtype)
    ids = torch.randint(lm.codebook_size, (rows * lm.num_codebooks, READ_FIRST), device=lm.norm.weight.device)
    held = {}

    @torch.no_grad()
    def step() -> None:
        if not held or held["length"] >= lm.num_steps(FRAMES):
            held["cache"] = model(ids, use_cache=True).past_key_values
            held["length"] = READ_FIRST
        out = model(ids[:, :1], past_key_values=held["cache"], use_cache=True)
        held["cache"] = out.past_key_values
        held["length"] += 1

    return step


# --- whole sounds ---


def whole_sounds(lm: TokenLM, precisions: list[str]) -> Table:
    """2.56 s of sound by every engine, and by the loop that reads everything again for each step."""
    condition = Condition(torch.randn(2, FRAMES, lm.channels, device=lm.norm.weight.device))
    how = {"seeds": [0], "sampler": SAMPLER, "guidance": GUIDANCE}
    notes: list[str] = []
    runs: dict[str, Callable[[], object]] = {"without a cache, float32": lambda: generate_slow(lm, condition, FRAMES, **how)}
    for precision in precisions:
        engine = _native(lm, precision, notes) if lm.norm.weight.device.type == "cpu" else None
        engine = engine or TorchEngine(lm, precision)
        runs[f"vaura, {engine.name}"] = lambda engine=engine: generate(engine, condition, FRAMES, **how)
    lines = interleaved(runs, 3, warm=1)
    return Table("2.56 s of sound", lines, peer="without a cache, float32", notes=notes)


# --- what number formats cost ---


@torch.no_grad()
def cost(folder: str, precisions: list[str]) -> Table:
    """Held-out loss and agreement of the most likely tokens, each format beside float32, on the clips that validate."""
    from vaura import experiment  # here, for they open Lightning
    from vaura.train import load_data

    task, config = experiment.load(folder)
    data = load_data(config, task, needs=("val",))
    engines = {name: engine_of(task.lm, name) for name in ("float32", *precisions)}
    losses = dict.fromkeys(engines, 0.0)
    same = dict.fromkeys(engines, 0)
    scored = clips = 0
    for batch in data.loader("val"):
        if batch is None:
            continue
        codes, features = task.tokenise(batch)
        condition = task.conditioner(features, codes.shape[2])
        best: torch.Tensor | None = None
        for name, engine in engines.items():
            logits = predicted(engine, codes, condition)
            losses[name] += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 2).float(), codes.flatten(), reduction="sum")
            )
            choice = logits.argmax(-1)
            best = choice if best is None else best
            same[name] += int((choice == best).sum())
        scored += codes.numel()
        clips += len(codes)
    lines = [
        Line(
            name,
            [losses[name] / scored],
            f"{(losses[name] - losses['float32']) / scored:+.5f}; {same[name] / scored:.2%} of the likeliest tokens as float32",
        )
        for name in engines
    ]
    return Table(f"Held-out loss of {folder}", lines, per="nats", notes=[f"{clips} clips, {scored} codes."])


def engine_of(lm: TokenLM, precision: str) -> Engine:
    try:
        return NativeEngine(lm, precision)
    except NoLibrary:
        return TorchEngine(lm, precision)


def predicted(engine: Engine, codes: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Logits (B, K, T, V) aligned with codes (B, K, T), all of them given."""
    lm = engine.lm
    steps = torch.nn.functional.pad(delay(codes, lm.delays, ABSENT), (1, -1), value=ABSENT)
    stream = engine.open(len(codes), steps.shape[2])
    logits = stream.read(steps, lm.channel_at(condition, 0, steps.shape[2]), every=True)
    return undelay(logits.transpose(1, 2), lm.delays)


def _listed(words: str, known) -> list[str]:
    listed = words.split(",")
    if wrong := [word for word in listed if word not in known]:
        raise InputError(f"--precision={wrong[0]} is none of {', '.join(known)}")
    return listed
