"""Checks of field values, which the dataclasses call when they are made. An error gives the field's full name, as
`train.compact.epochs`.
"""

from __future__ import annotations

import typing
from typing import Any

from pixrec.errors import ConfigError

_SECTIONS = {
    "SyntheticConfig": "demo",
    "TinyConfig": "model.tiny",
    "LoraConfig": "model.lora",
    "CompactConfig": "model.compact",
    "SequenceConfig": "train.compact",
    "JointConfig": "train.joint",
    "SasrecTowerConfig": "sasrec.tower",
    "SasrecTrainingConfig": "sasrec.training",
}


def _require(node: Any, names: typing.Iterable[str], fits: typing.Callable[[Any], bool], what: str) -> None:
    """Raise ConfigError unless `fits` holds for each of the named fields; a field that is None passes."""
    for name in names:
        value = getattr(node, name)
        if value is not None and not fits(value):
            raise ConfigError(f"{section_of(node)}.{name} is {value}: must be {what}")


def section_of(node: Any) -> str:
    """The dotted name of the section that this node is."""
    name = type(node).__name__
    return _SECTIONS.get(name) or name.removesuffix("Config").lower()


def at_least(node: Any, least: int, *names: str) -> None:
    _require(node, names, lambda value: value >= least, f"at least {least}")


def above_zero(node: Any, *names: str) -> None:
    _require(node, names, lambda value: value > 0, "above 0")


def between(node: Any, low: float, high: float, *names: str) -> None:
    _require(node, names, lambda value: low <= value <= high, f"between {low} and {high}")


def multiple(node: Any, name: str, of: int, what: str) -> None:
    _require(node, [name], lambda value: value % of == 0, f"a multiple of {of} ({what})")
