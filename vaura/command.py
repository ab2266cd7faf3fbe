"""The words of a command line, in Hydra's terms.

`python main.py config=PATH key=value ...` is Hydra's command line with one word more: `config=PATH` says where to look, and the
published spellings of keys are heard as the house's own.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vaura.errors import InputError, nearest

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

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
    if is_follower():
        arguments.append("hydra.output_subdir=null")  # rank 0 keeps the records of the run
    return Command(path, folder, name, arguments, configs)


def is_follower() -> bool:
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
