"""The page to open after an experiment: look, listen, and see how good it is and what it took.

One HTML file that needs nothing else: videos, spectrograms, curves and settings are all inside, and a policy in its head
forbids every request to the network. Its looks and its playing are in report.html beside this module.
"""

from __future__ import annotations

import base64
import colorsys
import html
import logging
import math
import operator
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape as _plain
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vaura.data.world import MATERIALS
from vaura.errors import InputError
from vaura.files import write_aside
from vaura.media.audio import read_audio
from vaura.media.mel import mel_filters
from vaura.media.video import probe
from vaura.metric.onset import match

Array = np.ndarray
Curve = list[tuple[int, float]]

SAMPLE_RATE = 16_000  # of the sounds that are drawn
COLUMNS, BANDS = 640, 116  # of a spectrogram, pixels
WINDOW, FFT = 0.025, 1024  # seconds; samples, most of them zeros, so that every band holds a bin
RANGE = 70.0  # decibels from black to the brightest
QUIET = 1e-3  # mel magnitude, as a share of a full-scale sine, above which a sound can be the brightest of its picture
NEAR = 0.05  # seconds within which a sound belongs to an impact
SMALL = 200  # pixels of width up to which a picture is enlarged with hard edges
POINTS = 500  # of a curve
INKS = ("one", "two", "three", "four", "five", "six")  # colours of lines and stages, named in report.html
NOT_CURVES = ("epoch", "hp_metric")  # what Lightning logs beside the curves


@dataclass(frozen=True)
class Example:
    """One clip with its generated and its own sound; `impacts` hold "time" (seconds), "material" and "loudness" in [0, 1]."""

    id: str
    generated: Path
    true: Path
    impacts: list[dict]
    found: list[float]  # seconds
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """One row of the table; `wanted` is a bound such as ">= 0.90"."""

    name: str
    value: float
    ceiling: float | None
    chance: float | None
    wanted: str = ""

    @property
    def bound(self) -> tuple[str, float] | None:
        """The comparison and the number in `wanted`, if it is one."""
        read = re.fullmatch(r"\s*(>=|<=|>|<)\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*", self.wanted)
        return (read[1], float(read[2])) if read else None

    @property
    def met(self) -> bool | None:
        """Whether the value keeps its bound; None where there is none."""
        if self.bound is None:
            return None
        sign, limit = self.bound
        return {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}[sign](self.value, limit)

    def share(self, value: float) -> float | None:
        """How far `value` is on the way from chance to the ceiling, within [0, 1]; None where an end is missing."""
        if self.chance is None or self.ceiling is None or not math.isfinite(value) or self.ceiling == self.chance:
            return None
        return min(1.0, max(0.0, (value - self.chance) / (self.ceiling - self.chance)))


def write_report(
    path: Path,
    *,
    title: str,
    summary: str,
    figures: list[Figure],
    examples: list[Example],
    curves: dict[str, Curve],
    seconds: dict[str, float],
    config: str,
    versions: dict[str, str],
) -> None:
    """Write the page to `path`. Blank lines part the paragraphs of `summary`; `curves` hold (step, value) by name.

    An example whose video cannot be read is shown with the reason in its place. InputError where `path` cannot be written.
    """
    page = Template(files("vaura").joinpath("report.html").read_text("utf-8")).substitute(
        title=html.escape(title),
        summary="\n".join(f"<p>{html.escape(part)}</p>" for part in re.split(r"\n\s*\n", summary.strip()) if part),
        figures=_figures(figures),
        examples=_examples(examples),
        curves=_curves(curves),
        seconds=_seconds(seconds),
        settings=_settings(config, versions),
    )
    with write_aside(path) as aside:
        aside.write_text(page, "utf-8")


def print_table(figures: list[Figure]) -> None:
    """The table of figures, in the terminal."""
    table = Table("figure")
    for heading in ("value", "ceiling", "chance"):
        table.add_column(heading, justify="right")
    table.add_column("wanted")
    for figure in figures:
        verdict = {True: "  [green]met[/]", False: "  [red]missed[/]", None: ""}[figure.met]
        numbers = (_number(value) for value in (figure.value, figure.ceiling, figure.chance))
        table.add_row(_plain(figure.name), *numbers, _plain(figure.wanted) + verdict)
    Console().print(table)


logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every file that it finished reading


