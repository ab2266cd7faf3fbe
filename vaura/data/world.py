"""A small world that can be seen and heard: objects of metal, glass, wood and drum skin bounce and ring as they strike.

Another world has other materials, see `SECOND`: whoever knows the first has to learn their looks and sounds anew.

A seed is imagined into a `Scene`; the scene is rendered to frames and to sound, so that every impact is known to the sample.
`build` writes whole splits as ordinary mp4 files with a manifest, and takes up where it was interrupted.

Lengths are shares of the picture's side, y points down, times are seconds.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from vaura.data.manifest import SPLITS, Clip, write_manifest
from vaura.errors import InputError, nearest
from vaura.media.mux import write_video
from vaura.progress import bar
from vaura.timing import count

VERSION = 1  # of the drawing and the sound; raise it whenever a seed would come out differently

Array = np.ndarray


@dataclass(frozen=True)
class Material:
    """How a material looks and rings. Mode m sounds at `pitch * ratios[m]` hertz and falls by 1/e in `decays[m]` seconds."""

    hue: float  # of a turn
    saturation: float
    value: float
    pitch: float  # hertz, at the middle size; half the size is an octave up
    ratios: tuple[float, ...]
    gains: tuple[float, ...]
    decays: tuple[float, ...]
    strike: float  # level of the noise of the blow, against the modes' peak of 1
    strike_decay: float  # seconds
    strike_width: int  # moving average over so many samples at 16 kHz: wider is duller
    give: float  # share by which the hardest blow flattens it


FIRST = ("metal", "glass", "wood", "drum")
"""The materials of the first world, which the quickstart knows."""

SECOND = ("bell", "stone", "plastic", "skin")
"""Those of another one, seen and heard by nobody who knows the first alone."""

# Ratios: metal, a free bar (Euler-Bernoulli) with a detuned twin of its lowest modes, whose beating makes the shimmer;
# glass, the rim modes of a thin goblet; wood, an undercut xylophone bar; drum, zeros of the Bessel functions (ideal membrane);
# bell, a bar struck where its high modes speak; stone, hardly more than the blow; plastic, a hollow bar that rings on; skin, a
# membrane of a higher pitch. They lie where a tokenizer fitted to the first world can still speak of them.
MATERIALS: dict[str, Material] = {
    "metal": Material(
        hue=0.60, saturation=0.42, value=0.95, pitch=540.0,
        ratios=(1.0, 1.006, 2.756, 2.768, 5.404, 8.933, 13.345),
        gains=(0.9, 0.45, 1.0, 0.4, 0.6, 0.35, 0.15), decays=(0.55, 0.5, 0.42, 0.38, 0.26, 0.16, 0.09),
        strike=0.35, strike_decay=0.003, strike_width=1, give=0.10,
    ),
    "glass": Material(
        hue=0.44, saturation=0.62, value=0.95, pitch=1500.0,
        ratios=(1.0, 2.32, 4.25, 1.83), gains=(1.0, 0.7, 0.4, 0.3), decays=(0.16, 0.10, 0.06, 0.08),
        strike=0.30, strike_decay=0.002, strike_width=1, give=0.07,
    ),
    "wood": Material(
        hue=0.085, saturation=0.72, value=0.80, pitch=420.0,
        ratios=(1.0, 2.98, 6.05, 1.74), gains=(1.0, 0.6, 0.3, 0.25), decays=(0.050, 0.025, 0.015, 0.030),
        strike=0.45, strike_decay=0.006, strike_width=4, give=0.06,
    ),
    "drum": Material(
        hue=0.975, saturation=0.80, value=0.85, pitch=112.0,
        ratios=(1.0, 1.593, 2.136, 2.295, 2.653, 2.917, 3.500), gains=(1.0, 0.7, 0.5, 0.35, 0.3, 0.2, 0.2),
        decays=(0.16, 0.13, 0.11, 0.10, 0.08, 0.07, 0.05),
        strike=0.45, strike_decay=0.008, strike_width=10, give=0.20,
    ),
    "bell": Material(
        hue=0.13, saturation=0.75, value=0.95, pitch=567.0,
        ratios=(1.0, 2.756, 5.404, 8.933, 13.345), gains=(0.6, 1.0, 0.9, 0.5, 0.3), decays=(0.40, 0.34, 0.24, 0.14, 0.08),
        strike=0.30, strike_decay=0.002, strike_width=1, give=0.05,
    ),
    "stone": Material(
        hue=0.58, saturation=0.10, value=0.62, pitch=1500.0,
        ratios=(1.0, 2.32, 4.25), gains=(0.5, 1.0, 0.7), decays=(0.022, 0.016, 0.010),
        strike=0.90, strike_decay=0.008, strike_width=1, give=0.03,
    ),
    "plastic": Material(
        hue=0.80, saturation=0.78, value=0.90, pitch=420.0,
        ratios=(1.0, 2.98, 6.05, 1.74), gains=(1.0, 0.6, 0.3, 0.25), decays=(0.14, 0.09, 0.05, 0.07),
        strike=0.20, strike_decay=0.006, strike_width=4, give=0.12,
    ),
    "skin": Material(
        hue=0.33, saturation=0.75, value=0.75, pitch=160.0,
        ratios=(1.0, 1.593, 2.136, 2.653, 2.917), gains=(1.0, 0.8, 0.5, 0.3, 0.2), decays=(0.24, 0.18, 0.14, 0.10, 0.08),
        strike=0.25, strike_decay=0.008, strike_width=10, give=0.22,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """The settings of a world; every scene of it follows from a seed. Raises InputError on settings that cannot be drawn."""

    materials: tuple[str, ...] = FIRST
    size: int = 96  # pixels, square
    fps: float = 25
    sample_rate: int = 16_000
    duration: float = 2.56  # seconds
    gravity: float = 5.4  # sides per second squared: a bounce of T seconds rises gravity * T**2 / 8
    intervals: tuple[float, float] = (0.3, 0.9)  # seconds between two impacts of one object
    spacing: float = 0.14  # least seconds between any two impacts
    quiet_start: float = 0.05  # no impact in the first and the last seconds
    quiet_end: float = 0.1
    radii: tuple[float, float] = (0.085, 0.125)  # half-widths of the objects
    two_objects: float = 0.4  # share of clips with two objects, of different materials
    distractor: float = 0.35  # share of clips in which a silent grey shape slides by

    def __post_init__(self) -> None:
        for name in ("materials", "intervals", "radii"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in self.materials:
            if name not in MATERIALS:
                raise InputError(
                    f"world.materials: there is no '{name}'; choose from {', '.join(MATERIALS)}.{nearest(name, MATERIALS)}"
                )
        if len(set(self.materials)) < (2 if self.two_objects > 0 else 1):
            raise InputError(
                "world.materials: two objects differ in material; name at least two materials or set two_objects=0"
            )
        if self.size < 32 or self.size % 2:
            raise InputError(f"world.size is {self.size} pixels; choose an even number of at least 32")
        if not self.spacing < self.intervals[0] <= self.intervals[1]:
            raise InputError(f"world.intervals {self.intervals} must rise and lie above world.spacing {self.spacing}")
        if self.duration < 2 * self.intervals[1] or self.spacing > self.intervals[0] / 2:
            raise InputError(
                "world: impacts do not fit; choose a duration of at least twice, a spacing of at most half, the intervals"
            )


@dataclass(frozen=True)
class Impact:
    """One blow: when (seconds), of what, and how loud, from 0 to 1 for the longest fall."""

    time: float
    material: str
    loudness: float


@dataclass(frozen=True)
class Body:
    """An object and its whole path: it meets the floor at `times`, at `spots`, the first before the clip, the last after it."""

    material: str
    radius: float
    floor: float  # y of the contact
    times: Array  # (J,) seconds, rising; neighbours are one ballistic bounce apart
    spots: Array  # (J,) x of each contact
    tint: Array  # (3,) colour in [0, 1]
    pitch: float  # hertz
    spin: int  # -1 or 1


@dataclass(frozen=True)
class Distractor:
    """A silent shape that slides sideways: `x + speed * time`."""

    shape: str  # "disc", "square" or "diamond"
    radius: float
    x: float
    y: float
    speed: float  # sides per second
    grey: float


@dataclass(frozen=True)
class Backdrop:
    """Wall, floor and light of a scene; colours (3,) in [0, 1]."""

    top: Array
    bottom: Array
    near: Array
    far: Array
    horizon: float  # y where the wall meets the floor
    light: float  # x of the light on the wall


@dataclass(frozen=True)
class Scene:
    """Everything to draw and to hear in one clip."""

    backdrop: Backdrop
    bodies: tuple[Body, ...]
    distractor: Distractor | None
    impacts: tuple[Impact, ...]  # in order of time
    seed: int


# Imagining


def imagine(seed: int, world: World) -> Scene:
    """The scene of a seed; the same on every machine."""
    rng = np.random.default_rng(seed)
    number = 2 if rng.random() < world.two_objects else 1
    names = [world.materials[index] for index in rng.permutation(len(world.materials))[:number]]
    times = _plan(rng, number, world)
    backdrop, floor = _imagine_backdrop(rng)
    lanes = [(0.22, 0.78)] if number == 1 else [(0.17, 0.38), (0.62, 0.83)]
    bodies = [_imagine_body(rng, name, when, floor, lane, world) for name, when, lane in zip(names, times, lanes, strict=True)]
    distractor = _imagine_distractor(rng, backdrop.horizon) if rng.random() < world.distractor else None
    impacts = [impact for body in bodies for impact in _impacts(body, world)]
    return Scene(
        backdrop,
        tuple(sorted(bodies, key=lambda body: body.floor)),
        distractor,
        tuple(sorted(impacts, key=lambda impact: impact.time)),
        seed,
    )


def _plan(rng: np.random.Generator, number: int, world: World) -> list[Array]:
    """Contact times of each object, drawn again until they keep their distance from each other and from both ends."""
    while True:
        plans = [_bounces(rng, world) for _ in range(number)]
        joined = np.sort(np.concatenate(plans))
        start = np.abs(joined).min() >= world.quiet_start
        end = np.abs(joined - world.duration).min() >= world.quiet_end
        if start and end and np.diff(joined).min() >= world.spacing:
            return plans


def _bounces(rng: np.random.Generator, world: World) -> Array:
    times = [-rng.random() * world.intervals[0]]
    while times[-1] < world.duration:
        times.append(times[-1] + rng.uniform(*world.intervals))
    return np.array(times)


def _imagine_body(
    rng: np.random.Generator, name: str, times: Array, floor: float, lane: tuple[float, float], world: World
) -> Body:
    material = MATERIALS[name]
    radius = rng.uniform(*world.radii)
    spots = [rng.uniform(*lane)]
    for _ in times[1:]:
        spots.append(float(np.clip(spots[-1] + rng.uniform(-0.14, 0.14), *lane)))
    hue = material.hue + rng.uniform(-0.02, 0.02)
    saturation = material.saturation * rng.uniform(0.85, 1.1)
    return Body(
        material=name,
        radius=radius,
        floor=floor + rng.uniform(-0.015, 0.02),
        times=times,
        spots=np.array(spots),
        tint=_colour(hue, min(saturation, 1.0), material.value * rng.uniform(0.9, 1.05)),
        pitch=material.pitch * (sum(world.radii) / 2 / radius),
        spin=int(rng.choice((-1, 1))),
    )


def _impacts(body: Body, world: World) -> list[Impact]:
    """The contacts inside the clip. The speed of a fall is gravity * T / 2, so loudness follows the bounce that ends there."""
    falls = np.diff(body.times)
    return [
        Impact(round(float(time), 6), body.material, round(float((fall / world.intervals[1]) ** 0.7), 4))
        for time, fall in zip(body.times[1:], falls, strict=True)
        if time < world.duration
    ]


def _imagine_backdrop(rng: np.random.Generator) -> tuple[Backdrop, float]:
    hue, floor_hue = rng.random(), rng.random()
    value = rng.uniform(0.45, 0.92)
    saturation = rng.uniform(0.08, 0.30)
    floor = rng.uniform(0.82, 0.93)
    depth = rng.uniform(0.08, 0.20)
    shade = rng.uniform(0.35, 0.80)
    backdrop = Backdrop(
        top=_colour(hue, saturation, value * 0.80),
        bottom=_colour(hue + rng.uniform(-0.12, 0.12), saturation * 0.7, min(value * 1.08, 1.0)),
        near=_colour(floor_hue, rng.uniform(0.10, 0.35), shade),
        far=_colour(floor_hue, rng.uniform(0.08, 0.25), min(shade * 1.2, 1.0)),
        horizon=floor - depth,
        light=rng.uniform(0.2, 0.8),
    )
    return backdrop, floor


def _imagine_distractor(rng: np.random.Generator, horizon: float) -> Distractor:
    direction = float(rng.choice((-1.0, 1.0)))
    return Distractor(
        shape=str(rng.choice(("disc", "square", "diamond"))),
        radius=rng.uniform(0.05, 0.09),
        x=0.5 - direction * rng.uniform(0.2, 0.6),
        y=rng.uniform(0.12, horizon - 0.1),
        speed=direction * rng.uniform(0.25, 0.6),
        grey=rng.uniform(0.72, 1.0),
    )


def _colour(hue: float, saturation: float, value: float) -> Array:
    """HSV, each of a turn or in [0, 1], to RGB (3,) in [0, 1]."""
    ramp = np.abs((hue * 6 + np.array((0.0, 4.0, 2.0))) % 6 - 3) - 1
    return value * (1 - saturation * (1 - np.clip(ramp, 0, 1)))


# Seeing


def render(scene: Scene, world: World) -> Tensor:
    """The frames (F, 3, H, W) uint8 of a scene; frame f shows the instant f / fps."""
    size = world.size
    times = np.arange(count(world.duration, world.fps)) / world.fps
    margin = math.ceil(0.5 * size)  # a patch may hang over the edge; nothing drawn is wider than this
    canvas = np.empty((len(times), 3, size + 2 * margin, size + 2 * margin), np.uint8)
    canvas[:, :, margin:-margin, margin:-margin] = _draw_backdrop(scene.backdrop, size)
    if scene.distractor is not None:
        _draw_distractor(canvas, margin, scene.distractor, times, size)
    paths = [_path(body, times, world) for body in scene.bodies]
    for body, path in zip(scene.bodies, paths, strict=True):
        _draw_shadow(canvas, margin, body, path, size)
    for body, path in zip(scene.bodies, paths, strict=True):
        _draw_body(canvas, margin, body, path, size)
    return torch.from_numpy(np.ascontiguousarray(canvas[:, :, margin:-margin, margin:-margin]))


def _draw_backdrop(backdrop: Backdrop, size: int) -> Array:
    """Wall, floor, light and vignette: (3, H, W) uint8."""
    y, x = ((np.arange(size) + 0.5) / size)[:, None], ((np.arange(size) + 0.5) / size)[None]
    wall = np.clip(y / backdrop.horizon, 0, 1)
    floor = np.clip((y - backdrop.horizon) / (1 - backdrop.horizon), 0, 1)
    glow = np.exp(-((x - backdrop.light) ** 2 + (y - 0.35) ** 2) / 0.18)
    edge = np.clip((y - backdrop.horizon) * size + 0.5, 0, 1)
    crease = 1 - 0.18 * np.exp(-np.abs(y - backdrop.horizon) / 0.025)
    vignette = 1 - 0.22 * ((x - 0.5) ** 2 + (y - 0.5) ** 2) / 0.5
    planes = [
        (top + (bottom - top) * wall) * (0.92 + 0.16 * glow) * (1 - edge)
        + (far + (near - far) * floor**0.7) * (0.95 + 0.10 * np.exp(-((x - backdrop.light) ** 2) / 0.1)) * edge
        for top, bottom, near, far in zip(backdrop.top, backdrop.bottom, backdrop.near, backdrop.far, strict=True)
    ]
    return (np.clip(np.stack(planes) * crease * vignette, 0, 1) * 255 + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class _Path:
    """Where a body is in each frame; every field (F,) float."""

    x: Array
    height: Array  # of its lowest point above the floor
    phase: Array  # of the bounce, in [0, 1)
    turn: Array  # number of bounces so far plus phase
    squash: Array  # vertical scale, 1 when free


def _path(body: Body, times: Array, world: World) -> _Path:
    index = np.searchsorted(body.times, times, side="right") - 1
    since, length = times - body.times[index], np.diff(body.times)[index]
    phase = since / length
    nearest_blow = np.minimum(since, length - since)
    give = MATERIALS[body.material].give * 2 * length / (length + world.intervals[1])
    return _Path(
        x=body.spots[index] + (body.spots[index + 1] - body.spots[index]) * phase,
        height=world.gravity / 2 * since * (length - since),
        phase=phase,
        turn=index + phase,
        squash=1 - give * np.exp(-((nearest_blow / 0.035) ** 2)),
    )


def _draw_shadow(canvas: Array, margin: int, body: Body, path: _Path, size: int) -> None:
    """A soft ellipse at the contact, wider and fainter as the body rises."""
    spread = _column(body.radius * (1.0 + 0.5 * path.height)) * size
    x, y, left, top = _patch(path.x * size, np.full_like(path.x, (body.floor - 0.01) * size), 0.34 * size, 0.11 * size)
    distance = (x / spread) ** 2 + (y / (0.30 * spread)) ** 2
    alpha = _column(0.62 / (1 + 4 * path.height)) / (1 + distance**2)
    _paint(canvas, margin, left, top, np.zeros(3), alpha * (distance < 9))


def _draw_distractor(canvas: Array, margin: int, shape: Distractor, times: Array, size: int) -> None:
    centre = np.clip(shape.x + shape.speed * times, -0.2, 1.2)
    radius = shape.radius * size
    x, y, left, top = _patch(centre * size, np.full_like(centre, shape.y * size), 1.5 * radius, 1.5 * radius)
    if shape.shape == "disc":
        distance = np.sqrt(x**2 + y**2) - radius
    elif shape.shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.88 * radius
    else:
        distance = (np.abs(x) + np.abs(y) - 1.2 * radius) / math.sqrt(2)
    light = shape.grey * (0.93 - 0.10 * y / radius)
    _paint(canvas, margin, left, top, np.clip(light, 0, 1)[:, None], np.clip(0.5 - distance, 0, 1))


def _draw_body(canvas: Array, margin: int, body: Body, path: _Path, size: int) -> None:
    """The body and its faint reflection in the floor."""
    radius = body.radius * size
    half = radius * _HALF_HEIGHTS[body.material]  # of the resting body: its lowest point touches the floor at height 0
    low = (body.floor - path.height) * size
    x, y, left, top = _patch(path.x * size, low - path.squash * half, 1.5 * radius + 2, 1.5 * radius + 2)
    squash = _column(path.squash)
    x, y = (x * np.sqrt(squash) / radius).astype(np.float32), (y / squash / radius).astype(np.float32)
    distance, colour, opacity = _LOOKS[body.material](x, y, path, body)
    alpha = np.clip(0.5 - distance * radius, 0, 1) * opacity
    mirrored = np.rint(2 * body.floor * size).astype(int) - top - alpha.shape[1]
    fade = _column(0.20 / (1 + 6 * path.height))
    _paint(canvas, margin, left, np.minimum(mirrored, size), colour[..., ::-1, :], (alpha * fade)[:, ::-1])
    _paint(canvas, margin, left, top, colour, alpha)


# A look takes x, y (F, h, w) in radii from the centre and gives the signed distance to the outline in radii (F, h, w),
# the colour (F, 3, h, w) in [0, 1] and the opacity in [0, 1].


def _look_metal(x: Array, y: Array, path: _Path, body: Body) -> tuple[Array, Array, Array | float]:
    """A polished ball: it mirrors a bright sky above a dark horizon."""
    distance, z = _sphere(x, y)
    up = -2 * z * y  # vertical part of the mirrored ray
    sky = 1 / (1 + np.exp(-14 * (up - 0.05)))
    tone = sky * (0.62 + 0.38 * up) + (1 - sky) * (0.22 + 0.42 * up**2)
    shine = _highlight(x, y, z, 60)
    return distance, np.minimum(_tinted(body, tone) * 1.12 + shine[:, None], 1), 1.0


def _look_glass(x: Array, y: Array, path: _Path, body: Body) -> tuple[Array, Array, Array | float]:
    """A clear marble: thick and bright at the rim, with light gathered opposite the lamp."""
    distance, z = _sphere(x, y)
    rim = (1 - z) ** 2
    gathered = np.exp(-((x - 0.35) ** 2 + (y - 0.45) ** 2) / 0.16)
    shine = _highlight(x, y, z, 90)
    colour = _tinted(body, 0.70 + 0.35 * gathered - 0.25 * rim) + (0.30 * gathered + shine)[:, None]
    return distance, np.minimum(colour, 1), np.minimum(0.62 + 0.38 * rim + shine + 0.2 * gathered, 1)


def _look_wood(x: Array, y: Array, path: _Path, body: Body) -> tuple[Array, Array, Array | float]:
    """A block with grain that makes a quarter turn in every bounce, so that it lands flat."""
    angle = body.spin * path.turn * math.pi / 2
    u, v = _turned(x, y, angle)
    distance = _box(u, v, 0.88, 0.88, 0.16)
    grain = np.sin(9 * v + 1.6 * np.sin(2.2 * u + 7 * body.radius * 10)) + 0.5 * np.sin(23 * v + 3 * u)
    bevel = np.clip((distance + 0.14) / 0.14, 0, 1)
    lit = np.clip(1.02 - 0.16 * (x + y), 0.6, 1.3)
    return distance, np.minimum(_tinted(body, (1 + 0.13 * grain) * lit * (1 - 0.35 * bevel)), 1), 1.0


def _look_drum(x: Array, y: Array, path: _Path, body: Body) -> tuple[Array, Array, Array | float]:
    """A squat drum seen from a little above: pale head, lacquered shell, two bright hoops."""
    u, v = _turned(x, y, 0.28 * body.spin * np.sin(math.pi * path.phase))
    across = np.sqrt(np.clip(1 - u**2, 0, 1))
    bow = 0.26 * across
    distance = np.maximum(np.abs(u) - 1, np.abs(v) - 0.58 - bow)
    head = np.clip((bow - np.abs(v + 0.58)) * 12, 0, 1)
    down = v - bow  # height along the shell, freed of its curvature
    hoops = np.clip(1.5 - np.abs(down + 0.52) * 16, 0, 1) + np.clip(1.5 - np.abs(down - 0.50) * 16, 0, 1)
    shell = 0.42 + 0.62 * across * (1 - 0.35 * u)
    colour = _tinted(body, shell)
    for pale, cover in ((np.array((0.95, 0.80, 0.45)) * 0.95, hoops * (1 - head)), (np.array((0.98, 0.93, 0.84)), head)):
        light = (np.clip(0.55 + 0.5 * across, 0, 1) if pale[2] < 0.5 else 1.0 - 0.08 * u)[:, None] * pale[:, None, None]
        colour = colour + (light - colour) * cover[:, None]
    return distance, np.clip(colour, 0, 1), 1.0


def _look_bell(x: Array, y: Array, path: _Path, body: Body) -> tuple[Array, Array, Array | float]:
    """A bell: a dome that flares to its rim, bright on one side, with a dark band."""
    flare = 0.45 + 0.13 * (y + 1) + 0.42 * np.clip(y, 0, 1) ** 2
    crown = np.sqrt(np.clip(x**2 + (y + 0.45) ** 2, 0, None)) - 0.55
    distance = np.maximum(np.where(y < -0.45, crown, np.abs(x) - flare), y - 1)
    round_ = np.clip(1 - (x / np.maximum(flare, 0.1)) ** 2, 0, 1)
    tone = 0.45 + 0.6 * np.sqrt(round_) * (1 - 0.4 * x) - 0.25 * np.exp(-(((y - 0.55) / 0.09) ** 2))
    shine = np.exp(-(((x + 0.3) / 0.13) ** 2)) * (y < 0.9) * 0.35
    return distance, np.clip(_tinted(body, tone) + shine[:, None], 0, 1), 1.0


def _look_stone(x: Array, y: Array, path: _Path, body: Body) -> tuple[Array, Array, Array | float]:
    """A rough pebble of eight flat sides that tumbles a quarter turn in every bounce."""
    u, v = _turned(x, y, body.spin * path.turn * math.pi / 2)
    sides = [u * math.cos(turn) + v * math.sin(turn) for turn in np.arange(8) * (math.pi / 4)]
    reach = (0.95, 0.90, 0.95, 1.0, 0.95, 0.92, 0.95, 0.88)
    distance = np.max([side - far for side, far in zip(sides, reach, strict=True)], axis=0)
    speckle = np.sin(31 * u + 5 * np.sin(17 * v)) * np.sin(27 * v + 3 * np.sin(23 * u))
    return distance, np.clip(_tinted(body, (1 + 0.28 * speckle) * (1.0 - 0.22 * (x + y))), 0, 1), 1.0


def _look_plastic(x: Array, y: Array, path: _Path, body: Body) -> tuple[Array, Array, Array | float]:
    """A glossy toy ball, flatly lit, with a white belt."""
    distance, z = _sphere(x, y)
    belt = np.clip(1.5 - np.abs(y + 0.25 * x * body.spin) * 9, 0, 1)
    shine = _highlight(x, y, z, 25)
    colour = _tinted(body, 0.70 + 0.30 * z)
    colour = colour + (0.92 - colour) * belt[:, None] + 0.45 * shine[:, None]
    return distance, np.clip(colour, 0, 1), 1.0


_LOOKS = {
    "metal": _look_metal,
    "glass": _look_glass,
    "wood": _look_wood,
    "drum": _look_drum,
    "bell": _look_bell,
    "stone": _look_stone,
    "plastic": _look_plastic,
    "skin": _look_drum,
}
_HALF_HEIGHTS = {
    "metal": 1.0,
    "glass": 1.0,
    "wood": 0.88,
    "drum": 0.84,
    "bell": 1.0,
    "stone": 0.95,
    "plastic": 1.0,
    "skin": 0.84,
}


def _sphere(x: Array, y: Array) -> tuple[Array, Array]:
    """Signed distance to the unit disc, and the height of the unit ball above it."""
    square = x**2 + y**2
    return np.sqrt(square) - 1, np.sqrt(np.clip(1 - square, 0, 1))


def _box(x: Array, y: Array, width: float, height: float, corner: float) -> Array:
    """Signed distance to a box with rounded corners, given its half sides."""
    a, b = np.abs(x) - width + corner, np.abs(y) - height + corner
    return np.sqrt(np.maximum(a, 0) ** 2 + np.maximum(b, 0) ** 2) + np.minimum(np.maximum(a, b), 0) - corner


def _highlight(x: Array, y: Array, z: Array, sharpness: float) -> Array:
    return np.clip(-0.34 * x - 0.48 * y + 0.81 * z, 0, 1) ** sharpness


def _turned(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    cos, sin = _column(np.cos(angle)).astype(np.float32), _column(np.sin(angle)).astype(np.float32)
    return cos * x + sin * y, cos * y - sin * x


def _tinted(body: Body, tone: Array) -> Array:
    return tone[:, None] * body.tint.astype(np.float32)[:, None, None]


def _column(values: Array) -> Array:
    return np.asarray(values)[:, None, None]


def _patch(x: Array, y: Array, half_width: float, half_height: float) -> tuple[Array, Array, Array, Array]:
    """A window around each centre (pixels): positions x (F, 1, w), y (F, h, 1) from the centre, and its left and top (F,)."""
    width, height = 2 * math.ceil(half_width), 2 * math.ceil(half_height)
    left, top = np.rint(x).astype(int) - width // 2, np.rint(y).astype(int) - height // 2
    across = left[:, None] + np.arange(width) + 0.5 - x[:, None]
    down = top[:, None] + np.arange(height) + 0.5 - y[:, None]
    return across[:, None, :].astype(np.float32), down[:, :, None].astype(np.float32), left, top


def _paint(canvas: Array, margin: int, left: Array, top: Array, colour: Array, alpha: Array) -> None:
    """Blend colour ((3,) or broadcastable to (F, 3, h, w)) over the canvas (F, 3, ., .) with opacity alpha (F, h, w)."""
    frames, height, width = alpha.shape
    windows = sliding_window_view(canvas, (height, width), axis=(2, 3), writeable=True)  # type: ignore[call-overload]
    where = (np.arange(frames), slice(None), top + margin, left + margin)
    colour = colour[:, None, None] if colour.ndim == 1 else colour
    below = windows[where].astype(np.float32)
    below += (colour.astype(np.float32) * 255 - below) * alpha[:, None].astype(np.float32)
    windows[where] = (below + 0.5).astype(np.uint8)


# Hearing


def sound(scene: Scene, world: World) -> Tensor:
    """The sound (1, N) float32 of a scene, peak at most 0.9: each impact excites the modes of its body and a short noise."""
    length = count(world.duration, world.sample_rate)
    rng = np.random.default_rng((scene.seed, 1))
    wav = np.zeros(length, np.float32)
    for body in scene.bodies:
        impacts = [impact for impact in scene.impacts if impact.material == body.material]
        modes, gains = _modes(body, length, world.sample_rate)
        for impact in impacts:
            start = count(impact.time, world.sample_rate)
            # a hard blow is brighter: the higher a mode, the more it owes to speed
            brightness = (0.5 + 0.5 * impact.loudness) ** np.arange(len(gains))
            blow = (gains * brightness).astype(np.float32) @ modes[:, : length - start]
            noise = _strike(MATERIALS[body.material], rng, world.sample_rate)[: length - start]
            blow[: len(noise)] += noise
            wav[start:] += 0.55 * impact.loudness * blow
    peak = float(np.abs(wav).max(initial=0))
    return torch.from_numpy(wav * min(1.0, 0.9 / max(peak, 1e-9)))[None]


def _modes(body: Body, length: int, sample_rate: int) -> tuple[Array, Array]:
    """Damped sinusoids (M, N) of a body below 0.46 of the sample rate, and their gains (M,), scaled to a joint peak of 1."""
    material = MATERIALS[body.material]
    frequency = body.pitch * np.array(material.ratios)
    kept = frequency < 0.46 * sample_rate
    frequency, decay, gains = frequency[kept], np.array(material.decays)[kept], np.array(material.gains)[kept]
    time = np.arange(length) / sample_rate
    turns = frequency[:, None] * time
    modes = np.sin(((turns - np.floor(turns)) * (2 * math.pi)).astype(np.float32))
    modes *= np.exp((-time / decay[:, None]).astype(np.float32))
    first = modes[:, : max(sample_rate // 20, 1)]
    return modes, gains / np.abs(gains @ first).max()


def _strike(material: Material, rng: np.random.Generator, sample_rate: int) -> Array:
    """The noise of the blow, unit peak times `material.strike`."""
    width = max(1, round(material.strike_width * sample_rate / 16_000))
    time = np.arange(math.ceil(6 * material.strike_decay * sample_rate)) / sample_rate
    noise = np.convolve(rng.standard_normal(len(time) + width - 1), np.ones(width), "valid") * np.exp(
        -time / material.strike_decay
    )
    return (material.strike * noise / np.abs(noise).max()).astype(np.float32)


# Building


def fingerprint(world: World, seeds: dict[str, range]) -> str:
    """Twelve hexadecimal digits that change with any setting, seed or version of the renderer: the name of a cache folder."""
    settings = {
        "version": VERSION,
        "world": asdict(world),
        "seeds": {split: list(_ends(seeds[split])) for split in sorted(seeds)},
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _ends(seeds: range) -> tuple[int, int, int]:
    return seeds.start, seeds.stop, seeds.step


def build(folder: str | Path, seeds: dict[str, range], world: World, workers: int = 2) -> Path:
    """Write every clip of `seeds` as <split>/<split>_<seed>.mp4 and then manifest.jsonl, whose path is returned.

    A clip whose file exists is finished and is kept, so an interrupted build resumes. Choose a folder that carries
    `fingerprint(world, seeds)`. Raises InputError where splits are unknown or share a seed, or the folder cannot be written.
    """
    _check_splits(seeds)
    folder = Path(folder)
    clips = [(split, seed) for split, numbers in seeds.items() for seed in numbers]
    missing = [clip for clip in clips if not (folder / _video(*clip)).exists()]
    with bar("imagine the world", len(missing)) as shown:
        for finished in _render_all(folder, missing, world, workers):
            shown.advance(finished)
    manifest = folder / "manifest.jsonl"
    write_manifest(manifest, [_clip(folder, split, seed, world) for split, seed in clips])
    return manifest


def _check_splits(seeds: dict[str, range]) -> None:
    taken: dict[int, str] = {}
    for split, numbers in seeds.items():
        if split not in SPLITS:
            raise InputError(f"seeds.{split}: a split is one of {', '.join(SPLITS)}.{nearest(split, SPLITS)}")
        if min(numbers, default=0) < 0:
            raise InputError(f"seeds.{split} holds the negative seed {min(numbers)}; start at 0 or above")
        for seed in numbers:
            if seed in taken:
                raise InputError(f"seeds.{split} and seeds.{taken[seed]} share seed {seed}; choose ranges that do not overlap")
            taken[seed] = split


def _video(split: str, seed: int) -> str:
    return f"{split}/{split}_{seed:06d}.mp4"


def _clip(folder: Path, split: str, seed: int, world: World) -> Clip:
    scene = imagine(seed, world)
    facts = {"materials": [body.material for body in scene.bodies], "impacts": [asdict(impact) for impact in scene.impacts]}
    return Clip(f"{split}_{seed:06d}", folder / _video(split, seed), world.duration, split=split, facts=facts)


def _render_all(folder: Path, clips: list[tuple[str, int]], world: World, workers: int) -> Iterator[int]:
    """Render `clips`, yield the size of each finished portion. An interrupt lets portions in hand finish and drops the rest."""
    portions = [clips[start : start + 8] for start in range(0, len(clips), 8)]
    if workers <= 1 or len(portions) < 3:
        yield from (_render_portion(folder, [clip], world) for clip in clips)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_settle_worker) as pool:
        waiting = [pool.submit(_render_portion, folder, portion, world) for portion in portions]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _settle_worker() -> None:
    """One thread a process, and interrupts are the parent's business."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _render_portion(folder: Path, clips: list[tuple[str, int]], world: World) -> int:
    for split, seed in clips:
        scene = imagine(seed, world)
        write_video(folder / _video(split, seed), render(scene, world), world.fps, sound(scene, world), world.sample_rate)
    return len(clips)
