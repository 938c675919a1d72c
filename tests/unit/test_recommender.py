from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import (
    Seen,
    square,
    tiny_config,
    tiny_dataset,
    tiny_items,
    tiny_model,
    write_index,
    write_model,
    write_prepared,
    write_tokens,
)

import pixrec
from pixrec.artifact import Index, Model, load_index
from pixrec.data.items import ItemTable
from pixrec.data.sequences import Dataset, Users
from pixrec.errors import ArtifactError, InputError, UnreadableImage
from pixrec.index import top_k
from pixrec.model.catalog import Catalog
from pixrec.model.encoding import Content
from pixrec.query import Answer, NewItem, Query
from pixrec.recommender import Recommender, load_recommender, recent_counts
from pixrec.schema import TEXT_FIELDS
from pixrec.scorers.blend import Blend, fitted_mixture
from pixrec.scorers.towers import TowerScorer


def index_of(model: Model, items: ItemTable, rows: np.ndarray | None = None) -> Index:
    rows = np.arange(len(items)) if rows is None else rows
    vectors = model.embedder().items(Catalog(items, model.encoder), rows)
    return Index("v1", [items.item_ids[row] for row in rows], vectors, {})


@pytest.fixture(scope="module")
def recommender(model: Model, items: ItemTable, dataset: Dataset) -> Recommender:
    return Recommender(model, index_of(model, items), items, dataset.training_counts())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Model, dataset: Dataset) -> Path:
    """A folder with data/, model/ and index/."""
    folder = tmp_path_factory.mktemp("made")
    data, saved = write_prepared(folder / "data", dataset), write_model(folder / "model", model)
    write_index(folder / "index", saved, data)
    return folder


def ids(answer: Answer | list[tuple[str, float]]) -> list[str]:
    return [item_id for item_id, _ in (answer.items if isinstance(answer, Answer) else answer)]


def test_the_best_items_are_those_nearest_to_the_user(recommender: Recommender, model: Model, items: ItemTable):
    index = index_of(model, items)
    user = model.embedder().users(Catalog(items, model.encoder), [np.array([3, 7])], index.vectors)
    scores, rows = top_k(user, index.vectors, 5)
    found = recommender.recommend(["i03", "i07"], 5)
    expected = [
        (items.item_ids[row], score) for row, score in zip(rows[0], scores[0], strict=True) if row not in (3, 7)
    ]
    assert ids(found)[: len(expected)] == [item_id for item_id, _ in expected]
    assert len(found) == 5
    values = [score for _, score in found]
    assert values == sorted(values, reverse=True)
    np.testing.assert_allclose(values[: len(expected)], [score for _, score in expected], rtol=1e-5)
    assert (recommender.model_version, recommender.index_version) == (model.fingerprint, "v1")


@pytest.fixture(scope="module")
def timed(items: ItemTable, dataset: Dataset) -> Recommender:
    """One whose user tower reads time, with weights enough to be seen."""
    model = tiny_model(tiny_config(model={"user_tower": "compact", "compact": {"time": "gaps"}}), items)
    with torch.no_grad():
        model.tower.compact.user.gap.weight.normal_()
    return Recommender(model, index_of(model, items), items, dataset.training_counts())


def test_timestamps_of_the_history_are_read(timed: Recommender):
    history = ["i03", "i07"]

    def scores(**given: Any) -> list[float]:
        return [score for _, score in timed.answer([Query(**{"history": history, "k": 5, **given})])[0].items]

    soon, late = scores(timestamps=[0, 1000]), scores(timestamps=[0, 10**10])
    assert soon != pytest.approx(late, abs=1e-4)
    assert scores(timestamps=[10**12, 10**12 + 1000]) == pytest.approx(soon, abs=1e-6)
    assert scores(timestamps=None) != pytest.approx(soon, abs=1e-4)
    # an item that nobody knows takes its moment along
    assert scores(history=["i03", "??", "i07"], timestamps=[0, 5, 1000]) == pytest.approx(soon, abs=1e-6)
    together = timed.answer([Query(history, 5, timestamps=t) for t in ([0, 1000], None, [0, 10**10])])
    assert [[s for _, s in answer.items] for answer in together] == [
        pytest.approx(expected, abs=1e-5) for expected in (soon, scores(timestamps=None), late)
    ]


def test_timestamps_of_new_items_are_read(timed: Recommender):
    new = {"new": NewItem({"title": "Square"})}
    answers = timed.answer([Query(["i03", "new"], 5, new_items=new, timestamps=t) for t in ([0, 1000], [0, 10**10])])
    assert answers[0].items != answers[1].items


