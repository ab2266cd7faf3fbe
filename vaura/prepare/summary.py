"""What preparing did, for people and for programs: how fast each stage was, where its time went, and what was left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vaura.data.manifest import SPLITS, Clip
from vaura.files import write_aside
from vaura.prepare.stage import Outcome

ERRORS, SUMMARY = "errors.jsonl", "summary"


@dataclass
class Tally:
    """A stage's work over all runs that were not killed: clips made and failed, seconds of video, and of work by phase."""

    clips: int = 0
    failed: int = 0
    media: float = 0.0
    wall: float = 0.0  # seconds from its beginning to its end
    seconds: dict[str, float] = field(default_factory=dict)  # of all processes together

    def add(self, outcome: Outcome, clips: int = 1) -> None:
        self.clips += clips if outcome.sentence is None else 0
        self.failed += outcome.sentence is not None
        self.media += outcome.media
        for phase, spent in outcome.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def plus(self, other: Tally) -> Tally:
        phases = {
            phase: self.seconds.get(phase, 0.0) + other.seconds.get(phase, 0.0) for phase in {**self.seconds, **other.seconds}
        }
        return Tally(self.clips + other.clips, self.failed, self.media + other.media, self.wall + other.wall, phases)


def shard_name(name: str, shard: str | None) -> str:
    """`name` for one shard: errors.jsonl -> errors-0-of-4.jsonl."""
    if shard is None:
        return name
    stem, dot, suffix = name.partition(".")
    return f"{stem}-{shard.replace('/', '-of-')}{dot}{suffix}"


def earlier(folder: Path, shard: str | None) -> dict[str, Tally]:
    """What runs of this shard before the present one did; without a shard, all shards are counted as well."""
    found: dict[str, Tally] = {}
    names = [shard_name(f"{SUMMARY}.json", shard)]
    names += sorted(path.name for path in folder.glob(f"{SUMMARY}-*-of-*.json")) if shard is None else []
    for number, name in enumerate(names):
        try:
            told = json.loads((folder / name).read_text())
            stages = {stage: Tally(**tally) for stage, tally in told["own" if number == 0 else "stages"].items()}
        except (OSError, ValueError, TypeError, KeyError):  # none, or of another version: nothing to add
            continue
        for stage, tally in stages.items():
            found[stage] = found[stage].plus(tally) if stage in found else tally
    return found


def own(folder: Path, shard: str | None) -> dict[str, Tally]:
    """As `earlier`, without other shards."""
    try:
        told = json.loads((folder / shard_name(f"{SUMMARY}.json", shard)).read_text())
        return {stage: Tally(**tally) for stage, tally in told["own"].items()}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def added(before: Mapping[str, Tally], now: Mapping[str, Tally]) -> dict[str, Tally]:
    """Both together, in the order of the stages of now."""
    return {stage: before[stage].plus(tally) if stage in before else tally for stage, tally in now.items()}


HEADS = ("stage", "clips", "failed", "clips/s", "x real time", "share of time", "where its work goes")


def table(stages: Mapping[str, Tally]) -> str:
    """A Markdown table, one stage a line."""
    whole = sum(tally.wall for tally in stages.values())
    lines = [list(HEADS), ["---", *["--:"] * 5, "---"]]
    for name, tally in stages.items():
        rate = [f"{value / tally.wall:.2f}" if tally.wall and tally.clips else "" for value in (tally.clips, tally.media)]
        share = f"{tally.wall / whole:.0%}" if whole and tally.clips else ""
        work = sum(tally.seconds.values())
        parts = sorted(tally.seconds.items(), key=lambda item: -item[1]) if tally.clips else []
        phases = ", ".join(f"{phase} {spent / work:.0%}" for phase, spent in parts if work and spent / work >= 0.005)
        lines.append([name, str(tally.clips), str(tally.failed), *rate, share, phases])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counted(clips: Sequence[Clip]) -> dict[str, Any]:
    """How many clips, seconds and videos there are of each split, and clips of each class."""
    splits = {}
    for split in SPLITS:
        of = [clip for clip in clips if clip.split == split]
        splits[split] = {
            "clips": len(of),
            "seconds": round(sum(clip.duration for clip in of), 3),
            "videos": len({clip.facts["source"] for clip in of}),
            "classes": dict(sorted(Counter(str(clip.facts.get("label") or "") for clip in of).items())),
        }
    return splits


def write_errors(folder: Path, shard: str | None, errors: Sequence[Mapping[str, str]]) -> Path:
    """One line of JSON for everything that was left out, in the order of the ids."""
    path = folder / shard_name(ERRORS, shard)
    ordered = sorted(errors, key=lambda error: (error["id"], error["stage"], error["sentence"]))
    with write_aside(path) as aside:
        aside.write_text("".join(json.dumps(dict(error)) + "\n" for error in ordered))
    return path


def write_summary(
    folder: Path,
    shard: str | None,
    facts: Mapping[str, Any],
    stages: Mapping[str, Tally],
    mine: Mapping[str, Tally],
    errors: Sequence[Mapping[str, str]],
    lines: Sequence[str],
) -> None:
    """summary.json and summary.md: `stages` with those of shards, `mine` without."""
    content = {
        **facts,
        "left_out": len(errors),
        "stages": {name: asdict(tally) for name, tally in stages.items()},
        "own": {name: asdict(tally) for name, tally in mine.items()},
    }
    with write_aside(folder / shard_name(f"{SUMMARY}.json", shard)) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n")
    with write_aside(folder / shard_name(f"{SUMMARY}.md", shard)) as aside:
        aside.write_text("\n\n".join([*lines, table(stages)]) + "\n", "utf-8")
