"""The verb `prepare`: from a folder of any videos to a prepared folder, see `vaura.data.prepared`.

    OUTPUT/clips, records, parts, contents    what the stages make, each file whole or absent
    OUTPUT/manifest.jsonl                     the clips of which everything was made, with split, label and source
    OUTPUT/data.yaml                          python main.py config=OUTPUT/data.yaml trains on them
    OUTPUT/errors.jsonl, summary.json, summary.md

Whatever is finished is not made again, so the same command goes on where one was killed. With shard=i/n it does its share of
the videos; the same command without a shard then writes the rest: splits, manifest and what is made of all clips.
"""

from __future__ import annotations

import inspect
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vaura.components import check_components
from vaura.config import save_config
from vaura.data.manifest import SPLITS, Clip, read_manifest, write_manifest
from vaura.data.prepared import MANIFEST
from vaura.data.splits import Sorted, check_shares, recording_rule, split
from vaura.errors import InputError, nearest
from vaura.files import make_folder, write_aside
from vaura.media.content import Contents
from vaura.precision import pick_device
from vaura.prepare.cut import Cut, Cutting
from vaura.prepare.leftovers import CONTENTS, of_earlier_runs, remove_unfinished
from vaura.prepare.local import Local
from vaura.prepare.parts import Blueprint, Codes, Features, Flow, FlowStills, Frames, Mel, Pictures
from vaura.prepare.sources import Source, find_sources, share_of_sources
from vaura.prepare.stage import Engine, Stage
from vaura.prepare.summary import Tally, added, counted, earlier, own, table, write_errors, write_summary
from vaura.progress import bar

CONFIG = "config.yaml"
ENGINES, LAYOUTS = ("local", "ray"), ("specvqgan", "specvqgan_flat")
Settings = TypeVar("Settings")
Error = dict[str, str]


def prepare(config: DictConfig) -> Path:
    """Prepare the videos of `input`; returns the folder `output`.

    What cannot be used is left out and told in errors.jsonl. InputError where nothing is left, or a setting will not do.
    """
    check_components(config)
    for key, word, known in (("engine", config.engine, ENGINES), ("layout", config.layout, (None, *LAYOUTS))):
        if word not in known:
            words = [str(one) for one in known if one]
            raise InputError(f"{key}={word} is none of {', '.join(words)}.{nearest(str(word), words)}")
    folder, out = (Path(path).expanduser().absolute() for path in (config.input, config.output))  # for other machines
    if out.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"output={out} lies in input={folder}, whose videos its clips would become; choose a folder beside it")
    sides = settings(Sides, config.splits, "splits")
    cut = Cut(out, settings(Cutting, config.cut, "cut"))
    sources = find_sources(folder, sides.by_folder)
    share = share_of_sources(sources, config.shard)
    workers = cores() if config.workers is None else config.workers
    engine = _engine(config, workers)
    make_folder(out)
    stages = planned(config, out)
    mine = None if config.shard is None else {source.id for source in share}
    remove_unfinished(out, mine)
    try:
        return _prepared(config, out, share, sides, cut, stages, engine, workers)
    except KeyboardInterrupt as stop:
        remove_unfinished(out, mine)
        raise KeyboardInterrupt(f"the same command goes on in {out}") from stop


def _prepared(
    config: DictConfig,
    out: Path,
    share: Sequence[Source],
    sides: Sides,
    cut: Cut,
    stages: Sequence[Stage],
    engine: Engine,
    workers: int,
) -> Path:
    errors: list[Error] = []
    tallies: dict[str, Tally] = {}
    with _entered(engine):
        known = Contents(out / CONTENTS, str(config.shard or "all").replace("/", "-of-"))
        digests = known.of([source.path for source in share], workers, "recognise the videos")
        for source in share:
            if source.path not in digests:
                errors.append({"id": source.id, "stage": "cut", "sentence": f"{source.path} cannot be read; check who may"})
        share = [replace(source, content=digests[source.path]) for source in share if source.path in digests]
        failed = run_stage(engine, cut, share, tallies, lambda source: len(cut.clips(source)))
        for source in share:
            record = cut.record(source)
            told = record.left_out if record else [failed[source.id]] if source.id in failed else []
            errors += [{"id": source.id, "stage": cut.name, "sentence": sentence} for sentence in told]
        clips = [clip for source in share for clip in cut.clips(source)]
        lost: set[str] = set()
        for stage in stages:
            failed = run_stage(engine, stage, [clip for clip in clips if clip.id not in lost], tallies)
            errors += [{"id": name, "stage": stage.name, "sentence": sentence} for name, sentence in failed.items()]
            lost |= set(failed)  # what lacks one part is not listed, so that no other is made of it
    cut_now, clips = clips, [clip for clip in clips if clip.id not in lost]
    if not clips:
        path = write_errors(out, config.shard, errors)
        reason = errors[0]["sentence"] if errors else "there is no video in it"
        raise InputError(f"nothing of input={config.input} can be used, see {path}: {reason}")
    lines = []
    if config.shard is None:
        clips, lines = finish(config, out, share, clips, sides, [stage.name for stage in stages])
        lines += of_earlier_runs(out, share, cut_now, config.remove_old)
    else:
        lines.append(f"This is shard {config.shard}; when all are done, the same command without shard finishes {out}.")
    _tell(config, out, share, clips, tallies, errors, lines)
    return out


