"""Requests that wait while calls are under way go together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from pixrec.serving.gathering import Gathered


class Slow:
    """Answers n with 10 n, once it is let go; negative numbers fail the call that they are in."""

    def __init__(self, **limits: int) -> None:
        self.calls: list[list[int]] = []
        self.let_go = asyncio.Event()
        settings = {"max_together": 3, "max_calls": 1, **limits}
        self.gathered = Gathered[int, int](self.answer, **settings)

    async def answer(self, asked: list[int]) -> list[int]:
        self.calls.append(asked)
        await self.let_go.wait()
        if min(asked) < 0:
            raise ValueError("negative")
        return [10 * one for one in asked]

    def ask(self, *numbers: int) -> list[asyncio.Task[int]]:
        return [asyncio.create_task(self.gathered.ask(number)) for number in numbers]


def run(case: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(case())


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_who_comes_alone_goes_at_once_and_the_others_together() -> None:
    async def case() -> None:
        slow = Slow()
        asked = slow.ask(1, 2, 3, 4, 5)
        await settled()
        assert slow.calls == [[1]]
        slow.let_go.set()
        assert await asyncio.gather(*asked) == [10, 20, 30, 40, 50]
        assert slow.calls == [[1], [2, 3, 4], [5]]

    run(case)


def test_so_many_calls_are_under_way() -> None:
    async def case() -> None:
        slow = Slow(max_calls=2)
        asked = slow.ask(1, 2, 3)
        await settled()
        assert slow.calls == [[1], [2]]
        slow.let_go.set()
        assert await asyncio.gather(*asked) == [10, 20, 30]

    run(case)


def test_who_gives_up_is_not_asked_for_and_holds_up_nobody() -> None:
    async def case() -> None:
        slow = Slow()
        first, second, third = slow.ask(1, 2, 3)
        await settled()
        first.cancel()  # under way
        second.cancel()  # waits
        await settled()
        slow.let_go.set()
        assert await third == 30
        assert slow.calls == [[1], [3]]

    run(case)


def test_a_call_that_fails_fails_those_in_it_and_no_other() -> None:
    async def case() -> None:
        slow = Slow()
        asked = slow.ask(1, 2, -3, 4, 5)
        slow.let_go.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in found] == [int, ValueError, ValueError, ValueError, int]

    run(case)
