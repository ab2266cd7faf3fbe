"""From a command line to the composed config of a run, and to the verb that runs it.

`python main.py config=PATH key=value ...` is Hydra's command line with one word more. A config has two schemas: the skeleton of
a run is a dataclass below, named in the config's defaults list (`- schema: train`); the schema of a component, any node with
`_target_`, is its constructor. Nothing here imports torch, so that a mistyped key is answered at once.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from vaura.errors import InputError, nearest
from vaura.files import write_aside

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

VERBS = {
    "train": "vaura.train:train",
    "generate": "vaura.generate:generate",
    "evaluate": "vaura.evaluate:evaluate",
    "quickstart": "vaura.quickstart:quickstart",
}

# Published spellings that keep working. A key, or everything below it, gets the house's word.
SPELLINGS = {
    "dataloader": "data",
    "trainer.seed": "seed",
    "trainer.ckpt_path": "resume",
    "trainer.experiment_name": "name",
    "checkpoint_path": "checkpoint",
    "cfg_scale": "guidance",
    "model_max_duration": "window",
}

# Trees that take any key: they are merged over another config, which knows its own keys.
FREE = ("overridden_hparams",)

# Parameters that a verb passes to a component itself: dotted key of the node -> names. Everything else stands in the config.
SUPPLIED: dict[str, set[str]] = {
    "data": {"fps", "size", "sample_rate", "channels"},
    "contrast.task": {"encoder", "sample_rate"},
}


# --- the skeletons: one dataclass per verb; the comment of a field is what a person reads when its value is missing ---


@dataclass
class TrainRun:
    action: str = "train"
    name: str = MISSING  # the experiment's name: its folder is logs/NAME/TIME
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
    resume: str | None = None  # a checkpoint to go on from


@dataclass
class QuickstartRun(TrainRun):
    action: str = "quickstart"
    world: Any = MISSING  # the synthetic clips
    generation: Any = MISSING  # how the held-out clips are generated
    evaluation: Any = MISSING  # how they are judged, and what is shown


@dataclass
class GenerateRun:
    action: str = "generate"
    name: str = "generate"  # the run's folder is logs/NAME/TIME
    experiment_path: str = MISSING  # the folder of a trained experiment
    checkpoint: str | None = None  # a checkpoint file; none takes the experiment's best
    video: str = MISSING  # a video, a folder of videos, or a manifest
    out: str | None = None  # where the samples go; none takes EXPERIMENT/samples/TIME
    duration: float | None = None  # seconds to generate; none takes the whole video
    start: float = 0.0  # seconds into the video
    samples_per_video: int = 1  # different sounds for each video
    batch_size: int = 8  # sounds generated at once
    guidance: float = 3.0  # guidance scale; 1 switches it off
    sampler: Any = MISSING  # rule from logits to a token
    window: float | None = None  # seconds generated at once; none takes what the experiment was trained on
    stride: float | None = None  # seconds between windows; none takes half a window
    seed: int = 0  # of the sampler
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    prompt: str | None = None  # an audio file to continue
    overridden_hparams: dict[str, Any] = field(default_factory=dict)  # merged over the experiment's config


@dataclass
class EvaluateRun:
    action: str = "evaluate"
    name: str = "evaluate"  # the run's folder is logs/NAME/TIME
    samples: str = MISSING  # the folder of generated samples
    originals: str = MISSING  # the folder, or the manifest, of the videos with their own sound
    out: str | None = None  # the file of the metrics; none writes metrics.json beside the samples
    threshold: float = 0.15  # of an onset, share of 20 dB
    tolerance: float = 0.05  # seconds between an onset and its truth


SCHEMAS: dict[str, type] = {
    "train": TrainRun,
    "quickstart": QuickstartRun,
    "generate": GenerateRun,
    "evaluate": EvaluateRun,
}
for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(group="schema", name=_name, node=_schema, package="_global_", provider="vaura")


# --- the command line ---


@dataclass(frozen=True)
class Command:
    """A command line in Hydra's terms: `name` is looked up in `folder`, the rest are Hydra's own arguments."""

    path: Path
    folder: Path
    name: str
    arguments: list[str]
    configs: Path

    @property
    def overrides(self) -> list[str]:
        return [argument for argument in self.arguments if not argument.startswith("-")]


def run(argv: Sequence[str], configs: Path = CONFIGS) -> int:
    """Run a command line; returns its exit status: 0 done, 2 refused in one sentence on stderr, 130 interrupted.

    A defect of ours leaves as the exception it is.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra raise what it would print
    _chosen.clear()
    try:
        if {"-h", "--help"} & set(argv) and not any(word.startswith("config=") for word in argv):
            print(f"usage: python main.py config=PATH [key=value ...] [--cfg job] [--multirun]\n{list_configs(configs)}")
            return 0
        _launch(translate(argv, configs))
    except InputError as error:
        return _refuse(error)
    except KeyboardInterrupt as stop:
        return _interrupted(str(stop))
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's answer to Ctrl-C
            return _interrupted()
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _refuse(error: InputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _interrupted(hint: str = "") -> int:
    folder = next(reversed(_chosen.values()), None)
    hint = f"the same command resumes in {folder}" if folder else hint
    print("interrupted" + (f"; {hint}" if hint else ""), file=sys.stderr)
    return 130


def translate(argv: Sequence[str], configs: Path = CONFIGS) -> Command:
    """`config=PATH` and published spellings -> Hydra's terms.

    Raises InputError where there is no `config=` or no such file.
    """
    given = [word.partition("=")[2] for word in argv if word.startswith("config=")]
    if not given:
        raise InputError(f"say which config to run: python main.py config=PATH\n{list_configs(configs)}")
    path, configs = find_config(given[-1], configs), configs.resolve()
    arguments = [respell(word) for word in argv if not word.startswith("config=")]
    arguments.sort(key=lambda word: "=" in word and not word.startswith("-"))  # argparse wants the overrides in one piece
    if path.is_relative_to(configs):
        folder, name = configs, path.relative_to(configs).with_suffix("").as_posix()
        if "/" in name and not path.read_text().startswith("# @package _global_"):
            raise InputError(
                f"{path} needs '# @package _global_' as its first line, because it lies in a subfolder of {configs}"
            )
    else:
        folder, name = path.parent, path.stem
        arguments.append(f'hydra.searchpath=["file://{configs}"]')
    if _is_follower():
        arguments.append("hydra.output_subdir=null")  # rank 0 keeps the records of the run
    return Command(path, folder, name, arguments, configs)


def _is_follower() -> bool:
    """Whether torchrun or SLURM started this process as a rank other than 0."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) > 0


def find_config(given: str, configs: Path = CONFIGS) -> Path:
    """The absolute path of `given`: relative to the working folder, the repository or configs/, with or without `.yaml`.

    Raises InputError naming the nearest.
    """
    for folder in (Path.cwd(), configs.parent, configs):
        for suffix in ("", ".yaml"):
            path = folder / (os.path.expanduser(given) + suffix)
            if path.is_file():
                return path.resolve()
    beside = (Path.cwd() / given).parent.glob("*.yaml")
    existing = [_shown(path) for path in (*beside, *runnable(configs))]
    names = {Path(path).name: path for path in existing}
    by_name = [f" Did you mean '{names[name]}'?" for name in difflib.get_close_matches(Path(given).name, names, n=1)]
    raise InputError(f"there is no config '{given}'." + (nearest(given, existing) or "".join(by_name)))


def runnable(configs: Path = CONFIGS) -> list[Path]:
    """The configs that can be given as `config=`: those at the top, and all below experiments/."""
    top = [path for path in sorted(configs.glob("*.yaml")) if path.stem != "house"]
    return top + sorted(configs.glob("experiments/**/*.yaml"))


def list_configs(configs: Path = CONFIGS) -> str:
    """One line per runnable config: its path and its first comment."""
    paths = {_shown(path): path for path in runnable(configs)}
    width = max(map(len, paths), default=0)
    return "\n".join(f"  config={shown:<{width}}  {_first_comment(path)}".rstrip() for shown, path in paths.items())


def _first_comment(path: Path) -> str:
    lines = (line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((line for line in lines if line and not line.startswith("@package")), "")


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def respell(argument: str) -> str:
    """One argument with the house's word for a published key.

    >>> respell("dataloader.batch_size=4"), respell("overridden_hparams.a.b=1"), respell("--cfg")
    ('data.batch_size=4', '++overridden_hparams.a.b=1', '--cfg')
    """
    match = re.fullmatch(r"(\+\+|\+|~)?([\w.]+)(=.*)?", argument, re.DOTALL)
    if match is None:
        return argument
    mark, key, value = (part or "" for part in match.groups())
    for published, ours in SPELLINGS.items():
        if key == published or key.startswith(f"{published}."):
            key = ours + key.removeprefix(published)
            break
    if key.startswith(tuple(f"{tree}." for tree in FREE)) and mark != "~":
        mark = "++"
    return mark + key + value


def compose(config: str | Path, overrides: Sequence[str] = (), configs: Path = CONFIGS) -> DictConfig:
    """The config that `python main.py config=CONFIG OVERRIDES` hands to its verb, without running it."""
    command = translate([f"config={config}", *overrides], configs)
    try:
        return _compose(command, command.overrides)
    except REFUSED as error:
        raise InputError(explain(error, command)) from error


def _compose(command: Command, overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(command.folder), version_base="1.3"):
        return hydra.compose(command.name, overrides)


def _launch(command: Command) -> None:
    started, argv = False, sys.argv

    def task(cfg: DictConfig) -> None:
        nonlocal started
        # Lightning starts sys.argv once more for each further device: it finds the command, or this one job of a sweep
        sys.argv = [argv[0], f"config={command.path}", *_task_overrides()] if _is_sweep() else argv
        try:
            check_run(cfg, command)
            started = True
            find_verb(cfg.action)(cfg)
        except InputError as error:
            if not started:
                _forget_run()
            sys.exit(_refuse(error))  # an exception would make Hydra print a line of its own first

    sys.argv = [argv[0], *command.arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(command.folder), config_name=command.name)(task)()
    except REFUSED as error:
        if started or isinstance(error, BrokenPipeError):
            raise
        raise InputError(explain(error, command)) from error
    finally:
        sys.argv = argv


def _task_overrides() -> list[str]:
    overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return list(map(str, overrides or ()))


def _is_sweep() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def find_verb(action: str) -> Callable[[DictConfig], None]:
    module, _, name = VERBS[action].partition(":")
    return getattr(importlib.import_module(module), name)


# --- the experiment folder ---


def run_dir() -> Path:
    """The experiment folder of the present run, the same in all its processes."""
    return Path(HydraConfig.get().runtime.output_dir)


def _forget_run() -> None:
    """Remove the folder Hydra made for a run that never began."""
    if [path.name for path in run_dir().iterdir()] == [".hydra"]:
        shutil.rmtree(run_dir())


_chosen: dict[str, str] = {}


def resumed_or(otherwise: str, *, _root_: DictConfig) -> str:
    """`${resumed_or:OTHERWISE}`: the experiment that the checkpoint `resume` lies in, else the folder `otherwise`."""
    return _resumed(_root_) or otherwise


def _resumed(root: DictConfig) -> str:
    """EXPERIMENT of `resume=EXPERIMENT/checkpoints/FILE` or `EXPERIMENT/FILE`, or ""."""
    checkpoint = OmegaConf.select(root, "resume", default=None)
    folders = (Path(checkpoint).parent, Path(checkpoint).parent.parent) if checkpoint else ()
    return next((str(folder) for folder in folders if (folder / "config.yaml").is_file()), "")


def resume_or_new(parent: str, *, _root_: DictConfig) -> str:
    """`${resume_or_new:PARENT}`: the newest unfinished folder below `parent` made by this same command, or a new one.

    The same command: equal config name, overrides and composed config. A folder holding a file `finished` is left alone, and
    the experiment of the checkpoint `resume`, where one is given, comes first.
    """
    if resumed := _resumed(_root_):
        return resumed
    if parent not in _chosen:
        same = [folder for folder in sorted(Path(parent).glob("*")) if _is_same_run(folder / ".hydra", _root_)]
        unfinished = [folder for folder in same if not (folder / "finished").exists()]
        _chosen[parent] = str(unfinished[-1] if unfinished else _new_folder(Path(parent)))
    return _chosen[parent]


def _is_same_run(record: Path, root: DictConfig) -> bool:
    if not (record / "hydra.yaml").is_file():
        return False
    then = OmegaConf.load(record / "hydra.yaml").hydra
    present = OmegaConf.masked_copy(root, [str(key) for key in root if key != "hydra"])
    return (
        then.job.config_name == root.hydra.job.config_name
        and (record / "overrides.yaml").read_text() == OmegaConf.to_yaml(root.hydra.overrides.task)
        and (record / "config.yaml").read_text() == OmegaConf.to_yaml(present)
    )


def _new_folder(parent: Path) -> Path:
    folder = first = parent / start_time()
    number = 1
    while folder.exists() and not _launcher():
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return folder


def start_time() -> str:
    """`${start_time:}`: when the run began, as a folder's name; one name for all processes that a launcher started."""
    return _launcher() or _NOW.strftime("%Y-%m-%dT%H-%M-%S")


def _launcher() -> str:
    """A name that the processes of one SLURM job or one torchrun share, or ""."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"job-{job}"
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if run != "none":
        return run and f"run-{run}"
    agent = Path(f"/proc/{os.getppid()}/stat")
    if not agent.is_file():
        raise InputError("torchrun names no run for its processes to share a folder by; add --standalone or --rdzv-id")
    return f"run-{os.getppid()}-{agent.read_text().rpartition(')')[2].split()[19]}"  # process id and its start time


_NOW = datetime.now()
OmegaConf.register_new_resolver("start_time", start_time, replace=True)
OmegaConf.register_new_resolver("resumed_or", resumed_or, replace=True)
OmegaConf.register_new_resolver("resume_or_new", resume_or_new, replace=True)


def save_config(cfg: DictConfig, path: str | Path) -> None:
    """Write the config of a run so that `config=PATH` runs it again: unresolved, hence overrides still reach everything."""
    schema = next(name for name, kind in SCHEMAS.items() if OmegaConf.get_type(cfg) is kind)
    header = OmegaConf.to_yaml(OmegaConf.create({"defaults": [{"schema": schema}, "house", "_self_"]}))
    with write_aside(path) as aside:
        aside.write_text(f"# python main.py config={path}\n{header}{OmegaConf.to_yaml(cfg)}")


def load_config(path: str | Path) -> DictConfig:
    """The config that `save_config` wrote."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no config {path}; an experiment's folder holds one")
    try:
        cfg = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        raise InputError(_yaml_sentence(error)) from error
    if not isinstance(cfg, DictConfig):
        raise InputError(f"{path} is no config: it holds a list, not keys and values")
    cfg.pop("defaults", None)
    return cfg


