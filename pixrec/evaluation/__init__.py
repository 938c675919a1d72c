"""How well scorers foretell what users do next: the protocol, the audit of who sees what, significance, results."""

from pixrec.evaluation.audit import audit_dataset, audit_elsewhere, dataset_guards, provenance
from pixrec.evaluation.protocol import Block, Collector, Ranker, Task, evaluate_scorers, rank_here
from pixrec.evaluation.results import Evaluation, Outcome
from pixrec.evaluation.seeds import aggregate
from pixrec.evaluation.significance import bootstrap_ci, paired_difference_ci, randomisation_p

__all__ = [
    "Block",
    "Collector",
    "Evaluation",
    "Outcome",
    "Ranker",
    "Task",
    "aggregate",
    "audit_dataset",
    "audit_elsewhere",
    "bootstrap_ci",
    "dataset_guards",
    "evaluate_scorers",
    "paired_difference_ci",
    "provenance",
    "randomisation_p",
    "rank_here",
]
