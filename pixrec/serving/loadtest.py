"""Load on a running server, and what it made of it. Knows HTTP; knows no Ray and no model.

In an open loop requests arrive at random moments at a given rate, whether or not earlier ones have been answered, as
shoppers do; latency counts from the moment a request was due, so a server that stands still is seen to. In a closed
loop a number of clients each send their next request when the last is answered, which finds the highest throughput.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from pixrec.errors import InputError

BUCKETS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
QUANTILES = (0.5, 0.9, 0.99)
NOT_ANSWERED = "not answered"
_LONGEST_HISTORY = 50


@dataclass(frozen=True)
class Load:
    """What is asked of the server."""

    url: str
    seconds: float = 30.0
    rate: float | None = None
    """Requests a second, in an open loop."""
    clients: int | None = None
    """Clients of a closed loop."""
    api_key: str | None = None
    k: int = 10
    history_items: int = 10
    timeout_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.clients is None):
            raise InputError("give either --rate, for an open loop, or --clients, for a closed one")
        for name in ("seconds", "rate", "clients", "history_items", "timeout_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be above 0")


@dataclass
class Seen:
    """What came back: a latency and a code for each request."""

    milliseconds: list[tuple[str, float]] = field(default_factory=list)
    versions: set[tuple[str, str]] = field(default_factory=set)
    """(model, index) versions named in answers."""

    def summary(self, seconds: float) -> dict[str, Any]:
        """Counts, rates and quantiles; the latencies are those of the answers with 200."""
        good = sorted(taken for code, taken in self.milliseconds if code == "200")
        codes = Counter(code for code, _ in self.milliseconds)
        return {
            "requests": len(self.milliseconds),
            "seconds": round(seconds, 2),
            "codes": dict(sorted(codes.items())),
            "answers_per_second": round(len(good) / seconds, 1),
            "share_200": round(len(good) / max(1, len(self.milliseconds)), 6),
            "milliseconds": {f"p{100 * q:g}": round(quantile(good, q), 2) for q in QUANTILES}
            | {"max": round(good[-1], 2) if good else None},
            "histogram_ms": histogram(good),
            "versions": [" ".join(pair) for pair in sorted(self.versions)],
        }


def quantile(ordered: Sequence[float], q: float) -> float:
    """The smallest value that at least the share `q` does not exceed; NaN of nothing."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


def histogram(milliseconds: Iterable[float]) -> dict[str, int]:
    """How many took at most so many milliseconds, and more than the bound before."""
    counts = Counter(next((f"<={b}" for b in BUCKETS_MS if taken <= b), f">{BUCKETS_MS[-1]}") for taken in milliseconds)
    names = [*(f"<={b}" for b in BUCKETS_MS), f">{BUCKETS_MS[-1]}"]
    return {name: counts[name] for name in names if counts[name]}


def run(load: Load) -> dict[str, Any]:
    """Put the load on the server; returns a summary. Raises InputError where it cannot be reached at all."""
    return asyncio.run(_run(load))


async def _run(load: Load) -> dict[str, Any]:
    headers = {"X-API-Key": load.api_key} if load.api_key else {}
    timeout = aiohttp.ClientTimeout(total=load.timeout_seconds)
    connector = aiohttp.TCPConnector(limit=0)  # a pool that is full would hide the wait of a client
    async with aiohttp.ClientSession(load.url, headers=headers, timeout=timeout, connector=connector) as session:
        try:
            item_ids = await _item_ids(session)
            versions = await _json(session.get("/version"))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise InputError(f"{load.url} does not answer: {error or type(error).__name__}") from None
        rng, seen = random.Random(load.seed), Seen()
        before, started = await _stages(session), time.monotonic()

        async def ask(due: float) -> None:
            history = [
                rng.choice(item_ids) for _ in range(rng.randint(1, min(_LONGEST_HISTORY, 2 * load.history_items)))
            ]
            code = await _ask(session, {"history": history, "k": load.k}, seen)
            seen.milliseconds.append((code, 1000 * (time.monotonic() - due)))

        if load.rate is not None:
            await _open_loop(ask, load.rate, load.seconds, rng)
        else:
            await _closed_loop(ask, load.clients or 1, load.seconds)
        taken = time.monotonic() - started
        after = await _stages(session)
    return {
        "url": load.url,
        **({"rate": load.rate} if load.rate is not None else {"clients": load.clients}),
        **seen.summary(taken),
        "stages_ms": mean_stages(before, after),
        "software": {name: versions[name] for name in ("pixrec", "ray") if name in versions},
    }


