"""What the ranks of a run on Ray tell the driver, and what it asks of them: knows nothing of Ray.

The board is an actor on the driver's machine, so it outlives ranks, their nodes and their
restarts. Calls to it do not wait: a rank is never slower for being watched.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from repa_pipeline.engine.run import Progress

TELL_EVERY_S = 1.0

# ("line", "out" or "err", text), ("start", title, total, done, unit), ("advance", count, facts),
# ("finish",), ("ranks", number that has begun), ("lost", text): they are gone.
News = tuple[Any, ...]


class Board:
    """The actor: news in the order they came, and whether the ranks are to save and end."""

    def __init__(self) -> None:
        self._news: list[News] = []
        self._ends = False

    def tell(self, *news: Any) -> None:
        self._news.append(news)

    def take(self) -> list[News]:
        """What was told since the last call."""
        news, self._news = self._news, []
        return news

    def ask_to_end(self) -> None:
        self._ends = True

    def is_asked_to_end(self) -> bool:
        return self._ends


class ToldProgress:
    """A rank's progress as news, about every second."""

    def __init__(self, board: Any):
        self._board = board
        self._count = 0
        self._told_at = float("-inf")
        self._facts: dict[str, float] = {}

    def start(self, title: str, total: int, done: int, unit: str) -> None:
        self._board.tell.remote("start", title, total, done, unit)

    def advance(self, count: int, **facts: float) -> None:
        self._count, self._facts = self._count + count, facts
        if time.monotonic() - self._told_at >= TELL_EVERY_S:
            self._tell()

    def workers(self, states: Mapping[str, str]) -> None:
        return

    def finish(self) -> None:
        if self._count:
            self._tell()
        self._board.tell.remote("finish")

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        self._board.tell.remote("advance", self._count, self._facts)
        self._count = 0


class ToldLines(io.TextIOBase):
    """A stream whose lines are news: what a rank prints is printed by the driver."""

    def __init__(self, board: Any, stream: str):
        self._board, self._stream = board, stream
        self._part = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._part = (self._part + text).split("\n")
        for line in lines:
            self._board.tell.remote("line", self._stream, line)
        return len(text)


class Teller:
    """Says on the driver's streams what the ranks told.

    num_ranks: of the group that runs now; 0 until one has begun.
    """

    def __init__(self, progress: Progress, out: TextIO, errors: TextIO):
        self.num_ranks = 0
        self._progress = progress
        self._streams = {"out": out, "err": errors}
        self._is_open = False

    def say(self, news: Iterable[News]) -> None:
        for kind, *facts in news:
            if kind == "line":
                print(facts[1], file=self._streams[facts[0]], flush=True)
            elif kind == "ranks":
                self.num_ranks = facts[0]
            elif kind == "lost":
                self.num_ranks = 0
                print(facts[0], file=self._streams["err"], flush=True)
            elif kind == "start":
                self.close()  # of ranks that were killed
                self._progress.start(*facts)
                self._is_open = True
            elif kind == "advance":
                self._progress.advance(facts[0], **facts[1])
            else:
                self.close()

    def close(self) -> None:
        """Ends what is shown of progress."""
        if self._is_open:
            self._progress.finish()
        self._is_open = False
