"""Imports point one way: of the package's modules none imports another that leads back to it, for types neither."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "wd_kernels"
LOADERS = {
    "_C": {"native"},
    "_cuda": {"native"},
    "triton": {"backends.triton", "backends.triton_begin", "backends.triton_kernels"},
}


def modules() -> dict[str, Path]:
    """Every module by its name in the package; "" is the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """What a module imports of the package, wherever in it: modules by their names."""
    own = name.split(".") if name else []
    package = own if path.name == "__init__.py" else own[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = package[: len(package) - (node.level - 1)] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            found.add(whole if whole in known else ".".join(base))
    return found - {name}


def graph(paths: dict[str, Path]) -> dict[str, set[str]]:
    """What each module imports. What leads into a package is its `__init__`, unless the name is a module of it."""
    return {name: imported(name, path, set(paths)) for name, path in paths.items()}


def test_there_is_no_circle() -> None:
    found = graph(modules())
    assert len(found) > 30
    assert "layout" in found["backends.cpu"]
    assert "rules" in found["layout"]
    list(TopologicalSorter(found).static_order())


def test_a_circle_would_be_seen(tmp_path: Path) -> None:
    texts = {"a": "def f():\n    from .b import g\n", "b": "from . import c\n", "c": "from .a import f\n"}
    paths = {name: tmp_path / f"{name}.py" for name in texts}
    for name, text in texts.items():
        paths[name].write_text(text)
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph(paths)).static_order())


def test_who_loads_libraries() -> None:
    """Native libraries are loaded in one module, Triton is imported in two."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            roots = {n.split(".")[0] for n in names} | ({node.module} if isinstance(node, ast.ImportFrom) else set())
            for library, allowed in LOADERS.items():
                if library in roots and not (isinstance(node, ast.ImportFrom) and node.level and library == "triton"):
                    assert name in allowed, f"{name or 'wd_kernels'} imports {library}"
