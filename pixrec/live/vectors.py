"""Vectors of an item as the bytes that stores hold."""

from __future__ import annotations

import numpy as np

from pixrec.live.store import EmbeddedVectors


def vectors_of(vector: bytes | None, content: bytes | None) -> EmbeddedVectors | None:
    """What `bytes_of` made bytes of; None where there is no vector."""
    if vector is None:
        return None
    searched = None if content is None else np.frombuffer(content, "<f2")
    return EmbeddedVectors(np.frombuffer(vector, "<f4"), searched)


def bytes_of(made: EmbeddedVectors) -> tuple[bytes, bytes | None]:
    content = None if made.content is None else made.content.astype("<f2").tobytes()
    return made.vector.astype("<f4").tobytes(), content
