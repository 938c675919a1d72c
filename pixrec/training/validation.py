"""Figures of a model under training: ranks over the catalog or a sample of it, and how much each modality brings.

The workers share items and users between them. Under FSDP every forward pass is a collective, so all take as many.

Shapes: N items of the catalog · C candidates · B users · D width of the shared space.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from pixrec.config import Config, Modalities
from pixrec.data.sequences import HeldOut, sample_users
from pixrec.metrics import LOGGED, rank_metrics, target_ranks
from pixrec.model.catalog import Catalog, Embedder
from pixrec.model.losses import gather_with_gradient
from pixrec.model.parallel import rank_and_size
from pixrec.model.towers import DualTower

_USERS_AT_A_TIME = 64
VALIDATION_SHARE = 0.05
"""Of the training time, what a validation on a sample takes, in items encoded: a step encodes each item of a window
twice, alone and within the history, and its backward pass takes as long as two forward passes."""
_LEAST_USERS, _LEAST_CANDIDATES = 50, 1000


def validate(
    tower: DualTower, catalog: Catalog, held_out: HeldOut, config: Config
) -> tuple[dict[str, float], np.ndarray]:
    """Figures named `valid_…`, none where nobody is held out, and the item vectors (N, D) of the whole catalog where
    they were computed, otherwise none (0, D).

    Loss (cross-entropy of the target among the candidates), NDCG@10 and recall. The candidates are the whole catalog;
    where that has more than `train.validation_candidates` items, they are a sample and the users' targets, and
    `valid_candidates` says how many. Where the model sees both modalities, also loss and recall@10 with the picture
    removed (`…_text_only`) and with the text removed (`…_image_only`): a model that ignores pictures loses nothing when
    they go.
    """
    alone: list[Modalities] = ["text", "image"]
    if not (config.train.validate_modalities and config.model.modalities == "both" and catalog.table.with_image.any()):
        alone = []
    sampled = len(catalog) > config.train.validation_candidates
    whole = not sampled or config.train.extra_negatives > 0
    table = item_table(tower, catalog, config) if whole else np.zeros((0, config.model.embedding_width), np.float32)
    if not len(held_out.targets):
        return {}, table
    rows = np.arange(len(catalog))
    if sampled:
        held_out, rows = _sample(len(catalog), held_out, config, 1 + len(alone))
    vectors = table if not sampled else table[rows] if whole else item_table(tower, catalog, config, rows=rows)
    figures = _figures(tower, catalog, held_out, config, rows, vectors, config.model.modalities)
    for modality in alone:
        seen = item_table(tower, catalog, config, modality, rows)
        only = _figures(tower, catalog, held_out, config, rows, seen, modality)
        figures |= {f"{n}_{modality}_only": only[n] for n in ("valid_loss", "valid_recall@10")}
    return figures | ({"valid_candidates": float(len(rows))} if sampled else {}), table


def _sample(num_items: int, held_out: HeldOut, config: Config, views: int) -> tuple[HeldOut, np.ndarray]:
    """Users and ascending rows of candidates (C,), their targets among them; the same at every validation.

    `views`: how often the model is validated, each time with other modalities.
    """
    train, longest = config.train, config.model.max_history_items
    trained = 3 * 2 * train.validate_every_steps * train.histories_per_step * longest
    half = int(VALIDATION_SHARE * trained / views / 2)  # one for the users' histories, one for the candidates
    users = sample_users(held_out, max(_LEAST_USERS, half // longest), train.seed)
    most = min(max(_LEAST_CANDIDATES, half), train.validation_candidates)
    drawn = np.random.default_rng([train.seed, 4]).choice(num_items, most, replace=False)
    return users, np.union1d(drawn, users.targets)


def item_table(
    tower: DualTower,
    catalog: Catalog,
    config: Config,
    modalities: Modalities | None = None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Vectors (N, D) of the whole catalog, or (C, D) of the items at `rows`, the same on every worker."""
    embedder = _embedder(tower, catalog, config, modalities)
    total = len(catalog) if rows is None else len(rows)
    mine, _ = _share(total)
    made = embedder.items(catalog, mine if rows is None else rows[mine])
    gathered, _ = gather_with_gradient(torch.from_numpy(made).to(embedder.device))
    places, _ = gather_with_gradient(torch.from_numpy(mine).to(embedder.device))
    vectors = np.empty((total, gathered.shape[1]), dtype=np.float32)
    vectors[places.cpu().numpy()] = gathered.cpu().numpy()
    return vectors


def _figures(
    tower: DualTower,
    catalog: Catalog,
    held_out: HeldOut,
    config: Config,
    rows: np.ndarray,
    vectors: np.ndarray,
    modalities: Modalities,
) -> dict[str, float]:
    """`vectors` (C, D): those of the candidates at `rows` (C,)."""
    embedder = _embedder(tower, catalog, config, modalities)
    users, counts = _share(len(held_out.targets))
    found, given = [], vectors if len(rows) == len(catalog) else None  # an interleaved tower reads no vectors
    for start in range(0, len(users), _USERS_AT_A_TIME):
        chosen = users[start : start + _USERS_AT_A_TIME]
        scores = embedder.users(catalog, [held_out.histories[i] for i in chosen], given) @ vectors.T
        targets = np.searchsorted(rows, held_out.targets[chosen])
        logits = torch.from_numpy(scores) / float(tower.temperature.detach())
        losses = F.cross_entropy(logits, torch.from_numpy(targets), reduction="none").numpy()
        found.append(np.stack([target_ranks(scores, targets), losses], axis=1).astype(np.float64))
    mine = np.concatenate(found)[counts]
    joined = gather_with_gradient(torch.from_numpy(mine).to(embedder.device))[0].cpu().numpy()
    figures = {f"valid_{k}": v for k, v in rank_metrics(joined[:, 0].astype(np.int64), (1, 10), LOGGED).items()}
    return {**figures, "valid_loss": float(joined[:, 1].mean())}


def _embedder(tower: DualTower, catalog: Catalog, config: Config, modalities: Modalities | None) -> Embedder:
    model = config.model
    wanted = modalities or model.modalities
    return Embedder(tower, catalog.encoder, wanted, model.max_history_items, precision=config.train.precision)


def _share(total: int) -> tuple[np.ndarray, np.ndarray]:
    """This worker's share of 0 … total - 1, as long as everybody's, and which of it is not a repetition."""
    rank, size = rank_and_size()
    mine = np.arange(rank, -(-total // size) * size, size)
    return mine % max(1, total), mine < total