def merge(cfg: DictConfig, changes: Any, where: str) -> DictConfig:
    """`cfg` with `changes` over it, in memory. Raises InputError at a key that `cfg` lacks, naming the nearest."""
    known = known_keys(cfg)
    OmegaConf.set_struct(cfg, True)
    try:
        merged = OmegaConf.merge(cfg, changes)
    except OmegaConfBaseException as error:
        raise InputError(f"{where}: {_omegaconf_sentence(error, str(error.full_key or ''), known)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def instantiate(node: Any, **supplied: Any) -> Any:
    """Build the component that `node` describes. Raises the constructor's own InputError, not Hydra's wrapping of it."""
    try:
        return hydra.utils.instantiate(node, **supplied)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        raise cause or error from error


# --- what can be wrong with a run ---

REFUSED = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError)


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
            raise InputError(_unknown(str(key), known))
    if cfg.action not in VERBS:
        raise InputError(f"unknown action '{cfg.action}'; there are {', '.join(VERBS)}." + nearest(cfg.action, VERBS))
    missing, every = [], known_keys(cfg)
    for key in every:
        try:
            OmegaConf.select(cfg, key, throw_on_missing=True)
        except (MissingMandatoryValue, InterpolationToMissingValueError) as error:
            missing += [key] if isinstance(error, MissingMandatoryValue) else []
        except OmegaConfBaseException as error:
            raise InputError(_omegaconf_sentence(error, key, every)) from error
    if missing:
        raise InputError(_missing(missing, schema, command))
    if cfg.get("resume") and not Path(cfg.resume).is_file():
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
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"'{error.override}' is no override; write {error.override}=VALUE"
        said = [line for line in error.message.splitlines() if not line.startswith(("Error parsing override", "See https"))]
        return f"cannot read '{error.override}': {' '.join(said)}; quote the value, as 'key=\"value\"'"
    if isinstance(error, yaml.MarkedYAMLError):
        return _yaml_sentence(error)
    if isinstance(error, OSError):
        return f"cannot write {error.filename}: {error.strerror}; hydra.run.dir=FOLDER chooses another folder"
    several = re.match(r"Ambiguous value for argument '((.+?)=(.+))'", str(error))
    if several:
        return (
            f"'{several[1]}' gives several values; write {several[2]}=[{several[3]}] for a list, or add --multirun to run each"
        )
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
    sentence = _omegaconf_sentence(cause, override[1] if override else cause.full_key or "", _keys_before(command))
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


