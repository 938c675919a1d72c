"""Requests that go to the model together. Knows no Ray: only a call that answers several at once."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Told = TypeVar("Told")


@dataclass(frozen=True)
class _Waiting(Generic[Asked, Told]):
    asked: Asked
    answer: asyncio.Future[Told]
    context: contextvars.Context


class Gathered(Generic[Asked, Told]):
    """At most so many calls are under way; what is asked meanwhile waits, and goes together in the next call.

    A call to another process costs as much as many answers. One that is asked alone goes at once, alone; the more are
    asked, the larger the calls become. Belongs to one event loop.
    """

    def __init__(
        self, call: Callable[[list[Asked]], Awaitable[Sequence[Told]]], max_together: int, max_calls: int
    ) -> None:
        """call: the answers, in the order of what is asked; what it raises all of them get."""
        self._call, self._max_together, self._max_calls = call, max_together, max_calls
        self._waiting: deque[_Waiting[Asked, Told]] = deque()
        self._calls: set[asyncio.Task[None]] = set()

    async def ask(self, asked: Asked) -> Told:
        """The answer. Raises what the call raises."""
        answer: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(asked, answer, contextvars.copy_context()))
        self._send()
        return await answer  # whoever gives up cancels it

    def _send(self) -> None:
        while len(self._calls) < self._max_calls and (together := self._next()):
            # A call for several belongs to none of them: Serve ends what was called for a request that is given up.
            context = together[0].context if len(together) == 1 else contextvars.Context()
            call = asyncio.get_running_loop().create_task(self._answer(together), context=context)
            self._calls.add(call)
            call.add_done_callback(self._called)

    def _next(self) -> list[_Waiting[Asked, Told]]:
        together: list[_Waiting[Asked, Told]] = []
        while self._waiting and len(together) < self._max_together:
            one = self._waiting.popleft()
            if not one.answer.done():
                together.append(one)
        return together

    def _called(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._send()

    async def _answer(self, together: Sequence[_Waiting[Asked, Told]]) -> None:
        try:
            told = await self._call([one.asked for one in together])
        except asyncio.CancelledError:
            for one in together:
                one.answer.cancel()
            raise
        except Exception as error:
            for one in together:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        for one, answer in zip(together, told, strict=True):
            if not one.answer.done():
                one.answer.set_result(answer)
