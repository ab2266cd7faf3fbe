"""The folder of a run: what it is called, whether it goes on with an older one, and who shares it.

The three words that a config's `hydra.run.dir` can use are resolvers, registered at the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vaura.errors import InputError


def run_dir() -> Path:
    """The experiment folder of the present run, the same in all its processes."""
    return Path(HydraConfig.get().runtime.output_dir)


_chosen: dict[str, str] = {}  # parent -> the folder below it in which the same command resumes
_new: set[Path] = set()  # folders that were not there when they were named


def begin(arguments: Sequence[str]) -> None:
    """A command line begins: no folder is named yet but the one it names itself."""
    _chosen.clear()
    _new.clear()
    for word in arguments:
        if word.startswith("hydra.run.dir="):
            _named(word.partition("=")[2])


def forget() -> None:
    """Remove the folder of a run that never began, where it was made for this run and holds nothing but Hydra's records."""
    folder = run_dir()
    if folder.resolve() in _new and [path.name for path in folder.iterdir()] == [".hydra"]:
        shutil.rmtree(folder)


def resumable() -> str:
    """The folder in which the same command resumes, or ""."""
    return next(reversed(_chosen.values()), "")


def _named(folder: str) -> str:
    if not Path(folder).exists():
        _new.add(Path(folder).resolve())
    return folder


def resumed_or(otherwise: str, *, _root_: DictConfig) -> str:
    """`${resumed_or:OTHERWISE}`: the experiment that the checkpoint `resume` lies in, else the folder `otherwise`."""
    return _resumed(_root_) or _named(otherwise)


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
        _chosen[parent] = _named(str(unfinished[-1] if unfinished else _new_folder(Path(parent))))
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
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:  # a job may hold several runs, each a step
        return f"job-{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_STEP_ID', '0')}"
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