def read_curves(tensorboard_folder: Path) -> dict[str, Curve]:
    """The scalars in the event files of a run, by name: at most `POINTS` points a curve, first and last among them.

    A run that was continued from step s replaces what was logged from s on before. Nothing where the folder does not exist.
    """
    if not Path(tensorboard_folder).is_dir():
        return {}
    everything, one = 0, 1
    sizes = {"scalars": everything, "images": one, "audio": one, "histograms": one, "compressedHistograms": one, "tensors": one}
    events = EventAccumulator(str(tensorboard_folder), size_guidance=sizes).Reload()
    return {name: _thin(_merge(events.Scalars(name))) for name in sorted(events.Tags()["scalars"])}


def _merge(events: Iterable) -> Curve:
    curve: Curve = []
    for event in sorted(events, key=lambda event: event.wall_time):
        while curve and curve[-1][0] >= event.step:
            curve.pop()
        curve.append((event.step, event.value))
    return curve


def _thin(curve: Curve) -> Curve:
    if len(curve) <= POINTS:
        return curve
    return [curve[index] for index in np.linspace(0, len(curve) - 1, POINTS).round().astype(int)]


# Figures


def _figures(figures: list[Figure]) -> str:
    if not figures:
        return '<p class="empty">Nothing was measured.</p>'
    lead = "Each bar runs from what chance scores to what the true sound, or another ceiling, scores."
    heads = ("Figure", ""), ("Value", "right"), ("Chance", "right"), ("", ""), ("Ceiling", ""), ("Wanted", "")
    head = "".join(f'<th role="columnheader" scope="col" class="{kind}">{name}</th>' for name, kind in heads)
    rows = "".join(map(_figure_row, figures))
    if any(figure.bound and figure.share(figure.bound[1]) is not None for figure in figures):
        lead += " The upright stroke is the value that was wanted."
    return (
        f'<p class="lead">{lead}</p><div class="card"><table class="figures" role="table">'
        f'<thead><tr role="row">{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _figure_row(figure: Figure) -> str:
    state = {True: "met", False: "missed", None: ""}[figure.met]
    sign = {"met": "✓ met", "missed": "✗ missed", "": ""}[state]
    wanted = (
        f'<span class="number">{html.escape(figure.wanted.replace(">=", "≥").replace("<=", "≤"))}</span>'
        if figure.wanted
        else ""
    )
    wanted += f' <span class="word">{sign}</span>' if sign else ""
    cells = (
        ("name", "", html.escape(figure.name)),
        ("value number right", "", _number(figure.value)),
        ("chance end number right", "chance", _number(figure.chance)),
        ("scale", "", _bar(figure, state)),
        ("ceiling end number", "ceiling", _number(figure.ceiling)),
        (f"wanted {state}", "", wanted),
    )
    return (
        '<tr role="row">'
        + "".join(f'<td role="cell" class="{kind}" data-label="{label}">{text}</td>' for kind, label, text in cells)
        + "</tr>"
    )


def _bar(figure: Figure, state: str) -> str:
    share = figure.share(figure.value)
    if share is None:
        return ""
    wanted = figure.bound and figure.share(figure.bound[1])
    mark = "" if wanted is None else f'<b style="left:{wanted:.2%}"></b>'
    label = f"{share:.0%} of the way from chance to the ceiling"
    return f'<div class="bar {state}" role="img" aria-label="{label}"><i style="width:{share:.2%}"></i>{mark}</div>'


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    size = abs(value)
    if 0 < size < 1e-3:
        return f"{value:.1e}"
    if size < 10:
        return f"{value:.3f}"
    return f"{value:,.0f}" if size >= 1000 or size == round(size) else f"{value:.1f}"


# Examples


def _examples(examples: list[Example]) -> str:
    if not examples:
        return '<p class="empty">There are no examples to show.</p>'
    materials = dict.fromkeys(str(impact["material"]) for example in examples for impact in example.impacts)
    colours = {name: _colour(name, index) for index, name in enumerate(materials)}
    keys = [(f'<i class="impact" style="--c:{colour}"></i>', f"{name} struck") for name, colour in colours.items()]
    if any(example.found for example in examples):
        near = f"onset within {NEAR * 1000:.0f} ms of an impact" if colours else "onset"
        keys.append((_triangle(True), near))
    if any(example.found and example.impacts for example in examples):
        keys.append((_triangle(False), "onset where nothing struck"))
    legend = "".join(f'<span class="key"><span>{mark}</span>{html.escape(text)}</span>' for mark, text in keys)
    return (
        '<p class="lead">The same picture twice: with the sound that was generated for it, and with its own. Below each, its '
        "spectrogram: time to the right, pitch upwards to 8 kHz, louder is brighter. Drag across it to search.</p>"
        f'<div class="toolbar">{legend}<label><input type="checkbox" id="loop">repeat</label></div>'
        + "".join(_example(example, colours) for example in examples)
    )


def _colour(material: str, index: int) -> str:
    """A light colour: of the material in the picture where it is known, else spread by the golden angle."""
    hue = MATERIALS[material].hue if material in MATERIALS else (0.15 + index * 0.618034) % 1
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, 0.68, 0.85))


