"""A model and its knockouts as scorers of the evaluation. Knows towers; knows no metric and no report."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from pixrec import storage
from pixrec.artifact import MODEL_MARKER, Index, Model, knockout_uri, load_model
from pixrec.config import Modalities
from pixrec.data.items import ItemTable
from pixrec.errors import ArtifactError
from pixrec.model.catalog import Catalog, Embedder

Progress = Callable[[str, int, int | None], None]

KNOCKOUTS: dict[str, Modalities] = {"pixrec_text_only": "text", "pixrec_image_only": "image"}


class TowerScorer:
    """Cosine of user and item vectors over the whole catalog (N items)."""

    def __init__(self, name: str, embedder: Embedder, catalog: Catalog, item_vectors: np.ndarray) -> None:
        self.name = name
        self._embedder, self._catalog = embedder, catalog
        self._vectors = item_vectors
        self._items = torch.from_numpy(item_vectors)

    def scores(self, histories: list[np.ndarray]) -> torch.Tensor:
        """Scores (B, N) float32 for histories of rows, oldest first."""
        return torch.from_numpy(self._embedder.users(self._catalog, histories, self._vectors)) @ self._items.T


def tower_scorers(
    model_uri: str, model: Model, items: ItemTable, index: Index | None, progress: Progress
) -> tuple[list[TowerScorer], dict[str, str]]:
    """The model's scorer and its two knockouts, and how each knockout was made.

    A knockout trained with the model is `trained`; where there is none, the model itself is scored with one modality
    removed (`scored`), which is the weaker test. A model of a single modality has no knockouts.
    """
    catalog = Catalog(items, model.encoder)
    rows = np.arange(len(items))
    embedder = model.embedder()
    vectors = aligned(index, items) if index else embedder.items(catalog, rows, progress=_named(progress, "pixrec"))
    scorers, made = [TowerScorer("pixrec", embedder, catalog, vectors)], dict[str, str]()
    if model.config.model.modalities != "both":
        return scorers, made
    for name, modality in KNOCKOUTS.items():
        uri = knockout_uri(model_uri, modality)
        if storage.exists(storage.join(uri, MODEL_MARKER)):
            made[name] = "trained"
            knockout = load_model(uri)
            embedder, seen = knockout.embedder(), Catalog(items, knockout.encoder)
        else:
            made[name] = "scored"
            embedder = Embedder(model.tower, model.encoder, modality, model.config.model.max_history_items)
            seen = catalog
        scorers.append(TowerScorer(name, embedder, seen, embedder.items(seen, rows, progress=_named(progress, name))))
    return scorers, made


def aligned(index: Index, items: ItemTable) -> np.ndarray:
    """The index's vectors (N, D) in the order of `items`. Raises ArtifactError unless both hold the same items."""
    position = {item_id: i for i, item_id in enumerate(index.item_ids)}
    if len(position) != len(items) or not all(item_id in position for item_id in items.item_ids):
        raise ArtifactError(
            f"index version {index.version} holds {len(position)} items, the data set {len(items)}, not the same ones; "
            "run pixrec embed on this data set"
        )
    return index.vectors[[position[item_id] for item_id in items.item_ids]]


def _named(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(f"items of {name}", done, total)
