"""Texts that end an answer, found in text that comes in pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """Texts before which an answer ends."""

    texts: tuple[str, ...] = ()

    @classmethod
    def checked(cls, stop: str | Sequence[str]) -> StopStrings:
        """From a text or several.

        Raises:
          ValueError: something else, or an empty text.
        """
        texts: tuple[Any, ...] = (stop,) if isinstance(stop, str) else tuple(stop)
        for text in texts:
            if not isinstance(text, str) or not text:
                raise ValueError(f"a stop string is {text!r}; expected a text of at least one character")
        return cls(texts)

    def scan(self) -> StopScan:
        """Looks for them in one answer."""
        return StopScan(self.texts)


class StopScan:
    """Passes text on up to a stop string, holding back what may be the beginning of one."""

    def __init__(self, texts: tuple[str, ...]):
        self._texts = texts
        self._held = ""
        self.stopped = False
        self.taken = 0  # characters that were put in

    def put(self, text: str) -> str:
        """What can be passed on now. After a stop string, nothing."""
        self.taken += len(text)
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._texts) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._texts), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def finish(self) -> str:
        """What was held back."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, but is not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
