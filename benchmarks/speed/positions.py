"""Every position of a history teaches in one pass, beside passes that read each prefix anew and teach its end only.

Same model, same histories, same examples, same loss (L_UT with the items of the batch as negatives): forward and
backward of the interleaved tower, without the optimiser. The second twin also encodes the pictures anew for each
prefix, as separate examples in separate batches would.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import workload
from benchmarks.timing import Row, seconds_each
from pixrec.model.catalog import distinct_rows
from pixrec.model.encoding import Histories, Items
from pixrec.model.losses import info_nce
from pixrec.model.towers import DualTower

NUM_HISTORIES, LENGTH = 8, 9


def run() -> list[Row]:
    work = workload.make()
    tower, encoder = work.model.tower.train(), work.model.encoder
    rows, local = distinct_rows(work.histories(NUM_HISTORIES, LENGTH))
    items, ids = work.catalog.items(rows), torch.from_numpy(rows)
    whole = encoder.histories(items, local)
    prefixes = [encoder.histories(items, [history[:end] for history in local]) for end in range(1, LENGTH)]
    target = whole.item[:, 1:].T.flatten()  # prefix by prefix, as the twins go

    steps = {
        "ours": functools.partial(_in_one_pass, tower, items, whole, ids),
        "a pass a prefix": functools.partial(_by_prefix, tower, items, prefixes, target, ids, share_pictures=True),
        "... pictures anew": functools.partial(_by_prefix, tower, items, prefixes, target, ids, share_pictures=False),
    }
    gradients = {name: _gradient(tower, step) for name, step in steps.items()}
    taken = seconds_each(steps, rounds=3)
    examples = NUM_HISTORIES * (LENGTH - 1)
    return [
        Row(
            what=f"training on {NUM_HISTORIES} histories of {LENGTH} items, every position teaches",
            ours=examples / taken["ours"],
            alternative=name,
            theirs=examples / taken[name],
            unit="examples/s",
            note=f"gradients differ by {_apart(gradients['ours'], gradients[name]):.0e} of their norm",
        )
        for name in ("a pass a prefix", "... pictures anew")
    ]


def _in_one_pass(tower: DualTower, items: Items, histories: Histories, ids: Tensor) -> None:
    out = tower(items, histories, generate=False)
    _learn(tower, out.user, out.item, out.target, ids)


def _by_prefix(
    tower: DualTower, items: Items, prefixes: list[Histories], target: Tensor, ids: Tensor, *, share_pictures: bool
) -> None:
    pictures = tower.pictures(items)
    vectors = tower.item_vectors(items, pictures)
    ends = []
    for histories in prefixes:
        states = tower.history_states(histories, pictures if share_pictures else tower.pictures(items))
        ends.append(tower.user_tower(states, histories)[:, -1])
    _learn(tower, torch.cat(ends), vectors, target, ids)


def _learn(tower: DualTower, users: Tensor, vectors: Tensor, target: Tensor, ids: Tensor) -> None:
    tower.zero_grad(set_to_none=True)
    part = info_nce(users, vectors, target, ids, tower.temperature)
    (part.total / part.examples).backward()


def _gradient(tower: DualTower, step: functools.partial[None]) -> Tensor:
    step()
    return torch.cat([p.grad.flatten() for p in tower.parameters() if p.grad is not None])


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm())
