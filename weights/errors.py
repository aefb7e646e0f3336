"""The one exception of the pack."""

from __future__ import annotations


class StyleLoomError(ValueError):
    """Something an artist can act on, in three parts.

    Args:
        found: what is wrong, naming the file, the key or the input.
        expected: what would have been right.
        fix: what to do now.
    """

    # What the host shows an artist as the kind of the error; the real one would be the path of this folder.
    __module__ = "styleloom"

    def __init__(self, found: str, expected: str, fix: str):
        self.found, self.expected, self.fix = found, expected, fix
        super().__init__(f"{found}\nExpected: {expected}\nWhat to do: {fix}")
