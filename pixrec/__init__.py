"""PixRec: recommends the next product from what products look like and say."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "load_recommender"]

if TYPE_CHECKING:
    from pixrec.recommender import Recommender


def load_recommender(model: str, index: str, data: str | None = None) -> Recommender:
    """Load a model folder and an index (local paths or s3:// URIs) for ranking.

    `data` is the prepared data set behind the index; by default the place the index remembers.
    Raises ArtifactError when a part is absent, incomplete, or the index was made by another model.
    """
    from pixrec.recommender import load_recommender as load

    return load(model, index, data)
