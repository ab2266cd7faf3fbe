"""The config of a run: its schema, composed by Hydra, checked, saved and read again.

A config has two schemas: the skeleton of a run is a dataclass below, named in the config's defaults list (`- schema: train`);
the schema of a component, any node with `_target_`, is its constructor (vaura/components.py).
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from vaura.command import CONFIGS, Command, translate
from vaura.errors import InputError, nearest
from vaura.files import write_aside
from vaura.refusals import REFUSED, hydra_sentence, omegaconf_sentence, unknown_key, yaml_sentence

VERBS = {
    "train": "vaura.train:train",
    "test": "vaura.train:test",
    "finetune": "vaura.finetune.verb:finetune",
    "train_part": "vaura.train_part:train_part",
    "generate": "vaura.generate:generate",
    "evaluate": "vaura.evaluate:evaluate",
    "codec": "vaura.codec:codec",
    "quickstart": "vaura.quickstart:quickstart",
    "prepare": "vaura.prepare.verb:prepare",
    "serve": "vaura.serve.verb:serve",
}


# --- the skeletons: one dataclass per verb; the comment of a field is what a person reads when its value is missing ---


@dataclass
class TrainRun:
    action: str = "train"
    name: str = MISSING  # the experiment's name: its folder is LOG_DIR/NAME/TIME
    log_dir: str = "logs"  # where the folders of experiments are
    seed: int = 0  # of everything random
    data: Any = MISSING  # manifests, clips, batches
    tokenizer: Any = MISSING  # signal <-> codes, frozen
    encoder: Any = MISSING  # video -> features, frozen
    contrast: Any = None  # how the encoder is taught where it has no weights
    conditioner: Any = MISSING  # features -> condition
    lm: Any = MISSING  # predicts codes
    task: Any = MISSING  # what is trained, and how
    trainer: Any = MISSING  # Lightning's Trainer
    logging: Any = MISSING  # what is written down while training
    resume: str | None = None  # a checkpoint to go on from, or to test
    test_at_end: bool = False  # measure the best checkpoint on the split test


@dataclass
class TrainPartRun:
    action: str = "train_part"
    name: str = MISSING  # the experiment's name: its folder is LOG_DIR/NAME/TIME
    log_dir: str = "logs"  # where the folders of experiments are
    seed: int = 0  # of everything random
    data: Any = MISSING  # clips, mels, batches
    tokenizer: Any = None  # the codec that learns, where it is one
    task: Any = MISSING  # what is trained, and how
    trainer: Any = MISSING  # Lightning's Trainer
    logging: Any = MISSING  # what is written down while training
    resume: str | None = None  # a checkpoint to go on from


@dataclass
class QuickstartRun(TrainRun):
    action: str = "quickstart"
    world: Any = MISSING  # the synthetic clips
    generation: Any = MISSING  # how the held-out clips are generated
    evaluation: Any = MISSING  # how they are judged, and what is shown


@dataclass
class FinetuneRun(TrainRun):
    action: str = "finetune"
    experiment_path: str = MISSING  # the experiment to begin with: its folder, or the name of one of V-AURA's
    checkpoint: str | None = None  # a checkpoint of it; none takes the best
    overridden_hparams: dict[str, Any] = field(default_factory=dict)  # merged over its config
    tokenizer: Any = None  # tokenizer, encoder, conditioner and LM are its own,
    encoder: Any = None
    conditioner: Any = None
    lm: Any = None
    adapt: Any = MISSING  # what of them learns
    origin: Any = None  # what they came from, which the run writes down
    measures: Any = MISSING  # what is measured of held-out clips, before and after


@dataclass
class GenerateRun:
    action: str = "generate"
    name: str = "generate"  # the run's folder is LOG_DIR/NAME/TIME
    log_dir: str = "logs"
    experiment_path: str = MISSING  # the folder of a trained experiment, or one of V-AURA's own
    checkpoint: str | None = None  # a checkpoint file; none takes the experiment's best
    video: str | None = None  # a video, a folder of videos, or a manifest
    data: Any = None  # or a corpus, of which one split is generated
    data_split: str = "val"  # which, where the corpus is one of arrays: train, val, test
    encoder: Any = None  # what looks at videos in place of the experiment's encoder
    vocoder: Any = None  # what makes sound of mels in place of the experiment's vocoder
    out: str | None = None  # where the samples go; none takes EXPERIMENT/OUT_PATH/TIME
    out_path: str = "samples"  # a folder below the experiment
    duration: float | None = None  # seconds to generate; none takes the whole video
    start: float = 0.0  # seconds into the video
    samples_per_video: int = 1  # different sounds for each video
    batch_size: int = 8  # sounds generated at once
    guidance: float = 3.0  # guidance scale; 1 switches it off
    guidance_end: float | None = None  # guidance scale at the last step of a window; none: constant
    guidance_shape: str = "linear"  # how it gets there: linear or cosine
    sampler: Any = MISSING  # rule from logits to a token
    loop: str = "windows"  # how a long sound goes on: windows, rolling, centred, published
    window: float | None = None  # seconds generated at once; none takes what the experiment was trained on
    stride: float | None = None  # seconds between windows; none takes half a window
    seed: int = 0  # of the sampler
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    precision: str = "auto"  # number format of the LM: auto, float32, bfloat16, int8 (weights alone)
    engine: str = "auto"  # what runs the LM: auto, native, torch
    compile: bool = False  # whether torch compiles the LM's steps
    label: Any = None  # the class of all clips, for models that want one: its number, or its name
    prompt: str | None = None  # an audio file to continue
    prepend_gt_audio: bool = False  # continue the beginning of the clip's own sound
    prompt_duration: float = 0.64  # seconds of it
    remove_prompts: bool = False  # whether the prompt is cut from what is written
    normalize: str = "limit"  # level of the sound: limit, lufs, clip, peak, rms, loudness
    save_original_files: bool = False  # also write the clip with its own sound
    compress_original_audio: bool = True  # that sound through the tokenizer and back
    features_cache: str | None = None  # a folder that keeps features of pictures; none: they are computed
    overridden_hparams: dict[str, Any] = field(default_factory=dict)  # merged over the experiment's config


@dataclass
class EvaluateRun:
    action: str = "evaluate"
    name: str = "evaluate"  # the run's folder is LOG_DIR/NAME/TIME
    log_dir: str = "logs"
    samples: str = MISSING  # the folder of generated samples
    originals: str = MISSING  # the folder, or the manifest, of the videos with their own sound
    out: str | None = None  # the file of the metrics; none writes metrics.json beside the samples
    threshold: float = 0.15  # of an onset, share of 20 dB
    tolerance: float = 0.05  # seconds between an onset and its truth
    start: float = 0.0  # seconds into the originals at which the samples begin
    classes: list[str] | None = None  # of samples in folders cls_0, cls_1, ...: what these stand for
    classifier: Any = None  # hears what FID, KID, MKL and IS are computed from, where it has weights
    mel: Any = MISSING  # the mels that it hears
    seconds: float = 10.0  # of sound that it hears
    columns: int = 848  # of their mel, the middle
    short: str = "loop"  # how shorter sound is made longer: loop or pad
    batch_size: int = 8  # mels it hears at once
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    recorded: bool = False  # whether mels are also compared as PerceptAlign's own figures were made
    distribution: Any = MISSING  # of the published figures: subsets, splits
    intervals: Any = MISSING  # how the intervals are found


@dataclass
class CodecRun:
    action: str = "codec"
    name: str = "codec"  # the run's folder is LOG_DIR/NAME/TIME
    log_dir: str = "logs"
    tokenizer: Any = MISSING  # signal <-> codes
    audio: str = MISSING  # a sound or a video, a folder of them, a pattern, or codes to make sound of
    compare: str | None = None  # a folder with other files of the same sounds
    out: str | None = None  # the folder to write to; none takes LOG_DIR/NAME/TIME
    sample_rate: int = 16_000  # hertz at which sounds are compared
    page_seconds: float = 30.0  # of each sound on the page
    device: str = "auto"  # auto, cpu, cuda, cuda:1


@dataclass
class PrepareRun:
    action: str = "prepare"
    name: str = "prepare"
    log_dir: str = "logs"
    seed: int = 0  # of the splits
    input: str = MISSING  # the folder of videos, of any size, rate, length and codec
    output: str = MISSING  # the folder that is made of them
    cut: Any = MISSING  # how videos become clips
    splits: Any = MISSING  # shares of train, val and test, and what belongs together
    mel: Any = None  # the mels that are stored; none: no mels
    mel_columns: int | None = None  # of each mel, the first; none: all
    stills: Any = None  # how frames and flow are kept as jpegs; none: no jpegs
    frames: Any = None  # of which pictures there are jpegs; none: of flow alone
    flow: Any = None  # the optical flow that is stored; none: no flow
    encoders: dict[str, Any] = field(default_factory=dict)  # name of a part -> the encoder that makes it
    tokenizer: Any = None  # what makes codes; none: no codes
    experiment_path: str | None = None  # an experiment whose tokenizer and encoder make codes and features
    engine: str = "local"  # local or ray
    ray: Any = None  # what the engine ray is told
    workers: int | None = None  # processes of the engine local; none takes the cores
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    remove_old: bool = False  # remove what earlier runs made of other videos, or by other settings
    shard: str | None = None  # i/n: only this share of the videos, for job arrays; none: all, and what is made of all
    pack: Any = MISSING  # WebDataset shards
    layout: str | None = None  # specvqgan or specvqgan_flat: also lay the files out as SpecVQGAN's are
    layout_name: str | None = None  # of the data set there; none takes that of the output folder


@dataclass
class ServeRun:
    action: str = "serve"
    name: str = "serve"
    log_dir: str = "logs"
    experiment_path: Any = MISSING  # an experiment, a folder that holds several, or a list of either
    title: str = "vaura"  # of the page
    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines in
    port: int | None = 7860  # none takes the first free one from 7860 on
    share: bool = False  # whether Gradio makes a public address, through a server of theirs
    open_browser: bool = False
    examples: str | None = None  # a folder of videos to try; none takes the experiment's own validation clips
    examples_shown: int = 8
    folder: str | None = None  # where temporary files go; none takes the system's
    keep_minutes: float = 60.0  # after which the files of a request are removed
    upload_mb: float = 100.0  # of one upload
    seconds: float = 60.0  # of sound in one request
    samples: int = 4  # in one request
    at_once: int = 1  # requests that are worked on at once
    queue: int = 16  # requests that may wait
    models_kept: int = 2  # in memory
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    precision: str = "auto"  # number format of the LM: auto, float32, bfloat16, int8 (weights alone)
    engine: str = "auto"  # what runs the LM: auto, native, torch
    compile: bool = False  # whether torch compiles the LM's steps
    loop: str = "windows"  # how a long sound goes on: windows, rolling, centred, published
    stride: float | None = None  # seconds between windows; none takes half a window
    normalize: str = "limit"  # level of the sound: limit, lufs, clip, peak, rms, loudness
    guidance: float | None = None  # what the page begins with; none takes the experiment's own
    sampler: Any = None  # what the page begins with; none takes the experiment's own
    encoder: Any = None  # what looks at videos in place of the experiment's encoder
    vocoder: Any = None  # what makes sound of mels in place of the experiment's vocoder
    overridden_hparams: dict[str, Any] = field(default_factory=dict)  # merged over each experiment's config
    threshold: float = 0.15  # of an onset, share of 20 dB
    tolerance: float = 0.05  # seconds between an onset and the original's
    classifier: Any = None  # names what it hears, where it has weights
    mel: Any = None  # the mels that it hears
    classes: str | None = None  # a file with a name a line for what the classifier knows


SCHEMAS: dict[str, type] = {
    "train": TrainRun,
    "train_part": TrainPartRun,
    "quickstart": QuickstartRun,
    "finetune": FinetuneRun,
    "generate": GenerateRun,
    "evaluate": EvaluateRun,
    "codec": CodecRun,
    "prepare": PrepareRun,
    "serve": ServeRun,
}
ACTIONS: dict[type, tuple[str, ...]] = {
    TrainRun: ("train", "test"),
    TrainPartRun: ("train_part",),
    QuickstartRun: ("quickstart", "train", "test"),
    FinetuneRun: ("finetune", "test"),
    GenerateRun: ("generate",),
    EvaluateRun: ("evaluate",),
    CodecRun: ("codec",),
    PrepareRun: ("prepare",),
    ServeRun: ("serve",),
}
for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(group="schema", name=_name, node=_schema, package="_global_", provider="vaura")


# some arithmetic for values that follow from others: ${sum:265,${conditioner.features}}
OmegaConf.register_new_resolver("product", lambda *numbers: math.prod(numbers), replace=True)
OmegaConf.register_new_resolver("sum", lambda *numbers: sum(numbers), replace=True)
OmegaConf.register_new_resolver("max", lambda *numbers: max(numbers), replace=True)
OmegaConf.register_new_resolver("min", lambda *numbers: min(numbers), replace=True)


# --- composed, saved, read again ---


def compose(config: str | Path, overrides: Sequence[str] = (), configs: Path = CONFIGS) -> DictConfig:
    """The config that `python main.py config=CONFIG OVERRIDES` hands to its verb, without running it."""
    command = translate([f"config={config}", *overrides], configs)
    try:
        return _compose(command, command.overrides)
    except REFUSED as error:
        raise InputError(explain(error, command)) from error


def _compose(command: Command, overrides: list[str]) -> DictConfig:
    running = GlobalHydra.instance()  # of the run that asks, if any: Hydra wants one at a time
    before, running.hydra = running.hydra, None
    try:
        with hydra.initialize_config_dir(str(command.folder), version_base="1.3"):
            return hydra.compose(command.name, overrides)
    finally:
        running.hydra = before


def save_config(cfg: DictConfig, path: str | Path) -> None:
    """Write the config of a run so that `config=PATH` runs it again: unresolved, hence overrides still reach everything.

    What the verb's own YAML says to Hydra, as where the run writes, is said again.
    """
    schema = next(name for name, kind in SCHEMAS.items() if OmegaConf.get_type(cfg) is kind)
    path_of_verb = CONFIGS / f"{schema}.yaml"
    verb = OmegaConf.load(path_of_verb) if path_of_verb.is_file() else OmegaConf.create()
    assert isinstance(verb, DictConfig)
    header = OmegaConf.merge({"defaults": [{"schema": schema}, "house", "_self_"]}, OmegaConf.masked_copy(verb, "hydra"))
    with write_aside(path) as aside:
        aside.write_text(f"# python main.py config={path}\n{OmegaConf.to_yaml(header)}{OmegaConf.to_yaml(cfg)}")


def load_config(path: str | Path) -> DictConfig:
    """The config that `save_config` wrote, without what it says to Hydra."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no config {path}; an experiment's folder holds one")
    try:
        cfg = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        raise InputError(yaml_sentence(error)) from error
    if not isinstance(cfg, DictConfig):
        raise InputError(f"{path} is no config: it holds a list, not keys and values")
    for key in ("defaults", "hydra"):
        cfg.pop(key, None)
    return cfg


