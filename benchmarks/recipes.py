"""What each recipe for a real backbone needs, computed by the dry run; the memory column of recipes/README.md.

    python -m benchmarks.recipes [recipe ...]

No weights and no hub are needed: the shapes are those of `benchmarks.shapes`. A step of the recipe's size is planned in
which every history has `model.max_history_items` events, no item comes twice and every text and picture is as long as
it may be, so a run takes no more. Tokens come from a small tokenizer, which changes nothing where texts are cut.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shapes import PUBLISHED, shape, small_tokenizer
from pixrec.artifact import Model, planned_model
from pixrec.config import Config, load_config
from pixrec.model.encoding import Content
from pixrec.model.objective import Batch
from pixrec.training.dry_run import plan_memory

FOLDER = Path(__file__).parents[1] / "recipes"
NAMES = {published: name for name, published in PUBLISHED.items()}


def backbone_recipes() -> list[Path]:
    """The recipes whose backbone has a shape here."""
    found = [(path, load_config(path.read_text()).model.backbone) for path in sorted(FOLDER.glob("*.yaml"))]
    return [path for path, backbone in found if backbone in NAMES]


def plan(recipe: Path) -> dict[str, Any]:
    """Parameters, tokens of a step and a picture, memory of a recipe."""
    config = load_config(recipe.read_text())
    word = "considerable "
    tokenizer = small_tokenizer([word])
    with tempfile.TemporaryDirectory() as folder:
        shape(NAMES[config.model.backbone], tokenizer.get_vocab()).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        at_hand = dataclasses.replace(config.model, backbone=folder, revision=None)
        model = planned_model(dataclasses.replace(config, model=at_hand), [])
    batch = _fullest(model, config, word)
    memory = plan_memory(model.tower, batch, config)
    parameters = list(model.tower.parameters())
    return {
        "recipe": recipe.name,
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "all": sum(p.numel() for p in parameters),
        "tokens_per_picture": model.encoder.tokens_per_picture,
        "tokens_per_step_per_worker": int(batch.tokens()[0]),
        **memory,
    }


def _fullest(model: Model, config: Config, word: str) -> Batch:
    train, encoder = config.train, model.encoder
    shown = train.micro_batch_histories or train.histories_per_step // max(1, train.num_workers)
    length = config.model.max_history_items + 1
    side = encoder.image_size_px
    picture = np.zeros((side, side, 3), np.uint8)
    if config.model.freeze_vision:  # its tokens are stored
        picture = np.zeros((encoder.tokens_per_picture, model.tower.backbone.family.picture_width), np.float16)
    contents = [Content(word * config.model.max_text_tokens, picture)] * (shown * length)
    items = encoder.items(contents)
    histories = encoder.histories(items, list(np.arange(len(items)).reshape(shown, length)))
    return Batch(items, histories, torch.arange(len(items)), torch.zeros(len(items)))


def main(names: list[str]) -> None:
    for recipe in backbone_recipes():
        if not names or recipe.name in names or recipe.stem in names:
            print(json.dumps(plan(recipe)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
