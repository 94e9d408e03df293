"""What the deaths of workers mean: when to try again, when to give up, what to tell. No Ray."""

from __future__ import annotations

import re

from repa_pipeline.errors import StageError

MAX_PAUSE_S = 30.0
# Starts in a row that may fail while no worker is up. A dead node goes unnoticed for a minute or
# so and new workers are still placed on it, so those that never answered get more patience.
MAX_SILENT_STARTS = 8
MAX_BROKEN_STARTS = 3


class StartHealth:
    """Workers that die before they are ready: pauses that double, and an end to it."""

    def __init__(self) -> None:
        self._not_before = float("-inf")
        self._num_silent = 0
        self._num_broken = 0

    def may_start(self, now: float) -> bool:
        return now >= self._not_before

    def succeeded(self) -> None:
        """A worker became ready."""
        self._num_silent = self._num_broken = 0

    def failed(self, now: float, cause: str, *, answered: bool, others_ready: bool) -> None:
        """A worker ended before it was ready; `answered`: it had been reached.

        Deaths during a pause are of one wave and count once. Raises StageError when it is enough
        and no other worker is ready.
        """
        if not self.may_start(now):
            return
        if answered:
            self._num_broken += 1
        else:
            self._num_silent += 1
        num_starts = self._num_silent + self._num_broken
        self._not_before = now + min(MAX_PAUSE_S, 2.0 ** (num_starts - 1))
        is_enough = self._num_broken >= MAX_BROKEN_STARTS or self._num_silent >= MAX_SILENT_STARTS
        if is_enough and not others_ready:
            raise StageError(
                f"no worker gets ready: {num_starts} starts in a row failed, the last: {cause}; "
                "mend it and run the same command again"
            )


def explain_death(text: str) -> str:
    """What Ray says of a dead actor, in part of a line."""
    flat = " ".join(text.split())
    if "unexpectedly exits with a connection error" in flat:
        return "its process ended at once (killed, out of memory, or a crash in native code)"
    if "temporarily unavailable" in flat:
        return "it cannot be reached any more"
    found = re.search(r"The actor (?:is dead because|died because) (.*)", flat)
    return (found[1] if found else flat)[:240].rstrip(". ")


def is_node_death(text: str) -> bool:
    """Whether the node is gone or cut off, so that the actor's death says nothing of its work."""
    return "its node has died" in " ".join(text.split())
