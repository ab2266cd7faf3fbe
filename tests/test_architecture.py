"""The house plan, held by machine: which room may import which, how deep it goes, and what is never loaded or caught.

Every rule is a function from a tree to its complaints; each is also shown small wrong trees, so that none is blind.
"""

import ast
import graphlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# A module imports strictly lower floors, or its own room. The ground floor is one room.
FLOORS = {
    0: (
        *("protocols", "timing", "errors", "files", "progress", "seeds"),
        *("launch", "command", "config", "components", "refusals", "run_folder"),  # from a command line to its verb
    ),
    1: ("media", "weights", "checkpoint", "kept", "precision"),
    2: ("tokenizer", "vocoder", "encoder", "conditioner", "lm", "metric", "data"),
    3: ("task", "published"),
    4: ("experiment",),
    5: ("train", "drawing", "evaluate", "prepare", "report"),
    6: ("generate", "train_part", "codec", "quickstart", "finetune", "serve"),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
DRAWERS = {"utils", "util", "misc", "common", "helpers", "helper", "manager", "managers", "base", "factory", "factories"}

ERRORS = {"PickleError", "UnpicklingError"}  # all of pickle that a safe load may need

Tree = dict[str, Path]


def modules(root: Path) -> Tree:
    """Dotted name -> file of every module of the package below `root`."""
    files = sorted((root / "vaura").rglob("*.py"))
    names = [file.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__") for file in files]
    return dict(zip(names, files, strict=True))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def imports(name: str, tree: Tree) -> Iterator[tuple[str, bool]]:
    """(imported module of the package, whether importing `name` leaves it alone) for every import statement of module `name`.

    Left alone are imports inside functions and those for type checkers.
    """
    inside = set()
    syntax = parse(tree[name])
    for node in ast.walk(syntax):
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside |= set(ast.walk(node))
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name if tree[name].name == "__init__.py" else name.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found = [f"{source}.{alias.name}" if f"{source}.{alias.name}" in tree else source for alias in node.names]
        else:
            continue
        yield from ((module, node in inside) for module in found if module.split(".")[0] == "vaura")


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def wrong_floors(root: Path) -> list[str]:
    tree, complaints = modules(root), []
    for name in tree:
        if name != "vaura" and room(name) not in FLOOR_OF:
            complaints.append(f"{name}: the room has no floor")
            continue
        for module, inside in imports(name, tree):
            if name == "vaura":
                allowed = inside
            elif room(module) not in FLOOR_OF:
                allowed = False
            else:
                here, there = FLOOR_OF[room(name)], FLOOR_OF[room(module)]
                allowed = there < here or room(name) == room(module) or here == there == 0
            if not allowed:
                complaints.append(f"{name} imports {module}")
    return complaints


def cycles(root: Path) -> list[str]:
    tree = modules(root)
    graph = {name: {module for module, _ in imports(name, tree) if module != name} for name in tree}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def wrong_names(root: Path) -> list[str]:
    tree = modules(root)
    deep = [f"{name}: deeper than two below vaura" for name in tree if name.count(".") > 2]
    return deep + [f"{name}: a drawer, not a room" for name in tree if set(name.split(".")) & DRAWERS]


def unsafe(root: Path) -> list[str]:
    """Loads that can run code, and handlers that swallow everything, in the package, scripts/ and main.py."""
    files = [*modules(root).values(), *sorted(root.glob("scripts/**/*.py")), *sorted(root.glob("main.py"))]
    return [
        f"{file.relative_to(root)}:{node.lineno}: {complaint}"
        for file in files
        for node in ast.walk(parse(file))
        for complaint in [danger(node)]
        if complaint
    ]


def danger(node: ast.AST) -> str:
    if isinstance(node, ast.Call):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
            return "torch.load without weights_only=True"
        if keywords.get("allow_pickle", "False") != "False":
            return "allow_pickle"
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        if {name.split(".")[0] for name in names} & {"cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}:
            return "pickle"
        if names == ["pickle"] and isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} - ERRORS:
            return "pickle"
        if names == ["torch"] and isinstance(node, ast.ImportFrom) and "load" in [alias.name for alias in node.names]:
            return "torch.load under another name"
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and node.attr not in ERRORS:
        return "pickle"
    if isinstance(node, ast.ExceptHandler):
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        if any(kind is None or ast.unparse(kind) == "BaseException" for kind in kinds):
            return "an except that catches everything"
    return ""


@pytest.mark.parametrize("rule", [wrong_floors, cycles, wrong_names, unsafe])
def test_the_house(rule: Callable[[Path], list[str]]) -> None:
    assert len(modules(REPOSITORY)) > 5
    assert rule(REPOSITORY) == []


WRONG = [
    (wrong_floors, {"vaura/timing.py": "from vaura.media.video import read"}, "vaura.timing imports vaura.media.video"),
    (wrong_floors, {"vaura/lm/llama.py": "def f():\n    import vaura.data.clips"}, "vaura.lm.llama imports vaura.data.clips"),
    (wrong_floors, {"vaura/lm/llama.py": "from ..task import token"}, "vaura.lm.llama imports vaura.task.token"),
    (wrong_floors, {"vaura/train.py": "from vaura.generate import generate"}, "vaura.train imports vaura.generate"),
    (wrong_floors, {"vaura/media/mel.py": "import vaura"}, "vaura.media.mel imports vaura"),
    (wrong_floors, {"vaura/__init__.py": "from vaura.experiment import load"}, "vaura imports vaura.experiment"),
    (wrong_floors, {"vaura/attic.py": ""}, "vaura.attic: the room has no floor"),
    (
        cycles,
        {"vaura/lm/a.py": "from vaura.lm import b", "vaura/lm/b.py": "def f():\n    from .a import x"},
        "vaura.lm.a -> vaura.lm.b -> vaura.lm.a",
    ),
    (wrong_names, {"vaura/lm/deep/er.py": ""}, "vaura.lm.deep.er: deeper than two below vaura"),
    (wrong_names, {"vaura/lm/utils.py": ""}, "vaura.lm.utils: a drawer, not a room"),
    (unsafe, {"vaura/weights.py": "import torch\ntorch.load('x')"}, "vaura/weights.py:2: torch.load without weights_only=True"),
    (unsafe, {"scripts/a.py": "torch.load('x', weights_only=False)"}, "scripts/a.py:1: torch.load without weights_only=True"),
    (unsafe, {"main.py": "from torch import load"}, "main.py:1: torch.load under another name"),
    (unsafe, {"vaura/lm/a.py": "import pickle\ndef f():\n    return pickle.load(g)"}, "vaura/lm/a.py:3: pickle"),
    (unsafe, {"vaura/lm/a.py": "from pickle import UnpicklingError, loads"}, "vaura/lm/a.py:1: pickle"),
    (unsafe, {"vaura/lm/a.py": "def f():\n    import dill"}, "vaura/lm/a.py:2: pickle"),
    (unsafe, {"vaura/lm/a.py": "np.load('x', allow_pickle=True)"}, "vaura/lm/a.py:1: allow_pickle"),
    (unsafe, {"main.py": "try:\n    f()\nexcept:\n    pass"}, "main.py:3: an except that catches everything"),
    (
        unsafe,
        {"main.py": "try:\n    f()\nexcept (A, BaseException):\n    pass"},
        "main.py:3: an except that catches everything",
    ),
]


@pytest.mark.parametrize(("rule", "files", "complaint"), WRONG)
def test_each_rule_can_fail(tmp_path: Path, rule: Callable[[Path], list[str]], files: dict[str, str], complaint: str) -> None:
    sound = {
        "vaura/__init__.py": "def load():\n    from vaura.experiment import load\n    return load",
        "vaura/experiment.py": "from vaura.task.token import x",
        "vaura/task/token.py": "from vaura.errors import y\nfrom vaura.lm.llama import z",
        "vaura/lm/llama.py": "from vaura.lm import pattern",
        "vaura/lm/pattern.py": "import torch\ntorch.load('x', weights_only=True)",
        "vaura/errors.py": "",
    }
    write(tmp_path / "sound", sound)
    write(tmp_path / "wrong", sound | files)
    assert rule(tmp_path / "sound") == []
    assert complaint in rule(tmp_path / "wrong")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
