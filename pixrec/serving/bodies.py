"""What requests and answers hold, as HTTP checks it. Knows pydantic, and nothing behind it.

Bodies are strict: a key that is unknown or a value of another type is refused with the field's name, never guessed at.
Their fields, and those of the answers, are those of `pixrec.query`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field

from pixrec.query import MAX_TIMESTAMP, ScoreKind


def _encodable(text: str) -> str:
    text.encode()  # UnicodeEncodeError is a ValueError, which pydantic reports with the field
    return text


# JSON can spell half a character ("\\ud800"), which no tokenizer and no Parquet file takes.
Text = Annotated[str, AfterValidator(_encodable)]


class _FailFast(FailFast):
    """A million wrong values are one error, not a million."""

    __hash__ = object.__hash__  # what stands in a union must have one


Ids = Annotated[list[Text], _FailFast()]
Timestamps = Annotated[list[int] | None, _FailFast()]
FilterValue = Text | bool | int | Annotated[float, Field(allow_inf_nan=False)]


class RangeBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    min: Annotated[float, Field(allow_inf_nan=False)] | None = None
    max: Annotated[float, Field(allow_inf_nan=False)] | None = None


FilterValues = dict[Text, Annotated[list[FilterValue], _FailFast()] | RangeBody]
Id = Annotated[Text, Field(min_length=1, max_length=500, pattern=r"^[^\x00]+$")]  # SQLite's JSON ends at a NUL
MaxPer = dict[Text, Annotated[int, Field(ge=1)]]


class RankingBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    k: int = Field(10, ge=1, description="How many items to return at most; the server's limit is `serve.max_k`.")
    filters: FilterValues = Field(
        default_factory=dict,
        description="Keep items whose field has one of the values, or a number in the range; all fields must match.",
    )
    diversity: float = Field(
        0.0, ge=0, le=1, description="0: the best scores; 1: items as unlike each other as can be."
    )
    max_per: MaxPer = Field(
        default_factory=dict, description="How many answers may share a value of a field, such as a brand."
    )


class NewItemBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    title: Text | None = None
    brand: Text | None = None
    category: Text | None = None
    price: Annotated[float, Field(allow_inf_nan=False)] | None = None
    description: Text | None = None
    image_base64: str | None = Field(None, description="Its picture, base64 of an image file.")


class RecommendBody(RankingBody):
    history: Ids = Field(
        default_factory=list,
        description="The shopper's items, oldest first. Ids the catalog does not hold are skipped. Must be given, if "
        "only as [], unless user_id is.",
    )
    exclude: Ids = Field(default_factory=list, description="Never return these items.")
    exclude_history: bool = Field(True, description="Do not return items of the history.")
    new_items: dict[Text, NewItemBody] = Field(
        default_factory=dict, description="Items of the history that the catalog does not hold yet, by id."
    )
    timestamps: Timestamps = Field(
        None, description="When each item of the history was met, milliseconds since the epoch; null: unknown."
    )
    user_id: Id | None = Field(
        None, description="Whose stored events are the history, in place of `history` and `timestamps`."
    )
    reasons: bool = Field(False, description="Say with each answer which item of the history is nearest to it.")


class EventBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    user_id: Id
    item_id: Id
    event: Annotated[Text, Field(max_length=100)] | None = Field(None, description="view, cart, purchase, or any word.")
    timestamp: Annotated[int, Field(ge=-MAX_TIMESTAMP, le=MAX_TIMESTAMP)] | None = Field(
        None, description="Milliseconds since the epoch; null: now."
    )


class EventsBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    events: Annotated[list[EventBody], _FailFast()]


ColumnValue = FilterValue | Annotated[list[Text], _FailFast()] | None


class ItemBody(NewItemBody):
    """An item with the columns that every catalog has; further keys are further columns of this one."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[Text, ColumnValue]

    item_id: Id
    image_uri: Annotated[Text, Field(max_length=2000)] | None = Field(
        None,
        description="Where its picture lies, in place of image_base64: http(s)://, s3://, as the server allows.",
    )


class ItemsBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    items: Annotated[list[ItemBody], _FailFast(), Field(min_length=1)]


class ItemsStoredBody(BaseModel):
    stored: int
    model_version: str = Field(description="The model that embedded them.")
    index_version: str


class ItemChangeBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    fields: dict[Text, ColumnValue] = Field(
        default_factory=dict, description="Columns to change, such as the price; those that are not named stay."
    )
    hidden: bool | None = Field(None, description="true: not among the answers any more; false: again; null: as it is.")


