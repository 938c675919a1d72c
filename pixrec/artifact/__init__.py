"""Models and indexes as folders on storage, each complete or invisible; no pickle anywhere."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "DESCRIPTION",
    "MODEL_MARKER",
    "Index",
    "IndexWriter",
    "Model",
    "check_index_writable",
    "describe_model",
    "described_model",
    "fingerprint",
    "give_weights",
    "index_manifest",
    "index_version",
    "keep_newest",
    "knockout_uri",
    "list_versions",
    "load_content",
    "load_heads",
    "load_index",
    "load_model",
    "new_model",
    "own_names",
    "pin_version",
    "pinned_version",
    "planned_model",
    "rollback",
    "save_model",
    "untrained_model",
    "with_compact",
]

_HOMES = ("versions", "index", "model")
"""From light to heavy: who reads a manifest loads no torch, and who reads vectors no model."""

if TYPE_CHECKING:
    from pixrec.artifact.index import Index, IndexWriter, index_version, load_content, load_index
    from pixrec.artifact.model import (
        DESCRIPTION,
        MODEL_MARKER,
        Model,
        describe_model,
        described_model,
        fingerprint,
        give_weights,
        knockout_uri,
        load_heads,
        load_model,
        new_model,
        own_names,
        planned_model,
        save_model,
        untrained_model,
        with_compact,
    )
    from pixrec.artifact.versions import (
        check_index_writable,
        index_manifest,
        keep_newest,
        list_versions,
        pin_version,
        pinned_version,
        rollback,
    )
else:

    def __getattr__(name: str) -> Any:
        """A name is imported when it is first asked for."""
        for home in _HOMES if name in __all__ else ():
            found = getattr(importlib.import_module(f"{__name__}.{home}"), name, None)
            if found is not None:
                globals()[name] = found
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
