"""The load test against a server that answers at once, one that stands still, and one that refuses."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import pytest
from aiohttp import web

from pixrec import cli
from pixrec.errors import InputError
from pixrec.serving.loadtest import Load, Seen, histogram, mean_stages, quantile, run, stage_sums

Answer = Callable[[int], Awaitable[web.Response]]
RANKING = {"items": [{"item_id": "a", "score": 1.0}], "model_version": "m", "index_version": "i"}


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """The URL of a server in a thread; `answer` is called with the number of each recommendation asked for."""
    ready, place, asked = Event(), dict[str, Any](), 0

    async def recommend(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return await answer(asked - 1)

    async def version(request: web.Request) -> web.Response:
        return web.json_response({"pixrec": "0", "ray": "0"})

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text="")

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/recommend", recommend)
        app.router.add_get("/version", version)
        app.router.add_get("/metrics", metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        place.update(loop=asyncio.get_running_loop(), stop=asyncio.Event(), port=runner.addresses[0][1])
        ready.set()
        await place["stop"].wait()
        await runner.cleanup()

    thread = Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    try:
        yield f"http://127.0.0.1:{place['port']}"
    finally:
        place["loop"].call_soon_threadsafe(place["stop"].set)
        thread.join(30)


async def at_once(number: int) -> web.Response:
    return web.json_response(RANKING)


def test_an_open_loop_keeps_its_rate_and_counts_every_request() -> None:
    with serving(at_once) as url:
        found = run(Load(url, seconds=0.5, rate=100))
    assert 20 < found["requests"] < 100
    assert found["codes"] == {"200": found["requests"]}
    assert found["versions"] == ["m i"]
    assert sum(found["histogram_ms"].values()) == found["requests"]


def test_an_open_loop_sees_a_server_that_stands_still() -> None:
    """All requests that came while it stood are late, not only the one that it stood on."""

    async def stands(number: int) -> web.Response:
        if number == 1:
            still.clear()
            asyncio.get_running_loop().call_later(0.3, still.set)
        await still.wait()
        return web.json_response(RANKING)

    still = asyncio.Event()
    still.set()
    with serving(stands) as url:
        found = run(Load(url, seconds=0.3, rate=200))
    assert found["milliseconds"]["p50"] > 50
    assert found["milliseconds"]["max"] >= 290


def test_a_closed_loop_and_what_is_refused() -> None:
    async def every_other(number: int) -> web.Response:
        return web.json_response(RANKING) if number % 2 == 0 else web.json_response({"detail": "full"}, status=503)

    with serving(every_other) as url:
        found = run(Load(url, seconds=0.3, clients=3))
    assert set(found["codes"]) == {"200", "503"}
    assert abs(found["share_200"] - 0.5) < 0.1


def test_a_server_that_is_not_there_and_arguments_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="does not answer"):
        run(Load("http://127.0.0.1:9", seconds=0.1, rate=1))
    for arguments in ([], ["--rate", "3", "--clients", "2"], ["--rate", "0"]):
        assert cli.main(["bench-serve", "--url", "http://127.0.0.1:9", *arguments]) == 2
        assert "--rate" in capsys.readouterr().err


def test_quantiles_and_histograms() -> None:
    assert [quantile(range(1, 101), q) for q in (0.5, 0.99)] == [51, 100]
    assert math.isnan(quantile([], 0.5))
    assert histogram([0.5, 1.0, 1.5, 9999]) == {"<=1": 2, "<=2": 1, ">5000": 1}
    nothing = Seen([("503", 3.0)]).summary(1.0)
    assert (nothing["answers_per_second"], nothing["milliseconds"]["max"]) == (0, None)


def test_where_the_time_went_is_read_from_the_metrics() -> None:
    text = (
        'pixrec_stage_seconds_sum{replica="a",stage="encode"} 1.0\n'
        'pixrec_stage_seconds_sum{replica="b",stage="encode"} 2.0\n'
        'pixrec_stage_seconds_count{replica="a",stage="encode"} 10.0\n'
        'pixrec_request_seconds_sum{route="/v1/recommend"} 4.0\n'
        'pixrec_request_seconds_count{route="/v1/recommend"} 8.0\n'
        'pixrec_request_seconds_count{route="/healthz"} 8.0\n'
        'pixrec_batch_size_sum{replica="a"} 30.0\n'
        'pixrec_batch_size_count{replica="a"} 10.0\n'
    )
    after = stage_sums(text)
    assert mean_stages({}, after) == {"batch": 3.0, "encode": 300.0, "request": 500.0}
    assert mean_stages(after, after) == {}
