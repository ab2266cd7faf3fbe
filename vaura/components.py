"""A component is any node with `_target_`; its schema is its constructor.

A config may come from a stranger, and whatever a `_target_` names is run. Hence only the classes of `TARGETS` can be named, and
what a person allows beyond them: the packages listed in the environment variable VAURA_TARGETS.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import hydra
from hydra.errors import InstantiationException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from vaura.errors import InputError, nearest
from vaura.refusals import omegaconf_sentence, wrong_type

# Parameters that a verb passes to a component itself: dotted key of the node -> names. Everything else stands in the config.
SUPPLIED: dict[str, set[str]] = {
    "data": {"fps", "size", "resize", "sample_rate", "channels"},
    "contrast.task": {"encoder", "sample_rate"},
}

# Modules whose classes a `_target_` may name. Wide ones, all of lightning or torch, hold classes that run or unpickle anything.
TARGETS = (
    *(f"vaura.{room}" for room in ("conditioner", "data", "encoder", "lm", "media", "metric", "task", "tokenizer", "vocoder")),
    *("lightning.Trainer", "lightning.pytorch.Trainer"),
    *(f"lightning.pytorch.{part}" for part in ("accelerators", "callbacks", "loggers", "plugins", "profilers", "strategies")),
    *("torch.nn", "torch.optim"),
)
FUNCTIONS = ("vaura.data.corpus",)  # modules of which functions may be named too
OWN = "VAURA_TARGETS"  # environment variable: further packages, separated by commas; not a key, or a config could allow itself

HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


def instantiate(node: Any, **supplied: Any) -> Any:
    """Build the component that `node` describes.

    Raises InputError for a target that may not be named, before anything is built; and the constructor's own InputError, not
    Hydra's wrapping of it.
    """
    for key, target in _targets(node, ""):
        _locate(target, key)
    try:
        return hydra.utils.instantiate(node, **supplied)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from error


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


def _targets(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Key and value of every `_target_` that Hydra will follow from `node`, by references too."""
    for name in _names(node):
        if OmegaConf.is_config(node) and OmegaConf.is_missing(node, name):
            continue
        path = _join(key, str(name))
        if name == "_target_":
            yield path, str(node[name])
        else:
            yield from _targets(node[name], path)


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
    if isinstance(node, DictConfig | dict):
        return list(node)
    return list(range(len(node))) if isinstance(node, ListConfig | list | tuple) else []


def _locate(target: str, key: str) -> Any:
    """The class or function of a dotted path. Raises InputError where there is none, or none that may be named."""
    own = [name.strip() for name in os.environ.get(OWN, "").split(",") if name.strip()]
    if not _below(target, (*TARGETS, *own)):  # asked first: to import a module is to run it
        raise _forbidden(target, key)
    parts = target.split(".")
    found: Any = None
    for depth, part in enumerate(parts):
        path = ".".join(parts[: depth + 1])
        if hasattr(found, part):
            found = getattr(found, part)
            if inspect.ismodule(found) and found.__name__ != path:  # another module that this one imports
                raise _forbidden(target, key)
            continue
        try:
            found = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise  # the module is there, but something it needs is not
            known = [f"{'.'.join(parts[:depth])}.{name}" for name in _members(found)]
            raise InputError(f"{key} is '{target}', which does not exist: no '{path}'." + nearest(path, known)) from error
    home = str(getattr(found, "__module__", ""))
    kind = callable(found) if _below(target, (*FUNCTIONS, *own)) else inspect.isclass(found)
    if not kind or home.split(".")[0] != parts[0]:  # a class that a module imports from elsewhere is not its own
        raise _forbidden(target, key)
    return found


def _below(target: str, names: Collection[str]) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in names)


def _forbidden(target: str, key: str) -> InputError:
    return InputError(
        f"{key} is '{target}', which a config cannot run: it can name classes of vaura's parts, torch.nn and torch.optim, "
        "and Lightning's Trainer and callbacks; if you know and trust this one, "
        f"list its package in the environment variable {OWN}"
    )


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
            raise InputError(wrong_type(_join(key, name), wanted, f"'{value}'"))


def _value(node: DictConfig, name: str, key: str) -> Any:
    """The value of a key; MISSING where it is not known before the run starts."""
    try:
        return MISSING if OmegaConf.is_missing(node, name) else node[name]
    except OmegaConfBaseException as error:
        if isinstance(error, InterpolationToMissingValueError) or "HydraConfig" in str(error):
            return MISSING
        raise InputError(omegaconf_sentence(error, key, ())) from error


def _plain_kinds(hint: Any) -> list[type]:
    """The plain types a hint admits, [] where it admits anything else."""
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    return kinds if all(kind in PLAIN or kind is type(None) for kind in kinds) else []


def _fits(value: Any, kind: type) -> bool:
    if value is None or isinstance(value, bool):
        return kind is type(value)
    return value == MISSING or isinstance(value, (int, float) if kind is float else kind)
