"""Names, sentences and the table for the terminal."""

from pixrec.report import format_table
from pixrec.report.words import (
    evaluated,
    guard_sentences,
    lead,
    meaning,
    metric_name,
    probability,
    protocol_sentences,
    title,
    warnings,
)


def test_table_for_the_terminal(metrics):
    *lines, cold = format_table(metrics).splitlines()
    assert cold == (
        "Recall@10 of 1 cold targets: pixrec 1.0000 (1.0000 to 1.0000), popularity 1.0000 (1.0000 to 1.0000)"
    )
    metrics["buckets"]["target_cold"] |= {"users": 0, "results": {}}
    assert format_table(metrics).splitlines() == lines
    assert [line.split()[0] for line in lines[2:]] == ["pixrec", "popularity"]
    assert "1.0000 to 1.0000" in lines[2]
    assert len({len(line) for line in lines}) == 1


def test_warnings():
    assert warnings({}) == []
    checked = {"data": "/a/boxes", "checked": True, "training_events": 1234, "training_windows_checked": 77}
    elsewhere = [
        {"stage": "joint", "data": None, "checked": False, "reason": "model.json does not say where it lay"},
        {"stage": "", **checked, "events_after_test_start": 5},
        {"stage": "joint", **checked, "events_after_test_start": 0},
    ]
    told = warnings({"guards": {"below_popularity": ["pixrec"], "audit": {"elsewhere": elsewhere}}})
    assert told == [
        "pixrec ranks below popularity in Recall@10: the best-sellers list would serve these users better.",
        "The model was trained in a stage joint on the data set of unknown place, which could not be audited "
        "(model.json does not say where it lay): it may have seen events of this test there.",
        "The model was trained on another data set, boxes, with 5 events of the test period: none of this test, but of "
        "its time.",
    ]


def test_names_and_probabilities():
    named = [metric_name(m) for m in ("recall@10", "ndcg@10", "mrr", "map@5", "coverage@1")]
    assert named == ["Recall@10", "NDCG@10", "MRR", "MAP@5", "Coverage@1"]
    assert [probability(p) for p in (0.001, 0.01, 0.5, 1.0)] == ["p < .01", "p = .01", "p = .50", "p = 1.00"]


def test_a_scorer_is_told_by_what_it_is_made_of():
    settings = {"evaluate": {"fused": ["sasrec", "popularity"], "max_users": 5}}
    metrics = {"knockouts": {"pixrec_text_only": "trained"}, "predictions": {"scorer": "mine"}, "settings": settings}
    told = {name: meaning(name, metrics) for name in ("pixrec_text_only", "mine", "rrf", "round_robin", "unheard")}
    assert told == {
        "pixrec_text_only": "the same, trained on text alone",
        "mine": "ranked lists read from a file",
        "rrf": "sasrec and popularity by reciprocal rank",
        "round_robin": "sasrec and popularity taking turns",
        "unheard": "",
    }
    assert meaning("rrf", {}) == "two scorers by reciprocal rank"


def test_a_sample_and_timestamps_without_time_are_told(metrics):
    plain = [*protocol_sentences(metrics), *guard_sentences(metrics)]
    assert not any("max_users" in sentence or "no clock" in sentence for sentence in plain)
    metrics["settings"] = {"evaluate": {"max_users": 2}}
    metrics["guards"]["timestamps_tell_time"] = False
    metrics["results"]["recent_popularity"] = metrics["results"]["popularity"]
    metrics["protocol"]["split"] = "temporal"
    assert "Users: 2, drawn at random where there are more (evaluate.max_users)." in protocol_sentences(metrics)
    assert any("no clock" in sentence for sentence in guard_sentences(metrics))
    assert any("The split is by time, but" in sentence for sentence in warnings(metrics))


def headline(users: int = 2000, **recalls: float) -> str:
    of = {s: {"recall@10": v, "ci95": {"recall@10": [v * 0.9, v * 1.1]}} for s, v in recalls.items()}
    return lead({"users": users, "results": of})


def test_the_headline_counts_shoppers():
    both = headline(pixrec=0.64, popularity=0.031, sasrec=0.7)
    assert both == (
        "PixRec puts the item that a shopper picked next into its top 10 for 64 of 100 shoppers; the best-sellers list "
        "manages 3. (95\N{NO-BREAK SPACE}% interval: 58 to 70.)"
    )
    assert "for 63 of 1,000 shoppers; the best-sellers list manages 60." in headline(pixrec=0.063, popularity=0.06)
    assert "for 500 of 1,000 shoppers; the best-sellers list manages 4." in headline(pixrec=0.5, popularity=0.004)
    assert headline(mine=0.5).startswith(
        "mine puts the item that a shopper picked next into its top 10 for 50 of 100 sh"
    )
    assert headline(popularity=0.5).startswith("The best-sellers list puts the item")


def test_the_report_says_what_was_evaluated():
    metrics = {"protocol": {"split": "temporal"}, "users": 1234, "items": 56_789, "results": {"mine": {}}}
    assert title(metrics, "Lamps") == "mine on Lamps"
    assert title({"results": {"popularity": {}, "pixrec": {}}}, "Lamps") == "PixRec on Lamps"
    assert evaluated(metrics) == "Evaluated: mine · temporal split · 1,234 users · 56,789 items"
