"""The report in words and numbers: names, sentences, the table for the terminal. Knows the shape of metrics.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pixrec.scorers.replaced import MEANINGS as REPLACED_MEANINGS

MINUS, NO_BREAK_SPACE = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
HEADLINE_METRICS = ("recall@1", "recall@10", "ndcg@10", "mrr")
METRIC_NAMES = {"mrr": "MRR"}
SCORER_MEANINGS = {
    "pixrec": "pictures and text",
    "pixrec_text_only": "text alone",
    "pixrec_image_only": "pictures alone",
    "popularity": "the best-sellers list, the same for everybody",
    "recent_popularity": "the best-sellers of late",
    "repeat_last": "the user's own items again, latest first",
    "item_transition": "what most often followed the user's last item",
    "blend": "the model, what followed, best-sellers and the user's own items, mixed",
    "content_linear": "a linear map of the history's item vectors",
    "content_neighbours": "what is like the history's last items, untrained",
    "sasrec": "learned item ids, no content",
    "sasrec_sampled": "learned item ids, softmax over sampled items",
    "sasrec_full": "learned item ids, softmax over all items",
    "sasrec_gbce": "learned item ids, gBCE over sampled items",
    "generative_bm25": "generated text, looked up with BM25",
} | {f"pixrec_{how}": meaning for how, meaning in REPLACED_MEANINGS.items()}
FUSION_MEANINGS = {"rrf": "by reciprocal rank", "round_robin": "taking turns"}
KNOCKOUT_MEANINGS = {
    "trained": "the same, trained on",
    "scored": "the same model, shown",
    "replaced": "the same model, shown",
}


def number(value: float) -> str:
    return f"{value:.4f}"


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", MINUS)


def percent(value: float) -> str:
    return f"{100 * value:.1f}{NO_BREAK_SPACE}%"


def probability(p: float) -> str:
    return "p < .01" if p < 0.01 else f"p = {p:.2f}".replace(" 0.", " .")


def metric_name(metric: str) -> str:
    if metric in METRIC_NAMES:
        return METRIC_NAMES[metric]
    name, at, k = metric.partition("@")
    return (name.upper() if len(name) <= 4 else name.capitalize()) + at + k


def kind(scorer: str) -> str:
    """How a scorer is coloured: the model, a knockout of it, or something to compare with."""
    return "main" if scorer == "pixrec" else "knockout" if scorer.startswith("pixrec_") else "baseline"


def meaning(scorer: str, metrics: Mapping[str, Any]) -> str:
    """What a scorer is, in a few words; empty where metrics.json does not say."""
    if scorer in FUSION_MEANINGS:
        fused = metrics.get("settings", {}).get("evaluate", {}).get("fused", ["two scorers"])
        return f"{' and '.join(fused)} {FUSION_MEANINGS[scorer]}"
    if scorer == metrics.get("predictions", {}).get("scorer"):
        return "ranked lists read from a file"
    how = KNOCKOUT_MEANINGS.get(metrics.get("knockouts", {}).get(scorer, ""))
    return " ".join(filter(None, [how, SCORER_MEANINGS.get(scorer)]))


def stage_name(stage: str) -> str:
    """What a stage of training trains, by the name that the log has behind that of the modality."""
    known = {"": "The towers", "compact": "The compact user tower", "compact_joint": "Both towers together"}
    return known.get(stage, f"The towers, stage {stage}")


def title(metrics: Mapping[str, Any], data_name: str) -> str:
    return f"{_author(_evaluated(metrics))} on {data_name}"


def evaluated(metrics: Mapping[str, Any]) -> str:
    """What was evaluated, on how much."""
    split = metrics["protocol"]["split"].replace("_", "-")
    items = f" · {metrics['items']:,} items" if "items" in metrics else ""
    return f"Evaluated: {_evaluated(metrics)} · {split} split · {metrics['users']:,} users{items}"


def lead(metrics: Mapping[str, Any]) -> str:
    """The headline: Recall@10 of what is evaluated beside the best-sellers list, in shoppers."""
    results, scorer = metrics["results"], _evaluated(metrics)
    value, (low, high) = results[scorer]["recall@10"], results[scorer]["ci95"]["recall@10"]
    floor = results["popularity"]["recall@10"] if scorer != "popularity" and "popularity" in results else None
    compared = [value] if floor is None else [value, floor]
    coarse = min(compared) >= 0.01 and (len({round(100 * v) for v in compared}) == len(set(compared)))
    of = 100 if coarse else 1000
    text = (
        f"{_author(scorer)} puts the item that a shopper picked next into its top 10 for {of * value:.0f} of {of:,} "
        "shoppers"
    )
    if floor is not None:
        text += f"; the best-sellers list manages {of * floor:.0f}"
    return f"{text}. (95{NO_BREAK_SPACE}% interval: {of * low:.0f} to {of * high:.0f}.)"


def _evaluated(metrics: Mapping[str, Any]) -> str:
    """The scorer that the report is about."""
    return "pixrec" if "pixrec" in metrics["results"] else next(iter(metrics["results"]))


def _author(scorer: str) -> str:
    return {"pixrec": "PixRec", "popularity": "The best-sellers list"}.get(scorer, scorer)


def protocol_sentences(metrics: Mapping[str, Any]) -> list[str]:
    protocol = metrics["protocol"]
    splits = {
        "leave_one_out": "Split: leave one out. Each user's last event is the test target, the one before it the "
        "validation target; training sees the rest.",
        "temporal": "Split: by time. Training ends before the validation period, which ends before the test period; "
        "each user's last event in the test period is the test target.",
    }
    seen = {
        "allowed": "Items that the user already has stay among the candidates.",
        "filtered": "Items that the user already has are removed from the candidates, unless one is the target.",
    }
    items = f" of {metrics['items']:,} items" if "items" in metrics else ""
    sample = metrics.get("settings", {}).get("evaluate", {}).get("max_users")
    return [
        splits.get(protocol["split"], f"Split: {protocol['split']}."),
        *(
            [f"Users: {metrics['users']:,}, drawn at random where there are more (evaluate.max_users)."]
            if sample
            else []
        ),
        f"Candidates: the whole catalog{items}, never a sample.",
        "Ties are ranked pessimistically: an item with the same score as the target counts as ranked above it.",
        seen[protocol["seen"]],
        "Each user has one target, so recall equals the hit rate, and MAP@k equals MRR@k.",
        "Intervals are 95 % bootstrap intervals over users: how much a figure would vary with other users like these, "
        "not how much it would if the model were trained again.",
        "p: how often a difference at least as large appears when each user's two results are swapped at random "
        "(paired randomisation test), adjusted for the number of comparisons (Holm).",
        "Coverage@k: the share of the catalog that is in at least one user's top k. Novelty@k: how rare the "
        "recommended items are in training, as the mean of minus log2 of their share of the events, in bits.",
    ]


def guard_sentences(metrics: Mapping[str, Any]) -> list[str]:
    guards = metrics.get("guards")
    if not guards:
        return []
    ties = ", ".join(f"{scorer} {percent(share)}" for scorer, share in guards["tie_share"].items())
    return [
        *_audit_sentence(guards.get("audit")),
        f"{percent(guards['repeat_share'])} of the targets are items that the user already has.",
        f"Targets whose score another item shares: {ties}.",
        *_random_tie_sentence(guards),
        f"Recall@10 of random guessing: {number(guards['chance_recall@10'])}.",
        *_floor_sentence(guards),
        *_one_event_sentence(guards),
        *_time_sentence(metrics),
        *_held_out_sentence(guards.get("held_out_items")),
        *_predictions_sentence(metrics.get("predictions")),
    ]


def warnings(metrics: Mapping[str, Any]) -> list[str]:
    below = metrics.get("guards", {}).get("below_popularity", [])
    found = []
    if below:
        names = f"{' and '.join(below)} {'ranks' if len(below) == 1 else 'rank'}"
        found.append(f"{names} below popularity in Recall@10: the best-sellers list would serve these users better.")
    if metrics.get("protocol", {}).get("split") == "temporal" and not _tells_time(metrics):
        found.append(
            "The split is by time, but the timestamps only tell the order of each user's events, not when they were."
        )
    for source in metrics.get("guards", {}).get("audit", {}).get("elsewhere", []):
        trained = f"The model was trained {_where(source)}"
        if not source["checked"]:
            why = f"which could not be audited ({source['reason']})"
            found.append(f"{trained}, {why}: it may have seen events of this test there.")
        elif later := source["events_after_test_start"]:
            found.append(f"{trained}, with {later:,} events of the test period: none of this test, but of its time.")
    return found


def notes(metrics: Mapping[str, Any]) -> list[str]:
    """How the knockouts among the scorers were made."""
    made: dict[str, list[str]] = {}
    for scorer, how in metrics.get("knockouts", {}).items():
        made.setdefault(how, []).append(scorer)
    sentences = {
        "trained": "trained the same way on one modality alone, with the same budget.",
        "scored": "the model itself, scored with one modality removed; a weaker test than a knockout trained with the "
        "same budget (train.knockouts).",
        "replaced": "the model itself, scored with one modality replaced by a constant or by noise, which it was not "
        "trained to expect.",
    }
    return [f"{', '.join(made[how])}: {sentence}" for how, sentence in sentences.items() if how in made]


def format_table(metrics: Mapping[str, Any]) -> str:
    """The results as plain text, one line a scorer, recall@10 with its 95 % interval; then a line of cold targets."""
    head = ["scorer", *(metric_name(m) for m in HEADLINE_METRICS), "95 % of Recall@10"]
    lines = [
        [scorer, *(number(result[m]) for m in HEADLINE_METRICS), " to ".join(map(number, result["ci95"]["recall@10"]))]
        for scorer, result in metrics["results"].items()
    ]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    table = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, ["-" * w for w in widths], *lines]
    ]
    return "\n".join([*table, *_cold_line(metrics)])


def _cold_line(metrics: Mapping[str, Any]) -> list[str]:
    """Recall@10 of every scorer on targets that occur in no training history."""
    cold = metrics.get("buckets", {}).get("target_cold", {"users": 0})
    if not cold["users"]:
        return []
    figures = [
        f"{scorer} {number(result['recall@10'])} ({' to '.join(map(number, result['ci95']['recall@10']))})"
        for scorer, result in cold["results"].items()
    ]
    return [f"Recall@10 of {cold['users']:,} cold targets: {', '.join(figures)}"]


def _audit_sentence(audit: Mapping[str, Any] | None) -> list[str]:
    if audit is None:
        return []
    targets, learners = audit["targets_checked"], ", ".join(audit["windows_of"])
    return [
        f"Audited: none of the {targets['test']:,} test and {targets['valid']:,} validation targets is among the "
        f"{audit['training_events']:,} events or in one of {audit['training_windows_checked']:,} windows of training "
        f"({learners}).",
        *(
            f"Audited: the model was trained {_where(source)}; none of the {source['training_events']:,} events and "
            f"{source['training_windows_checked']:,} windows there is held out here."
            for source in audit.get("elsewhere", [])
            if source["checked"]
        ),
    ]


def _where(source: Mapping[str, Any]) -> str:
    """In which stage and on which data set the model was trained before, or in place of, the one at hand."""
    name = (source["data"] or "").rstrip("/").rpartition("/")[2] or "of unknown place"
    return f"in a stage {source['stage']} on the data set {name}" if source["stage"] else f"on another data set, {name}"


def _random_tie_sentence(guards: Mapping[str, Any]) -> list[str]:
    figures = [
        f"{scorer} {number(found['recall@1'])} and {number(found['recall@10'])}"
        for scorer, found in guards.get("random_ties", {}).items()
        if guards["tie_share"][scorer] > 0
    ]
    return [f"Recall@1 and @10 with ties broken at random, which is generous: {', '.join(figures)}."] if figures else []


def _floor_sentence(guards: Mapping[str, Any]) -> list[str]:
    floor = guards["popularity_recall@10"]
    return [] if floor is None else [f"Recall@10 of popularity, which a model has to beat: {number(floor)}."]


def _one_event_sentence(guards: Mapping[str, Any]) -> list[str]:
    share = guards.get("users_with_one_event_share")
    return [] if share is None else [f"{percent(share)} of all users have a single event and cannot be evaluated."]


def _time_sentence(metrics: Mapping[str, Any]) -> list[str]:
    if _tells_time(metrics) or "recent_popularity" not in metrics["results"]:
        return []
    return ["The timestamps only tell the order of each user's events, so recent_popularity has no clock to go by."]


def _tells_time(metrics: Mapping[str, Any]) -> bool:
    return bool(metrics.get("guards", {}).get("timestamps_tell_time", True))


def _held_out_sentence(items: int | None) -> list[str]:
    if not items:
        return []
    return [
        f"{items:,} items were held out of training entirely: their events were left out of the data set, except where "
        "they are a test target (prepare.cold_item_share)."
    ]


def _predictions_sentence(counts: Mapping[str, Any] | None) -> list[str]:
    if counts is None:
        return []
    return [
        f"{counts['scorer']}: read from a file with lists for {counts['users']:,} of the users. Counted as misses: "
        f"{counts['users_missing']:,} users without a list. Left out: {counts['users_unknown']:,} users who are not "
        f"tested, {counts['items_unknown']:,} unknown items, {counts['items_repeated']:,} repeats within a list."
    ]
