"""Everything that is ranked side by side, put together by name. Knows models, data sets and baselines; no metric."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from pixrec.artifact import Index, Model, load_content
from pixrec.config import Config
from pixrec.console import Progress
from pixrec.data.sequences import Dataset
from pixrec.errors import ConfigError, InputError
from pixrec.model.encoders import EncoderTower
from pixrec.model.vision import find_tokens
from pixrec.scorers.baselines import ContentLinear, ItemTransition, Popularity, RecentPopularity, RepeatLast
from pixrec.scorers.blend import Blend, fitted_mixture
from pixrec.scorers.fusion import ReciprocalRankFusion, RoundRobin
from pixrec.scorers.generative import GenerativeBM25
from pixrec.scorers.neighbours import ContentNeighbours
from pixrec.scorers.predictions import Predictions
from pixrec.scorers.protocol import Need, Scorer
from pixrec.scorers.sasrec import LOSS_OF, Sasrec, train_sasrec
from pixrec.scorers.towers import KNOCKOUTS, REPLACEMENTS, Recipe, TowerScorer, tower_scorers

GIVEN_BY: dict[Need, str] = {"model": "a --model", "events": "a data set with training events"}
FUSIONS = ("rrf", "round_robin")


@dataclass(frozen=True)
class Inputs:
    """What the command was given to be evaluated, beside the data set."""

    model_uri: str | None = None
    model: Model | None = None
    index: Index | None = None
    predictions: Predictions | None = None
    index_uri: str | None = None


def build_scorers(
    dataset: Dataset, config: Config, inputs: Inputs, progress: Progress
) -> tuple[list[Scorer], dict[str, str]]:
    """All scorers in the order of the tables, and how the knockouts among them were made.

    First what is evaluated: the model with its knockouts, or the predictions; then what `evaluate.scorers` names.
    To add a scorer, give it a name in `ScorerFactory.makers`. Raises ConfigError on an unknown name, InputError on one
    that needs what was not given.
    """
    factory, names = ScorerFactory(dataset, config, inputs, progress), config.evaluate.scorers
    factory.check_names()
    towers, made = list[TowerScorer](), dict[str, str]()
    if inputs.model is not None and inputs.model_uri is not None:
        replaced = [name for name in names if name in REPLACEMENTS]
        towers, made = tower_scorers(
            inputs.model_uri, inputs.model, dataset.items, inputs.index, progress, replaced, dataset.uri
        )
    factory.made |= {tower.name: tower for tower in towers}
    scorers: list[Scorer] = [*towers]
    if inputs.predictions is not None:
        scorers.append(inputs.predictions)
    known = {scorer.name for scorer in scorers}
    return scorers + [factory.make(name) for name in names if name not in known], made


class Maker(NamedTuple):
    """How a scorer is made, and its class, which says what it needs."""

    kind: type[Scorer]
    make: Callable[[], Scorer]


class ScorerFactory:
    """Makes scorers by name, each once."""

    def __init__(self, dataset: Dataset, config: Config, inputs: Inputs, progress: Progress) -> None:
        self.dataset, self.config, self.inputs, self.progress = dataset, config, inputs, progress
        self.made: dict[str, Any] = {}
        self.makers: dict[str, Maker] = {
            "popularity": Maker(Popularity, lambda: Popularity(dataset.training_counts())),
            "recent_popularity": Maker(RecentPopularity, self._recent_popularity),
            "repeat_last": Maker(RepeatLast, lambda: RepeatLast(dataset.training_counts())),
            "item_transition": Maker(ItemTransition, self._item_transition),
            "content_linear": Maker(
                ContentLinear, lambda: ContentLinear(dataset.training_histories(), self.make("pixrec").vectors)
            ),
            "generative_bm25": Maker(GenerativeBM25, self._generative_bm25),
            **{name: Maker(Sasrec, partial(self._sasrec, name)) for name in LOSS_OF},
            "content_neighbours": Maker(ContentNeighbours, self._content_neighbours),
            "blend": Maker(Blend, self._blend),
            "rrf": Maker(ReciprocalRankFusion, lambda: ReciprocalRankFusion("rrf", self._fused())),
            "round_robin": Maker(RoundRobin, lambda: RoundRobin("round_robin", self._fused())),
        }

    def check_names(self) -> None:
        """Before any work is done: raise ConfigError on a name that nobody makes, InputError on one that needs what
        was not given."""
        wanted = self.config.evaluate
        known = [*self.makers, *REPLACEMENTS, *KNOCKOUTS, "pixrec"]
        for field, names in (("scorers", wanted.scorers), ("fused", wanted.fused)):
            for name in names:
                if name not in known or (field == "fused" and name in FUSIONS):
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f"did you mean {near[0]!r}?" if near and near[0] != name else f"known: {', '.join(known)}"
                    raise ConfigError(f"evaluate.{field} names {name!r}; {hint}")
        merged = wanted.fused if set(FUSIONS) & set(wanted.scorers) else ()
        for field, names in (("scorers", wanted.scorers), ("fused", merged)):
            for name in names:
                kind = self.makers[name].kind if name in self.makers else TowerScorer
                if missing := [need for need in kind.needs if need not in self.given]:
                    raise InputError(f"evaluate.{field} names {name}, which needs {GIVEN_BY[missing[0]]}")

    @property
    def given(self) -> set[Need]:
        return {"events"} if self.inputs.model is None else {"events", "model"}

    def make(self, name: str) -> Any:
        if name not in self.made:
            if name not in self.makers:
                raise InputError(f"evaluate.scorers or evaluate.fused names {name}, which needs a --model that has it")
            self.made[name] = self.makers[name].make()
        return self.made[name]

    def _fused(self) -> list[Scorer]:
        return [self.make(name) for name in self.config.evaluate.fused]

    def _recent_popularity(self) -> Scorer:
        rows, timestamps = self.dataset.training_events()
        share = self.config.evaluate.recent_share
        return RecentPopularity(rows, timestamps, len(self.dataset.items), share)

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

    def _blend(self) -> Scorer:
        model, scorer = self.inputs.model, self.make("pixrec")
        assert model is not None, "check_names has seen to it"
        share = self.config.serve.new_item_share
        return Blend(scorer, fitted_mixture(self.dataset, model.temperature, scorer.scores, self._content, share))

    @cached_property
    def _content(self) -> np.ndarray | None:
        """Content vectors (N, C) of the items, where the model keeps such."""
        index, model = self.inputs.index, self.inputs.model
        if model is None or not isinstance(model.tower, EncoderTower):
            return None
        if index is not None and self.inputs.index_uri is not None:
            return load_content(self.inputs.index_uri, index.manifest, self.dataset.items)
        embedder, catalog = Recipe("pixrec", "").towers(self.dataset.items, model, self.dataset.uri)
        return embedder.items_and_search(catalog, np.arange(len(self.dataset.items)))[1]

    def _content_neighbours(self) -> Scorer:
        if self._content is None:
            raise InputError("evaluate.scorers names content_neighbours, but the model has no frozen encoders")
        return ContentNeighbours(self._content)

    def _generative_bm25(self) -> Scorer:
        model = self.inputs.model
        assert model is not None, "check_names has seen to it"
        if not model.writes_text:
            raise InputError("evaluate.scorers names generative_bm25, but the model has no language model that writes")
        tokens = find_tokens(self.dataset.uri, model.config, model.tower.backbone)
        return GenerativeBM25(model, self.dataset.items, self.config.evaluate, tokens)
