"""Models and indexes as folders on storage, each complete or invisible; no pickle anywhere."""

from pixrec.artifact.index import (
    Index,
    IndexWriter,
    check_index_writable,
    index_manifest,
    index_version,
    load_index,
)
from pixrec.artifact.model import (
    DESCRIPTION,
    MODEL_MARKER,
    Model,
    describe_model,
    described_model,
    fingerprint,
    give_weights,
    knockout_uri,
    load_model,
    new_model,
    own_names,
    save_model,
    untrained_model,
    with_compact,
)
from pixrec.artifact.versions import keep_newest, list_versions, rollback

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
    "load_index",
    "load_model",
    "new_model",
    "own_names",
    "rollback",
    "save_model",
    "untrained_model",
    "with_compact",
]
