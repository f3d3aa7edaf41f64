"""How often to say the same trouble again. Pure."""

from __future__ import annotations


class Complaint:
    """One thing that is tried again and again. It is worth a line the first time, when its text is another, and when
    it has failed 4, 16, 64 … times: an outage of hours at one try a second is a dozen lines."""

    def __init__(self) -> None:
        self._text = ""
        self._times = 0
        self._next = 1

    def due(self, error: object) -> bool:
        """It failed with this. Whether to say so now."""
        text = str(error)
        if text != self._text:
            self._text, self._times, self._next = text, 0, 1
        self._times += 1
        if self._times < self._next:
            return False
        self._next *= 4
        return True

    @property
    def times(self) -> int:
        """How often it failed with the newest text."""
        return self._times

    def over(self) -> bool:
        """It worked. Whether it had failed before."""
        failed = self._times > 0
        self._text, self._times, self._next = "", 0, 1
        return failed