def _missing_option(error: MissingConfigException) -> str:
    wanted = error.missing_cfg_file or ""
    group, _, option = wanted.rpartition("/")
    if not error.options:
        return f"there is no config '{wanted}.yaml', named in a defaults list"
    return f"there is no {group} '{option}'; there are {', '.join(error.options)}." + nearest(option, error.options)


def _yaml_sentence(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{mark.name}, line {mark.line + 1}" if mark else "a config"
    return f"{where} is not YAML: {error.problem or error.context}"


def _omegaconf_sentence(error: OmegaConfBaseException, key: str, known: Collection[str]) -> str:
    first = str(error).splitlines()[0]
    if converted := re.match(r"Value (.+) of type '.+' could not be converted to (\w+)", first):
        return _wrong_type(key, WANTED.get(converted[2], converted[2]), converted[1])
    if first.endswith("is not Optional"):
        return f"{key} takes a value, not null"
    if dangling := re.match(r"Interpolation key '(.+)' not found", first):
        return f"{key} refers to ${{{dangling[1]}}}, which does not exist." + nearest(dangling[1], known)
    if re.match(r"Key '.+' (is not in struct|not in)", first):
        return _unknown(key, known)
    return f"{key}: {first}"


def _unknown(key: str, known: Collection[str]) -> str:
    last = {word.rpartition(".")[2]: word for word in known}
    by_last = difflib.get_close_matches(key.rpartition(".")[2], last, n=1, cutoff=0.8)
    near = nearest(key, known) or "".join(f" Did you mean '{last[name]}'?" for name in by_last)
    near = near or f" --cfg {'hydra' if key.startswith('hydra.') else 'job'} shows every key."
    return f"unknown key '{key}'.{near}"


WANTED = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "text", "Path": "a path"}


