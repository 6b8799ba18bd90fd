"""The fields of a client's JSON, and the bounds of what clients may ask."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request

from sdjax.errors import UserError
from sdjax.system.untrusted import brief


class InvalidRequest(UserError):
    """A request that cannot be answered; the message names the field, its value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The bounds of requests; a request beyond them is refused in words.

    side: of a picture, in pixels; steps: of the sampler; pictures: of one request.
    prompt: characters of a prompt; chunks: that a prompt with weights has.
    body: bytes of a request; image: pixels of a picture that a client sends.
    queue: pictures that wait; seconds: of one request, in which it waits and is drawn.
    rate: requests a minute of one address.
    """

    side: int = 2048
    steps: int = 150
    pictures: int = 16
    prompt: int = 10_000
    chunks: int = 16
    body: int = 32 << 20
    image: int = 16_000_000
    queue: int = 64
    seconds: float = 600.0
    rate: int = 600


class Fields:
    """The fields of a client's JSON object, read with a type and bounds.

    Fields that are absent or null have their default; those that nobody reads are ignored, as the
    servers do whose clients these are.
    """

    def __init__(self, body: Any):
        if not isinstance(body, Mapping):
            raise InvalidRequest(f"expected a JSON object, found {brief(body)}")
        self._body = body

    def text(self, name: str, default: str = "", *, most: int) -> str:
        """Return a text of at most so many characters."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise InvalidRequest(f"{name} is {brief(value)}; expected a text")
        if len(value) > most:
            raise InvalidRequest(f"{name} has {len(value)} characters; expected at most {most}")
        return value

    def whole(self, name: str, default: int, *, least: int, most: int) -> int:
        """Return a whole number within bounds; 3.0 and "3" are 3."""
        return int(self._number(name, default, least, most, whole=True))

    def number(self, name: str, default: float, *, least: float, most: float) -> float:
        """Return a finite number within bounds."""
        return self._number(name, default, least, most, whole=False)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} is {brief(value)}; expected true or false")
        return value

    def names(self, name: str) -> Sequence[str]:
        """Return a list of texts."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise InvalidRequest(f"{name} is {brief(value)}; expected a list of texts")
        return value

    def group(self, name: str) -> Fields:
        """Return the fields of an object within this one."""
        value = self._get(name, {})
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"{name} is {brief(value)}; expected an object")
        return Fields(value)

    def keys(self) -> list[str]:
        """Return the names of all fields that are there."""
        return [str(name) for name in self._body]

    def _get(self, name: str, default: Any) -> Any:
        value = self._body.get(name)
        return default if value is None else value

    def _number(self, name: str, default: float, least: float, most: float, whole: bool) -> float:
        value = self._get(name, default)
        kind = "a whole number" if whole else "a number"
        try:
            if isinstance(value, bool):
                raise ValueError
            found = float(value)
            if found != found or (whole and found != int(found)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise InvalidRequest(f"{name} is {brief(value)}; expected {kind}") from None
        if not least <= found <= most:
            raise InvalidRequest(
                f"{name} is {brief(value)}; expected {kind} from {least:g} to {most:g}"
            )
        return int(value) if whole and isinstance(value, int) else found


async def read_fields(http: Request) -> Fields:
    """Return the JSON object of a request's body.

    Raises:
        InvalidRequest: it is none.
    """
    body = await http.body()
    try:
        text = body.decode(json.detect_encoding(body)) or "{}"
        content = json.loads(text)
        if "\\u" in text:  # half of a surrogate pair can be in no picture and no answer
            json.dumps(content, ensure_ascii=False).encode()
        return Fields(content)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is no JSON: {error}; send a JSON object") from error