@pytest.mark.parametrize(
    ("timestamps", "message"),
    [([1], "holds 1 values for 2 items"), ([2, 1], r"timestamps\[1\] 1 is before"), ([0, 10**16], "10,000 years")],
)
def test_timestamps_that_do_not_fit_are_refused(timed: Recommender, timestamps: list[int], message: str):
    with pytest.raises(InputError, match=message):
        timed.answer([Query(["i03", "i07"], 5, timestamps=timestamps)])


def test_a_model_without_time_does_not_look_at_timestamps(recommender: Recommender):
    asked = recommender.answer([Query(["i03", "i07"], 5, timestamps=[0, 1000]), Query(["i03", "i07"], 5)])
    assert asked[0] == asked[1]


def test_only_the_recent_history_counts(recommender: Recommender):
    long = [f"i{row:02d}" for row in range(8)]
    kwargs = {"exclude_history": False}
    assert recommender.recommend(long, 12, **kwargs) == recommender.recommend(long[-4:], 12, **kwargs)
    assert recommender.recommend(long, 12, **kwargs) != recommender.recommend(long[-3:], 12, **kwargs)


def test_what_is_left_out(recommender: Recommender):
    history = ["i01", "i02"]
    everything = ids(recommender.recommend(history, 12, exclude_history=False))
    assert sorted(everything) == sorted(f"i{row:02d}" for row in range(12))
    assert ids(recommender.recommend(history, 12)) == [x for x in everything if x not in history]
    left = ids(recommender.recommend(history, 12, exclude=["i05", "nobody"]))
    assert left == [x for x in everything if x not in (*history, "i05")]
    assert (
        ids(recommender.recommend(history, 3, exclude=everything[:6]))
        == [x for x in everything[6:] if x not in history][:3]
    )


@pytest.mark.parametrize("k", [12, 13, 1000])
def test_more_than_there_is(recommender: Recommender, k: int):
    assert len(recommender.recommend(["i00"], k)) == 11
    assert len(recommender.recommend([], k)) == 12
    assert recommender.recommend(["i00"], k, exclude=recommender.items.item_ids) == []


@pytest.mark.parametrize("k", [0, -3])
def test_less_than_one(recommender: Recommender, k: int):
    for ask in (lambda: recommender.recommend(["i00"], k), lambda: recommender.similar("i00", k)):
        with pytest.raises(InputError, match=f"k is {k}: must be at least 1"):
            ask()


def test_filters(recommender: Recommender):
    (answer,) = recommender.answer([Query(["i00"], 12, filters={"brand": ["Bob"], "year": [2001, 2002, 2003]})])
    assert set(ids(answer)) == {"i01", "i03"}
    (everything,) = recommender.answer([Query(["i00"], 12)])
    assert ids(answer) == [x for x in ids(everything) if x in ("i01", "i03")]
    (nothing,) = recommender.answer([Query(["i00"], 12, filters={"brand": ["Eve"]})])
    assert (nothing.items, nothing.fallback) == ([], False)
    with pytest.raises(InputError, match="'colour' is no filter field"):
        recommender.answer([Query(["i00"], filters={"colour": ["red"]})])


def test_ranges_and_values_of_one_batch_are_kept_apart(recommender: Recommender):
    filters = [{"year": {"min": 2001, "max": 2003}}, {"year": {"min": 2003}}, {"year": [2001, 2003]}, {}]
    answers = recommender.answer([Query(["i00"], 12, filters=each) for each in filters])
    (everything,) = recommender.answer([Query(["i00"], 12)])
    years = {f"i{row:02d}": recommender.items.fields(row)["year"] for row in range(len(recommender.items))}
    passing = [lambda y: 2001 <= y <= 2003, lambda y: y >= 2003, lambda y: y in (2001, 2003), lambda y: True]
    for answer, passes in zip(answers, passing, strict=True):
        assert ids(answer) == [x for x in ids(everything) if passes(years[x])]


def test_the_structure_of_an_index_in_another_order_is_renumbered(model: Model, items: ItemTable, dataset: Dataset):
    asked = []

    class Structure:
        proposed_each = 4

        def renumbered(self, rows: np.ndarray) -> Structure:
            asked.append(rows.tolist())
            return self

    backwards = np.arange(len(items))[::-1]
    for rows in (backwards, np.arange(len(items))):
        index = dataclasses.replace(index_of(model, items, rows), structure=Structure)
        recommender = Recommender(model, index, items, dataset.training_counts())
        assert recommender.recommend(["i03"], 3)
    assert asked == [backwards.tolist()]