def _example(example: Example, colours: dict[str, str]) -> str:
    name = html.escape(example.id)
    note = f"<p>{html.escape(example.note)}</p>" if example.note else ""
    return (
        f'<article class="card example" aria-label="{name}"><div class="about"><h3>{name}</h3>{note}'
        f'<p class="heard">{_heard(example)}</p></div>'
        + _panel(example, "generated", "generated sound", example.generated, example.found, colours)
        + _panel(example, "true", "true sound", example.true, [], colours)
        + "</article>"
    )


def _heard(example: Example) -> str:
    found, struck = example.found, [float(impact["time"]) for impact in example.impacts]
    if not struck:
        return f"{_plural(len(found), 'onset')} heard"
    hits = match(found, struck, NEAR)
    extra = len(found) - hits
    return f"{hits} of {_plural(len(struck), 'impact')} heard" + (f", {_plural(extra, 'more onset')}" if extra else "")


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _panel(example: Example, kind: str, sound: str, path: Path, found: list[float], colours: dict[str, str]) -> str:
    name = html.escape(example.id)
    try:
        wav = read_audio(path, sample_rate=SAMPLE_RATE)[0]
        small = probe(path).width <= SMALL
    except InputError as error:
        controls = f'<div class="controls"><h4>{sound.capitalize()}</h4></div>'
        return f'<div class="panel {kind}">{controls}<div class="screen absent">{html.escape(str(error))}</div></div>'
    duration = len(wav) / SAMPLE_RATE
    video = base64.b64encode(path.read_bytes()).decode()
    image = base64.b64encode(png(spectrogram(wav), colour_map())).decode()
    return f"""<div class="panel {kind}">
<div class="controls"><h4>With the {sound}</h4>
<button type="button" aria-label="Play {name} with the {sound}">
<svg class="play" viewBox="0 0 12 14" aria-hidden="true"><path d="M0 0 12 7 0 14z"/></svg>
<svg class="pause" viewBox="0 0 12 14" aria-hidden="true"><path d="M0 0h4v14H0zM8 0h4v14H8z"/></svg>
{sound.capitalize()}</button><time>{duration:.2f} s</time></div>
<div class="screen"><video class="{"small" if small else ""}" controls playsinline preload="auto"
aria-label="{name} with the {sound}" src="data:video/mp4;base64,{video}"></video>
<div class="strip"><img alt="Spectrogram of the {sound} of {name}" src="data:image/png;base64,{image}">
<div class="lane">{_lane(example.impacts, found, duration, colours)}</div>
<div class="playhead"></div>
<input type="range" min="0" max="{duration:.4f}" step="0.01" value="0" aria-label="Position in {name} with the {sound}"></div>
<div class="times" aria-hidden="true">{_times(duration)}</div></div></div>"""


def _lane(impacts: list[dict], found: list[float], duration: float, colours: dict[str, str]) -> str:
    """Ticks of the impacts from above, as long as they are loud, and triangles of the found onsets from below."""
    struck = [float(impact["time"]) for impact in impacts]
    ticks = "".join(
        f'<i class="impact" title="{html.escape(str(impact["material"]))} at {time:.2f} s" '
        f'style="left:{time / duration:.3%};height:{7 + 11 * float(impact["loudness"]):.0f}px;'
        f'--c:{colours[str(impact["material"])]}"></i>'
        for impact, time in zip(impacts, struck, strict=True)
    )
    triangles = "".join(
        _triangle(not struck or min(abs(onset - time) for time in struck) <= NEAR, onset, duration) for onset in found
    )
    return ticks + triangles