async def _open_loop(ask: Callable[[float], Awaitable[None]], rate: float, seconds: float, rng: random.Random) -> None:
    """Arrivals with exponential gaps (a Poisson process)."""
    due, asked = time.monotonic(), set[asyncio.Task[None]]()
    end = due + seconds
    while (due := due + rng.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.ensure_future(ask(due))
        asked.add(task)
        task.add_done_callback(asked.discard)
    await asyncio.gather(*asked)


async def _closed_loop(ask: Callable[[float], Awaitable[None]], clients: int, seconds: float) -> None:
    end = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < end:
            await ask(time.monotonic())

    await asyncio.gather(*(client() for _ in range(clients)))


async def _ask(session: aiohttp.ClientSession, body: dict[str, Any], seen: Seen) -> str:
    try:
        async with session.post("/v1/recommend", json=body) as answer:
            if answer.status == 200:
                found = await answer.json()
                seen.versions.add((found["model_version"], found["index_version"]))
            else:
                await answer.read()
            return str(answer.status)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return NOT_ANSWERED


async def _item_ids(session: aiohttp.ClientSession) -> list[str]:
    """Items to make histories of: those that are bought the most, since the server names no others by itself."""
    answer = await _json(session.post("/v1/recommend", json={"history": [], "k": 200}))
    return [item["item_id"] for item in answer["items"]]


async def _json(sent: Any) -> Any:
    async with sent as answer:
        if answer.status != 200:
            raise InputError(f"{answer.url} answers {answer.status}: {(await answer.text())[:200]}")
        return await answer.json()


async def _stages(session: aiohttp.ClientSession) -> dict[tuple[str, str], float]:
    """Sums and counts of the stages, over all replicas, as /metrics tells them."""
    async with session.get("/metrics") as answer:
        return stage_sums(await answer.text()) if answer.status == 200 else {}


def stage_sums(text: str) -> dict[tuple[str, str], float]:
    """Of Prometheus's text: by stage, and by `sum` or `count`, the total over all replicas. The whole request is the
    stage `request`."""
    found: Counter[tuple[str, str]] = Counter()
    for line in text.splitlines():
        for kind in ("sum", "count"):
            if line.startswith(f"pixrec_stage_seconds_{kind}{{"):
                stage = line.partition('stage="')[2].partition('"')[0]
            elif line.startswith(f"pixrec_request_seconds_{kind}{{") and 'route="/v1/recommend"' in line:
                stage = "request"
            elif line.startswith(f"pixrec_batch_size_{kind}{{"):
                stage = "batch"
            else:
                continue
            found[stage, kind] += float(line.rpartition(" ")[2])  # type: ignore[assignment]
    return dict(found)


def mean_stages(before: dict[tuple[str, str], float], after: dict[tuple[str, str], float]) -> dict[str, float]:
    """Milliseconds of each stage, on average, and the histories in a batch as `batch`. encode and retrieve are of a
    batch, validate and request of one request within its HTTP replica."""
    means = {}
    for stage in sorted({stage for stage, _ in after}):
        total, count = (after.get((stage, k), 0) - before.get((stage, k), 0) for k in ("sum", "count"))
        if count:
            means[stage] = round(total / count * (1 if stage == "batch" else 1000), 3)
    return means
