"""What a field may hold, checked where its dataclass is made. Knows the places of sections by name alone."""

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
    """Raise ConfigError unless the named fields fit; None, where a field may be it, always does."""
    for name in names:
        value = getattr(node, name)
        if value is not None and not fits(value):
            raise ConfigError(f"{section_of(node)}.{name} is {value}: must be {what}")


def section_of(node: Any) -> str:
    """Where a section of this type stands in the config."""
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
