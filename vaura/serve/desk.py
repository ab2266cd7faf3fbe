"""What the page and its endpoint answer: what comes of a request, told in the words of who asked."""

from __future__ import annotations

import json
import secrets
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vaura.errors import InputError
from vaura.serve import cards
from vaura.serve.line import Stopped
from vaura.serve.request import Request
from vaura.serve.work import CODEC, ORIGINAL, SAMPLE, Done, Heard, Piece, Step, Workshop

FAILED = "something went wrong here that is not your fault; try again, or tell who runs this page: its log says what it was"
FORM = (
    "model",
    "checkpoint",
    "start",
    "duration",
    "samples",
    "guidance",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "prime",
    "label",
)


def address(path: Path) -> str:
    """Where a browser finds a file, below the page's own address."""
    return f"gradio_api/file={quote(str(path))}"


class Desk:
    """Answers the page: one request a visitor at a time, each told in his own words."""

    def __init__(self, shop: Workshop, gr: Any) -> None:
        self.shop, self.gr, self._stops = shop, gr, dict[str, threading.Event]()

    # --- one visitor's request ---

    def begin(self, visitor: str) -> None:
        self.stop(visitor)
        self._stops[visitor] = threading.Event()

    def stop(self, visitor: str) -> None:
        if stop := self._stops.get(visitor):
            stop.set()

    def leave(self, visitor: str) -> None:
        self.stop(visitor)
        self._stops.pop(visitor, None)

    def answer(self, visitor: str, video: str | None, form: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """What changes on the page, by name: state, feed, cards by their place, summary, settings."""
        stop = self._stops.setdefault(visitor, threading.Event())
        pieces, true, token, width = list[Piece](), None, secrets.token_hex(8), None
        drawn, made = 0, dict[str, str]()
        try:
            if video is not None:
                width = self.shop.check(video).width
            tolerance = self.shop.manner.tolerance
            for event in self.shop.run(self.request(form), video, stop):
                if isinstance(event, Step):
                    yield {"state": cards.progress(event)}
                elif isinstance(event, Piece):
                    pieces.append(event)
                    yield {"feed": cards.feed(token, pieces, None if true is None else true.video, address, False)}
                elif isinstance(event, Heard):
                    true = event if event.kind == ORIGINAL else true
                    drawn += event.kind == SAMPLE
                    place = _place(event, drawn)
                    made[place] = cards.card(event, address, None if event is true else true, width, tolerance)
                    yield {place: made[place]}
                elif isinstance(event, Done):
                    yield made | self._ended(event, pieces, token)  # a busy browser may have missed one
        except Stopped:
            yield {"state": cards.notice("stopped"), "feed": ""}
        except InputError as error:
            yield {"state": cards.notice(self.shop.told(error, video), wrong=True), "feed": ""}
        except Exception:  # a defect of ours: its traceback is for the log, and no visitor's business
            traceback.print_exc(file=sys.stderr)
            yield {"state": cards.notice(FAILED, wrong=True), "feed": ""}

    def request(self, form: Sequence[Any]) -> Request:
        """What a form says; a duration of 0 is none."""
        said = dict(zip(FORM, form, strict=True))
        return Request.of(said | {"duration": said["duration"] or None})

    def _ended(self, done: Done, pieces: list[Piece], token: str) -> dict[str, Any]:
        room = done.heard[0].video.parent
        changed: dict[str, Any] = {
            "state": "",
            "summary": cards.summary(done, room / "settings.json", address),
            "settings": done.request.json(done.video),
        }
        if pieces:
            changed["feed"] = cards.feed(token, pieces, done.heard[0].video, address, True)
        return changed

    # --- the endpoint ---

    def endpoint(self, video: str | None, form: Sequence[Any], progress: Any) -> tuple[list[str], dict[str, Any]]:
        """Files (mp4 and wav of each sample, of the original, and of that through the codec) and what they are."""
        try:
            for event in self.shop.run(self.request(form), video):
                if isinstance(event, Step):
                    progress(event.share, desc=event.what)
                elif isinstance(event, Done):
                    return _files(event), _report(event)
        except InputError as error:
            raise self.gr.Error(self.shop.told(error, video), print_exception=False) from error
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            raise self.gr.Error(FAILED, print_exception=False) from error
        raise AssertionError("a request ends in Done or by an error")

    def shelf(self) -> list[dict[str, Any]]:
        """The models, their checkpoints and what is known of them."""
        return [
            {"model": entry.name, "checkpoints": list(entry.checkpoints), "about": entry.said}
            for entry in self.shop.shelf.entries.values()
        ]


def _place(heard: Heard, drawn: int) -> str:
    return heard.kind if heard.kind in (ORIGINAL, CODEC) else f"{SAMPLE}{drawn}"


def _files(done: Done) -> list[str]:
    order = {SAMPLE: 0, ORIGINAL: 1, CODEC: 2}
    ranked = sorted(done.heard, key=lambda heard: order[heard.kind])
    return [str(path) for heard in ranked for path in (heard.video, heard.wav) if path is not None]


def _report(done: Done) -> dict[str, Any]:
    return {
        "settings": json.loads(done.request.json(done.video)),
        "seconds": round(done.took, 3),
        "heard": [
            {
                "kind": heard.kind,
                "video": heard.video.name,
                "wav": None if heard.wav is None else heard.wav.name,
                "duration": heard.duration,
                "onsets": [round(onset, 3) for onset in heard.onsets],
                "classes": [{"class": name, "share": round(share, 4)} for name, share in heard.classes],
            }
            for heard in done.heard
        ],
    }