def _triangle(near: bool, onset: float | None = None, duration: float = 1.0) -> str:
    """The mark of a found onset, hollow where no impact is near; without `onset` the one in the legend."""
    kind = "found" if near else "found astray"
    place = "" if onset is None else f' style="left:{onset / duration:.3%}"'
    title = "" if onset is None else f"<title>onset at {onset:.2f} s</title>"
    return f'<svg class="{kind}"{place} viewBox="0 0 10 10">{title}<path d="M5 1 9.4 9H.6z"/></svg>'


def _times(duration: float) -> str:
    labels = [time for time in _ticks(0, duration, 6) if time <= 0.96 * duration]
    return "".join(f'<span style="left:{time / duration:.3%}">{time:g}{" s" if not time else ""}</span>' for time in labels)


# Pictures


def spectrogram(wav: torch.Tensor) -> Array:
    """wav (N,) at `SAMPLE_RATE` -> levels (BANDS, COLUMNS) uint8, mel bands with the lowest at the bottom.

    Column c shows the sound around (c + 1/2) / COLUMNS of the whole; 255 is the loudest, 0 is `RANGE` decibels below it.
    """
    width = round(WINDOW * SAMPLE_RATE)
    starts = ((np.arange(COLUMNS) + 0.5) * len(wav) / COLUMNS).astype(int)
    frames = np.pad(wav.numpy(), width // 2)[starts[:, None] + np.arange(width)] * np.hanning(width)
    mel = np.abs(np.fft.rfft(frames, FFT)) @ mel_filters(SAMPLE_RATE, BANDS, FFT, f_min=40.0).numpy() * (4 / width)
    level = 20 * np.log10(np.maximum(mel, 1e-9) / max(mel.max(), QUIET))
    return (np.clip(level / RANGE + 1, 0, 1) * 255).round().astype(np.uint8).T[::-1]


def colour_map() -> Array:
    """256 colours (256, 3) uint8 from near black over violet and orange to pale yellow, in even steps of lightness.

    Built in Oklab and brought to sRGB (Ottosson, "A perceptual color space for image processing", 2020).
    """
    x = np.linspace(0, 1, 256)
    lightness, chroma, hue = 0.16 + 0.80 * x, 0.02 + 0.16 * np.sin(math.pi * x**0.9) ** 0.8, np.radians(285 + 175 * x**0.8)
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], 1)
    to_lms = np.array([[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]])
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    light = np.clip((lab @ to_lms.T) ** 3 @ to_rgb.T, 0, 1)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (encoded * 255).round().astype(np.uint8)


def png(pixels: Array, palette: Array) -> bytes:
    """pixels (H, W) uint8, places in the palette (256, 3) uint8 -> the bytes of a PNG file."""
    height, width = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], 1)  # each row begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = (b"IHDR", header), (b"PLTE", palette.tobytes()), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


# Curves


