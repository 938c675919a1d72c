"""Several runs of the same evaluation, one a seed, as means and standard deviations. Knows metrics.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pixrec.errors import InputError


def aggregate(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`{"runs": names, "results": {scorer: {metric: {"mean", "sd", "values"}}}}` of metrics.json by name of the run.

    Scorers and metrics that every run has; `sd` is that between runs (n - 1 in the denominator, None for one run).
    It says what another seed of training would change, which the intervals over users do not. Raises InputError
    unless all runs share protocol, number of users and items, and the data set, or where two are of one model.
    """
    names, contents = list(runs), list(runs.values())
    models: dict[str, str] = {}
    for name, content in runs.items():
        _check_alike(names[0], contents[0], name, content)
        model = content.get("provenance", {}).get("model_fingerprint")
        if model is not None and model in models:
            raise InputError(f"{name}: measures the same model as {models[model]}; give runs of different seeds")
        models[model] = name
    scorers = [s for s in contents[0]["results"] if all(s in c["results"] for c in contents)]
    return {"runs": names, "results": {s: _aggregate([c["results"][s] for c in contents]) for s in scorers}}


def _aggregate(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shared = [m for m in results[0] if m != "ci95" and all(m in r for r in results)]
    summary = {}
    for metric in shared:
        values = [float(r[metric]) for r in results]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        summary[metric] = {"mean": float(np.mean(values)), "sd": sd, "values": values}
    return summary


def _check_alike(first: str, one: Mapping[str, Any], name: str, other: Mapping[str, Any]) -> None:
    if not isinstance(other.get("results"), Mapping) or "protocol" not in other:
        raise InputError(f"{name}: is no metrics.json of pixrec evaluate")
    facts = {
        "protocol": lambda m: m["protocol"],
        "number of users": lambda m: m.get("users"),
        "number of items": lambda m: m.get("items"),
        "data set": lambda m: m.get("provenance", {}).get("data_fingerprint"),
    }
    for what, fact in facts.items():
        if fact(one) != fact(other):
            raise InputError(
                f"{name}: its {what} is {fact(other)}, that of {first} is {fact(one)}; compare like with like"
            )
