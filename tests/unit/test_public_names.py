"""The names that other programs call: they may grow, not change."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import pixrec
from pixrec.data.images import decode_image
from pixrec.errors import InputError, UnreadableImage
from pixrec.index import top_k
from pixrec.metrics import rank_metrics
from pixrec.recommender import Recommender

FROZEN: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (pixrec.load_recommender, {"model": ..., "index": ...}),
    (Recommender.recommend, {"self": ..., "history": ..., "k": 10}),
    (decode_image, {"data": ..., "size": ...}),
    (top_k, {"queries": ..., "items": ..., "k": ...}),
    (rank_metrics, {"ranks": ..., "ks": ...}),
]


def test_what_the_package_offers():
    assert pixrec.__all__ == ["__version__", "load_recommender"]
    assert issubclass(UnreadableImage, InputError)


@pytest.mark.parametrize(("function", "frozen"), FROZEN, ids=lambda value: getattr(value, "__qualname__", None))
def test_signatures(function: Callable[..., Any], frozen: dict[str, Any]):
    parameters = list(inspect.signature(function).parameters.values())
    first = parameters[: len(frozen)]
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in first)
    defaults = {p.name: ... if p.default is p.empty else p.default for p in first}
    assert defaults == frozen
    assert all(p.default is not p.empty for p in parameters[len(frozen) :]), "what was added must be optional"
