from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fakes import tiny_dataset

from pixrec import storage
from pixrec.config import EvaluateConfig
from pixrec.errors import InputError
from pixrec.evaluation.protocol import evaluate_scorers
from pixrec.metrics import rank_targets
from pixrec.scorers import Users
from pixrec.scorers.predictions import load_predictions

ITEMS = ["a", "b", "c", "d", "e"]
USERS = ["u0", "u1", "u2"]


def named(*user_ids: str) -> Users:
    return Users(user_ids, [np.array([0])] * len(user_ids))


def write(folder: Path, columns: dict[str, object], schema: pa.Schema | None = None) -> str:
    uri = str(folder / "lists.parquet")
    storage.write_table(uri, pa.table(columns, schema=schema))
    return uri


def test_listed_items_rank_by_place_and_all_others_last(tmp_path: Path):
    uri = write(tmp_path, {"user_id": ["u1", "u0"], "item_ids": [["e", "b"], ["c"]]})
    predictions = load_predictions(uri, "mine", USERS, ITEMS)
    scores = predictions.scores(named("u1", "u1", "u0", "u2"))
    ranked = rank_targets(scores, [1, 0, 2, 2])
    assert ranked.allowed.tolist() == [2, 5, 1, 5]  # an unlisted target and a user without a list: last
    assert ranked.ties.tolist() == [0, 2, 0, 4]


def test_what_does_not_fit_is_counted(tmp_path: Path):
    lists = [["a", "zebra", "a", None, "b"], ["a"], ["b"], None]
    uri = write(tmp_path, {"user_id": ["u0", "stranger", "other", "u1"], "item_ids": lists})
    predictions = load_predictions(uri, "mine", USERS, ITEMS)
    assert predictions.counts == {
        "users": 2,
        "users_missing": 1,
        "users_unknown": 2,
        "items_unknown": 2,
        "items_repeated": 1,
    }
    finite = np.isfinite(predictions.scores(named("u0", "u1")).numpy())
    assert finite.tolist() == [[True, True, False, False, False], [False] * 5]


def test_kinds_of_strings_and_lists_do_not_matter(tmp_path: Path):
    schema = pa.schema([("user_id", pa.large_string()), ("item_ids", pa.large_list(pa.large_string()))])
    uri = write(tmp_path, {"user_id": ["u2"], "item_ids": [["d"]]}, schema)
    assert load_predictions(uri, "mine", USERS, ITEMS).scores(named("u2")).argmax() == 3


FAULTS = {
    "no users": ({"item_ids": [["a"]]}, "no column 'user_id'.*it has item_ids"),
    "no lists": ({"user_id": ["u0"]}, "no column 'item_ids'"),
    "numbers": ({"user_id": ["u0"], "item_ids": [[1]]}, "'item_ids' is list<.*int64>, must be a list of strings"),
    "numbered users": ({"user_id": [1], "item_ids": [["a"]]}, "'user_id' is int64; cast it to string"),
    "twice": ({"user_id": ["u0", "u0"], "item_ids": [["a"], ["b"]]}, "'u0' has several rows"),
    "strangers": ({"user_id": ["x"], "item_ids": [["a"]]}, "none of its 1 users is a test user"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refusals_name_file_and_cure(tmp_path: Path, fault: str):
    columns, message = FAULTS[fault]
    with pytest.raises(InputError, match=f"lists.parquet: .*{message}"):
        load_predictions(write(tmp_path, columns), "mine", USERS, ITEMS)


def test_an_empty_table_is_refused(tmp_path: Path):
    schema = pa.schema([("user_id", pa.string()), ("item_ids", pa.list_(pa.string()))])
    with pytest.raises(InputError, match="the table is empty"):
        load_predictions(write(tmp_path, {"user_id": [], "item_ids": []}, schema), "mine", USERS, ITEMS)


def test_perfect_predictions_reach_one_under_the_protocol(tmp_path: Path):
    dataset = tiny_dataset()
    held_out, ids = dataset.held_out("test"), dataset.items.item_ids
    lists = [[ids[target]] for target in held_out.targets]
    uri = write(tmp_path, {"user_id": held_out.user_ids, "item_ids": lists})
    scorer = load_predictions(uri, "mine", held_out.user_ids, ids)
    config = EvaluateConfig(bootstrap_samples=10, batch_size=3)
    counts, with_image = dataset.training_counts(), dataset.items.with_image
    evaluation = evaluate_scorers([scorer], held_out, config, training_counts=counts, with_image=with_image)
    result = evaluation.metrics_json("leave_one_out")["results"]["mine"]
    assert (result["recall@1"], result["mrr"]) == (1.0, 1.0)
    assert result["coverage@10"] == len(set(held_out.targets)) / len(ids)  # unlisted items are not recommended
