"""Everything that is ranked side by side, put together by name. Knows models, data sets and baselines; no metric.

Shapes: B users · N items · D width of the shared space.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from pixrec import storage
from pixrec.artifact import MODEL_MARKER, Index, Model, knockout_uri, load_model
from pixrec.config import Config, Modalities
from pixrec.console import Progress
from pixrec.data.items import ItemTable
from pixrec.data.sequences import Dataset
from pixrec.errors import ArtifactError, ConfigError, InputError
from pixrec.index import ROW_MULTIPLE
from pixrec.model.catalog import Catalog, Embedder
from pixrec.model.vision import find_tokens
from pixrec.scorers.baselines import (
    ContentLinear,
    ItemTransition,
    Popularity,
    RecentPopularity,
    ReciprocalRankFusion,
    RepeatLast,
    RoundRobin,
)
from pixrec.scorers.predictions import Predictions
from pixrec.scorers.protocol import AnyScorer, Scorer
from pixrec.scorers.replaced import REPLACED, Replaced, ReplacedItems
from pixrec.scorers.sasrec import LOSS_OF, train_sasrec

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
        return embedder, Catalog(items, model.encoder, tokens=tokens)


class TowerScorer:
    """Cosine of user and item vectors over the whole catalog."""

    def __init__(
        self, name: str, embedder: Embedder, catalog: Catalog, item_vectors: np.ndarray, recipe: Recipe | None = None
    ) -> None:
        self.name, self.recipe, self.vectors = name, recipe, item_vectors
        self._embedder, self._catalog = embedder, catalog
        filled = np.pad(item_vectors, ((0, -len(item_vectors) % ROW_MULTIPLE), (0, 0)))  # equal items, equal scores
        self._items = torch.from_numpy(filled).to(embedder.device)

    def scores(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        """Scores (B, N) float32 for histories of rows, oldest first."""
        return self.scores_at(histories, None)

    def scores_at(self, histories: Sequence[np.ndarray], timestamps: Sequence[np.ndarray] | None) -> torch.Tensor:
        """As `scores`, of users whose events' `timestamps` are known: in milliseconds, beside the histories."""
        users = self._embedder.users(self._catalog, histories, self.vectors, timestamps)
        return (torch.from_numpy(users).to(self._items.device) @ self._items.T)[:, : len(self.vectors)]


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


@dataclass(frozen=True)
class Sources:
    """What the command was given to be evaluated."""

    model_uri: str | None = None
    model: Model | None = None
    index: Index | None = None
    predictions: Predictions | None = None


def build_scorers(
    dataset: Dataset, config: Config, sources: Sources, progress: Progress
) -> tuple[list[AnyScorer], dict[str, str]]:
    """All scorers in the order of the tables, and how the knockouts among them were made.

    First what is evaluated: the model with its knockouts, or the predictions; then what `evaluate.scorers` names.
    To add a scorer, give it a name in `ScorerFactory.makers`. Raises ConfigError on an unknown name, InputError on one
    that needs what was not given.
    """
    factory, names = ScorerFactory(dataset, config, sources, progress), config.evaluate.scorers
    factory.check_names()
    towers, made = list[TowerScorer](), dict[str, str]()
    if sources.model is not None and sources.model_uri is not None:
        replaced = [name for name in names if name in REPLACEMENTS]
        towers, made = tower_scorers(
            sources.model_uri, sources.model, dataset.items, sources.index, progress, replaced, dataset.uri
        )
    factory.made |= {tower.name: tower for tower in towers}
    scorers: list[AnyScorer] = [*towers]
    if sources.predictions is not None:
        scorers.append(sources.predictions)
    known = {scorer.name for scorer in scorers}
    return scorers + [factory.make(name) for name in names if name not in known], made


class ScorerFactory:
    """Makes scorers by name, each once."""

    def __init__(self, dataset: Dataset, config: Config, sources: Sources, progress: Progress) -> None:
        self.dataset, self.config, self.sources, self.progress = dataset, config, sources, progress
        self.made: dict[str, Any] = {}
        self.makers: dict[str, Callable[[], Scorer]] = {
            "popularity": lambda: Popularity(dataset.training_counts()),
            "recent_popularity": self._recent_popularity,
            "repeat_last": lambda: RepeatLast(dataset.training_counts()),
            "item_transition": self._item_transition,
            "content_linear": lambda: ContentLinear(dataset.training_histories(), self.make("pixrec").vectors),
            "generative_bm25": self._generative_bm25,
            **{name: partial(self._sasrec, name) for name in LOSS_OF},
            "rrf": lambda: ReciprocalRankFusion("rrf", [self.make(name) for name in config.evaluate.fused]),
            "round_robin": lambda: RoundRobin("round_robin", [self.make(name) for name in config.evaluate.fused]),
        }

    def check_names(self) -> None:
        """Raise ConfigError on a name that nobody makes, before any work is done."""
        known = [*self.makers, *REPLACEMENTS, *KNOCKOUTS, "pixrec"]
        for field, names in (("scorers", self.config.evaluate.scorers), ("fused", self.config.evaluate.fused)):
            for name in names:
                if name not in known or (field == "fused" and name in ("rrf", "round_robin")):
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f"did you mean {near[0]!r}?" if near and near[0] != name else f"known: {', '.join(known)}"
                    raise ConfigError(f"evaluate.{field} names {name!r}; {hint}")

    def make(self, name: str) -> Any:
        if name not in self.made:
            if name not in self.makers:
                raise InputError(f"evaluate.scorers or evaluate.fused names {name}, which needs a --model that has it")
            self.made[name] = self.makers[name]()
        return self.made[name]

    def _recent_popularity(self) -> Scorer:
        events, visible = self.dataset.events, self.dataset.training_visible()
        share = self.config.evaluate.recent_share
        return RecentPopularity(events.rows[visible], events.timestamps[visible], len(self.dataset.items), share)

    def _item_transition(self) -> Scorer:
        histories, items = self.dataset.training_histories(), len(self.dataset.items)
        settings = self.config.evaluate
        steps, damping = settings.transition_steps, settings.transition_damping
        return ItemTransition(histories, items, steps=steps, damping=damping)

    def _sasrec(self, name: str) -> Scorer:
        def tell(row: dict[str, Any]) -> None:
            if "total_steps" in row:
                self.progress(f"train {name}", row["step"], row["total_steps"])

        return train_sasrec(name, self.dataset, self.config.sasrec, tell)

    def _generative_bm25(self) -> Scorer:
        from pixrec.scorers.generative import GenerativeBM25

        if self.sources.model is None:
            raise InputError("evaluate.scorers names generative_bm25, which needs --model")
        model = self.sources.model
        tokens = find_tokens(self.dataset.uri, model.config, model.tower.backbone)
        return GenerativeBM25(model, self.dataset.items, self.config.evaluate, tokens)


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