class ChangedBody(BaseModel):
    item_id: str


RequestId = Annotated[Text, Field(min_length=1, max_length=200)]


class FeedbackBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    request_id: RequestId = Field(description="`X-Request-Id` of the answer.")
    model_version: Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{1,80}$")] = Field(description="As the answer says.")
    impressions: Annotated[list[Id], _FailFast()] = Field(
        default_factory=list, description="Items of the answer that were seen."
    )
    clicks: Annotated[list[Id], _FailFast()] = Field(
        default_factory=list, description="Items that were clicked, which counts as seen."
    )


class StoredBody(BaseModel):
    stored: int


class DeletedBody(BaseModel):
    deleted: int = Field(description="How many events there were.")


class SimilarBody(RankingBody):
    item_id: Text


class SearchBody(RankingBody):
    text: Text | None = Field(None, description="What the item looks like or says.")
    image_base64: str | None = Field(None, description="A picture, base64 of a JPEG, PNG, WebP or GIF file.")


class RankedItem(BaseModel):
    item_id: str
    score: float


class AnswerBody(BaseModel):
    items: list[RankedItem]
    score_kind: ScoreKind = Field(description="What a score is: a cosine, a share of all purchases or a chance.")
    model_version: str
    index_version: str
    unknown_items: list[str]
    fallback: bool = Field(description="No item of the history is known: these are the popular ones.")
    reasons: dict[str, str] | None = Field(None, description="By item the nearest one of the history; if asked for.")
    missing_shards: list[int] | None = Field(
        None, description="Parts of the index that gave no answer, whose items are lacking; only where some did not."
    )
    store_away: bool = Field(
        False,
        description="The store of events and items did not answer: what is newest may lack. Only there if so.",
    )


class EmbedBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    texts: Ids = Field(default_factory=list, description="What an item could look like or say.")
    images_base64: Annotated[list[str], _FailFast()] = Field(
        default_factory=list, description="Pictures, base64 of JPEG, PNG, WebP or GIF files."
    )
    item_ids: Ids = Field(default_factory=list, description="Items of the catalog.")
    histories: Annotated[list[Ids], _FailFast()] = Field(
        default_factory=list, description="Items of shoppers, oldest first."
    )


class EmbeddedBody(BaseModel):
    texts: list[list[float]]
    images: list[list[float]]
    item_ids: list[list[float] | None] = Field(description="null: the item is unknown.")
    histories: list[list[float] | None] = Field(description="null: no item of the history is known.")
    model_version: str
    index_version: str


class PinBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    index_version: Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{1,80}$")] | None = Field(
        description="The version to serve whatever is published later; null: the current one again."
    )


class ChangeBody(BaseModel):
    outcome: Literal["swapped", "unchanged", "refused"]
    state: dict[str, Any] = Field(description="The versions of the replica, and why another one is refused.")


class ChangesBody(BaseModel):
    replicas: list[ChangeBody]


class HealthBody(BaseModel):
    status: str
    overloaded: bool
    model_version: str | None = None
    index_version: str | None = None


class ReadyBody(BaseModel):
    ready: bool
    model_version: str
    index_version: str
    refused: str | None = Field(description="Why a published version is not served.")
    published: str | None = Field(description="When the index was published.")


class FilterValueCount(BaseModel):
    value: str | bool | int | float
    items: int = Field(description="How many items hold it.")


class FiltersBody(BaseModel):
    filters: dict[str, list[FilterValueCount]] = Field(description="By field, the most frequent values first.")


class Problem(BaseModel):
    detail: str


PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "The API key is missing or wrong"},
    413: {"model": Problem, "description": "The body is too large"},
    429: {"model": Problem, "description": "Too many requests; see Retry-After"},
    503: {"model": Problem, "description": "Overloaded or starting; see Retry-After"},
}
REFUSED: dict[int | str, dict[str, Any]] = {
    403: {"model": Problem, "description": "The server has no key for its /admin routes"},
    409: {"model": Problem, "description": "The version cannot be served; the one before stays in use"},
}
CLOSED: dict[int | str, dict[str, Any]] = {
    403: {"model": Problem, "description": "The server has no key for changes of items"}
}
FULL: dict[int | str, dict[str, Any]] = {409: {"model": Problem, "description": "The store holds as much as it may"}}
NO_VERSION: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is no such version"}}
NOT_STORED: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "The server stores nothing"}}
UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "The item is unknown"}}
