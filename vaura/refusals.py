"""What Hydra, OmegaConf and YAML refuse, each told in one sentence: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from vaura.errors import nearest

REFUSED = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError)
WANTED = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "text", "Path": "a path"}


def hydra_sentence(error: Exception) -> str:
    """What Hydra says before it looks at any key: of words, files and folders; "" for anything else."""
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"'{error.override}' is no override; write {error.override}=VALUE"
        said = [line for line in error.message.splitlines() if not line.startswith(("Error parsing override", "See https"))]
        return f"cannot read '{error.override}': {' '.join(said)}; quote the value, as 'key=\"value\"'"
    if isinstance(error, yaml.MarkedYAMLError):
        return yaml_sentence(error)
    if isinstance(error, OSError):
        return f"cannot write {error.filename}: {error.strerror}; hydra.run.dir=FOLDER chooses another folder"
    several = re.match(r"Ambiguous value for argument '((.+?)=(.+))'", str(error))
    if several:
        return (
            f"'{several[1]}' gives several values; write {several[2]}=[{several[3]}] for a list, or add --multirun to run each"
        )
    return ""


def _missing_option(error: MissingConfigException) -> str:
    wanted = error.missing_cfg_file or ""
    group, _, option = wanted.rpartition("/")
    if not error.options:
        return f"there is no config '{wanted}.yaml', named in a defaults list"
    return f"there is no {group} '{option}'; there are {', '.join(error.options)}." + nearest(option, error.options)


def yaml_sentence(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{mark.name}, line {mark.line + 1}" if mark else "a config"
    return f"{where} is not YAML: {error.problem or error.context}"


def omegaconf_sentence(error: OmegaConfBaseException, key: str, known: Collection[str]) -> str:
    first = str(error).splitlines()[0]
    if converted := re.match(r"Value (.+) of type '.+' could not be converted to (\w+)", first):
        return wrong_type(key, WANTED.get(converted[2], converted[2]), converted[1])
    if first.endswith("is not Optional"):
        return f"{key} takes a value, not null"
    if dangling := re.match(r"Interpolation key '(.+)' not found", first):
        return f"{key} refers to ${{{dangling[1]}}}, which does not exist." + nearest(dangling[1], known)
    if re.match(r"Key '.+' (is not in struct|not in)", first):
        return unknown_key(key, known)
    return f"{key}: {first}"


def unknown_key(key: str, known: Collection[str]) -> str:
    known = [word for word in known if word != key]  # a choice elsewhere can take away a key that was there
    last = {word.rpartition(".")[2]: word for word in known}
    by_last = difflib.get_close_matches(key.rpartition(".")[2], last, n=1, cutoff=0.8)
    near = nearest(key, known) or "".join(f" Did you mean '{last[name]}'?" for name in by_last)
    near = near or f" --cfg {'hydra' if key.startswith('hydra.') else 'job'} shows every key."
    return f"unknown key '{key}'.{near}"


def wrong_type(key: str, wanted: str, value: str) -> str:
    return f"{key} takes {wanted}, not {value}"
