"""What a client may ask: the part of OpenAI's chat completions that this server answers, and `vtc`."""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vtc.methods import described
from vtc.serve.encode import NOTHING, Spend

PARTS = 1000
"""Texts and images of a request, over all its messages."""


@cache
def names() -> tuple[str, ...]:
    """Of all methods, looked for once: `described` reads their files, which takes as long as an answer."""
    return tuple(described())


class _Strict(BaseModel):
    """What is not known is refused: it would change the answer. So is what has another type: "no" is not false."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _said(cls, given: Any) -> Any:
        """Without what is not known and null, which says nothing: so gradio's chat sends earlier turns.

        Of what else is not known the first is enough: a million names would be a million errors.
        """
        if not isinstance(given, dict):
            return given
        known = {name: value for name, value in given.items() if name in cls.model_fields}
        unknown = (one for one in given.items() if one[0] not in known and one[1] is not None)
        return known | dict(islice(unknown, 1))


def _encodable(given: str) -> str:
    """JSON may have half of a surrogate pair, and a tokenizer takes none."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"no Unicode text: {error.reason} at {error.start}") from None
    return given


Words = Annotated[str, AfterValidator(_encodable)]


class Text(_Strict):
    type: Literal["text"]
    text: Words


class Address(_Strict):
    url: str
    detail: str | None = None
    """What OpenAI's models read; here the budget decides."""


class Picture(_Strict):
    type: Literal["image_url"]
    image_url: Address


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: Words | Annotated[list[Annotated[Text | Picture, Field(discriminator="type")]], Field(min_length=1)]
    name: Words | None = None


def _bounded(given: Any) -> Any:
    """Each part takes its time here and in the chat template, while nobody else is answered."""
    if isinstance(given, list):
        contents = (one.get("content") if isinstance(one, dict) else None for one in given)
        parts = sum(max(1, len(content)) if isinstance(content, list) else 1 for content in contents)
        if parts > PARTS:
            raise ValueError(f"{parts} messages and parts of them; this server takes {PARTS} in a request")
    return given


Tokens = Annotated[int, Field(ge=1, le=10**6)]


class Compress(_Strict):
    """`extra_body={"vtc": {"method": ..., "budget": ...}}`."""

    method: str | None = None
    """A name out of `vtc methods`, or "none" for all visual tokens."""
    budget: Tokens | Annotated[float, Field(gt=0, le=1)] | None = None
    """Visual tokens per image averaged over the decoder layers, or a fraction."""


class StreamOptions(_Strict):
    include_usage: bool | None = None
    """None: a stream ends with its usage, too."""
    include_obfuscation: bool | None = None


def _listed(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


Stop = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_encodable)]


class Asked(_Strict):
    """A request."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1), BeforeValidator(_bounded)]
    vtc: Compress | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """None and below 0.001: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Annotated[list[Stop], Field(max_length=4), BeforeValidator(_listed)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    user: str | None = None

    @property
    def sampled(self) -> bool:
        """A temperature that is all but 0 is taken for it: divided by it, logits are no numbers any more."""
        return self.temperature is not None and self.temperature >= 1e-3

    @property
    def packed(self) -> bool:
        """Whether the answer is greedy and ends where the model ends it: only those share batches."""
        return not self.sampled and self.top_p in (None, 1.0) and not self.stop

    @property
    def counted(self) -> bool:
        """Whether the reply ends with its usage."""
        return not self.stream or self.stream_options is None or self.stream_options.include_usage is not False

    @property
    def urls(self) -> list[str]:
        """Of its images, in order."""
        parts = (part for message in self.messages if not isinstance(message.content, str) for part in message.content)
        return [part.image_url.url for part in parts if isinstance(part, Picture)]

    def spend(self, default: Spend) -> Spend:
        """Method and budget. Raises ValueError for a method that vtc has not, and for a budget of no method."""
        if self.vtc is None or (self.vtc.method is None and self.vtc.budget is None):
            return default
        method, budget = self.vtc.method, self.vtc.budget
        if method == "none":
            return NOTHING
        if method is not None and method not in names():  # names alone: other forms would import and read files
            raise ValueError(f"unknown method {method!r}; this server knows none, {', '.join(names())}")
        if method is None and default is NOTHING:  # the very one: a server may have the same method at all tokens
            raise ValueError("vtc.budget: this server reads all visual tokens; name a method for this budget, too")
        return default[0] if method is None else method, budget


def read(body: dict[str, Any]) -> Asked:
    """A request out of JSON. Raises ValueError with the place of what does not fit."""
    body = dict(body)
    if body.get("max_completion_tokens") is not None:
        body["max_tokens"] = body["max_completion_tokens"]
    body.pop("max_completion_tokens", None)
    try:
        return Asked.model_validate(body)
    except ValidationError as error:
        all_ = error.errors(include_url=False, include_input=False)
        told = max(all_, key=lambda one: len(one["loc"]))  # of what may be this or that, the one that came further
        raise ValueError(f"{'.'.join(map(str, told['loc']))}: {told['msg']}") from None
