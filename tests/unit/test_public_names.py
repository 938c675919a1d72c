"""The public Python names and their signatures: other programs call them, so they may grow but not change."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import pixrec
from pixrec.data.images import decode_image
from pixrec.errors import InputError, UnreadableImage
from pixrec.index import top_k
from pixrec.metrics import rank_metrics
from pixrec.recommender import Recommender

NAMES = [
    "Config",
    "PixRecError",
    "PreparedData",
    "PublishedIndex",
    "Recommender",
    "Report",
    "TrainedModel",
    "__version__",
    "embed",
    "evaluate",
    "load_recommender",
    "prepare",
    "train",
]
FROZEN: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (pixrec.prepare, {"items": ..., "interactions": ..., "out": ...}),
    (pixrec.train, {"data": ..., "out": ...}),
    (pixrec.embed, {"model": ..., "data": ..., "out": ...}),
    (pixrec.evaluate, {"model": ..., "data": ..., "out": ...}),
    (pixrec.load_recommender, {"model": ..., "index": ...}),
    (Recommender.recommend, {"self": ..., "history": ..., "k": 10}),
    (decode_image, {"data": ..., "size": ...}),
    (top_k, {"queries": ..., "items": ..., "k": ...}),
    (rank_metrics, {"ranks": ..., "ks": ...}),
]
OPTIONS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (pixrec.prepare, {"source": "tables", "config": None, "progress": False}),
    (pixrec.train, {"config": None, "resume": False, "progress": False}),
    (pixrec.embed, {"config": None, "progress": False}),
    (pixrec.evaluate, {"index": None, "predictions": None, "also": (), "config": None, "progress": False}),
]
OF_A_HANDLE = {"uri", "fingerprint", "counts", "info", "load"}
OF_HANDLES = {
    "PreparedData": set(),
    "TrainedModel": set(),
    "PublishedIndex": {"version", "versions", "rollback", "keep_newest"},
    "Report": {"table", "show", "page"},
}


def test_what_the_package_offers():
    assert pixrec.__all__ == NAMES
    assert set(NAMES) <= set(dir(pixrec))
    assert all(getattr(pixrec, name) is not None for name in NAMES)
    assert issubclass(UnreadableImage, InputError)
    assert issubclass(InputError, pixrec.PixRecError)
    with pytest.raises(AttributeError, match="no attribute 'prepares'"):
        _ = pixrec.prepares


@pytest.mark.parametrize(("function", "frozen"), FROZEN, ids=lambda value: getattr(value, "__qualname__", None))
def test_signatures(function: Callable[..., Any], frozen: dict[str, Any]):
    parameters = list(inspect.signature(function).parameters.values())
    first = parameters[: len(frozen)]
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in first)
    defaults = {p.name: ... if p.default is p.empty else p.default for p in first}
    assert defaults == frozen
    assert all(p.default is not p.empty for p in parameters[len(frozen) :]), "what was added must be optional"


@pytest.mark.parametrize(("function", "options"), OPTIONS, ids=lambda value: getattr(value, "__qualname__", None))
def test_options(function: Callable[..., Any], options: dict[str, Any]):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in options} == options
    assert {parameters[name].kind for name in options} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", OF_HANDLES)
def test_what_a_handle_has(name: str):
    kind = getattr(pixrec, name)
    offered = {field.name for field in fields(kind)} | {key for key in dir(kind) if not key.startswith("_")}
    assert offered >= OF_A_HANDLE | OF_HANDLES[name]
    assert all(kind.__doc__ and getattr(kind, key).__doc__ for key in OF_HANDLES[name] | {"load"})


@pytest.mark.parametrize("function", [function for function, _ in FROZEN], ids=lambda f: f.__qualname__)
def test_they_are_documented_and_typed(function: Callable[..., Any]):
    assert inspect.getdoc(function)
    parameters = [p for name, p in inspect.signature(function).parameters.items() if name != "self"]
    assert [p.name for p in parameters if p.annotation is p.empty] == []
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


def test_importing_the_package_is_light():
    heavy = ("torch", "ray", "transformers", "pyarrow", "numpy", "pandas")
    code = f"import sys, pixrec; print([name for name in {heavy} if name in sys.modules], pixrec.__version__)"
    root = Path(pixrec.__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert ran.stdout == f"[] {pixrec.__version__}\n", ran.stderr
