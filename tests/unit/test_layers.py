"""Imports point one way, and what must never be called is never called. Reads the sources, runs none."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import pixrec

ROOT = Path(pixrec.__file__).parent

# Lowest first. A module may import what stands in its own layer or below.
LAYERS = [
    ["errors", "schema"],
    ["config", "console", "query"],
    ["storage", "client"],
    ["data"],
    ["live", "model"],
    ["index", "metrics"],
    ["retrieval"],
    ["artifact"],
    ["training"],
    ["scorers"],
    ["evaluation"],
    ["report", "recommender"],
    ["cluster", "serving", "handles"],
    ["verbs"],
    ["pipeline"],
    ["cli"],
]
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}

# Packages that only some rooms may know.
KEPT_TO = {
    "ray": {"cluster", "serving"},
    "fastapi": {"serving"},
    "pydantic": {"serving"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "rich": {"console"},
    "argparse": {"cli"},
    "fsspec": {"storage"},
    "s3fs": {"storage"},
    "peft": {"model"},
    "jinja2": {"report"},
    "aiohttp": {"data", "serving"},
    "simplejpeg": {"data"},
    "bm25s": {"scorers"},
    "IPython": {"report"},
    "lance": {"data"},
    "faiss": {"retrieval"},
    "httpx": {"client"},
    "prometheus_client": {"serving"},
    "redis": {"live"},
    "sqlite3": {"live"},
}
CONVERTS = "pixrec.model.packages"
"""May read a checkpoint of torch, as weights alone, to keep it as safetensors."""
NEVER = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(file): ast.parse(file.read_text(), str(file)) for file in sorted(ROOT.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@cache
def imports(module: str) -> frozenset[str]:
    """Full names of all modules that `module` imports, also inside functions."""
    return frozenset(_imports(module))


def _imports(module: str) -> Iterator[str]:
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            source = node.module or ""
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in SOURCES else source


def own_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name in SOURCES and name != "pixrec"}


def test_every_room_has_a_layer():
    assert {room_of(module) for module in SOURCES} - {""} == set(LAYER_OF)


@pytest.mark.parametrize("module", [module for module in SOURCES if module != "pixrec"])
def test_imports_point_downwards(module: str):
    upward = {name for name in own_imports(module) if LAYER_OF[room_of(name)] > LAYER_OF[room_of(module)]}
    assert not upward, f"{module} imports {upward}"


def test_the_package_itself_only_offers_the_library():
    """Its names are imported when asked for: at once it imports nothing but the standard library."""
    offered = {f"pixrec.{room}" for room in ("config", "errors", "handles", "recommender", "verbs")}
    assert own_imports("pixrec") == offered == set(pixrec._HOMES)
    eager = [node for node in SOURCES["pixrec"].body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {getattr(node, "module", None) or node.names[0].name for node in eager} == {
        "__future__",
        "importlib",
        "typing",
    }


def test_no_module_imports_itself_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in own_imports(module):
                visit(name, (*path, module))
            done.add(module)

    for module in SOURCES:
        visit(module, ())


@pytest.mark.parametrize("package", KEPT_TO)
def test_a_package_is_known_in_its_rooms_only(package: str):
    users = {room_of(module) for module in SOURCES if any(name.split(".")[0] == package for name in imports(module))}
    assert users <= KEPT_TO[package]


def test_nothing_executable_is_ever_loaded():
    for module, tree in SOURCES.items():
        assert not {name.split(".")[0] for name in imports(module)} & NEVER, module
        for node in ast.walk(tree):
            where = f"{module}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load") or module == CONVERTS, where
                assert node.value.id != "yaml" or node.attr.startswith("safe_") or node.attr == "YAMLError", where
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords), where
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), where
                assert node.value.value is False, where
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell"):
                assert isinstance(node.value, ast.Constant), where
                assert node.value.value is False, where
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), where
