"""Run a command line: compose its config, hand that to its verb, and leave with an exit status.

Nothing before the verb imports torch, so that a mistyped key is answered at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vaura import run_folder
from vaura.command import CONFIGS, Command, is_follower, list_configs, translate
from vaura.config import VERBS, check_run, explain
from vaura.errors import InputError
from vaura.refusals import REFUSED


def run(argv: Sequence[str], configs: Path = CONFIGS) -> int:
    """Run a command line; returns its exit status: 0 done, 2 refused in one sentence on stderr, 130 interrupted.

    A defect of ours leaves as the exception it is.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra raise what it would print
    try:
        if {"-h", "--help"} & set(argv) and not any(word.startswith("config=") for word in argv):
            print(f"usage: python main.py config=PATH [key=value ...] [--cfg job] [--multirun]\n{list_configs(configs)}")
            return 0
        command = translate(argv, configs)
        run_folder.begin(command.arguments)
        _launch(command)
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
    if is_follower():
        return 130  # a terminal stops all processes of a run at once, and one tells of it
    if folder := run_folder.resumable():
        hint = f"the same command resumes in {folder}"
    print("interrupted" + (f"; {hint}" if hint else ""), file=sys.stderr)
    return 130


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
                run_folder.forget()
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
