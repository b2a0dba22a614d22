"""Token bytes to text, a chunk at a time."""

from __future__ import annotations

import codecs


class Utf8Stream:
    """Decodes bytes that arrive in pieces; a character is emitted once, whole.

    What can't be UTF-8 becomes U+FFFD as soon as that is certain, so the joined chunks equal
    `b"".join(pieces).decode("utf-8", errors="replace")`.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, piece: bytes) -> str:
        """The characters that this piece completes; may be empty."""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left at the end: U+FFFD if a character was cut, else nothing."""
        return self._decoder.decode(b"", final=True)