def _wrong_type(key: str, wanted: str, value: str) -> str:
    return f"{key} takes {wanted}, not {value}"


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


# --- components: the constructor is the schema ---

HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


def check_components(
    cfg: DictConfig | ListConfig,
    *,
    complete: bool = True,
    supplied: Mapping[str, Collection[str]] = SUPPLIED,
) -> None:
    """Bind every node with `_target_` to the signature of its constructor, building nothing.

    Raises InputError for a target that does not exist and an unknown key; in a `complete` config also for a missing parameter
    (unless `_partial_`, or in `supplied`: dotted key of a node -> parameters code gives) and a plain value of the wrong type.
    """
    for key, node in _components(cfg, ""):
        target = _locate(str(node["_target_"]), f"{key}._target_".lstrip("."))
        named = _check_keys(node, key, target)
        if complete:
            _check_required(node, key, named, supplied.get(key, ()))
            _check_types(node, key, target)


def _components(node: Any, key: str) -> Iterator[tuple[str, DictConfig]]:
    names = _names(node)
    if "_target_" in names:
        yield key, node
    for name in names:
        # a reference to a node elsewhere is bound there
        if not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
            yield from _components(node[name], f"{key}.{name}".lstrip("."))


def _names(node: Any) -> list[Any]:
    """The keys of a node: words, or positions in a list."""
    return list(node) if isinstance(node, DictConfig) else list(range(len(node))) if isinstance(node, ListConfig) else []