def test_a_range_keeps_the_numbers_within_it(recommender: Recommender):
    def found(**filters: Any) -> set[str]:
        (answer,) = recommender.answer([Query(["i00"], 12, filters=filters)])
        return set(ids(answer))

    assert found(year={"min": 2003, "max": 2005}) == {"i03", "i04", "i05"}
    assert found(year={"min": 2009.5}) == {"i10", "i11"}
    assert found(price={"max": 10.0}, year={"min": 2001}) == {"i03", "i06", "i09"}
    assert found(year={"min": 3000}) == set()
    with pytest.raises(InputError, match="'brand' holds no numbers"):
        found(brand={"min": 1})
    with pytest.raises(InputError, match=r"'colour' is no filter field of this catalog; known: .*year.*price"):
        found(colour={"min": 1})


def test_diversity_and_caps_choose_among_the_best(recommender: Recommender):
    plain, capped, diverse = recommender.answer(
        [Query(["i00"], 12), Query(["i00"], 6, max_per={"brand": 2}), Query(["i00"], 5, diversity=0.9)]
    )
    ann, bob = ([i for i in ids(plain) if int(i[1:]) % 2 == odd] for odd in (0, 1))
    assert ids(capped) == [i for i in ids(plain) if i in {*ann[:2], *bob[:2]}]
    assert dict(capped.items).items() <= dict(plain.items).items(), "scores stay what they are"
    assert ids(diverse)[0] == ids(plain)[0]
    assert ids(diverse) != ids(plain)[:5]
    (popular,) = recommender.answer([Query([], 4, max_per={"brand": 1})])
    assert (popular.fallback, len(popular.items)) == (True, 2)
    assert len(recommender.similar("i00", 9, max_per={"year": 1}).items) == 9


