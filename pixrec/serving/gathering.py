"""Requests that go to the model together. Knows no Ray: only a call that answers several at once."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Told = TypeVar("Told")


class Gathered(Generic[Asked, Told]):
    """At most so many calls are under way; what is asked meanwhile waits, and goes together in the next call.

    A call to another process costs as much as many answers. One that is asked alone goes at once, alone; the more are
    asked, the larger the calls become. Belongs to one event loop.
    """

    def __init__(
        self,
        call: Callable[[list[Asked]], Awaitable[Sequence[Told]]],
        max_together: int,
        max_calls: int,
    ) -> None:
        """call: the answers, in the order of what is asked; what it raises all of them get."""
        self._call, self._max_together, self._max_calls = call, max_together, max_calls
        self._waiting: deque[tuple[Asked, asyncio.Future[Told], contextvars.Context]] = deque()
        self._calls: set[asyncio.Task[None]] = set()

    async def ask(self, asked: Asked) -> Told:
        """The answer. Raises what the call raises."""
        answer: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, answer, contextvars.copy_context()))
        self._send()
        return await answer  # whoever gives up cancels it

    def _send(self) -> None:
        while self._waiting and len(self._calls) < self._max_calls:
            together, context = list[tuple[Asked, asyncio.Future[Told]]](), contextvars.Context()
            while self._waiting and len(together) < self._max_together:
                asked, answer, of_one = self._waiting.popleft()
                if not answer.done():
                    together.append((asked, answer))
                    context = of_one
            if (
                len(together) > 1
            ):  # the call belongs to no one of them, so that none who gives up ends it for the others
                context = contextvars.Context()
            if together:
                call = asyncio.get_running_loop().create_task(self._answer(together), context=context)
                self._calls.add(call)
                call.add_done_callback(self._called)

    def _called(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._send()

    async def _answer(self, together: Sequence[tuple[Asked, asyncio.Future[Told]]]) -> None:
        try:
            told = await self._call([asked for asked, _ in together])
        except asyncio.CancelledError:
            for _, answer in together:
                answer.cancel()
            raise
        except Exception as error:
            for _, answer in together:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), one in zip(together, told, strict=True):
            if not answer.done():
                answer.set_result(one)
