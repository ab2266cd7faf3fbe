"""video -> features, sound <-> codes: AV-CLIP a segment, DAC and EnCodec a second of sound.

AV-CLIP stands beside the same weights with attention written out, DAC and EnCodec beside transformers' models of equal size.
Weights are of chance, which costs the same. The limit of a line is the time its arithmetic takes at the pace of the machine's
matrix products in its number format, both taken in this run.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Line, Table, interleaved
from vaura.encoder import avclip
from vaura.encoder.avclip import AVCLIP, Tower
from vaura.errors import InputError
from vaura.precision import PRECISIONS, multiplies_bfloat16
from vaura.tokenizer import encodec
from vaura.tokenizer.dac import DAC
from vaura.tokenizer.dac_network import Codec, Sizes
from vaura.tokenizer.encodec import EnCodec

SMALL_TOWER = avclip.Sizes(width=64, depth=2, hidden=128, pooled_hidden=128, patch=16, patches=16, head_width=32)
SMALL_CODEC = Sizes(8, (2, 4, 8, 8), 64, 96, (8, 8, 4, 2), 3, 64, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="times that each alternative runs")
    parser.add_argument("--seconds", type=float, default=2.0, help="of sound, coded at once")
    parser.add_argument("--batch", type=int, default=4, help="segments of video encoded at once, where they are several")
    parser.add_argument(
        "--compile", action="store_true", help="compiled alternatives as well; they take a minute or two to make"
    )
    parser.add_argument("--only", choices=PARTS, help="one part of the house alone")
    parser.add_argument("--small", action="store_true", help="small networks, to see that it works")


def run(args: argparse.Namespace) -> list[Table]:
    """One table each: a segment of AV-CLIP, a second through each codec, forth and back."""
    for name, value in (("rounds", args.rounds), ("seconds", args.seconds), ("batch", args.batch)):
        if value <= 0:
            raise InputError(f"--{name} is {value}; give a number above 0")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        chosen = [args.only] if args.only else list(PARTS)
        return [table for name in chosen for table in PARTS[name](args, Path(folder))]


def av_clip(args: argparse.Namespace, folder: Path) -> list[Table]:
    file, sizes = folder / "tower.pt", SMALL_TOWER if args.small else avclip.Sizes()
    torch.save({key: 0.02 * torch.randn(value.shape) for key, value in Tower(sizes).state_dict().items()}, file)

    def segments(number: int) -> Tensor:
        shape = (number, sizes.frames, 3, sizes.size, sizes.size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=args.device)

    def make(precision: str, batch: int, compile: bool = False) -> AVCLIP:
        made = AVCLIP(str(file), batch, precision, sizes.head_width, compile=compile)  # type: ignore[arg-type]
        return made.to(args.device)

    formats = ["float32", *(["bfloat16"] if multiplies_bfloat16() else [])]
    runs: dict[str, Callable[[], Any]] = {"attention written out, float32": written_out(make("float32", 1), segments(1))}
    for precision in formats:
        runs[precision] = partial(make(precision, 1), segments(1))
        runs[f"{precision}, {args.batch} at once"] = partial(make(precision, args.batch), segments(args.batch))
        if args.compile:
            runs[f"{precision}, {args.batch} at once, compiled"] = partial(
                make(precision, args.batch, True), segments(args.batch)
            )
    lines = measured(runs, args)
    for line in lines:
        if "at once" in line.name:
            line.seconds = [seconds / args.batch for seconds in line.seconds]
    work = operations(runs["float32"])
    lines += limits(lines, dict.fromkeys(formats, work), args)
    title = f"AV-CLIP, a segment of {sizes.frames} video frames, {work / 1e9:.3g} GFLOP"
    return [Table(title, lines, peer="attention written out, float32", per="ms a segment")]


def written_out(encoder: AVCLIP, video: Tensor) -> Callable[[], Tensor]:
    """The encoder with the definition of attention in place of torch's kernels."""

    def run() -> Tensor:
        kernel = avclip.attend
        avclip.attend = naive
        try:
            return encoder(video)
        finally:
            avclip.attend = kernel

    return run


