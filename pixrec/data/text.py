"""An item's fields as one line of text. Knows no tokens: cutting to a token budget is the model's business."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pixrec.schema import BRAND, CATEGORY, DESCRIPTION, PRICE, TEXT_FIELDS

SEPARATOR = " | "
MAX_DESCRIPTION_CHARACTERS = 400  # about 100 tokens; towers read far fewer, and the title comes first


def item_text(fields: Mapping[str, Any]) -> str:
    """One line from title, brand, category, price and description; what is unknown is left out.

    `Toy Story | by John Lasseter | Animation, Children's, Comedy | $12.50`. Empty when nothing is known.
    """
    parts = (_phrase(name, fields.get(name)) for name in TEXT_FIELDS)
    return SEPARATOR.join(part for part in parts if part)


def _phrase(name: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if name == PRICE:
        return f"${value:.2f}"
    words = " ".join(str(value).split())
    if name == BRAND:
        return f"by {words}" if words else ""
    if name == CATEGORY:
        return ", ".join(part.strip() for part in words.split("|") if part.strip())
    if name == DESCRIPTION:
        return _cut(words, MAX_DESCRIPTION_CHARACTERS)
    return words


def _cut(words: str, longest: int) -> str:
    """The longest run of whole words within `longest` characters; a single longer word is cut hard."""
    if len(words) <= longest:
        return words
    whole, space, _ = words[: longest + 1].rpartition(" ")
    return whole if space else words[:longest]