def _curves(curves: dict[str, Curve]) -> str:
    charts: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        finite = [(step, value) for step, value in curve if math.isfinite(value)]
        if finite and name not in NOT_CURVES:
            chart, line = _placed(name)
            charts.setdefault(chart, {})[line] = finite
    if not charts:
        return '<p class="empty">No curves were logged.</p>'
    numbered = {chart: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", chart)] for chart in charts}
    order = sorted(charts, key=lambda chart: (not chart.startswith("loss"), numbered[chart]))
    lead = "By training step; a strong line over a faint one is its running mean."
    return (
        f'<p class="lead">{lead}</p><div class="charts">' + "".join(_chart(chart, charts[chart]) for chart in order) + "</div>"
    )


def _placed(name: str) -> tuple[str, str]:
    """The chart and the line of a curve: "val/loss_codebook_2" -> ("loss, codebook 2", "val")."""
    if name.startswith("lr-"):
        optimizer, _, group = name.removeprefix("lr-").partition("/")
        return "learning rate", group or optimizer
    line, _, chart = name.partition("/")
    return (chart or line).replace("_codebook_", ", codebook ").replace("_", " "), line


def _chart(title: str, lines: dict[str, Curve]) -> str:
    x = _Axis([step for curve in lines.values() for step, _ in curve], 6, 46, 332)
    y = _Axis([value for curve in lines.values() for _, value in curve], 6, 166, 8)
    inks = {line: f"var(--{INKS[index % len(INKS)]})" for index, line in enumerate(lines)}
    grid = "".join(
        f'<line x1="46" x2="332" y1="{y(at):.1f}" y2="{y(at):.1f}"/>'
        f'<text x="39" y="{y(at) + 4:.1f}" text-anchor="end">{at:g}</text>'
        for at in y.ticks
    )
    grid += "".join(f'<text x="{x(at):.1f}" y="188" text-anchor="middle">{at:g}</text>' for at in x.ticks)
    drawn = "".join(_line(curve, x, y, inks[line]) for line, curve in lines.items())
    legend = "".join(
        f'<span><i style="--c:{inks[line]}"></i>{html.escape(line)} '
        f'<span class="number">{_number(_mean(curve)[-1][1])}</span></span>'
        for line, curve in lines.items()
    )
    spoken = "; ".join(f"{line} from {_number(c[0][1])} to {_number(c[-1][1])} at step {c[-1][0]}" for line, c in lines.items())
    label = html.escape(f"{title}: {spoken}")
    return (
        f'<figure class="card"><figcaption><b>{html.escape(title)}</b><div class="legend">{legend}</div></figcaption>'
        f'<svg class="chart" viewBox="0 0 340 194" role="img" aria-label="{label}">{grid}{drawn}</svg></figure>'
    )


class _Axis:
    """Values -> positions between `start` and `stop`, in the picture's units."""

    def __init__(self, values: Iterable[float], ticks: int, start: float, stop: float) -> None:
        values = list(values)
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            slack = abs(self.low) / 2 or 1.0
            self.low, self.high = self.low - slack, self.high + slack
        self.start, self.stop = start, stop
        self.ticks = list(_ticks(self.low, self.high, ticks))

    def __call__(self, value: float) -> float:
        return self.start + (self.stop - self.start) * (value - self.low) / (self.high - self.low)


def _ticks(low: float, high: float, most: int) -> Iterator[float]:
    """At most `most` round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10, 20) if (high - low) / (power * times) < most)
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield float(f"{index * step:.12g}")


def _line(curve: Curve, x: _Axis, y: _Axis, ink: str) -> str:
    if len(curve) == 1:
        return f'<circle cx="{x(curve[0][0]):.1f}" cy="{y(curve[0][1]):.1f}" r="3" style="--c:{ink}"/>'
    mean = _mean(curve)
    layers = [("mean", mean)] if mean == curve else [("raw", curve), ("mean", mean)]
    return "".join(
        f'<polyline class="{kind}" style="--c:{ink}" points="{" ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)}"/>'
        for kind, points in layers
    )


def _mean(curve: Curve) -> Curve:
    """The running mean over a twentieth of a long curve that jitters; any other as it is."""
    reach = len(curve) // 40
    values = np.array([value for _, value in curve])
    if reach < 2 or np.abs(np.diff(values)).sum() < 4 * np.ptp(values):
        return curve
    return [(step, float(values[max(0, at - reach) : at + reach + 1].mean())) for at, (step, _) in enumerate(curve)]


# Time and settings


def _seconds(seconds: dict[str, float]) -> str:
    spent = {stage: value for stage, value in seconds.items() if math.isfinite(value) and value > 0}
    if not spent:
        return '<p class="empty">No times were kept.</p>'
    inks = {stage: f"var(--{INKS[index % len(INKS)]})" for index, stage in enumerate(spent)}
    bar = "".join(f'<i style="flex:{value:.4g} 0 0;--c:{inks[stage]}"></i>' for stage, value in spent.items())
    items = "".join(
        f'<li><i style="--c:{inks[stage]}"></i><span class="name">{html.escape(stage)}</span>'
        f'<span class="number">{_duration(value)}</span></li>'
        for stage, value in spent.items()
    )
    return (
        f'<p class="lead">{_duration(sum(spent.values()))} in all.</p>'
        f'<div class="stages" aria-hidden="true">{bar}</div><ul class="stage-list">{items}</ul>'
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _settings(config: str, versions: dict[str, str]) -> str:
    shown = f"<pre>{html.escape(config.strip())}</pre>" if config.strip() else '<pre class="empty">No settings were kept.</pre>'
    pairs = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in versions.items())
    return f'<details class="card"><summary>The whole configuration</summary>{shown}</details><dl>{pairs}</dl>'
