"""Everything that can be ranked, behind one protocol: `Scorer.scores(users)` scores every item for every user."""

from pixrec.data.sequences import Users
from pixrec.scorers.build import Inputs, build_scorers
from pixrec.scorers.predictions import Predictions, load_predictions
from pixrec.scorers.protocol import Need, Scorer
from pixrec.scorers.sasrec import LOSS_OF, Sasrec, train_sasrec
from pixrec.scorers.towers import KNOCKOUTS, Recipe, TowerScorer, aligned

__all__ = [
    "KNOCKOUTS",
    "LOSS_OF",
    "Inputs",
    "Need",
    "Predictions",
    "Recipe",
    "Sasrec",
    "Scorer",
    "TowerScorer",
    "Users",
    "aligned",
    "build_scorers",
    "load_predictions",
    "train_sasrec",
]