def _locate(target: str, key: str) -> Any:
    """The class or function of a dotted path. Raises InputError where there is none."""
    parts = target.split(".")
    found: Any = None
    for depth, part in enumerate(parts):
        path = ".".join(parts[: depth + 1])
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            found = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise  # the module is there, but something it needs is not
            known = [f"{'.'.join(parts[:depth])}.{name}" for name in _members(found)]
            raise InputError(f"{key} is '{target}', which does not exist: no '{path}'." + nearest(path, known)) from error
    return found


def _members(found: Any) -> list[str]:
    modules = [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))]
    return modules + [name for name in dir(found) if not name.startswith("_")]


def _check_keys(node: DictConfig, key: str, target: Any) -> dict[str, inspect.Parameter]:
    """The parameters of `target` that have a name, after checking that the node has no other key."""
    parameters = inspect.signature(target).parameters.values()
    named = {spec.name: spec for spec in parameters if spec.kind in (spec.POSITIONAL_OR_KEYWORD, spec.KEYWORD_ONLY)}
    if not any(spec.kind is spec.VAR_KEYWORD for spec in parameters):
        for name in node:
            if name not in HYDRA_KEYS and name not in named:
                raise InputError(_unknown_parameter(key, str(name), named))
    return named


def _check_required(node: DictConfig, key: str, named: dict[str, inspect.Parameter], supplied: Collection[str]) -> None:
    if node.get("_partial_", False):
        return
    known = {*node, *supplied, *list(named)[: len(node.get("_args_", ()))]}
    for name, spec in named.items():
        if spec.default is spec.empty and name not in known:
            raise InputError(f"{key} lacks '{name}', which {node['_target_']} needs; add {_join(key, name)}=VALUE")


