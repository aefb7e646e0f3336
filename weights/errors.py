"""The one exception of the pack."""

from __future__ import annotations


class StyleLoomError(ValueError):
    """Something an artist can act on, in three parts.

    Args:
        found: what is wrong, naming the file, the key or the input.
        expected: what would have been right.
        fix: what to do now.
    """

    def __init__(self, found: str, expected: str, fix: str):
        self.found, self.expected, self.fix = found, expected, fix
        super().__init__(f"{found}\nExpected: {expected}\nWhat to do: {fix}")
