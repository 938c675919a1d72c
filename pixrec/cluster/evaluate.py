"""Scoring over Ray Data: the users in blocks through a pool of actors, each of which holds the model and the items.

Only towers are ranked there: reading a history takes a model, while a baseline is a lookup that stays with the driver.
An actor has the items and the item vectors, never the events; a block carries its own users' histories.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from pixrec import storage
from pixrec.artifact import load_model
from pixrec.console import Progress
from pixrec.data.items import load_items
from pixrec.data.sequences import HeldOut
from pixrec.evaluation import Block, Collector, Outcome, Ranker, Task, rank_here
from pixrec.schema import TIMESTAMPS, USER_ID
from pixrec.scorers import Recipe, Scorer, TowerScorer

_NUMBER, _HISTORY, _TARGET = "number", "history", "target"
_RANKS = ("allowed", "filtered", "ties")
_TOP = "top"
_BLOCKS_PER_ACTOR = 8  # small enough that a slow actor is no long wait at the end, large enough to be worth a task


class UserRanker:
    """One actor: makes the scorer once, ranks blocks of users. Usable without Ray."""

    def __init__(self, recipe: Recipe, vectors: Any, data: str, task: Any, threads: int) -> None:
        """vectors (N, D) and task, which holds no users: themselves, or references to them in Ray's object store."""
        vectors, task = (ray.get(x) if isinstance(x, ray.ObjectRef) else x for x in (vectors, task))
        torch.set_num_threads(threads)
        on_gpu = task.config.gpus_per_actor and torch.cuda.is_available()
        model = load_model(recipe.model_uri, "cuda" if on_gpu else "cpu")
        self._task: Task = task
        self._scorer = TowerScorer(recipe.name, *recipe.towers(load_items(data), model, data), vectors, recipe)

    @torch.no_grad()
    def __call__(self, block: pa.Table) -> pa.Table:
        """Users (B rows) to their numbers, ranks, ties and lists."""
        histories = [np.asarray(h) for h in block.column(_HISTORY).to_pylist()]
        targets = block.column(_TARGET).to_numpy().copy()  # Ray's memory is read-only
        timestamps = None
        if TIMESTAMPS in block.column_names:
            timestamps = [np.asarray(t) for t in block.column(TIMESTAMPS).to_pylist()]
        users = HeldOut(block.column(USER_ID).to_pylist(), histories, targets, timestamps)
        found = self._task.rank(self._scorer, users)
        columns: dict[str, Any] = {_NUMBER: block.column(_NUMBER)}
        columns |= {name: pa.array(values) for name, values in zip(_RANKS, found[:3], strict=True)}
        flat = pa.array(found.top.reshape(-1))
        return pa.table({**columns, _TOP: pa.FixedSizeListArray.from_arrays(flat, max(1, found.top.shape[1]))})


def ranker(data: str) -> Ranker:
    """A ranker of the prepared data set at `data`, which every node must be able to read. Needs a connected Ray."""

    def rank(scorer: Scorer, task: Task, progress: Progress) -> Outcome:
        if not isinstance(scorer, TowerScorer) or scorer.recipe is None:
            return rank_here(scorer, task, progress)
        recipe = dataclasses.replace(scorer.recipe, model_uri=storage.absolute(scorer.recipe.model_uri))
        return _rank_on_actors(scorer, recipe, storage.absolute(data), task, progress)

    return rank


def _rank_on_actors(scorer: TowerScorer, recipe: Recipe, data: str, task: Task, progress: Progress) -> Outcome:
    config, total = task.config, len(task.held_out.targets)
    without_users = Task(task.held_out.only(np.zeros(0, np.int64)), task.training_counts, task.tie_order, config)
    blocks = list(_blocks(task))
    ranked = ray.data.from_arrow(blocks).map_batches(
        UserRanker,
        fn_constructor_args=(
            recipe,
            ray.put(scorer.vectors),
            data,
            ray.put(without_users),
            max(1, int(config.cpus_per_actor)),
        ),
        batch_size=task.users_per_block,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor or None,
    )
    collector = Collector(task)
    for block in cast(Iterable[pa.Table], ranked.iter_batches(batch_format="pyarrow", batch_size=None)):
        allowed, filtered, ties = (block.column(name).to_numpy() for name in _RANKS)
        top = block.column(_TOP).combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(block), -1)
        collector.add(block.column(_NUMBER).to_numpy(), Block(allowed, filtered, ties, top))
        progress(scorer.name, collector.done, total)
    if collector.done != total:
        raise RuntimeError(f"{collector.done} users were ranked of {total}")
    return collector.outcome()


def _blocks(task: Task) -> Iterator[pa.Table]:
    """The users as tables, in multiples of what is ranked at a time."""
    users, step = task.held_out, task.users_per_block
    total = len(users.targets)
    per_block = -(-total // max(1, task.config.num_actors * _BLOCKS_PER_ACTOR))
    per_block = -(-per_block // step) * step
    for first in range(0, total, per_block):
        numbers = np.arange(first, min(first + per_block, total))
        part = users.only(numbers)
        lengths = [len(history) for history in part.histories]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        lists = {_HISTORY: part.histories} | ({} if part.timestamps is None else {TIMESTAMPS: part.timestamps})
        yield pa.table(
            {
                _NUMBER: numbers,
                USER_ID: pa.array(part.user_ids, pa.string()),
                _TARGET: part.targets,
                **{
                    name: pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(values).astype(np.int64)))
                    for name, values in lists.items()
                },
            }
        )
