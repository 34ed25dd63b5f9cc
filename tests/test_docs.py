"""What the documentation says is tried out: recipes parse, commands exist, code runs, links lead somewhere.

A fenced block is marked by its language: `yaml` is a recipe, `bash` is a command line, `python` runs (all blocks of a
page in one module, from top to bottom). `<!-- compile only -->` before a block of Python says that it needs something
that a test does not have; it is compiled. Commands in the running text, between backticks, are held to the same.
"""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from torch import nn

from gossamer.models.candidate import Candidate
from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.models.source import Source
from gossamer.recipe import Recipe
from gossamer.techniques.registry import resolve

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"), *ROOT.glob("recipes/*.md")]
)
FENCE = re.compile(r"(?m)^(?P<before><!-- compile only -->\n+)?```(?P<language>[\w-]*)\n(?P<code>.*?)^```$", re.DOTALL)
COMPILE_ONLY = "<!-- compile only -->"


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text, and whether it may be run."""

    page: Path
    line: int
    language: str
    code: str
    runs: bool = True

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match["language"], match["code"], not match["before"])
        for match in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(language: str) -> list[Block]:
    """Return all blocks in a language."""
    return [block for block in BLOCKS if block.language == language]


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (place, command line) of all that a page tells to type: bash blocks, and `gossamer ...` in the text."""
    for block in blocks(page):
        if block.language == "bash":
            for line in block.code.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield str(block), line.strip()
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for found in re.findall(r"`((?:gossamer|make) [^`]+)`", text):
        yield str(page.relative_to(ROOT)), found


COMMANDS = [found for page in PAGES for found in commands(page)]
OURS = [(place, "gossamer " + line.rpartition("gossamer ")[2] if line.startswith("torchrun ") else line)
        for place, line in COMMANDS if line.startswith(("gossamer ", "torchrun "))]  # fmt: skip


def test_blocks_are_found_and_have_a_known_language() -> None:
    assert {block.language for block in BLOCKS} <= {"bash", "python", "text", "yaml"}
    assert min(len(of(language)) for language in ("bash", "python", "yaml")) >= 2


def test_no_mark_stands_where_it_means_nothing() -> None:
    marks = sum(page.read_text(encoding="utf-8").count(COMPILE_ONLY) for page in PAGES)
    assert marks == sum(not block.runs and block.language == "python" for block in BLOCKS)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_recipes_in_the_text_are_recipes(block: Block) -> None:
    assert resolve(Recipe.from_yaml(block.code, str(block)))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipe_files_are_recipes(path: Path) -> None:
    assert resolve(Recipe.load(path))
    assert path.read_text(encoding="utf-8").startswith("# "), "a recipe says what it is for"
    assert f"]({path.name})" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- commands


def command_group() -> Any:
    """Return the command line as typer's group of commands."""
    module = importlib.import_module("gossamer.cli.main")  # `gossamer.cli.main` itself is the function of that name
    return typer.main.get_command(module.app)


def misuse(group: Any, line: str, *, place_is_text: bool = False) -> str | None:
    """Return what is wrong with a `gossamer ...` command line, or None.

    Options must exist and have their values; what is required must be there, unless a `...` says that some is left
    out, or the running text only names the command.
    """
    words = shlex.split(line)[1:]
    name = words[0]
    if name.startswith("-"):
        command, rest = group, words
    elif name in group.commands:
        command, rest = group.commands[name], words[1:]
    else:
        return f"no command {name!r}; there are {', '.join(group.commands)}"
    context = command.context_class(command, info_name=name)
    try:
        values, extra, _ = command.make_parser(context).parse_args(rest)
    except Exception as error:  # a usage error of the library that typer carries with it, by another name each time
        return str(error)
    if extra not in ([], ["..."]):
        return f"unexpected {extra}"
    if not rest and place_is_text:
        return None
    missing = [p.name for p in command.params if p.required and not given(values.get(p.name))]
    return f"missing {missing}" if missing and "..." not in words else None


def given(value: Any) -> bool:
    """Tell whether a parser found a value: typer marks what was not given by an empty tuple, None or a sentinel."""
    return value is not None and value != () and type(value).__name__ != "Sentinel"


@pytest.mark.parametrize(("place", "line"), OURS)
def test_commands_in_the_text_exist(place: str, line: str) -> None:
    assert misuse(command_group(), line, place_is_text=":" not in place) is None


def test_a_wrong_command_would_be_seen() -> None:
    group = command_group()
    assert misuse(group, "gossamer optimise x") is not None
    assert misuse(group, "gossamer doctor --no-such-option") is not None
    assert misuse(group, "gossamer inspect") is not None
    assert misuse(group, "gossamer inspect ./my-bert") is None


@pytest.mark.parametrize(("place", "line"), [found for found in COMMANDS if found[1].startswith("make ")])
def test_make_targets_in_the_text_exist(place: str, line: str) -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert {word for word in line.split()[1:] if "=" not in word} <= targets


def test_other_commands_are_the_usual_ones() -> None:
    known = {"gossamer", "make", "pip", "source", "npm", "python", "torchrun", "tensorboard"}
    assert {line.split()[0] for _, line in COMMANDS} <= known


def test_the_makefile_runs_commands_that_exist() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ").replace("$(GOAL)", "quality >= 98%")
    lines = [line.partition("$(BIN)/")[2] for line in text.splitlines() if line.startswith("\t$(BIN)/gossamer ")]
    assert lines
    group = command_group()
    assert [problem for line in lines if (problem := misuse(group, line))] == []


# ---------------------------------------------------------------- Python


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))], ids=str)
def test_python_in_the_text_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page, monkeypatch)


def run_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Run the Python of a page as one module and return it; blocks marked so are compiled only."""
    module = ModuleType(f"docs_{page.stem.lower().replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # annotations are looked up there
    for block in blocks(page):
        if block.language == "python":
            code = compile("\n" * block.line + block.code, str(page), "exec")
            if block.runs:
                exec(code, vars(module))  # noqa: S102 - our own pages
    return module


def test_the_technique_in_contributing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = run_page(ROOT / "CONTRIBUTING.md", monkeypatch).Clip(sigmas=1.0)
    network = nn.Sequential(nn.Linear(16, 8))
    weight = network[0].weight.detach().clone()
    layer = LayerInfo(name="0", kind="linear", role="linear", shape=(8, 16), num_parameters=136)
    model = ModelMap(layers=(layer,), stacks=(), num_parameters=136, num_bytes=544, macs=128)
    source = Source.open(network, forward=lambda module, inputs: module(inputs["x"]), name="one layer")
    candidate = clip.apply(Candidate(source=source, module=network), model, context=None)
    bound = float(weight.std())
    assert float(weight.abs().max()) > bound, "something has to be clipped"
    torch.testing.assert_close(candidate.module[0].weight.detach(), weight.clamp(-bound, bound))
    assert candidate.applied == [{"clip": {"sigmas": 1.0}}]


# ---------------------------------------------------------------- links and the two languages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f" {page}\n" not in navigation] == []


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = blocks(ENGLISH), blocks(CHINESE)
    assert [(block.language, block.code) for block in english] == [(block.language, block.code) for block in chinese]
    assert [line for _, line in commands(ENGLISH)] == [line for _, line in commands(CHINESE)]


def test_both_readmes_have_the_same_shape() -> None:
    def shape(page: Path) -> list[str]:
        lines = page.read_text(encoding="utf-8").splitlines()
        return [line[:2] for line in lines if line.startswith(("# ", "##", "| `", "| 0", "| 1", "| 2", "!["))]

    assert shape(ENGLISH) == shape(CHINESE)


def test_the_chinese_readme_uses_the_terms_of_the_field() -> None:
    text = CHINESE.read_text(encoding="utf-8")
    terms = ["模型压缩", "量化", "剪枝", "蒸馏", "混合精度训练", "分布式训练", "参数高效微调"]
    assert [term for term in terms if term not in text] == []
