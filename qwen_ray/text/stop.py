"""Ends a text at the first stop string, and shows nothing that could still turn out to be one.

The stop string that is complete first wins, of two complete at once the longer: so the outcome depends on the text
alone, not on the pieces it comes in. Each stop string has its own automaton (Knuth, Morris, Pratt 1977): constant time
per character, however long the stop strings are.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Of one text. `matched` is the stop string that ended it, None so far."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._patterns = [_Pattern(stop) for stop in stops if stop]
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is now safe to show: all but an ending that could begin a stop string. "" after a match."""
        if self.matched is not None:
            return ""
        if not self._patterns:
            return text
        seen = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            complete = [pattern.text for pattern in self._patterns if pattern.advance(character)]
            if complete:
                self.matched = max(complete, key=len)
                self._held = ""
                return seen[:end] if self._include else seen[: end - len(self.matched)]
        num_held = max(pattern.num_matched for pattern in self._patterns)
        self._held = seen[len(seen) - num_held :]
        return seen[: len(seen) - num_held]

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """`num_matched` characters of `text` are the end of what has been read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._fallback = _fallbacks(text)

    def advance(self, character: str) -> bool:
        """Reads one character; True if it completes the string."""
        matched = self.num_matched
        while matched and self.text[matched] != character:
            matched = self._fallback[matched]
        if self.text[matched] == character:
            matched += 1
        self.num_matched = matched
        return matched == len(self.text)


def _fallbacks(text: str) -> list[int]:
    """For every prefix length, the longest shorter prefix that it ends with."""
    table = [0, 0]
    length = 0
    for character in text[1:]:
        while length and text[length] != character:
            length = table[length]
        length += text[length] == character
        table.append(length)
    return table