def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax of the scaled products, (N, L, heads, channels) to (N, L', heads, channels)."""
    scores = torch.einsum("nqhc,nkhc->nhqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("nhqk,nkhc->nqhc", scores.softmax(-1), value)


def descript(args: argparse.Namespace, folder: Path) -> list[Table]:
    file, sizes = folder / "dac.pt", SMALL_CODEC if args.small else Sizes()
    codec = Codec(sizes)
    torch.save(codec.state_dict(), file)
    runs = {}
    formats = ["float32", *(["bfloat16"] if multiplies_bfloat16() else [])]
    for precision in formats:
        runs[precision] = DAC("44khz", str(file), precision).to(args.device)
        if args.compile:
            runs[f"{precision}, compiled"] = DAC("44khz", str(file), precision, compile=True).to(args.device)
    ours = runs["float32"]
    wav = 0.1 * torch.randn(1, 1, ours.num_frames(args.seconds) * ours.hop_length, device=args.device)
    codes = torch.randint(ours.codebook_size, (1, ours.num_codebooks, ours.num_frames(args.seconds)), device=args.device)
    peer = descript_of_transformers(sizes, args.device)
    return both_ways("DAC 44.1 kHz", runs, peer, wav, codes, formats, args)


def meta(args: argparse.Namespace, folder: Path) -> list[Table]:
    file = folder / "encodec.pt"
    try:
        torch.save(encodec.build("24khz").state_dict(), file)
    except InputError as error:
        return [Table("EnCodec 24 kHz", [], notes=[f"Left out: {error}."])]
    formats = ["float32", *(["bfloat16"] if multiplies_bfloat16() else [])]
    runs = {precision: EnCodec("24khz", 6, str(file), precision=precision).to(args.device) for precision in formats}
    ours = runs["float32"]
    wav = 0.1 * torch.randn(1, 1, ours.num_frames(args.seconds) * encodec.HOP_LENGTH, device=args.device)
    codes = torch.randint(ours.codebook_size, (1, ours.num_codebooks, ours.num_frames(args.seconds)), device=args.device)
    return both_ways("EnCodec 24 kHz, 6 kbps", runs, encodec_of_transformers(args.device), wav, codes, formats, args)


def both_ways(
    name: str, ours: dict[str, Any], peer: Any, wav: Tensor, codes: Tensor, formats: list[str], args: argparse.Namespace
) -> list[Table]:
    """A table of encoding and one of decoding, per second of sound; `peer` has `encode` and `decode` too, or is None."""
    seconds = wav.shape[-1] / next(iter(ours.values())).sample_rate
    notes = [] if peer else ['Left out: transformers; `pip install -e ".[bench]"` brings it.']
    tables = []
    for verb, given in (("encode", wav), ("decode", codes)):
        runs = {key: partial(getattr(codec, verb), given) for key, codec in ours.items()}
        if peer:
            runs["transformers, float32"] = partial(getattr(peer, verb), given)
        work = operations(runs["float32"]) / seconds
        lines = measured(runs, args)
        for line in lines:
            line.seconds = [value / seconds for value in line.seconds]
        lines += limits(lines, dict.fromkeys(formats, work), args)
        title = f"{name}, {verb} a second of sound, {work / 1e9:.3g} GFLOP"
        tables.append(Table(title, lines, peer="transformers, float32" if peer else None, per="ms a second", notes=list(notes)))
    return tables


class Peer:
    """A codec of transformers with a tokenizer's two verbs."""

    def __init__(self, model: nn.Module, **settings: float) -> None:
        self.model, self.settings = model.eval().requires_grad_(False), settings

    def encode(self, wav: Tensor) -> Tensor:
        return self.model.encode(wav, **self.settings).audio_codes  # type: ignore[operator]


class DescriptPeer(Peer):
    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(audio_codes=codes).audio_values  # type: ignore[operator]


class EncodecPeer(Peer):
    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[None], [None]).audio_values  # type: ignore[operator]


def descript_of_transformers(sizes: Sizes, device: str) -> DescriptPeer | None:
    """transformers' DacModel of these sizes, weights of chance; None where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import DacConfig, DacModel

    config = DacConfig(
        encoder_hidden_size=sizes.encoder_dim,
        downsampling_ratios=list(sizes.encoder_rates),
        decoder_hidden_size=sizes.decoder_dim,
        upsampling_ratios=list(sizes.decoder_rates),
        n_codebooks=sizes.num_codebooks,
        codebook_size=sizes.codebook_size,
        codebook_dim=sizes.codebook_dim,
        hidden_size=sizes.latent_dim,
        sampling_rate=44_100,
    )
    return DescriptPeer(DacModel(config).to(device))


def encodec_of_transformers(device: str) -> EncodecPeer | None:
    """transformers' EncodecModel of 24 kHz, weights of chance; None where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import EncodecConfig, EncodecModel

    return EncodecPeer(EncodecModel(EncodecConfig()).to(device), bandwidth=6.0)


def measured(runs: dict[str, Callable[[], Any]], args: argparse.Namespace) -> list[Line]:
    cuda = torch.device(args.device).type == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if cuda:
            return interleaved(runs, args.rounds, warm=2, finish=torch.cuda.synchronize)
        return interleaved(runs, args.rounds)


def operations(run: Callable[[], Any]) -> float:
    """Floating-point operations of products and convolutions in one run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def limits(lines: list[Line], work: dict[str, float], args: argparse.Namespace) -> list[Line]:
    """The time of `work` operations at the pace of large matrix products, a line for each format; others say their share."""
    found = []
    for precision, operations_ in work.items():
        size = 256 if args.small else 8192 if torch.device(args.device).type == "cuda" else 2048
        square = torch.randn(size, size, device=args.device).to(PRECISIONS[precision])
        finish = torch.cuda.synchronize if square.is_cuda else lambda: None
        (line,) = interleaved({"": partial(torch.matmul, square, square)}, 5, finish=finish)
        best = min(line.seconds) * operations_ / (2 * size**3)
        found.append(Line(f"limit, {precision}", [best], f"{operations_ / best / 1e12:.3g} TFLOP/s in matrix products"))
        for other in lines:
            if precision in other.name and "limit" not in other.name:
                other.note = f"{best / other.median:.0%} of the limit in {precision}"
    return found


PARTS: dict[str, Callable[[argparse.Namespace, Path], list[Table]]] = {"avclip": av_clip, "dac": descript, "encodec": meta}