def test_a_cap_looks_further_than_the_first_candidates(recommender: Recommender, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pixrec.retrieval.ranking.LEAST_CANDIDATES", 1)
    (plain,) = recommender.answer([Query(["i00"], 12)])
    (capped,) = recommender.answer([Query(["i00"], 2, max_per={"brand": 1})])
    first = ids(plain)[0]
    other = next(i for i in ids(plain) if int(i[1:]) % 2 != int(first[1:]) % 2)
    assert ids(capped) == [first, other]


def test_reasons_name_the_nearest_item_of_the_history(recommender: Recommender, model: Model, items: ItemTable):
    vectors = index_of(model, items).vectors
    (answer,) = recommender.answer([Query(["ghost", "i03", "i07"], 4, reasons=True)])
    assert answer.reasons is not None
    for item_id in ids(answer):
        row = int(item_id[1:])
        nearest = max((3, 7), key=lambda known: float(vectors[known] @ vectors[row]))
        assert answer.reasons[item_id] == f"i{nearest:02d}"
    without, unknown = recommender.answer([Query(["i03"], 4), Query(["ghost"], 4, reasons=True)])
    assert (without.reasons, unknown.reasons) == (None, {})


def test_what_is_searched_elsewhere_is_ranked_alike(made: Path):
    """Also by a recommender whose own vectors are not looked at."""
    whole = pixrec.load_recommender(made / "model", made / "index")
    rest = pixrec.load_recommender(made / "model", made / "index")
    rest.ranking._searcher = rest.ranking._content = None  # type: ignore[assignment]
    queries = [Query(["i03", "i07"], 4), Query([], 2), Query(["i03"], 3, filters={"brand": ["Ann"]}, diversity=0.5)]
    asked = whole.read(queries)
    assert rest.rank(asked, whole.encode(asked), whole.ranking.found) == whole.answer(queries)
    vector = whole.item_vectors(["i03"])[0]
    assert rest.near(vector, Query([], 4, ["i03"]), search=whole.ranking.found) == whole.similar("i03", 4)


def test_unknown_items_are_passed_over_and_named(recommender: Recommender):
    (answer,) = recommender.answer([Query(["new", "i01", "newer", "new"], 3)])
    assert answer.unknown_items == ["new", "newer"]
    assert answer.fallback is False
    assert answer.score_kind == "cosine"
    assert answer.items == recommender.recommend(["i01"], 3)


@pytest.mark.parametrize("history", [[], ["new"]])
def test_without_a_known_history_the_most_bought_items_come(
    recommender: Recommender, dataset: Dataset, history: list[str]
):
    (answer,) = recommender.answer([Query(history, 4)])
    counts = dataset.training_counts()
    order = np.argsort(-counts, kind="stable")[:4]
    assert ids(answer) == [dataset.items.item_ids[row] for row in order]
    np.testing.assert_allclose([score for _, score in answer.items], counts[order] / counts.sum(), rtol=1e-6)
    assert (answer.fallback, answer.unknown_items) == (True, history)
    assert answer.score_kind == "purchase_share"
    (filtered,) = recommender.answer([Query(history, 4, exclude=["i02"], filters={"brand": ["Ann"]})])
    assert "i02" not in ids(filtered)
    assert set(ids(filtered)) <= {f"i{row:02d}" for row in range(0, 12, 2)}


def test_recent_events_count_more(made: Path):
    day = 86_400_000
    counts = recent_counts(np.array([0, 0, 1, 2]), np.array([0, 0, 2 * day, day]), 4, half_life_days=1.0)
    assert counts.tolist() == [0.5, 1.0, 0.5, 0.0]
    assert recent_counts(np.zeros(0, int), np.zeros(0, int), 2, 1.0).tolist() == [0, 0]
    plain = load_recommender(str(made / "model"), str(made / "index"))
    late = load_recommender(str(made / "model"), str(made / "index"), half_life_days=1e-5)
    # Shoppers walk from item to item, one event a second: half of an event is left after .86 s.
    assert ids(late.recommend([], 12)) != ids(plain.recommend([], 12))
    assert sum(score for _, score in late.recommend([], 12)) == pytest.approx(1.0)


def test_many_queries_at_once_are_answered_as_each_alone(recommender: Recommender):
    queries = [
        Query(["i00"], 3),
        Query([], 2),
        Query(["i01", "i02", "i03", "i04", "i05"], 12, exclude_history=False),
        Query(["new", "i07"], 4, exclude=["i08"], filters={"brand": ["Ann"]}),
        Query(["i09", "i09"], 1),
    ]
    for query, answer in zip(queries, recommender.answer(queries), strict=True):
        (alone,) = recommender.answer([query])
        assert ids(answer) == ids(alone)
        assert (answer.unknown_items, answer.fallback) == (alone.unknown_items, alone.fallback)
        np.testing.assert_allclose([s for _, s in answer.items], [s for _, s in alone.items], atol=1e-6)
    assert recommender.answer([]) == []


def test_similar(recommender: Recommender, model: Model, items: ItemTable):
    vectors = index_of(model, items).vectors
    nearest = np.argsort(-(vectors @ vectors[4]), kind="stable")
    answer = recommender.similar("i04", 3)
    assert ids(answer) == [items.item_ids[row] for row in nearest if row != 4][:3]
    assert (answer.unknown_items, answer.fallback) == ([], False)
    assert (answer.score_kind, answer.model_version, answer.index_version) == ("cosine", model.fingerprint, "v1")
    assert len(recommender.similar("i04", 50).items) == 11
    assert set(ids(recommender.similar("i04", 50, {"year": [2000, 2004]}))) == {"i00"}
    with pytest.raises(KeyError):
        recommender.similar("new")


def test_search_encodes_what_is_given_as_an_item(recommender: Recommender, model: Model, items: ItemTable):
    own = items.image(5)
    assert own is not None
    answer = recommender.search(items.text(5), own, 3)
    assert ids(answer)[0] == "i05"
    assert answer.items[0][1] == pytest.approx(1, abs=1e-5)
    vector = model.embedder().contents([Content("Tile", None)])[0]
    scores = index_of(model, items).vectors @ vector
    assert ids(recommender.search("Tile", k=2)) == [
        items.item_ids[row] for row in np.argsort(-scores, kind="stable")[:2]
    ]
    assert len(recommender.search(image=square(0.5), k=4).items) == 4
    assert ids(recommender.search("Tile", k=5, filters={"year": [2003]})) == ["i03"]


def test_search_wants_something_to_look_for(recommender: Recommender):
    with pytest.raises(InputError, match="search needs a text or a picture"):
        recommender.search("  ")
    with pytest.raises(UnreadableImage):
        recommender.search("Tile", b"no picture")


def test_an_interleaved_tower_reads_contents(items: ItemTable, dataset: Dataset):
    model = tiny_model(tiny_config(model={"user_tower": "interleaved"}), items)
    recommender = Recommender(model, index_of(model, items), items, dataset.training_counts())
    both, alone = recommender.answer([Query(["i00", "i01", "i02"], 4), Query(["i05"], 3)])
    assert len(both.items) == 4
    single = recommender.recommend(["i05"], 3)
    assert ids(alone) == ids(single)
    np.testing.assert_allclose([s for _, s in alone.items], [s for _, s in single], atol=1e-5)


def test_a_history_of_items_that_the_data_set_lacks(items: ItemTable, dataset: Dataset):
    """The vector of a new item is the one the catalog would have; it is made once and usable in histories at once."""
    model = tiny_model(tiny_config(model={"user_tower": "compact", "compact": {"width": 32}}), items)
    recommender = Recommender(model, index_of(model, items), items, dataset.training_counts())
    last = len(items) - 1  # beyond the identities: its vector is its content's
    copy = NewItem({n: v for n, v in items.fields(last).items() if n in TEXT_FIELDS}, items.image(last))
    vectors = recommender.encode_new({"new": copy, "i00": copy})
    assert list(vectors) == ["new"]
    np.testing.assert_allclose(vectors["new"], index_of(model, items).vectors[last], atol=1e-6)
    known, new = recommender.answer(
        [Query(["i03", items.item_ids[last]], 5), Query(["i03", "new", "gone"], 5, new_items={"new": copy})]
    )
    assert new.unknown_items == ["gone"]
    assert [i for i, _ in new.items if i != items.item_ids[last]][:4] == ids(known)[:4]
    made: list[int] = []
    contents = recommender._embedder.contents
    recommender._embedder.contents = lambda found: made.append(len(found)) or contents(found)  # type: ignore
    again = recommender.encode_new({"another name": copy, "different": NewItem({"title": "lamp"})})
    assert made == [1]
    np.testing.assert_array_equal(again["another name"], vectors["new"])


def test_an_interleaved_tower_takes_no_new_items(recommender: Recommender):
    with pytest.raises(InputError, match="interleaved"):
        recommender.encode_new({"new": NewItem({"title": "lamp"})})
    with pytest.raises(InputError, match="interleaved"):
        recommender.answer([Query(["new"], new_items={"new": NewItem({"title": "lamp"})})])


def test_items_that_came_after_the_index(model: Model, items: ItemTable, dataset: Dataset, recommender: Recommender):
    behind = Recommender(model, index_of(model, items, np.arange(10)), items, dataset.training_counts())
    history = ["i10", "i11"]
    expected = [x for x in recommender.recommend(history, 12) if x[0] < "i10"]
    found = behind.recommend(history, 12)
    assert ids(found) == ids(expected)
    assert (ids(behind.similar("i11", 5)), len(behind.recommend([], 99))) == (
        [x for x in ids(recommender.similar("i11", 12)) if x < "i10"][:5],
        10,
    )


def test_an_index_in_another_order_and_of_items_that_are_gone(model: Model, items: ItemTable, dataset: Dataset):
    counts = dataset.training_counts()
    straight = Recommender(model, index_of(model, items), items, counts)
    turned = Recommender(model, index_of(model, items, np.arange(12)[::-1]), items, counts)
    assert ids(turned.recommend(["i01"], 12)) == ids(straight.recommend(["i01"], 12))
    stray = dataclasses.replace(index_of(model, items), item_ids=[*items.item_ids[:-1], "gone"])
    with pytest.raises(ArtifactError, match="holds item 'gone', which the data set lacks"):
        Recommender(model, stray, items, counts)


def test_load_recommender(made: Path, recommender: Recommender):
    loaded = pixrec.load_recommender(str(made / "model"), str(made / "index"))
    assert ids(loaded.recommend(["i01", "i02"], 5)) == ids(recommender.recommend(["i01", "i02"], 5))
    assert loaded.model_version == recommender.model_version
    assert loaded.index_version == load_index(str(made / "index")).version


def test_a_blend_ranks_as_the_scorer_of_evaluation_does(made: Path, model: Model, items: ItemTable, dataset: Dataset):
    places = (str(made / name) for name in ("model", "index", "data"))
    blended = pixrec.load_recommender(*places, blend=True)
    answer = blended.answer([Query(["i00", "i01"], k=12, exclude_history=False), Query(["i03"], exclude=["i04"])])
    catalog = Catalog(items, model.encoder)
    scorer = TowerScorer("pixrec", model.embedder(), catalog, index_of(model, items).vectors)
    wanted = Blend(scorer, fitted_mixture(dataset, model.temperature, scorer.scores))
    scores = wanted.scores(Users(["u"], [np.array([0, 1])]))[0]
    assert ids(answer[0])[:3] == [items.item_ids[row] for row in scores.topk(3).indices]
    assert answer[0].score_kind == "probability"
    assert sum(score for _, score in answer[0].items) == pytest.approx(1.0, abs=1e-4)
    assert not {"i03", "i04"} & set(ids(answer[1])), "the history and what is excluded stay out"
    assert ids(blended.answer([Query(["i01"], filters={"year": [2005]})])[0]) == ["i05"]
    assert blended.answer([Query(["nobody knows"])])[0].score_kind == "purchase_share"


@pytest.mark.parametrize("stored", [[0, 1], []])
def test_a_history_is_read_from_stored_picture_tokens(
    tmp_path: Path, items: ItemTable, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, stored: list[int]
):
    """A request shows the vision part those pictures of its history alone that have no tokens."""
    model = tiny_model(tiny_config(model={"freeze_vision": True}), items)
    data, saved = write_prepared(tmp_path / "data", dataset), write_model(tmp_path / "model", model)
    write_index(tmp_path / "index", saved, data)
    expected = pixrec.load_recommender(str(tmp_path / "model"), str(tmp_path / "index")).recommend(["i00", "i01"], 5)
    write_tokens(tmp_path / "data.tokens", saved, tiny_items(with_pictures=stored))
    write_tokens(tmp_path / "data.tokens", tiny_model(tiny_config(train={"seed": 4}), items), items)  # stale
    loaded = pixrec.load_recommender(str(tmp_path / "model"), str(tmp_path / "index"))
    seen = Seen(monkeypatch, dataclasses.replace(model, tower=loaded._embedder.tower))
    found = loaded.recommend(["i00", "i01"], 5)
    assert dict(found) == pytest.approx(dict(expected), abs=2e-3)
    assert seen.pictures == 2 - len(stored)
    loaded.recommend(["i07", "i01"], 5)
    assert seen.pictures == (1 if stored else 4)


def test_a_tree_that_moved_is_still_whole(made: Path, tmp_path: Path):
    moved = Path(shutil.copytree(made, tmp_path / "elsewhere" / "made"))
    loaded = pixrec.load_recommender(str(moved / "model"), str(moved / "index"))
    assert len(loaded.recommend(["i01"], 3)) == 3
    shutil.move(moved / "index", tmp_path / "index")  # the index alone: the data set is still where it was made
    loaded = pixrec.load_recommender(str(moved / "model"), str(tmp_path / "index"))
    assert len(loaded.recommend(["i01"], 3)) == 3


def test_the_data_set_beside_the_index_comes_first(made: Path, tmp_path: Path):
    moved = Path(shutil.copytree(made, tmp_path / "made"))
    write_prepared(moved / "data", tiny_dataset(num_users=1))  # other counts than those where the index was made
    loaded = pixrec.load_recommender(str(moved / "model"), str(moved / "index"))
    assert loaded.recommend([], 1) == [("i00", 1.0)]
    named = pixrec.load_recommender(str(moved / "model"), str(moved / "index"), str(made / "data"))
    assert named.recommend([], 1)[0][1] < 1


def lose_data(folder: Path) -> None:
    shutil.rmtree(folder / "data")


def other_model(folder: Path) -> None:
    shutil.rmtree(folder / "model")
    write_model(folder / "model", tiny_model(tiny_config(train={"seed": 9})))


def other_data(folder: Path) -> None:
    shutil.rmtree(folder / "data")
    write_prepared(folder / "data", tiny_dataset(tiny_items(4)))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "model"), "holds no complete model"),
        (lambda folder: shutil.rmtree(folder / "index"), "holds no published index"),
        (lambda folder: (folder / "index" / "CURRENT").unlink(), "holds no published index"),
        (lose_data, "its data set is neither at .*; name it with --data"),
        (other_model, "was made by model .*; run pixrec embed with this model"),
        (other_data, "holds item 'i04', which the data set lacks"),
    ],
)
def test_parts_that_do_not_belong_together(
    model: Model, dataset: Dataset, tmp_path: Path, harm: Callable[[Path], None], message: str
):
    data, saved = write_prepared(tmp_path / "data", dataset), write_model(tmp_path / "model", model)
    write_index(tmp_path / "index", saved, data)
    harm(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        pixrec.load_recommender(str(tmp_path / "model"), str(tmp_path / "index"))
