"""The house: what imports what, in one direction only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "lml").rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports_of(file: Path) -> set[str]:
    """Modules of ours that `file` imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import, which is not looked at here"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {"", module_of(file), "lml"}


def packages_of(file: Path) -> set[str]:
    """What `file` imports, by its first name."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.partition(".")[0] for name in names}


def test_no_circle():
    graph = {name: imports_of(file) for name, file in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                # a package's __init__ gathers its own modules
                if not name.startswith(f"{other}."):
                    visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def room_of(module: str, rooms: list[str]) -> str | None:
    """The smallest room that `module` is in."""
    around = [room for room in rooms if f"{module}.".startswith(f"lml.{room}.")]
    return max(around, key=len, default=None)


def test_imports_run_down_the_map_of_the_house():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    map_of_house = page[page.index("## The map") : page.index("## Extending")]
    lines = [line.split(":")[0] for line in map_of_house.splitlines() if line.startswith("- ")]
    rooms = [room for line in lines for room in re.findall(r"`([\w.]+)`", line)]
    assert {f"lml.{room}" for room in rooms} <= set(MODULES)
    # a module that is in no room could import what it likes
    assert {name for name in MODULES if room_of(name, rooms) is None} == {"lml"}
    for name, file in MODULES.items():
        # the package itself is above all rooms
        for other in imports_of(file) if name != "lml" else ():
            above, below = rooms.index(room_of(name, rooms)), rooms.index(room_of(other, rooms))
            assert above <= below, f"{name} imports {other}"


@pytest.mark.parametrize(
    "name", ["lml.correction", "lml.numerics", "lml.options", "lml.damping", "lml.denoiser"]
)
def test_the_method_needs_torch_alone(name):
    assert packages_of(MODULES[name]) <= {
        "__future__",
        "collections",
        "lml",
        "math",
        "numbers",
        "torch",
    }


def test_nothing_in_the_library_imports_tests_or_scripts():
    """Nor what lies in these folders, by its own name."""
    theirs = {file.stem for folder in ("tests", "scripts") for file in (ROOT / folder).glob("*.py")}
    for file in FILES:
        assert not packages_of(file) & {"tests", "scripts", *theirs}, file
