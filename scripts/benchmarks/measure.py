"""Timing and tables shared by the benchmarks: alternatives run in turn, so that a busy moment meets them all."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch

from vaura.files import write_aside


@dataclass
class Line:
    """One alternative: its times in seconds, and what share of the line called `against` it reaches (limit / median)."""

    name: str
    seconds: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


@dataclass
class Table:
    """Lines of one experiment. `limit` and `peer` name the lines that the others are compared with, where there are any."""

    title: str
    lines: list[Line]
    limit: str | None = None
    peer: str | None = None
    per: str = "ms"  # what the column says; from "ms" on, times are told in thousandths of a second
    notes: list[str] = field(default_factory=list)

    def line(self, name: str) -> Line | None:
        return next((line for line in self.lines if line.name == name), None)

    def markdown(self) -> str:
        """As the README shows it."""
        limit = self.line(self.limit) if self.limit else None
        peer = self.line(self.peer) if self.peer else None
        head = ["", self.per, "spread", *(["of the limit"] if limit else []), *([f"x {peer.name}"] if peer else []), ""]
        rows = [head, ["---", *["--:"] * (len(head) - 2), "---"]]
        for line in self.lines:
            cells = [line.name, f"{line.median * (1e3 if self.per.startswith('ms') else 1):.3g}", f"±{line.spread:.0%}"]
            cells += [f"{limit.median / line.median:.0%}"] if limit else []
            cells += [f"{peer.median / line.median:.2f}"] if peer else []
            rows.append([*cells, line.note])
        body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        return "\n".join([f"**{self.title}**", "", body, *[f"\n{note}" for note in self.notes]])


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, *, warm: int = 1, finish: Callable[[], None] = lambda: None
) -> list[Line]:
    """The times of all `runs`, one of each in turn, `rounds` times after `warm` rounds that are not counted.

    `finish` waits for a device that works behind Python's back.
    """
    lines = [Line(name) for name in runs]
    for number in range(warm + rounds):
        for line, run in zip(lines, runs.values(), strict=True):
            finish()
            begin = time.perf_counter()
            run()
            finish()
            if number >= warm:
                line.seconds.append(time.perf_counter() - begin)
    return lines


def machine(device: torch.device | str = "cpu") -> str:
    """The name of what was measured on, and the date."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name = f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}; torch {torch.__version__}; {date.today().isoformat()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.is_file())
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def show(tables: Sequence[Table], where: str, path: str | None = None) -> None:
    """Print the tables; with `path` also write every single time to that JSON file."""
    print(f"\n{where}")
    for table in tables:
        print(f"\n{table.markdown()}")
    if path:
        record = {"machine": where, "tables": [asdict(table) for table in tables]}
        with write_aside(Path(path)) as aside:
            aside.write_text(json.dumps(record, indent=1))
