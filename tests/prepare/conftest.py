"""A folder of videos as people have them: several classes, sizes, rates and lengths, copies, and some that are of no use."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vaura.launch import run
from vaura.media.mux import write_video

SMALL = ["cut.seconds=0.64", "cut.size=32", "cut.sample_rate=22050", "cut.preset=ultrafast", "cut.tail=loop"]
SMALL += ["device=cpu", "workers=1"]


def make_video(path: Path, seconds: float, fps: float = 25.0, side: int = 48, hertz: float = 440.0, level: float = 0.5) -> Path:
    """A video whose grey level tells the time, red, and whose sound is a tone."""
    frames = torch.arange(round(seconds * fps)) / fps
    shade = (40 + 150 * frames / max(seconds, 1e-6)).round()
    video = shade[:, None, None, None].expand(-1, 3, side, side + 16).to(torch.uint8)
    time = torch.arange(round(seconds * 22050)) / 22050
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, video, fps, level * torch.sin(2 * math.pi * hertz * time)[None], 22050, crf=4, preset="ultrafast")
    return path


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven good videos in two classes, one of them twice, and four that cannot be used."""
    root = tmp_path_factory.mktemp("videos") / "in"
    for number, (seconds, fps) in enumerate([(1.4, 25.0), (0.8, 30.0), (0.3, 25.0), (0.64, 12.5)]):
        make_video(root / f"bell/ring {number}.mp4", seconds, fps, hertz=300 + 100 * number)
    for number in range(3):
        make_video(root / f"drum/hit{number}.mp4", 0.7, side=32 + 16 * number, hertz=100 + 20 * number)
    (root / "drum/copy.mp4").write_bytes((root / "drum/hit0.mp4").read_bytes())
    make_video(root / "drum/silent.mp4", 0.7, level=0.0)
    (root / "drum/garbage.mp4").write_bytes(b"no video at all")
    whole = (root / "bell/ring 0.mp4").read_bytes()
    (root / "bell/torn.mp4").write_bytes(whole[: len(whole) // 2])
    write_video(root / "bell/mute.mp4", torch.zeros(20, 3, 32, 32, dtype=torch.uint8), 25.0)
    return root


@pytest.fixture
def prepare() -> Callable[..., int]:
    """prepare(input, output, overrides): the exit status of the command."""

    def call(source: Path, out: Path, *overrides: str) -> int:
        return run(["config=prepare", f"input={source}", f"output={out}", *SMALL, *overrides])

    return call


def content(out: Path) -> dict[str, bytes]:
    """Everything that was made, by name; without what holds times of work and the folder's own path."""
    apart = {"summary.json", "summary.md", "data.yaml", "config.yaml"}
    files = [path for path in out.rglob("*") if path.is_file() and "contents" not in path.parts]
    named = {path.relative_to(out).as_posix(): path for path in files if path.name not in apart}
    return {name: path.read_bytes() for name, path in sorted(named.items()) if not name.startswith(("summary-", "errors-"))}


def unfinished(out: Path) -> list[str]:
    """What begins with a dot."""
    return [name for _, _, names in os.walk(out) for name in names if name.startswith(".")]
