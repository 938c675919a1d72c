"""Which weights learn at which rate, and which of them decay.

A pretrained backbone needs far lower rates than heads that begin at random, and its parts differ: the language model
and the connector of a fine-tuned vision-language model are usually given 1e-5 and its vision part a fifth of that
(LLaVA-OneVision, Li et al. 2024, arXiv 2408.03326), adapters 2e-4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).
`pixrec-tiny` begins at random and learns as fast as its heads. Matrices decay; norms, biases and the temperature do
not, nor do the embeddings of a pretrained backbone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from pixrec.config import Config
from pixrec.model.backbone import ADAPTER, TINY, of_connector
from pixrec.model.towers import DualTower

PRETRAINED = {"backbone": 1e-5, "adapters": 2e-4, "vision": 2e-6, "connector": 1e-5}
"""Peak rates where `train.rates` names none."""
KINDS = (*PRETRAINED, "heads")


def kind_of(name: str, vision_parts: tuple[str, ...]) -> str:
    """Which of KINDS a parameter of the towers is, by its name."""
    if not name.startswith("backbone."):
        return "heads"
    if ADAPTER in name:
        return "adapters"
    if not set(name.split(".")) & set(vision_parts):
        return "backbone"
    return "connector" if of_connector(name, vision_parts) else "vision"


def rate_of(kind: str, config: Config) -> float:
    """Peak rate of a kind."""
    if kind == "heads":
        return config.train.learning_rate
    chosen = getattr(config.train.rates, kind)
    default = config.train.learning_rate if config.model.backbone == TINY else PRETRAINED[kind]
    return float(default if chosen is None else chosen)


def groups(tower: DualTower, named: dict[str, nn.Parameter], config: Config) -> list[dict[str, Any]]:
    """Parameter groups of the optimiser, those of one rate and decay together; scalars apart, which are never sharded.

    The heads come first.
    """
    model = tower.backbone.model
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings()) if _pretrained(config) else ()
    whole = {id(p) for module in embeddings if module is not None for p in module.parameters()}
    by_rate: dict[float, list[nn.Parameter]] = {}
    for kind in reversed(KINDS):
        chosen = [p for n, p in named.items() if kind_of(n, tower.backbone.family.vision_parts) == kind]
        by_rate.setdefault(rate_of(kind, config), []).extend(chosen)
    return [group for rate, params in by_rate.items() for group in _by_decay(params, rate, whole) if group["params"]]


def _pretrained(config: Config) -> bool:
    return config.model.backbone != TINY


def _by_decay(params: list[nn.Parameter], rate: float, whole: set[int]) -> Iterator[dict[str, Any]]:
    """`whole`: matrices that do not decay."""
    decays = [p for p in params if p.ndim >= 2 and id(p) not in whole]
    yield {"params": decays, "lr": rate}
    for chosen in ([p for p in params if p.ndim and (p.ndim < 2 or id(p) in whole)], [p for p in params if not p.ndim]):
        yield {"params": chosen, "lr": rate, "weight_decay": 0.0}