def _unknown_parameter(key: str, name: str, named: Collection[str]) -> str:
    known = [_join(key, parameter) for parameter in named]
    near = nearest(_join(key, name), known) if nearest(name, named) else f" It takes {', '.join(named) or 'none'}."
    return f"unknown key '{_join(key, name)}'.{near}"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _check_types(node: DictConfig, key: str, target: Any) -> None:
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # names imported for type checkers only
        return
    for name in set(hints) & {str(name) for name in node}:
        kinds = _plain_kinds(hints[name])
        value = _value(node, name, _join(key, name))
        if kinds and not any(_fits(value, kind) for kind in kinds):
            wanted = " or ".join(PLAIN.get(kind, "null") for kind in kinds)
            raise InputError(_wrong_type(_join(key, name), wanted, f"'{value}'"))


def _value(node: DictConfig, name: str, key: str) -> Any:
    """The value of a key; MISSING where it is not known before the run starts."""
    try:
        return MISSING if OmegaConf.is_missing(node, name) else node[name]
    except OmegaConfBaseException as error:
        if isinstance(error, InterpolationToMissingValueError) or "HydraConfig" in str(error):
            return MISSING
        raise InputError(_omegaconf_sentence(error, key, ())) from error


def _plain_kinds(hint: Any) -> list[type]:
    """The plain types a hint admits, [] where it admits anything else."""
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    return kinds if all(kind in PLAIN or kind is type(None) for kind in kinds) else []


def _fits(value: Any, kind: type) -> bool:
    if value is None or isinstance(value, bool):
        return kind is type(value)
    return value == MISSING or isinstance(value, (int, float) if kind is float else kind)
