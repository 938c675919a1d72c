"""PixRec: recommends the next product from what products look like and say.

    data = pixrec.prepare(items, interactions, out="data")
    model = pixrec.train(data, out="model", config={"train.epochs": 3})
    index = pixrec.embed(model, data, out="index")
    report = pixrec.evaluate(model, data, out="report", index=index)
    recommender = pixrec.load_recommender(model, index)
    recommender.recommend(["p00017", "p00042"], k=10)

Tables are places (a path, an s3:// URI) or in memory (pyarrow, pandas, Polars). What a function returns is a small
handle that stands for its place. Every error whose cure lies with the caller is a PixRecError.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Config",
    "PixRecError",
    "PreparedData",
    "PublishedIndex",
    "Recommender",
    "Report",
    "TrainedModel",
    "__version__",
    "embed",
    "evaluate",
    "load_recommender",
    "prepare",
    "train",
]

_HOMES = {
    "pixrec.config": ("Config",),
    "pixrec.errors": ("PixRecError",),
    "pixrec.handles": ("PreparedData", "PublishedIndex", "Report", "TrainedModel"),
    "pixrec.recommender": ("Recommender",),
    "pixrec.verbs": ("embed", "evaluate", "load_recommender", "prepare", "train"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from pixrec.config import Config
    from pixrec.errors import PixRecError
    from pixrec.handles import PreparedData, PublishedIndex, Report, TrainedModel
    from pixrec.recommender import Recommender
    from pixrec.verbs import embed, evaluate, load_recommender, prepare, train
else:

    def __getattr__(name: str) -> Any:
        """A public name is imported when it is first asked for: `import pixrec` alone loads neither torch nor Ray."""
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = getattr(importlib.import_module(_HOME_OF[name]), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