def merge(cfg: DictConfig, changes: Any, where: str) -> DictConfig:
    """`cfg` with `changes` over it, in memory. Raises InputError at a key that `cfg` lacks, naming the nearest.

    A component of `changes` that has another `_target_` takes the place of the old one, none of whose keys are its own.
    """
    cfg = _without_replaced(cfg, changes)
    known = known_keys(cfg)
    OmegaConf.set_struct(cfg, True)
    try:
        merged = OmegaConf.merge(cfg, changes)
    except OmegaConfBaseException as error:
        raise InputError(f"{where}: {omegaconf_sentence(error, str(error.full_key or ''), known)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _without_replaced(cfg: DictConfig, changes: Any) -> DictConfig:
    """`cfg` with only the keys that `changes` names in every component of which these make another."""
    changed = OmegaConf.create(changes)
    cfg = cfg.copy()

    def walk(old: Any, new: Any) -> None:
        if not (isinstance(old, DictConfig) and isinstance(new, DictConfig)):
            return
        if new.get("_target_") not in (None, old.get("_target_")):
            for key in list(old):
                del old[key]
            for key in new:
                old[key] = None
            return
        for key in map(str, new):
            if key in old and not OmegaConf.is_interpolation(old, key) and not OmegaConf.is_interpolation(new, key):
                walk(old[key], new[key])

    walk(cfg, changed)
    return cfg


# --- what can be wrong with it ---


def check_run(cfg: DictConfig, command: Command) -> None:
    """Raise InputError for a config without schema, unknown keys and actions, missing values, and dangling references."""
    schema = next((kind for kind in SCHEMAS.values() if OmegaConf.get_type(cfg) is kind), None)
    if schema is None:
        raise InputError(
            f"{command.path} names no schema: its defaults list begins with one of {', '.join(SCHEMAS)}, as '- schema: train'"
        )
    known = [spec.name for spec in fields(schema)]
    for key in cfg:
        if key not in known:
            raise InputError(unknown_key(str(key), known))
    if cfg.action not in VERBS:
        raise InputError(f"unknown action '{cfg.action}'; there are {', '.join(VERBS)}." + nearest(cfg.action, VERBS))
    if cfg.action not in ACTIONS[schema]:
        raise InputError(f"{command.path} says how to {' or '.join(ACTIONS[schema])}, not how to {cfg.action}; remove action=")
    missing, every = [], known_keys(cfg)
    for key in every:
        try:
            OmegaConf.select(cfg, key, throw_on_missing=True)
        except (MissingMandatoryValue, InterpolationToMissingValueError) as error:
            missing += [key] if isinstance(error, MissingMandatoryValue) else []
        except OmegaConfBaseException as error:
            raise InputError(omegaconf_sentence(error, key, every)) from error
    if missing:
        raise InputError(_missing(missing, schema, command))
    if cfg.get("resume") and not Path(cfg.resume).is_file():
        below = Path(cfg.resume).parent / "checkpoints" / Path(cfg.resume).name
        if below.is_file():  # as V-AURA's README writes it
            cfg.resume = str(below)
            return
        raise InputError(f"resume: there is no checkpoint {cfg.resume}; give EXPERIMENT/checkpoints/last.ckpt")


def known_keys(cfg: DictConfig | ListConfig) -> list[str]:
    """Every dotted key of a config."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            yield f"{prefix}{key}"
            yield from walk(value, f"{prefix}{key}.")

    return list(walk(OmegaConf.to_container(cfg, resolve=False), ""))


def explain(error: Exception, command: Command) -> str:
    """One sentence for what kept Hydra from composing a config."""
    if sentence := hydra_sentence(error):
        return sentence
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OmegaConfBaseException):
            return _composition_sentence(cause, str(error), command)
    return f"{' '.join(str(error).split())} (in {command.path} {' '.join(command.overrides)})"


def _composition_sentence(cause: OmegaConfBaseException, outer: str, command: Command) -> str:
    missing = re.search(r"Missing mandatory value: (\S+)", str(cause))
    if missing:
        return _missing([missing[1]], None, command)
    override = re.match(r"Could not override '([^']+)'", outer)
    file = re.match(r"In '([^']+)'", outer)
    sentence = omegaconf_sentence(cause, override[1] if override else cause.full_key or "", _keys_before(command))
    return f"in {file[1]}.yaml, {sentence}" if file else sentence


def _keys_before(command: Command) -> list[str]:
    """The keys of the config with its choices of groups but without the overridden values, one of which is wrong.

    Where a file is wrong itself, those of the skeletons.
    """
    groups = {path.relative_to(command.configs).as_posix() for path in command.configs.glob("**/")}
    choices = [word for word in command.overrides if word.lstrip("+").partition("=")[0] in {*groups, "hydra.searchpath"}]
    try:
        return known_keys(_compose(command, choices))
    except REFUSED:
        return [spec.name for schema in SCHEMAS.values() for spec in fields(schema)]


def _missing(keys: Sequence[str], schema: type | None, command: Command) -> str:
    told = [key + (f" ({hint})" if (hint := _hint(key, schema, command)) else "") for key in keys]
    return f"{', '.join(told)}: no value given; add {' '.join(f'{key}=VALUE' for key in keys)}"


def _hint(key: str, schema: type | None, command: Command) -> str:
    """The comment beside `key`: in the YAML that leaves it open, or in the skeleton."""
    group, _, last = key.rpartition(".")
    sources = [command.path, *sorted(command.configs.glob(f"{group.replace('.', '/')}/*.yaml"))] if group else [command.path]
    for source in sources:
        comment = re.search(rf"^\s*{re.escape(last)}:\s*\?\?\?\s*#\s*(.+)$", source.read_text(), re.MULTILINE)
        if comment:
            return comment[1].strip()
    for kind in (schema,) if schema else SCHEMAS.values():
        for owner in kind.__mro__[:-1]:
            comment = re.search(rf"^\s*{re.escape(key)}: .*#\s*(.+)$", inspect.getsource(owner), re.MULTILINE)
            if comment:
                return comment[1].strip()
    return ""
