"""An item's fields as one line of text, and plain text from HTML. Knows no tokenizer."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from typing import Any

from pixrec.schema import BRAND, CATEGORY, DESCRIPTION, PRICE, TEXT_FIELDS

SEPARATOR = " | "
MAX_DESCRIPTION_CHARACTERS = 400  # about 100 tokens; towers read far fewer, and the title comes first

# One tag or comment; every `<` is looked at once. What begins with no letter, as in `5 < 6`, is text.
_TAG = re.compile(r"<(?:/?[a-zA-Z]|!)[^<>]*>")
_UNSEEN = re.compile(r"<(script|style)\b[^<>]*>[^<]*</\1\s*>", re.IGNORECASE)


def item_text(fields: Mapping[str, Any]) -> str:
    """One line from title, brand, category, price and description; what is unknown is left out.

    `Toy Story | by John Lasseter | Animation, Children's, Comedy | $12.50`. Empty when nothing is known.
    """
    parts = (_phrase(name, fields.get(name)) for name in TEXT_FIELDS)
    return SEPARATOR.join(part for part in parts if part)


def plain_text(markup: str) -> str:
    """HTML as one line of text: tags become spaces, `&amp;` becomes `&`, also where it was escaped twice."""
    for _ in range(2):
        markup = html.unescape(_TAG.sub(" ", _UNSEEN.sub(" ", markup)))
    return " ".join(_TAG.sub(" ", markup).replace("\0", " ").split())


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
