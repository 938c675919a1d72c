"""The paper's ranking: the text of the next item is generated, and the catalog is searched for it with BM25.

Knows a model's language head and the catalog's texts. A second opinion to compare the towers with, far slower than
they: each generated token reads the whole history again.

Shapes: B users · N items · M generated texts of a user · T tokens · V vocabulary.
"""

from __future__ import annotations

import re

import numpy as np
import torch

from pixrec.artifact import Model
from pixrec.config import EvaluateConfig
from pixrec.data.items import ItemTable
from pixrec.data.sequences import Users
from pixrec.data.tokens import PictureTokens
from pixrec.errors import InputError
from pixrec.model.catalog import Catalog
from pixrec.scorers.fusion import take_turns
from pixrec.scorers.protocol import Scorer

_WORD = re.compile(r"\w+")


class GenerativeBM25(Scorer):
    """Beam search over the interleaved model's language head, each text looked up, the rankings merged in turns.

    A beam is as long as half of the catalog's texts are: training says what a text holds, not where it ends.
    """

    name = "generative_bm25"
    needs = ("model",)

    def __init__(
        self, model: Model, items: ItemTable, config: EvaluateConfig, tokens: PictureTokens | None = None
    ) -> None:
        """Raises InputError when bm25s is not installed or no item has a text."""
        self._embedder, self._catalog = model.embedder(), Catalog(items, model.encoder, tokens=tokens)
        self._beams = config.generate_beams
        texts = [items.text(row) for row in range(len(items))]
        self._index = _Index(texts)
        lengths = [len(tokens) for tokens in model.encoder.tokenize([text for text in texts if text])]
        self._length = max(1, min(config.generate_tokens, int(np.median(lengths))))
        self._banned = sorted({*model.encoder.tokenizer.all_special_ids, model.encoder.separator_id})

    def scores(self, users: Users) -> torch.Tensor:
        """(B, N) float32: minus the turn at which an item is given; items that share no word with any text are last."""
        found = [[self._index.scores(text) for text in self.generate(history)] for history in users.histories]
        return torch.cat([take_turns([torch.from_numpy(scores)[None] for scores in texts]) for texts in found])

    @torch.inference_mode()
    def generate(self, history: np.ndarray) -> list[str]:
        """The M likeliest texts of the item after `history` (rows, oldest first), likeliest first."""
        embedder, tower = self._embedder, self._embedder.tower
        _, items, sequence = self._catalog.histories(
            [np.asarray(history)[-embedder.max_history_items :]], embedder.modalities
        )
        pictures = tower.pictures(items.to(embedder.device))
        sequence = sequence.to(embedder.device)
        tokens, slots = sequence.token_ids, sequence.picture_slot
        likelihood = torch.zeros(1, device=tokens.device)
        for _ in range(self._length):
            hidden = tower.backbone.hidden_states(tokens, torch.ones_like(tokens, dtype=torch.bool), slots, pictures)
            logits = tower.backbone.token_logits(hidden[:, -1]).float()
            logits[:, self._banned] = -torch.inf
            totals = likelihood[:, None] + logits.log_softmax(-1)
            likelihood, best = totals.flatten().topk(min(self._beams, totals.numel()))
            beam, token = best // totals.shape[1], best % totals.shape[1]
            tokens = torch.cat([tokens[beam], token[:, None]], dim=1)
            slots = torch.cat([slots[beam], torch.full_like(token[:, None], -1)], dim=1)
        texts = tokens[:, -self._length :].tolist()
        return list(self._catalog.encoder.tokenizer.batch_decode(texts, skip_special_tokens=True))


class _Index:
    """BM25 over texts, by lower-case words."""

    def __init__(self, texts: list[str]) -> None:
        try:
            import bm25s
        except ImportError:
            raise InputError(
                "evaluate.scorers names generative_bm25, which needs bm25s: pip install 'pixrec[generative]'"
            ) from None
        words = [_words(text) for text in texts]
        if not any(words):
            raise InputError("generative_bm25 needs items with a text; the data set has none")
        self._bm25 = bm25s.BM25()
        self._bm25.index(words, show_progress=False)
        self._known = {word for text in words for word in text}

    def scores(self, text: str) -> np.ndarray:
        """(N,) float32; 0 for an item without a word of the text."""
        words = [word for word in _words(text) if word in self._known]
        if not words:
            return np.zeros(self._bm25.scores["num_docs"], dtype=np.float32)
        return self._bm25.get_scores(words)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