def _tell(
    config: DictConfig,
    out: Path,
    share: Sequence[Source],
    clips: Sequence[Clip],
    tallies: dict[str, Tally],
    errors: Sequence[Error],
    lines: list[str],
) -> None:
    path = write_errors(out, config.shard, errors)
    copies = len(share) - len({source.content for source in share})
    head = f"{len(clips)} clips, {sum(clip.duration for clip in clips):.1f} s, of {len(share)} videos are in {out}"
    notes = [f"{head}, {copies} of which are copies of others." if copies else f"{head}."]
    notes += [f"Left out: {len(errors)}, see {path.name}."] if errors else []
    stages = added(earlier(out, config.shard), tallies)
    mine = added(own(out, config.shard), tallies)
    facts = {"clips": len(clips), "videos": len(share), "copies": copies, "shard": config.shard, "splits": counted(clips)}
    write_summary(out, config.shard, facts, stages, mine, errors, [*notes, *lines])
    print("\n\n".join([*notes, *lines, table(stages)]))


# --- the parts of a run ---


class Sides:
    """How videos are split, see `vaura.data.splits`.

    Args:
        train, val, test: shares; together 1.
        by_folder: folders of the input called train, val and test are splits, whatever the shares.
        recording: a regular expression whose first group, found in a file's name, names the recording it is a part of.
    """

    def __init__(
        self, train: float = 0.8, val: float = 0.1, test: float = 0.1, by_folder: bool = True, recording: str | None = None
    ) -> None:
        self.shares = check_shares({"train": train, "val": val, "test": test})
        self.by_folder, self.rule = by_folder, recording_rule(recording)

    def of(self, sources: Sequence[Source], seed: int, before: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
        """The split of each video by its id, and sentences of what had to be changed for it."""
        found = []
        for source in sources:
            match = self.rule.search(source.stem) if self.rule else None
            recording = match[1] if match else None
            found.append(Sorted(source.id, source.label, source.content or None, recording, source.split))
        return split(found, self.shares, seed, before)


def earlier_splits(out: Path, config: DictConfig) -> dict[str, str]:
    """The split of each video in the manifest that lies there; of none where it was made by another rule, or by hand."""
    try:
        made_by = OmegaConf.load(out / CONFIG)
        if not isinstance(made_by, DictConfig) or any(made_by.get(key) != config[key] for key in ("splits", "seed")):
            return {}
        return {str(clip.facts["source"]): clip.split for clip in read_manifest(out / MANIFEST) if clip.split in SPLITS}
    except (OSError, InputError, KeyError, OmegaConfBaseException, YAMLError):  # there is none yet
        return {}


def settings(kind: type[Settings], node: Any, key: str, **supplied: Any) -> Settings:
    """`kind` of the values of a config's node, and of those `supplied`.

    Raises InputError for a key that it does not have, and a value of another kind.
    """
    given = OmegaConf.to_container(node, resolve=True) if node is not None else {}
    if not isinstance(given, dict):
        raise InputError(f"{key}={given} is no set of keys and values")
    known = [name for name in inspect.signature(kind).parameters if name not in supplied]
    for name in given:
        if name not in known:
            raise InputError(f"unknown key '{key}.{name}'." + nearest(str(name), known))
    try:
        return kind(**{str(name): value for name, value in given.items()}, **supplied)
    except TypeError as error:
        raise InputError(f"{key} holds a value of another kind than it should ({error})") from error


def planned(config: DictConfig, out: Path) -> list[Stage]:
    """The stages after the first, in their order. Components are built once here, to know what would be made by what."""
    found: list[Stage] = []
    if config.mel is not None:
        found.append(Mel(out, Blueprint.of(config.mel, "mel"), config.mel_columns))
    flow = Flow(out, Blueprint.of(config.flow, "flow")) if config.flow is not None else None
    if flow is not None:
        found.append(flow)
    if config.stills is not None:
        stills = Blueprint.of(config.stills, "stills")
        if config.frames is not None:
            found.append(Frames(out, stills, settings(Pictures, config.frames, "frames")))
        if flow is not None:
            found.append(FlowStills(out, stills, flow))
    for name, node in (config.encoders or {}).items():
        if node is not None:
            found.append(Features(out, Blueprint.of(node, f"encoders.{name}"), str(name), flow))
    if config.experiment_path is not None:
        if config.tokenizer is not None:
            raise InputError("experiment_path brings its own tokenizer: give one of experiment_path and tokenizer")
        path = str(config.experiment_path)
        found.append(Codes(out, Blueprint("experiment_path", folder=path, part="tokenizer")))
        found.append(Features(out, Blueprint("experiment_path", folder=path, part="encoder"), "features", flow))
    elif config.tokenizer is not None:
        found.append(Codes(out, Blueprint.of(config.tokenizer, "tokenizer")))
    names = [stage.name for stage in found]
    for name in names:
        if names.count(name) > 1 or name == "cut":
            raise InputError(f"encoders.{name} has the name of another part; choose another than {', '.join(sorted({*names}))}")
    packable = [name for name in names if name not in ("frames", "flow_stills")]
    for name in config.pack.kinds:
        if name not in packable:
            raise InputError(
                f"pack.kinds names '{name}', and what is made is {', '.join(packable) or 'nothing'}." + nearest(name, packable)
            )
    return found


def run_stage(
    engine: Engine, stage: Stage, items: Sequence[Any], tallies: dict[str, Tally], clips_of: Any = lambda _: 1
) -> dict[str, str]:
    """Run `stage` over what is not done of `items`; a sentence for each that failed, by its id."""
    waiting = [item for item in items if not stage.done(item)]
    tally = tallies[stage.name] = Tally()
    by_id = {item.id: item for item in waiting}
    failed: dict[str, str] = {}
    begun = time.monotonic()
    with bar(stage.name, len(items), len(items) - len(waiting)) as shown:
        for outcome in engine.run(stage, waiting) if waiting else ():
            if outcome.stops:
                raise InputError(f"{outcome.sentence}; the same command then goes on")
            tally.add(outcome, clips_of(by_id[outcome.id]))
            if outcome.sentence is not None:
                failed[outcome.id] = outcome.sentence
            shown.advance(1, f"{len(failed)} left out" if failed else None)
    tally.wall = time.monotonic() - begun if waiting else 0.0
    return failed


def finish(
    config: DictConfig, out: Path, sources: Sequence[Source], clips: list[Clip], sides: Sides, kinds: Sequence[str]
) -> tuple[list[Clip], list[str]]:
    """Splits, manifest, data.yaml, shards and layout: what is made of all clips. The clips, and what is to be told.

    `kinds` are those of the parts that were made now.
    """
    used = {clip.facts["source"] for clip in clips}
    before = earlier_splits(out, config)
    chosen, told = sides.of([source for source in sources if source.id in used], config.seed, before)
    clips = [replace(clip, split=chosen[clip.facts["source"]]) for clip in clips]
    write_manifest(out / MANIFEST, clips)
    write_data_config(out, clips)
    save_config(config, out / CONFIG)
    counts = ", ".join(f"{name} {facts['clips']}" for name, facts in counted(clips).items())
    lines = [*told, f"Splits: {counts}. To train on them: python main.py config={out / 'data.yaml'}"]
    if config.pack.kinds:
        from vaura.data.packing import pack

        given = OmegaConf.to_container(config.pack, resolve=True)
        assert isinstance(given, dict)
        packed = pack(out, **{str(key): value for key, value in given.items()})
        lines.append(f"Shards: {len(packed.written)} written, {len(packed.right)} were right.")
    if config.layout is not None:
        lines.append(_laid_out(config, out, kinds))
    return clips, lines


def _laid_out(config: DictConfig, out: Path, kinds: Sequence[str]) -> str:
    from vaura.data.layout import FORMS, lay_out

    name = config.layout_name or re.sub(r"[^\w.-]+", "_", out.name).lstrip(".") or "data"
    forms = {kind: form for kind, form in FORMS.items() if kind in kinds}  # others may be of earlier clips
    done = lay_out(out, out / "specvqgan", name, flat=config.layout.endswith("_flat"), forms=forms)
    return f"Layout: {done.clips} clips below {out / 'specvqgan'} as the data set {name}, {done.written} files written now."


DATA = """\
# python main.py config={path}    train on the clips that were prepared here
# Any override of configs/train.yaml works, as lm=base. Other recipes take the same clips by
# data=folder data.manifest={manifest}
defaults:
  - train
  - _self_

name: {name}
data:
  manifest: {manifest} # with its splits
  duration: {duration:g} # seconds of a training clip, of the {seconds:g} s that were cut
"""


def write_data_config(out: Path, clips: Sequence[Clip]) -> None:
    """OUTPUT/data.yaml, which a training takes as its config."""
    seconds = max(clip.duration for clip in clips)  # those that are shorter are left out of a training, or shorten it
    duration = min(seconds, 2.56)
    text = DATA.format(
        path=_quoted(out / "data.yaml"),
        manifest=_quoted((out / MANIFEST).resolve()),
        name=_quoted(out.resolve().name),
        duration=duration,
        seconds=seconds,
    )
    with write_aside(out / "data.yaml") as aside:
        aside.write_text(text, "utf-8")


def _quoted(value: object) -> str:
    text = str(value)
    return text if re.fullmatch(r"[\w./-]+", text) else "'" + text.replace("'", "''") + "'"


def _engine(config: DictConfig, workers: int) -> Engine:
    if config.engine == "local":
        return Local(workers, str(pick_device(config.device)))
    from vaura.prepare.ray_engine import RayEngine

    return settings(RayEngine, config.ray, "ray", device=config.device)


@contextmanager
def _entered(engine: Engine) -> Iterator[None]:
    with ExitStack() as stack:
        if hasattr(engine, "__enter__"):
            stack.enter_context(engine)  # type: ignore[arg-type]
        yield


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
