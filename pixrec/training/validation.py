"""Figures of a model under training: ranks over the whole catalog, and how much each modality brings.

The workers share items and users between them. Under FSDP every forward pass is a collective, so all take as many.

Shapes: N items of the catalog · B users · D width of the shared space.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from pixrec.config import Config, Modalities
from pixrec.data.sequences import HeldOut
from pixrec.metrics import LOGGED, rank_metrics, target_ranks
from pixrec.model.catalog import Catalog, Embedder
from pixrec.model.losses import gather_with_gradient
from pixrec.model.parallel import rank_and_size
from pixrec.model.towers import DualTower

_USERS_AT_A_TIME = 64


def validate(
    tower: DualTower, catalog: Catalog, held_out: HeldOut, config: Config
) -> tuple[dict[str, float], np.ndarray]:
    """Figures named `valid_…`, none where nobody is held out, and the item vectors (N, D) behind them.

    Loss (cross-entropy of the target among the whole catalog), NDCG@10 and recall. Where the model sees both
    modalities, also loss and recall@10 with the picture removed (`…_text_only`) and with the text removed
    (`…_image_only`): a model that ignores pictures loses nothing when they go.
    """
    vectors = item_table(tower, catalog, config)
    if not len(held_out.targets):
        return {}, vectors
    figures = _figures(tower, catalog, held_out, config, vectors, config.model.modalities)
    alone: list[Modalities] = ["text", "image"]
    if config.train.validate_modalities and config.model.modalities == "both" and catalog.table.with_image.any():
        for modality in alone:
            only = _figures(tower, catalog, held_out, config, item_table(tower, catalog, config, modality), modality)
            figures |= {f"{n}_{modality}_only": only[n] for n in ("valid_loss", "valid_recall@10")}
    return figures, vectors


def item_table(tower: DualTower, catalog: Catalog, config: Config, modalities: Modalities | None = None) -> np.ndarray:
    """Vectors (N, D) of the whole catalog, the same on every worker."""
    embedder = _embedder(tower, catalog, config, modalities)
    mine, _ = _share(len(catalog))
    gathered, _ = gather_with_gradient(torch.from_numpy(embedder.items(catalog, mine)).to(embedder.device))
    rows, _ = gather_with_gradient(torch.from_numpy(mine).to(embedder.device))
    vectors = np.empty((len(catalog), gathered.shape[1]), dtype=np.float32)
    vectors[rows.cpu().numpy()] = gathered.cpu().numpy()
    return vectors


def _figures(
    tower: DualTower, catalog: Catalog, held_out: HeldOut, config: Config, vectors: np.ndarray, modalities: Modalities
) -> dict[str, float]:
    embedder = _embedder(tower, catalog, config, modalities)
    users, counts = _share(len(held_out.targets))
    found = []
    for start in range(0, len(users), _USERS_AT_A_TIME):
        chosen = users[start : start + _USERS_AT_A_TIME]
        scores = embedder.users(catalog, [held_out.histories[i] for i in chosen], vectors) @ vectors.T
        targets = held_out.targets[chosen]
        logits = torch.from_numpy(scores) / float(tower.temperature.detach())
        losses = F.cross_entropy(logits, torch.from_numpy(targets), reduction="none").numpy()
        found.append(np.stack([target_ranks(scores, targets), losses], axis=1).astype(np.float64))
    mine = np.concatenate(found)[counts]
    joined = gather_with_gradient(torch.from_numpy(mine).to(embedder.device))[0].cpu().numpy()
    figures = {f"valid_{k}": v for k, v in rank_metrics(joined[:, 0].astype(np.int64), (1, 10), LOGGED).items()}
    return {**figures, "valid_loss": float(joined[:, 1].mean())}


def _embedder(tower: DualTower, catalog: Catalog, config: Config, modalities: Modalities | None) -> Embedder:
    model = config.model
    return Embedder(tower, catalog.encoder, modalities or model.modalities, model.max_history_items)


def _share(total: int) -> tuple[np.ndarray, np.ndarray]:
    """This worker's share of 0 … total - 1, as long as everybody's, and which of it is not a repetition."""
    rank, size = rank_and_size()
    mine = np.arange(rank, -(-total // size) * size, size)
    return mine % max(1, total), mine < total
