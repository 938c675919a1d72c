"""A trained model as a scorer, beside its knockouts: the same with one modality removed, or replaced. Knows models,
indexes and items; no metric.

Shapes: B users · N items · D width of the shared space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pixrec import storage
from pixrec.artifact import MODEL_MARKER, Index, Model, knockout_uri, load_model
from pixrec.config import Modalities
from pixrec.console import Progress
from pixrec.data.items import ItemTable
from pixrec.data.sequences import Users
from pixrec.errors import ArtifactError, InputError
from pixrec.index import ROW_MULTIPLE, in_order, shared_tensor
from pixrec.model.catalog import Catalog, Embedder
from pixrec.model.encoders import EncoderTower
from pixrec.model.texts import find_texts
from pixrec.model.vision import find_tokens
from pixrec.scorers.protocol import Scorer
from pixrec.scorers.replaced import REPLACED, Replaced, ReplacedItems

KNOCKOUTS: dict[str, Modalities] = {"pixrec_text_only": "text", "pixrec_image_only": "image"}
REPLACEMENTS: dict[str, Replaced] = {f"pixrec_{how}": how for how in REPLACED}


@dataclass(frozen=True)
class Recipe:
    """What makes the towers of one scorer, so that another process can make the same."""

    name: str
    model_uri: str
    modality: Modalities | None = None
    """What the model is shown; None: what it was trained on"""
    replaced: Replaced | None = None

    def towers(self, items: ItemTable, model: Model, data: str | None = None) -> tuple[Embedder, Catalog]:
        """The model as this scorer uses it, and the items as it sees them; stored picture tokens of the data set at
        `data` are used where they fit."""
        embedder = model.embedder()
        if self.modality is not None:
            embedder.modalities = self.modality
        if self.replaced is not None:
            items = ReplacedItems(items, self.replaced, model.encoder.image_size_px)
        tokens = None if data is None else find_tokens(data, model.config, model.tower.backbone)
        if data is not None and isinstance(model.tower, EncoderTower):
            model.tower.stored_texts = find_texts(data, model.config, model.tower.backbone)
        return embedder, Catalog(items, model.encoder, tokens=tokens)


class TowerScorer(Scorer):
    """Cosine of user and item vectors over the whole catalog."""

    needs = ("model",)

    def __init__(
        self, name: str, embedder: Embedder, catalog: Catalog, item_vectors: np.ndarray, recipe: Recipe | None = None
    ) -> None:
        self.name, self.recipe, self.vectors = name, recipe, item_vectors
        self._embedder, self._catalog = embedder, catalog
        # Only the last few rows need filling up for equal items to have equal scores; the vectors themselves, which may
        # be mapped or lie in Ray's object store, are not copied.
        whole = len(item_vectors) - len(item_vectors) % ROW_MULTIPLE
        rest = np.pad(item_vectors[whole:], ((0, -len(item_vectors) % ROW_MULTIPLE), (0, 0)))
        self._items = [shared_tensor(part).to(embedder.device) for part in (item_vectors[:whole], rest) if len(part)]

    def scores(self, users: Users) -> torch.Tensor:
        """Scores (B, N) float32, on the device of the model."""
        vectors = self._embedder.users(self._catalog, users.histories, self.vectors, users.timestamps)
        users_BD = torch.from_numpy(vectors).to(self._embedder.device)
        parts = [users_BD @ items.T for items in self._items]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[:, : len(self.vectors)]


def tower_scorers(
    model_uri: str,
    model: Model,
    items: ItemTable,
    index: Index | None,
    progress: Progress,
    replaced: Sequence[str] = (),
    data: str | None = None,
) -> tuple[list[TowerScorer], dict[str, str]]:
    """The model's scorer, its two knockouts and those `replaced` names, and how each knockout was made.

    A knockout trained with the model is `trained`; where there is none, the model itself is scored with one modality
    removed (`scored`), which is the weaker test. `replaced`: the model is shown a constant or noise. A model of a
    single modality has no knockouts.
    """
    recipes, made = [Recipe("pixrec", model_uri)], dict[str, str]()
    if model.config.model.modalities == "both":
        for name, modality in KNOCKOUTS.items():
            uri = knockout_uri(model_uri, modality)
            made[name] = "trained" if storage.exists(storage.join(uri, MODEL_MARKER)) else "scored"
            recipes.append(Recipe(name, uri) if made[name] == "trained" else Recipe(name, model_uri, modality))
        recipes += [Recipe(name, model_uri, replaced=REPLACEMENTS[name]) for name in replaced]
        made |= dict.fromkeys(replaced, "replaced")
    elif replaced:
        raise InputError(f"evaluate.scorers names {replaced[0]}, but {model_uri} was trained on one modality alone")
    scorers, device = [], str(model.embedder().device)
    for recipe in recipes:
        used = model if recipe.model_uri == model_uri else load_model(recipe.model_uri, device)
        embedder, catalog = recipe.towers(items, used, data)
        if recipe.name == "pixrec" and index is not None:
            vectors = aligned(index, items)
        else:
            vectors = embedder.items(catalog, np.arange(len(items)), progress=_named(progress, recipe.name))
        scorers.append(TowerScorer(recipe.name, embedder, catalog, vectors, recipe))
    return scorers, made


def aligned(index: Index, items: ItemTable) -> np.ndarray:
    """The index's vectors (N, D) in the order of `items`. Raises ArtifactError unless both hold the same items."""
    rows = items.rows_of(index.item_ids)
    if len(rows) != len(items) or (np.bincount(rows[rows >= 0], minlength=len(items)) != 1).any():
        raise ArtifactError(
            f"index version {index.version} holds {len(rows)} items, the data set {len(items)}, not the same ones; "
            "run pixrec embed on this data set"
        )
    return in_order(index.vectors, rows, len(items))


def _named(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(f"items of {name}", done, total)
