"""The view that looks at data: pictures and captions, buckets, duplicates, and mended captions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sdjax.data.buckets import BucketConfig, assign, bucket_shapes
from sdjax.data.raw.limits import MOST_CAPTION_CHARS
from sdjax.errors import UserError
from sdjax.web.look import duplicates
from sdjax.web.look.captions import MendedCaptions
from sdjax.web.look.collection import MOST_SIZES, SIDES, Collection
from sdjax.web.server.fields import InvalidRequest, read_fields
from sdjax.web.server.site import NotTrustedError, Place, page
from sdjax.web.templating import asset

ADDRESS = "/look"
PAGE = 48  # pictures at a time
_KEPT = {"cache-control": "private, max-age=600"}
_MOST_WORDS = 300  # characters of a filter


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """The routes of some collections.

    captions: where mended captions go; None where none are mended. trusted: whether the server has
    a token, without which nobody may mend.
    """

    collections: Mapping[str, Collection]
    captions: MendedCaptions | None
    trusted: bool
    places: Sequence[Place] = ()

    def routes(self) -> list[Route]:
        """Return the page, and what it asks for."""
        return [
            Route(ADDRESS, self.page, methods=["GET"]),
            Route(f"{ADDRESS}/items", self.items, methods=["GET"]),
            Route(f"{ADDRESS}/picture", self.picture, methods=["GET"]),
            Route(f"{ADDRESS}/buckets", self.buckets, methods=["GET"]),
            Route(f"{ADDRESS}/duplicates", self.duplicates, methods=["GET"]),
            Route(f"{ADDRESS}/caption", self.caption, methods=["POST"]),
        ]

    async def page(self, http: Request) -> Response:
        """Return the page."""
        facts = {
            "sets": [{"name": name, "raw": one.raw} for name, one in self.collections.items()],
            "page": PAGE,
            "mends": self.captions is not None and self.trusted,
            "why": self._why_not(),
            "file": str(self.captions.file) if self.captions else "",
            "most": MOST_CAPTION_CHARS,
        }
        style = asset("report.css") + asset("watch.css") + asset("look.css")
        return page(
            "look.html", ["look_sets.js", "look.js"], pictures=True, facts=facts, style=style,
            places=self.places, here=ADDRESS,
        )  # fmt: skip

    async def items(self, http: Request) -> Response:
        """Return a page of pictures that are asked for, by split and words."""
        asked = http.query_params
        first = _whole(asked.get("from", "0"), "from")
        return JSONResponse(
            await run_in_threadpool(
                self._items, self._set(http), asked.get("split", ""), asked.get("words", ""), first
            )
        )

    async def picture(self, http: Request) -> Response:
        """Return a picture, small, or larger."""
        collection = self._set(http)
        number = _whole(http.query_params.get("number", ""), "number")
        side = _whole(http.query_params.get("side", str(SIDES[0])), "side")
        if side not in SIDES:
            raise InvalidRequest(f"side is {side}; expected one of {SIDES}")
        data = await run_in_threadpool(collection.shown, number, side)
        return Response(data, media_type="image/webp", headers=_KEPT)

    async def buckets(self, http: Request) -> Response:
        """Return the buckets of a resolution and a step, with their pictures."""
        asked = http.query_params
        resolution = _whole(asked.get("resolution", "512"), "resolution")
        step = _whole(asked.get("step", "64"), "step")
        if not 16 <= resolution <= 4096 or not 1 <= step <= resolution or resolution > 512 * step:
            raise InvalidRequest(
                f"resolution is {resolution} and step {step}; expected 16 to 4096, and a step of "
                "1/512 of it or more"
            )
        return JSONResponse(
            await run_in_threadpool(self._buckets, self._set(http), resolution, step)
        )

    async def duplicates(self, http: Request) -> Response:
        """Return what `sdjax.prepare` dropped of a collection."""
        return JSONResponse(await run_in_threadpool(self._duplicates, self._set(http)))

    async def caption(self, http: Request) -> Response:
        """Write a mended caption down."""
        if why := self._why_not():
            raise NotTrustedError(why)
        fields = await read_fields(http)
        collection = self._named(fields.text("set", most=1000))
        item = await run_in_threadpool(
            collection.item, fields.whole("number", -1, least=0, most=2**31)
        )
        text = " ".join(fields.text("caption", most=2 * MOST_CAPTION_CHARS).split())
        before = fields.text("before", most=2 * MOST_CAPTION_CHARS)
        captions = self.captions
        assert captions is not None
        await run_in_threadpool(captions.set, item.name, text, before=before, stored=item.caption)
        shown = {"caption": text, "mended": captions.is_mended(item.name)}
        return JSONResponse({**shown, "count": captions.count})

    def _why_not(self) -> str:
        """Return why captions cannot be mended, "" if they can."""
        if self.captions is None:
            return "captions are mended on a server with --captions=FILE and a token"
        if not self.trusted:
            return "captions are mended on a server with a token: start it with --token_file=FILE"
        return ""

    def _set(self, http: Request) -> Collection:
        return self._named(http.query_params.get("set", ""))

    def _named(self, name: str) -> Collection:
        if name not in self.collections:
            listed = ", ".join(self.collections)
            raise InvalidRequest(f"set is {name[:200]!r}; expected one of: {listed}")
        return self.collections[name]

    def _caption(self, name: str, stored: str) -> str:
        return stored if self.captions is None else self.captions.get(name, stored)

    def _items(self, collection: Collection, split: str, words: str, first: int) -> dict[str, Any]:
        """Return the pictures from the `first` of those that have the split and the words."""
        if len(words) > _MOST_WORDS:
            raise InvalidRequest(f"words has {len(words)} characters; expected {_MOST_WORDS}")
        opened = collection.open()
        wanted, unwanted = _words(words)
        found = []
        splits: dict[str, int] = {}
        for number, item in enumerate(opened.items):
            splits[item.split] = splits.get(item.split, 0) + 1
            if split and item.split != split:
                continue
            if wanted or unwanted:
                text = f"{item.name} {self._caption(item.name, item.caption)}".casefold()
                if not all(w.search(text) for w in wanted) or any(w.search(text) for w in unwanted):
                    continue
            found.append(number)
        shown = []
        for number in found[first : first + PAGE]:
            item = opened.items[number]
            caption = self._caption(item.name, item.caption)
            mended = self.captions is not None and self.captions.is_mended(item.name)
            shown.append(
                {"number": number, "name": item.name, "split": item.split, "caption": caption,
                 "mended": mended}
            )  # fmt: skip
        return {
            "items": shown, "total": len(found), "all": len(opened.items), "splits": splits,
            "notes": list(opened.notes), "count": self.captions.count if self.captions else 0,
        }  # fmt: skip

    def _buckets(self, collection: Collection, resolution: int, step: int) -> dict[str, Any]:
        shapes = bucket_shapes(resolution, BucketConfig(step=step))
        sizes = collection.sizes()
        found = assign(sizes[:, 0], sizes[:, 1], shapes, batch_size=1)
        rows = [
            {"height": h, "width": w, "count": len(members), "examples": members[:6].tolist()}
            for (h, w), members in zip(found.shapes, found.members, strict=True)
        ]
        smaller = int(((sizes > 0).all(1) & (sizes.prod(1) < resolution**2)).sum())
        return {
            "rows": rows, "refused": found.refused, "cropped": round(found.cropped, 4),
            "read": len(sizes), "smaller": smaller,
            "limited": len(collection.open().items) > MOST_SIZES,
            "median": np.median(sizes, axis=0).astype(int).tolist() if len(sizes) else [0, 0],
        }  # fmt: skip

    def _duplicates(self, collection: Collection) -> dict[str, Any] | None:
        """Return what was dropped, with where the pictures of it can be seen."""
        found = duplicates.read(collection.folder)
        if found is None:
            return None
        for row in found["pairs"]:
            row["pictures"] = [self._seen(row["name"]), self._seen(row["of"], collection)]
        return found

    def _seen(self, name: str, first: Collection | None = None) -> dict[str, Any] | None:
        """Return the collection and number of a picture; None if none has it."""
        for one in (first, *self.collections.values()):
            if one is None:
                continue
            try:
                number = one.number(name)
            except UserError:
                continue
            if number is not None:
                return {"set": one.name, "number": number}
        return None


def _words(text: str) -> tuple[list[re.Pattern[str]], list[re.Pattern[str]]]:
    """Return the words of a filter that are wanted, and those with a minus before, that are not.

    A word is found where one of the caption begins with it: red in "reddish", not in "shuttered".
    """
    every = text.casefold().split()
    wanted = [word for word in every if not word.startswith("-")]
    unwanted = [word[1:] for word in every if word.startswith("-") and len(word) > 1]
    return [_begins(word) for word in wanted], [_begins(word) for word in unwanted]


def _begins(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}")


def _whole(text: str, name: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise InvalidRequest(f"{name} is {text[:20]!r}; expected a whole number")
    return int(text)
