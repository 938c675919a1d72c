"""The store of many nodes: a Redis server. What a method has returned for is there for all of them.

Each change is one Lua script, so that it is done whole or not at all, and changes are numbered in the order in which
they become visible. A server that does not answer is left in peace for a second, so that requests do not wait for it.

    pixrec:u:USER   sorted set, by time: number of arrival, kind and item of each event
    pixrec:i:ITEM   hash: columns, text, picture, content hash, hidden, and vectors by model
    pixrec:f:ANSWER hash: items of an answer that were seen, 1 where clicked; for a week
    pixrec:impressions, pixrec:clicks  hashes: counts by model version
    pixrec:popular:DAYS sorted set: what sells best by that half-life, as `pixrec.live.popularity` counts it
    pixrec:changes  sorted set: the number of the last change of each item
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pixrec.live.popularity import HALF_LIFE_DAYS, HALF_LIVES_KEPT, Decay
from pixrec.live.store import (
    FEEDBACK_SECONDS,
    MODELS_KEPT,
    AddedItem,
    EmbeddedVectors,
    Event,
    Feedback,
    LiveItem,
    StoreAway,
    StoreFull,
)
from pixrec.live.vectors import bytes_of, vectors_of

logger = logging.getLogger("ray.serve.pixrec")

_CONNECT_SECONDS, _ANSWER_SECONDS, _PAUSE_SECONDS = 0.5, 2.0, 1.0
_USERS_AT_A_TIME, _NUMBER_BYTES = 1000, 12
_USER, _ITEM, _CHANGES, _CHANGE = "pixrec:u:", "pixrec:i:", "pixrec:changes", "pixrec:change"

_ADD = """
local popular, half_life_ms, now = 'pixrec:popular:' .. ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local function count(item, timestamp)
    local score = math.min(timestamp / half_life_ms, now)
    if score <= now - HALF_LIVES_KEPT then return end
    local before = tonumber(redis.call('ZSCORE', popular, item) or score - 1e4)
    local sum = math.max(before, score) + math.log(1 + 2 ^ -math.abs(before - score)) / math.log(2)
    redis.call('ZADD', popular, string.format('%.17g', sum), item)
end
for i = 5, #ARGV, 3 do
    local key, known = 'pixrec:u:' .. ARGV[i], false
    for _, member in ipairs(redis.call('ZRANGEBYSCORE', key, ARGV[i + 1], ARGV[i + 1])) do
        known = known or string.sub(member, 13) == ARGV[i + 2]
    end
    if not known then
        local number = string.format('%012x', redis.call('INCR', 'pixrec:number'))
        local payload = ARGV[i + 2]
        redis.call('ZADD', key, ARGV[i + 1], number .. payload)
        redis.call('ZREMRANGEBYRANK', key, 0, -ARGV[1] - 1)
        if redis.call('ZSCORE', key, number .. payload) then
            local kind = 256 * string.byte(payload, 1) + string.byte(payload, 2)
            count(string.sub(payload, 3 + kind), tonumber(ARGV[i + 1]))
        end
    end
end
redis.call('ZREMRANGEBYSCORE', popular, '-inf', string.format('%.17g', now - HALF_LIVES_KEPT))
""".replace("HALF_LIVES_KEPT", str(HALF_LIVES_KEPT))
_FEEDBACK = """
local told, seen, clicked = cjson.decode(ARGV[1]), 0, 0
local key = 'pixrec:f:' .. told.request_id
for _, item in ipairs(told.seen) do
    seen = seen + redis.call('HSETNX', key, item, '0')
end
for _, item in ipairs(told.clicks) do
    if redis.call('HGET', key, item) == '0' then
        redis.call('HSET', key, item, '1')
        clicked = clicked + 1
    end
end
redis.call('EXPIRE', key, ARGV[2])
redis.call('HINCRBY', 'pixrec:impressions', told.model, seen)
redis.call('HINCRBY', 'pixrec:clicks', told.model, clicked)
"""
_CHANGED = """
local function changed(id)
    redis.call('ZADD', 'pixrec:changes', redis.call('INCR', 'pixrec:change'), id)
end
local function add_vectors(key, model, vector, content)
    redis.call('HSET', key, 'v:' .. model, vector, 'c:' .. model, content)
    local kept = {model}
    for _, other in ipairs(cjson.decode(redis.call('HGET', key, 'models') or '[]')) do
        if other ~= model and #kept < MODELS_KEPT then
            table.insert(kept, other)
        elseif other ~= model then
            redis.call('HDEL', key, 'v:' .. other, 'c:' .. other)
        end
    end
    redis.call('HSET', key, 'models', cjson.encode(kept))
