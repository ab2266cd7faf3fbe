"""One training step of the token LM: forward, backward, clipping, AdamW; beside MusicGen's decoder and the matrix peak.

The peer is transformers' MusicgenForCausalLM without its cross-attention, of the same layers, width, heads, codebooks, and
as many parameters. All run in the same precision, with the same fused AdamW, on random codes.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Table, interleaved
from vaura.errors import InputError
from vaura.lm.llama import TokenLM
from vaura.protocols import Condition
from vaura.task.memory import keep_freed_memory

Step = Callable[[], object]
CODES = 1024  # of a codebook, DAC's
PEER = "MusicGen decoder"
SIDES = (2048, 4096, 8192)  # of the square matrices whose product is the limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=12, help="V-AURA: 24")
    parser.add_argument("--dim", type=int, default=768, help="V-AURA: 1536")
    parser.add_argument("--heads", type=int, default=12, help="V-AURA: 16")
    parser.add_argument("--codebooks", type=int, default=9)
    parser.add_argument("--batch", default="2,12", help="clips a step, several separated by commas")
    parser.add_argument("--frames", type=int, default=221, help="token frames a clip; 221: 2.56 s of DAC at 44.1 kHz")
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks, task.compile=blocks")
    parser.add_argument("--checkpoint", action="store_true", help="also with task.checkpoint_activations=true")
    parser.add_argument("--rounds", type=int, default=5)


def run(args: argparse.Namespace) -> list[Table]:
    try:
        batches = [int(number) for number in args.batch.split(",")]
    except ValueError as error:
        raise InputError(f"--batch {args.batch} is no list of numbers like 2,12") from error
    device = torch.device(args.device)
    if device.type == "cpu":
        keep_freed_memory()  # as training does, and the peer has it too
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    return [table(args, batch, device, dtype) for batch in batches]


def table(args: argparse.Namespace, batch: int, device: torch.device, dtype: torch.dtype) -> Table:
    """Seconds a position, a token frame of a clip, of each step; and of its operations at the pace of matrix products."""
    torch.manual_seed(0)
    codes = torch.randint(CODES, (batch, args.codebooks, args.frames), device=device)
    condition = Condition(torch.randn(batch, args.frames, args.dim // 3, device=device))
    lm = model(args, device)
    flops = batch * lm.training_flops(args.frames)
    positions = batch * args.frames

    def ours(name: str, compiled: bool = False, checkpointed: bool = False) -> None:
        own = lm if not runs else model(args, device)
        own.checkpoint_every = int(checkpointed)
        if compiled:
            own.compile_blocks()
        runs[name] = learning(own, lambda: own.loss(codes, condition).mean(), device, dtype)

    runs: dict[str, Step] = {}
    notes: list[str] = []
    ours("vaura")
    if args.compile:
        ours("vaura, compiled blocks", compiled=True)
    if args.checkpoint:
        ours("vaura, checkpointed activations", checkpointed=True)
    try:
        peer = musicgen(args, device)
    except ImportError:
        notes.append('MusicGen is left out: `pip install -e ".[bench]"` brings transformers')
    else:
        notes.append(f"{count(lm) / 1e6:.1f} M parameters, {PEER} {count(peer) / 1e6:.1f} M.")
        runs[PEER] = learning(peer, lambda: their_loss(peer, codes), device, dtype)
        if args.compile:
            compiled = musicgen(args, device)
            for layer in compiled.model.decoder.layers:
                layer.compile(dynamic=False)
            runs[f"{PEER}, compiled layers"] = learning(compiled, lambda: their_loss(compiled, codes), device, dtype)
    side = SIDES[-1] if device.type == "cuda" else SIDES[0]
    squares = {n: [torch.randn(n, n, device=device, dtype=dtype) for _ in range(2)] for n in SIDES if n <= max(side, 4096)}
    for n, (a, b) in squares.items():
        runs[f"product {n}"] = lambda a=a, b=b: a @ b
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    lines = interleaved(runs, args.rounds, warm=2, finish=finish)
    products = [line for line in lines if line.name.startswith("product")]
    fastest = min(products, key=lambda line: line.median / side_of(line.name) ** 3)
    rate = 2 * side_of(fastest.name) ** 3
    peak = rate / fastest.median
    for line in lines:
        line.seconds = [seconds * flops / rate if line is fastest else seconds for seconds in line.seconds]
        line.seconds = [seconds / positions for seconds in line.seconds]
        line.note = f"{1 / line.median:.0f} positions a second"
    fastest.name = "the same operations in matrix products"
    kept = [line for line in lines if not line.name.startswith("product")]
    notes.append(f"Matrix products reach {peak / 1e12:.2f} TFLOP/s; the share of it is model FLOPs utilisation.")
    title = f"training step, {args.layers} x {args.dim}, {batch} clips of {args.frames} frames, {args.precision}"
    return Table(title, kept, limit=fastest.name, peer=PEER if PEER in runs else None, per="ms a position", notes=notes)


def side_of(name: str) -> int:
    return int(name.split()[1])


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def model(args: argparse.Namespace, device: torch.device) -> TokenLM:
    torch.manual_seed(0)
    lm = TokenLM(args.codebooks, CODES, args.layers, args.dim, args.heads, channels=args.dim // 3).to(device)
    for head in lm.heads.parameters():
        nn.init.normal_(head, std=0.02)
    return lm


def musicgen(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """As large as `model`: its two matrices of 4 D are as many weights as the three of 8 D / 3. Raises ImportError."""
    importlib.import_module("vaura.media.torchaudio_door")  # transformers imports torchaudio, which may not fit this torch
    from transformers import MusicgenForCausalLM
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    config = MusicgenDecoderConfig(
        vocab_size=CODES,
        num_codebooks=args.codebooks,
        hidden_size=args.dim,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        ffn_dim=3 * model_ffn(args.dim) // 2,
        dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        pad_token_id=CODES,
        bos_token_id=CODES,
        attn_implementation="sdpa",
    )
    peer = MusicgenForCausalLM(config).to(device).train()
    for layer in peer.model.decoder.layers:  # without a text to look at, these are never asked
        del layer.encoder_attn, layer.encoder_attn_layer_norm
    return peer


def model_ffn(dim: int) -> int:
    """Width of our feed-forward part."""
    return -(-int(8 * dim / 3) // 256) * 256


def their_loss(peer: nn.Module, codes: Tensor) -> Tensor:
    """Cross-entropy of every code by those before it."""
    _, books, frames = codes.shape
    steps = frames + books - 1  # as many as the delay pattern has
    read = F.pad(codes, (1, steps - frames - 1), value=CODES).flatten(0, 1)
    logits = peer(input_ids=read, use_cache=False).logits  # (B K, S, V)
    return F.cross_entropy(logits[:, :frames].float().flatten(0, 1), codes.flatten())


def learning(model: nn.Module, loss_of: Callable[[], Tensor], device: torch.device, dtype: torch.dtype) -> Step:
    """A whole optimizer step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
