"""A component is any node with `_target_`; its schema is its constructor."""

from __future__ import annotations

import importlib
import inspect
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
    "data": {"fps", "size", "sample_rate", "channels"},
    "contrast.task": {"encoder", "sample_rate"},
}

HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


def instantiate(node: Any, **supplied: Any) -> Any:
    """Build the component that `node` describes. Raises the constructor's own InputError, not Hydra's wrapping of it."""
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