end
""".replace("MODELS_KEPT", str(MODELS_KEPT))
_PUT = (
    _CHANGED
    + """
local count = redis.call('ZCARD', 'pixrec:changes')
for i = 3, #ARGV, 8 do
    count = count + 1 - redis.call('EXISTS', 'pixrec:i:' .. ARGV[i])
end
if count > tonumber(ARGV[1]) then return 0 end
for i = 3, #ARGV, 8 do
    local key = 'pixrec:i:' .. ARGV[i]
    redis.call('DEL', key)
    redis.call('HSET', key, 'fields', ARGV[i + 1], 'text', ARGV[i + 2], 'hash', ARGV[i + 3], 'hidden', '0')
    if ARGV[i + 4] == '1' then redis.call('HSET', key, 'image', ARGV[i + 5]) end
    add_vectors(key, ARGV[2], ARGV[i + 6], ARGV[i + 7])
    changed(ARGV[i])
end
return 1
"""
)
_CHANGE_ITEM = (
    _CHANGED
    + """
local key = 'pixrec:i:' .. ARGV[1]
if (redis.call('HGET', key, 'fields') or '') ~= ARGV[2] then return 0 end
redis.call('HSET', key, 'fields', ARGV[3])
if ARGV[4] ~= '' then redis.call('HSET', key, 'hidden', ARGV[4]) end
changed(ARGV[1])
return 1
"""
)
_SET_VECTORS = (
    _CHANGED
    + """
for i = 2, #ARGV, 4 do
    local key = 'pixrec:i:' .. ARGV[i]
    if redis.call('HGET', key, 'hash') == ARGV[i + 1] then
        add_vectors(key, ARGV[1], ARGV[i + 2], ARGV[i + 3])
        changed(ARGV[i])
    end
