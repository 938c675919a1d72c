"""Names and types of the tables. Knows no file system and no model.

A name keeps its spelling from the Parquet column to the argument that takes it.

Shapes used throughout PixRec:
    B users or histories · L items in a history · N items of a catalog · U distinct items of a batch
    T tokens · D width of the shared embedding space · S side of a square picture in pixels
"""

from __future__ import annotations

import pyarrow as pa

# Columns of the input tables; docs/data.md says what each holds.
ITEM_ID, TITLE, BRAND, CATEGORY, DESCRIPTION, PRICE = "item_id", "title", "brand", "category", "description", "price"
IMAGE, IMAGE_URI, IMAGE_URIS, IMAGE_STATUS = "image", "image_uri", "image_uris", "image_status"
USER_ID, TIMESTAMP, RATING, EVENT = "user_id", "timestamp", "rating", "event"
ITEM_IDS, TIMESTAMPS, EVENTS = "item_ids", "timestamps", "events"
SOURCE, KEY, REASON = "source", "key", "reason"
EMBEDDING, SCALE, CONTENT_HASH, HAS_IMAGE = "embedding", "scale", "content_hash", "has_image"
CONTENT = "content"

# The fields that make up an item's text, in the order in which they are read out.
TEXT_FIELDS = (TITLE, BRAND, CATEGORY, PRICE, DESCRIPTION)

# Values of `image_status`.
OK, MISSING, REJECTED = "ok", "missing", "rejected"

# Values of `source` in rejects/.
ITEMS, INTERACTIONS, IMAGES = "items", "interactions", "images"

REJECTS = pa.schema([(SOURCE, pa.string()), (KEY, pa.string()), (REASON, pa.string())])

SEQUENCES = pa.schema([(USER_ID, pa.string()), (ITEM_IDS, pa.list_(pa.string())), (TIMESTAMPS, pa.list_(pa.int64()))])
SEQUENCES_WITH_EVENTS = SEQUENCES.append(pa.field(EVENTS, pa.list_(pa.string())))

# The known columns of a prepared item; further columns of the input pass through after them.
PREPARED_ITEM_FIELDS = [
    (ITEM_ID, pa.string()),
    (TITLE, pa.string()),
    (BRAND, pa.string()),
    (CATEGORY, pa.string()),
    (DESCRIPTION, pa.string()),
    (PRICE, pa.float64()),
    (IMAGE, pa.binary()),  # in memory only: a stored data set keeps its pictures in a store of their own
    (IMAGE_STATUS, pa.string()),
]


def index_schema(width: int, dtype: str, content_width: int = 0) -> pa.Schema:
    """Schema of an index part: `embedding` is a fixed-size list of `width` values of `dtype`.

    dtype float32 or float16 is the vector itself; int8 comes with a float32 column `scale`, and the vector is their
    product. `has_image`: whether the vector was made from a picture; False is from text alone, null is unknown. With a
    `content_width`, `content` are so many values of float16 that search compares: what frozen encoders say of the item.
    """
    value = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}[dtype]
    scale = [(SCALE, pa.float32())] if dtype == "int8" else []
    content = [(CONTENT, pa.list_(pa.float16(), content_width))] if content_width else []
    return pa.schema(
        [
            (ITEM_ID, pa.string()),
            (EMBEDDING, pa.list_(value, width)),
            *scale,
            (CONTENT_HASH, pa.string()),
            (HAS_IMAGE, pa.bool_()),
            *content,
        ]
    )
