"""Where an answer ends by what it says."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """The stop strings of a request. As OpenAI's, they are no part of the answer."""

    def __init__(self, strings: Sequence[str] = ()):
        self.strings = strings
        self._text, self._told = "", 0

    def met(self, text: str) -> bool:
        """Whether one is in it."""
        return any(string in text for string in self.strings)

    @property
    def over(self) -> bool:
        """Whether what has come so far has one."""
        return self.met(self._text)

    def tell(self, piece: str, last: bool = False) -> str:
        """What of the answer may go out once this piece has come: an end that may become a stop string waits."""
        self._text += piece
        text = self._text
        if self.over:
            end = min(place for string in self.strings if (place := text.find(string)) >= 0)
        elif last:
            end = len(text)
        else:
            begun = (n for string in self.strings for n in range(1, len(string)) if text.endswith(string[:n]))
            end = len(text) - max(begun, default=0)
        told, self._told = text[self._told : end], end
        return told