end
"""
)


class RedisStore:
    """A server, which need not be there when this is made. May be used by several threads at a time."""

    def __init__(
        self, url: str, most_per_user: int, password: str | None = None, half_life_days: float = HALF_LIFE_DAYS
    ) -> None:
        """most_per_user: older events of a user than so many are dropped; half_life_days: of what sells best, which
        another one begins anew."""
        self._decay = Decay(half_life_days)
        options: dict[str, Any] = {} if password is None else {"password": password}
        self._redis: Any = redis.Redis.from_url(
            url,
            socket_connect_timeout=_CONNECT_SECONDS,
            socket_timeout=_ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 1),
            **options,
        )
        self._most, self._away_until, self._checked = most_per_user, 0.0, False
        self._add, self._feedback, self._put, self._change, self._set_vectors = map(
            self._redis.register_script, (_ADD, _FEEDBACK, _PUT, _CHANGE_ITEM, _SET_VECTORS)
        )

    def add(self, events: Sequence[Event]) -> None:
        decay = self._decay
        arguments: list[Any] = [self._most, repr(decay.half_life_days), repr(decay.half_life_ms), repr(decay.now())]
        for event in events:
            kind = (event.event or "").encode()
            payload = len(kind).to_bytes(2, "big") + kind + event.item_id.encode()
            arguments += [event.user_id, event.timestamp, payload]
        with self._answered():
            self._add(args=arguments)

    def history(self, user_id: str, most: int) -> list[tuple[str, int]]:
        with self._answered():
            found = self._redis.zrevrange(_USER + user_id, 0, most - 1, withscores=True)
        return [(_event(member)[1], int(score)) for member, score in reversed(found)]

    def forget(self, user_id: str) -> int:
        with self._answered(), self._redis.pipeline() as together:
            return int(together.zcard(_USER + user_id).delete(_USER + user_id).execute()[0])

    def events(self) -> Iterator[list[Event]]:
        with self._answered():
            keys = self._redis.scan_iter(f"{_USER}*", count=_USERS_AT_A_TIME)
            for key in keys:
                user_id = key.decode().removeprefix(_USER)
                found = self._redis.zrange(key, 0, -1, withscores=True)
                told = ((*_event(member), int(score)) for member, score in found)
                yield [Event(user_id, item_id, timestamp, kind or None) for kind, item_id, timestamp in told]

    def popular(self, most: int) -> list[tuple[str, float]]:
        key = f"pixrec:popular:{self._decay.half_life_days!r}"
        with self._answered():
            found = self._redis.zrevrange(key, 0, most - 1, withscores=True)
        return self._decay.counts([(item_id.decode(), score) for item_id, score in found])

    def add_feedback(self, feedback: Sequence[Feedback]) -> None:
        with self._answered():
            for one in feedback:
                seen, clicks = [*one.impressions, *one.clicks], list(one.clicks)
                told = {"request_id": one.request_id, "model": one.model_version, "seen": seen, "clicks": clicks}
                self._feedback(args=[json.dumps(told), FEEDBACK_SECONDS])

    def click_through(self) -> dict[str, tuple[int, int]]:
        with self._answered():
            seen, clicked = (self._redis.hgetall(f"pixrec:{name}") for name in ("impressions", "clicks"))
        return {model.decode(): (int(count), int(clicked.get(model, 0))) for model, count in seen.items()}

    def put(self, model: str, items: Sequence[AddedItem], vectors: Sequence[EmbeddedVectors], most: int) -> None:
        arguments: list[Any] = [most, model]
        for item, made in zip(items, vectors, strict=True):
            vector, content = bytes_of(made)
            image = [int(item.image is not None), item.image or b""]
            written = json.dumps(dict(item.fields))
            arguments += [item.item_id, written, item.text, item.content_hash, *image, vector, content or b""]
        with self._answered():
            stored = self._put(args=arguments)
        if not stored:
            raise StoreFull

    def change(self, item_id: str, fields: Mapping[str, Any], hidden: bool | None = None) -> None:
        with self._answered():
            done = False
            while not done:  # somebody else's change came between
                before = self._redis.hget(_ITEM + item_id, "fields") or b""
                after = json.dumps({**json.loads(before or "{}"), **fields})
                done = self._change(args=[item_id, before, after, "" if hidden is None else int(hidden)])

    def last_change(self) -> int:
        with self._answered():
            return int(self._redis.get(_CHANGE) or 0)

    def changes(self, after: int, model: str, most: int) -> list[LiveItem]:
        with self._answered():
            found = self._redis.zrangebyscore(_CHANGES, f"({after}", "+inf", 0, most, withscores=True)
            names = ("fields", "hash", "hidden", f"v:{model}", f"c:{model}")
            with self._redis.pipeline(transaction=False) as together:
                for item_id, _ in found:
                    together.hmget(_ITEM + item_id.decode(), names)
                rows = together.execute()
        return [
            LiveItem(
                item_id.decode(),
                json.loads(fields),
                None if content_hash is None else content_hash.decode(),
                hidden == b"1",
                int(change),  # what is newer by now comes again
                vectors_of(vector, content or None),
            )
            for (item_id, change), (fields, content_hash, hidden, vector, content) in zip(found, rows, strict=True)
        ]

    def contents(self, item_ids: Sequence[str]) -> list[AddedItem]:
        with self._answered(), self._redis.pipeline(transaction=False) as together:
            for item_id in item_ids:
                together.hmget(_ITEM + item_id, "fields", "text", "image", "hash")
            rows = zip(item_ids, together.execute(), strict=True)
        return [
            AddedItem(item_id, json.loads(fields), text.decode(), image, content_hash.decode())
            for item_id, (fields, text, image, content_hash) in rows
            if content_hash is not None
        ]

    def set_vectors(self, model: str, made: Mapping[tuple[str, str], EmbeddedVectors]) -> None:
        arguments: list[Any] = [model]
        for (item_id, content_hash), vectors in made.items():
            vector, content = bytes_of(vectors)
            arguments += [item_id, content_hash, vector, content or b""]
        with self._answered():
            self._set_vectors(args=arguments)

    def close(self) -> None:
        self._redis.close()

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        """A block that asks the server. Raises StoreAway, for a while without asking, once it did not answer."""
        if time.monotonic() < self._away_until:
            raise StoreAway("the Redis store did not answer a moment ago")
        try:
            if not self._checked:
                self._check()
            yield
        except redis.RedisError as error:
            if isinstance(error, (redis.ConnectionError, redis.TimeoutError)):
                self._away_until = time.monotonic() + _PAUSE_SECONDS
            raise StoreAway(f"the Redis store did not answer: {error}") from None

    def _check(self) -> None:
        """Say so once where the server keeps nothing on disk: then a crash of it loses what was stored."""
        self._redis.ping()
        self._checked = True
        with contextlib.suppress(redis.ResponseError):  # it may be forbidden to ask
            if self._redis.config_get("appendonly").get("appendonly") == "no":
                logger.warning("the Redis store has appendonly off: what it holds is lost when it stops")


def _event(member: bytes) -> tuple[str, str]:
    """Kind and item."""
    start = _NUMBER_BYTES + 2
    middle = start + int.from_bytes(member[_NUMBER_BYTES:start], "big")
    return member[start:middle].decode(), member[middle:].decode()
