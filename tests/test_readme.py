"""What the README says is so: its commands compose, its Python fits the house, its map is the territory."""

import inspect
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

import vaura
from vaura.command import SPELLINGS, find_config, runnable, translate
from vaura.components import check_components
from vaura.config import check_run, compose, save_config
from vaura.data.manifest import Clip
from vaura.data.sound import Sound
from vaura.drawing import How, VideoToAudio
from vaura.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [line for language, block in BLOCKS if not language for line in block.splitlines()]
INLINE = re.findall(r"`([^`\n]+)`", README)

TREE = next(block for _, block in BLOCKS if block.startswith("main.py "))
COMMANDS = [line[line.index("main.py") + len("main.py") :].strip() for line in LINES if re.match(r".*\bmain\.py config=", line)]
INSTALLS = [text for text in LINES + INLINE if text.startswith("pip install -e")]


def arguments(command: str) -> list[str]:
    """The words behind main.py that name the config and change it; of a sweep, its first job."""
    words = shlex.split(command)
    if "--cfg" in words:
        del words[words.index("--cfg") : words.index("--cfg") + 2]
    if "--multirun" in words:
        words.remove("--multirun")
        words = [word.partition(",")[0] for word in words]
    return words


def compose_checked(words: list[str]) -> None:
    """Compose a command as `main.py` does and check everything that can be checked without running it."""
    name, *overrides = [word.removeprefix("config=") for word in sorted(words, key=lambda word: not word.startswith("config="))]
    cfg = compose(name, overrides)
    check_run(cfg, translate(words))
    check_components(cfg)


@pytest.fixture
def experiment(tmp_path) -> Path:
    """The folder of an experiment, as far as the command line reads it."""
    save_config(compose("train", ["data.data_dir=videos"]), tmp_path / "config.yaml")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    return tmp_path


def test_the_first_two_commands():
    first, second = [block for language, block in BLOCKS if not language][:2]
    assert first == "pip install -e . && python main.py config=configs/quickstart.yaml\n"
    assert second == 'pip install -e ".[test]" && pytest -m "not slow" -n 2 --dist loadfile\n'


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes(command, experiment):
    compose_checked([word.replace("EXPERIMENT", str(experiment)) for word in arguments(command)])


@pytest.mark.parametrize("wrong", ["lm.dimm=3", "lm=smal", "guidence=2", "tokenizer.bandwidth=6"])
def test_a_wrong_command_would_be_noticed(wrong):
    with pytest.raises(InputError):
        compose_checked(["config=configs/train.yaml", "data.data_dir=FOLDER", wrong])


def test_every_config_that_runs_is_shown():
    shown = {
        find_config(word.removeprefix("config="))
        for command in COMMANDS
        for word in arguments(command)[:1]
        if "EXPERIMENT" not in word
    }
    assert shown == set(runnable())


def test_the_extras_that_are_installed_exist():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set(re.findall(r"\[(\w+)\]", " ".join(INSTALLS)))
    assert named
    assert named <= set(extras)


def test_the_published_spellings():
    rows = re.findall(
        r"^\| (`.*`) \| (`.*`) \|$", README.partition("| published | here |")[2].partition("\n\n")[0], re.MULTILINE
    )
    keys = [[re.sub(r"\.\*$", "", key) for key in re.findall(r"`([^`]+)`", cell)] for row in rows for cell in row]
    told = {old: new for olds, news in zip(keys[::2], keys[1::2], strict=True) for old, new in zip(olds, news, strict=True)}
    assert told == SPELLINGS


def test_the_python_example_fits_the_house(monkeypatch):
    (example,) = [block for language, block in BLOCKS if language == "python"]
    model = create_autospec(VideoToAudio, instance=True)
    model.generate.return_value = Sound(torch.zeros(1, 8), 8, Clip("clip", Path("clip.mp4"), 1.0))
    monkeypatch.setattr(vaura, "load", create_autospec(vaura.load, return_value=model))
    monkeypatch.setattr(Sound, "save", create_autospec(Sound.save))
    exec(compile(example, "the README's example", "exec"), {})
    free = set(model.generate.call_args.kwargs) - set(inspect.signature(VideoToAudio.generate).parameters)
    assert free
    assert free <= {field.name for field in fields(How)}
    Sound.save.assert_called_once()


def paths_of(tree: str) -> list[str]:
    """The paths that an indented tree names, two spaces a level; folders end in "/"."""
    above: list[str] = []
    paths = []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        above[depth:] = [name]
        paths.append("".join(above))
    return paths


def test_the_map_is_the_territory():
    mapped = paths_of(TREE)
    assert len(mapped) == len(set(mapped))
    assert [
        path for path in mapped if not (REPOSITORY / path).exists() or path.endswith("/") != (REPOSITORY / path).is_dir()
    ] == []
    files = [path for room in ("vaura", "configs") for path in (REPOSITORY / room).rglob("*") if path.is_file()]
    there = {path.relative_to(REPOSITORY).as_posix() for path in files if path.suffix != ".pyc"}
    rooms = {path for path in there if re.fullmatch(r"vaura/\w+/__init__\.py", path)}  # the line of the folder stands for it
    assert there - rooms - set(mapped) == set()


def test_what_is_linked_exists():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("https://")]
    headings = {"#" + heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", README, re.MULTILINE)}
    assert [target for target in targets if target not in headings and not (REPOSITORY / target).exists()] == []
    named = re.findall(
        r"\b(?:vaura|tests|configs|scripts|notebooks)/[\w/]*\.\w+|\b\w+\.yaml(?= makes)", " ".join(INLINE + LINES)
    )
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
