from __future__ import annotations

from typing import Any

import pytest
import ray

from pixrec.cluster.progress import listening


def test_all_rows_have_arrived_when_the_block_ends(ray_session: None):
    rows: list[dict[str, Any]] = []
    with listening(rows.append) as mailbox:
        for step in range(3):
            ray.get(mailbox.put.remote([{"step": step, "row": row} for row in range(2)]))
    assert rows == [{"step": step, "row": row} for step in range(3) for row in range(2)]


def test_what_the_listener_raises_is_raised_at_the_end(ray_session: None):
    heard = []

    def broken(row: dict[str, Any]) -> None:
        heard.append(row["step"])
        raise OSError(f"disk full at {row['step']}")

    with pytest.raises(OSError, match="disk full at 1"), listening(broken) as mailbox:
        ray.get(mailbox.put.remote([{"step": 1}, {"step": 2}]))
    assert heard == [1, 2]


def test_an_error_of_the_work_is_hidden_by_no_other(ray_session: None):
    def broken(row: dict[str, Any]) -> None:
        raise OSError

    with pytest.raises(ZeroDivisionError), listening(broken) as mailbox:  # noqa: PT012
        ray.get(mailbox.put.remote([{"step": 1}]))
        ray.kill(mailbox)
        raise ZeroDivisionError


def test_a_mailbox_that_is_gone_is_an_error(ray_session: None):
    with pytest.raises(ray.exceptions.RayActorError), listening(print) as mailbox:
        ray.kill(mailbox)
