"""The rules of the house that a program can check: rooms, names, no pickle, a listed surface."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gossamer

SRC = Path(__file__).parent.parent / "src" / "gossamer"

# From the top of the house to its ground; a room imports only rooms that stand after it in this list.
ROOMS = [
    *("cli", "api", "report", "plan", "techniques", "train", "runtimes", "measure"),
    *("tasks", "data", "models", "run", "recipe", "judgement", "goal", "errors"),
]

FILES = sorted(path for path in SRC.rglob("*.py"))
MODULES = {path.relative_to(SRC).with_suffix("").as_posix(): path for path in FILES}
VAGUE_NAMES = {"utils", "helpers", "common", "misc", "tools", "util", "helper"}


def is_type_checking(node: ast.AST) -> bool:
    """Tell whether a node is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_at_run_time(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything that a file imports when it runs, inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            assert isinstance(node, ast.If)
            for branch in node.orelse:
                yield from imports_at_run_time(ast.Module([branch], []))
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; the house writes them in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        yield from imports_at_run_time(node)


def room_of(module: str) -> str | None:
    """Return the room that a dotted name of ours lies in; None for names outside and for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "gossamer" and len(parts) > 1 and parts[1] in ROOMS else None


def upward_imports(room: str, source: str) -> list[str]:
    """Return `line N: name` of each import in `source` that goes up the house from `room`."""
    found = imports_at_run_time(ast.parse(source))
    rooms = ((line, name, room_of(name)) for line, name in found)
    return [
        f"line {line}: {name}"
        for line, name, other in rooms
        if other is not None and ROOMS.index(other) < ROOMS.index(room)
    ]


def test_there_is_a_house() -> None:
    assert len(FILES) > 10


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__", "__main__"}))
def test_a_file_stands_in_a_known_room(module: str) -> None:
    assert module.split("/")[0] in ROOMS


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__", "__main__"}))
def test_rooms_import_only_rooms_below_them(module: str) -> None:
    assert upward_imports(module.split("/")[0], MODULES[module].read_text(encoding="utf-8")) == []


def test_an_upward_import_would_be_seen() -> None:
    source = "def f():\n    from gossamer.plan import search\nif TYPE_CHECKING:\n    import gossamer.cli\n"
    assert upward_imports("measure", source) == ["line 2: gossamer.plan.search"]
    assert upward_imports("cli", source) == []
    assert upward_imports("measure", "from gossamer import runtimes") == ["line 1: gossamer.runtimes"]


@pytest.mark.parametrize("module", MODULES)
def test_no_file_has_a_vague_name(module: str) -> None:
    assert not VAGUE_NAMES & set(module.split("/"))


@pytest.mark.parametrize("module", MODULES)
def test_folders_are_at_most_three_deep(module: str) -> None:
    assert module.count("/") <= 2


def pickle_uses(source: str) -> list[str]:
    """Return `line N: what` of each way to read a pickle: its modules, torch.load without weights_only, numpy."""
    tree = ast.parse(source)
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = [f"line {line}: {name}" for line, name in imports_at_run_time(tree) if name.split(".")[0] in banned]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        settings = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called == "torch.load" and settings.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if settings.get("allow_pickle") == "True":
            found.append(f"line {node.lineno}: allow_pickle=True")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_pickle_is_read(module: str) -> None:
    assert pickle_uses(MODULES[module].read_text(encoding="utf-8")) == []


def test_a_pickle_would_be_seen() -> None:
    source = "import pickle\ntorch.load(path)\nnp.load(path, allow_pickle=True)\ntorch.load(path, weights_only=True)\n"
    assert [use.split(":")[0] for use in pickle_uses(source)] == ["line 1", "line 2", "line 3"]


@pytest.mark.skipif("api" not in MODULES, reason="the verbs are not there yet")
def test_the_public_surface_is_listed_and_there() -> None:
    assert sorted(gossamer.__all__) == list(gossamer.__all__), "gossamer.__all__ is sorted"
    assert len(set(gossamer.__all__)) == len(gossamer.__all__)
    assert [name for name in gossamer.__all__ if not hasattr(gossamer, name)] == []


@pytest.mark.skipif("api" not in MODULES, reason="the verbs are not there yet")
def test_every_public_name_says_what_it_does() -> None:
    silent = [
        name
        for name in gossamer.__all__
        if name != "__version__" and not (getattr(gossamer, name).__doc__ or "").strip()
    ]
    assert silent == []


def test_the_package_tells_type_checkers_that_it_is_typed() -> None:
    assert (SRC / "py.typed").exists()
