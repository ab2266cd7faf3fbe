"""Results as HTML: a picture that plays with its sound, the sound's spectrogram below it, and what was made of what."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from vaura.metric.onset import match
from vaura.serve.request import Request
from vaura.serve.work import ORIGINAL, SAMPLE, Done, Heard, Piece, Step

SMALL = 200  # pixels of width up to which a picture is enlarged with hard edges

Address = Callable[[Path], str]
"""Where a browser finds a file."""

PLAY = '<svg class="play" viewBox="0 0 12 14" aria-hidden="true"><path d="M0 0 12 7 0 14z"/></svg>'
PAUSE = '<svg class="pause" viewBox="0 0 12 14" aria-hidden="true"><path d="M0 0h4v14H0zM8 0h4v14H8z"/></svg>'


def card(heard: Heard, address: Address, true: Heard | None = None, width: int | None = None, tolerance: float = 0.05) -> str:
    """One picture with its sound; `true` is the original it is compared with, `width` that of the picture in pixels."""
    name, video = html.escape(heard.name), html.escape(address(heard.video))
    small = "small" if width is not None and width <= SMALL else ""
    strip = times = ""
    if heard.spectrogram is not None:
        strip = (
            f'<div class="va-strip"><img alt="Spectrogram of: {name}" src="{html.escape(address(heard.spectrogram))}">'
            f'<div class="va-lane">{_lane(heard)}</div><div class="va-head"></div>'
            f'<input type="range" min="0" max="{heard.duration:.4f}" step="0.01" value="0" '
            f'aria-label="Position in: {name}"></div>'
        )
        times = f'<div class="va-times" aria-hidden="true">{_times(heard.duration)}</div>'
    links = "".join(
        f'<a href="{html.escape(address(path))}" download="{html.escape(path.name)}" '
        f'aria-label="Download {name} as {path.suffix[1:]}">{path.suffix[1:]}</a>'
        for path in (heard.wav, heard.video)
        if path is not None
    )
    return (
        f'<article class="va-card va-{heard.kind}" aria-label="{name}">'
        f'<div class="va-top"><h3>{name}</h3><p>{html.escape(said(heard, true, tolerance))}</p></div>'
        f'<div class="va-screen"><video class="{small}" playsinline preload="auto" src="{video}" aria-label="{name}"></video>'
        f"{strip}{times}</div>"
        f'<div class="va-foot"><button type="button" class="va-play" aria-label="Play: {name}">{PLAY}{PAUSE}<span>Play</span>'
        f'</button><time>{heard.duration:.2f} s</time><span class="va-links">{links}</span></div>{_classes(heard)}</article>'
    )


def said(heard: Heard, true: Heard | None = None, tolerance: float = 0.05) -> str:
    """What is found in a sound, in a few words."""
    if heard.spectrogram is None:
        return "It has no sound of its own to compare with."
    if heard.kind == ORIGINAL or true is None or true.wav is None:
        return _plural(len(heard.onsets), "onset")
    if not true.onsets:
        return f"{_plural(len(heard.onsets), 'onset')}; the original has none"
    hits = match(heard.onsets, true.onsets, tolerance)
    return f"{hits} of {_plural(len(true.onsets), 'onset')} of the original, {len(heard.onsets) - hits} elsewhere"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _lane(heard: Heard) -> str:
    """A triangle for each onset, hollow where the original has none."""
    near = heard.near or [True] * len(heard.onsets)
    return "".join(
        f'<svg class="{"" if close else "astray"}" style="left:{onset / heard.duration:.3%}" viewBox="0 0 10 10">'
        f'<title>onset at {onset:.2f} s</title><path d="M5 1 9.4 9H.6z"/></svg>'
        for onset, close in zip(heard.onsets, near, strict=True)
    )


def _times(duration: float) -> str:
    step = next(
        (step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300) if duration / step <= 6),
        600 * math.ceil(duration / 3600),
    )
    marks = [number * step for number in range(int(duration / step) + 1) if number * step <= 0.96 * duration]
    return "".join(f'<span style="left:{at / duration:.3%}">{at:g}{"" if at else " s"}</span>' for at in marks)


def _classes(heard: Heard) -> str:
    if not heard.classes:
        return ""
    rows = "".join(
        f'<li><span>{html.escape(name)}</span><i style="--w:{share:.1%}"></i><b>{share:.0%}</b></li>'
        for name, share in heard.classes
    )
    return f'<ol class="va-classes" aria-label="What a classifier hears">{rows}</ol>'


def legend(true: bool) -> str:
    """What the marks mean."""
    solid = '<svg viewBox="0 0 10 10"><path d="M5 1 9.4 9H.6z"/></svg>'
    hollow = solid.replace("<svg", '<svg class="astray"')
    keys = [(solid, "onset that the original has too" if true else "onset")] + ([(hollow, "onset of its own")] if true else [])
    marks = "".join(f'<span class="va-key"><i>{mark}</i>{text}</span>' for mark, text in keys)
    return f'<div class="va-legend">{marks}<span>Spectrograms: time to the right, pitch upwards to 8 kHz.</span></div>'


def progress(step: Step) -> str:
    """How far it is."""
    left = "" if step.left is None or step.share >= 1 else f"{_span(step.left)} left"
    busy = " busy" if step.share <= 0 else ""
    return (
        f'<div class="va-state" role="status"><p><b>{html.escape(step.what)}</b><span>{left}</span></p>'
        f'<div class="va-bar{busy}" role="progressbar" aria-valuenow="{100 * step.share:.0f}" aria-valuemin="0" '
        f'aria-valuemax="100" aria-label="{html.escape(step.what)}"><i style="width:{step.share:.1%}"></i></div></div>'
    )


def _span(seconds: float) -> str:
    if seconds < 1:
        return "less than a second"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def notice(sentence: str, wrong: bool = False) -> str:
    """One sentence; `wrong` where it says what cannot be."""
    kind, role = ("va-wrong", "alert") if wrong else ("va-calm", "status")
    return f'<div class="va-state {kind}" role="{role}"><p>{html.escape(sentence[:1].upper() + sentence[1:])}</p></div>'


EMPTY = (
    '<div class="va-empty"><svg viewBox="0 0 120 40" aria-hidden="true">'
    + "".join(
        f'<rect x="{4 * index + 1}" y="{20 - size}" width="2" height="{2 * size}" rx="1"/>'
        for index, size in enumerate(
            round(1.5 + 17 * math.exp(-((index % 10) / 3.2)) * (1 if index < 10 else 0.8 if index < 20 else 0.55), 1)
            for index in range(30)
        )
    )
    + "</svg><p>The sound will be here: beside the picture it belongs to, and beside the original.</p></div>"
)


def feed(token: str, pieces: Sequence[Piece], picture: Path | None, address: Address, done: bool) -> str:
    """What page.js reads to play a sound that is still being made."""
    said = {
        "id": token,
        "done": done,
        "picture": "" if picture is None else address(picture),
        "pieces": [[address(piece.wav), piece.begin, piece.duration] for piece in pieces],
    }
    return f'<div id="va-feed" data-feed="{html.escape(json.dumps(said))}"></div>'


def facts(found: object) -> str:
    """What a video holds, in a line."""
    from vaura.media.video import Probe

    assert isinstance(found, Probe)
    sound = "no sound" if found.sample_rate is None else "with its own sound"
    parts = (f"{found.duration:.2f} s", f"{found.width} × {found.height}", f"{found.fps:.4g} frames a second", sound)
    return f'<p class="va-facts">{" · ".join(parts)}</p>'


def summary(done: Done, settings: Path, address: Address) -> str:
    """What was made, of what, and how long it took."""
    request = done.request
    sound = done.length * request.samples
    drawn = f"{sound / done.drawing:.1f} × real time" if done.drawing > 0 else ""
    rows = [
        ("Seed", f"{request.seed}"),
        ("Sound", f"{_plural(request.samples, 'sample')} of {done.length:.2f} s"),
        ("Took", f"{done.took:.1f} s" + (f", drawing {done.drawing:.1f} s ({drawn})" if drawn else "")),
        ("Guidance", f"{request.guidance:g}"),
        ("Temperature", f"{request.temperature:g}"),
        ("Kept of the odds", _kept(request)),
        ("Model", f"{request.model}, {request.checkpoint}"),
    ]
    if request.prime:
        rows.append(("Begins with", f"{request.prime:g} s of its own sound"))
    if request.label is not None:
        rows.append(("Class", str(request.label)))
    listed = "".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in rows)
    link = f'<a href="{html.escape(address(settings))}" download="{html.escape(settings.name)}">settings as JSON</a>'
    true = any(heard.kind == ORIGINAL and heard.wav is not None for heard in done.heard)
    many = any(heard.kind == SAMPLE for heard in done.heard)
    marks = legend(true) if many else ""
    return f'<div class="va-after">{marks}<dl class="va-summary">{listed}</dl><p class="va-facts">{link}</p></div>'


def _kept(request: Request) -> str:
    if request.top_p:
        return f"the likeliest, {request.top_p:.0%} together"
    return f"the {request.top_k} likeliest" if request.top_k else "all"
