"""Cut JSON text into values without parsing them, with a cursor that holds no more than one value at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sharding.jit import compiled
from sharding.sources.streams import CHUNK, DamagedError, Stream, TooLargeError

BLANK: Final = re.compile(rb"[ \t\r\n]*")
BLANKS: Final = (b"", b" ", b"\t", b"\r", b"\n")
SCALAR: Final = re.compile(rb"[^ \t\r\n,:\]}\[{\"]+")
FIRST: Final = re.compile(rb'\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*')  # the beginning of an object, up to its first name
HEAD: Final = 2**16  # bytes searched for it
QUOTE, BACKSLASH, OPEN, CLOSE = ord('"'), ord("\\"), ord("{"), ord("}")


@compiled
def _value_end(text: NDArray[np.uint8], at: int, state: NDArray[np.int64]) -> int:
    """The position after a string, an array or an object that begins at ``at``, or −1 where the text ends inside it.

    ``state`` (depth, in a string, after a backslash) carries over to a call that goes on with more text.
    """
    depth, quoted, escaped = state[0], state[1], state[2]
    for i in range(at, len(text)):
        c = text[i]
        if quoted:
            if escaped:
                escaped = 0
            elif c == BACKSLASH:
                escaped = 1
            elif c == QUOTE:
                quoted = 0
                if depth == 0:
                    return i + 1
        elif c == QUOTE:
            quoted = 1
        else:
            c |= 0x20  # "[" and "]" become "{" and "}"; no other byte does outside a string of valid JSON
            if c == OPEN:
                depth += 1
            elif c == CLOSE:
                depth -= 1
                if depth <= 0:
                    return i + 1
    state[0], state[1], state[2] = depth, quoted, escaped
    return -1


class Cursor:
    """A place in a JSON text that moves forward, value by value."""

    def __init__(self, stream: Stream, limit: int) -> None:
        """Begin at the start of ``stream``. Values over ``limit`` bytes are skipped."""
        self._stream = stream
        self._limit = limit
        self._text = b""  # a window on the document
        self._bytes = np.frombuffer(self._text, np.uint8)  # the same
        self._at = 0  # the cursor in the window
        self._start = 0  # the last value in the window, which is kept there for ``_recover``
        self._before = 0  # bytes of the document before the window

    @property
    def offset(self) -> int:
        """Where the cursor is in the document, in bytes."""
        return self._before + self._at

    def peek(self) -> bytes:
        """Return the next non-blank byte without consuming it; empty at the end of the document."""
        while (byte := self._text[self._at : self._at + 1]) in BLANKS:
            self._at = BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at == len(self._text) and not self._more():
                return b""
        return byte

    def accept(self, byte: bytes) -> bool:
        """Consume the next byte if it is this one."""
        found = self.peek() == byte
        self._at += found
        return found

    def take(self, byte: bytes) -> None:
        """Consume the next byte, which must be this one."""
        if not self.accept(byte):
            found = self.peek()
            what = f"{found!r} where {byte!r} should be" if found else "the end"
            raise DamagedError(f"the JSON text has {what} at byte {self.offset:,}")

    def look(self, n: int) -> bytes:
        """Return up to n bytes, from the next non-blank one on, without consuming them."""
        self.peek()
        while len(self._text) - self._at < n and self._more():
            pass
        return self._text[self._at : self._at + n]

    def value(self) -> bytes:
        """Consume the next value and return its text.

        Raises:
            DamagedError: if there is none, or the document ends inside it.
            TooLargeError: if it is larger than the limit; it is consumed.
        """
        first = self.peek()
        self._start = self._at
        if first not in (b'"', b"[", b"{"):
            return self._scalar()
        state = np.zeros(3, np.int64)
        done = 0
        while (end := _value_end(self._bytes, self._start + done, state)) < 0:
            done = len(self._text) - self._start
            if done > self._limit:
                self._pass_over(state)
            if not self._more():
                raise DamagedError(f"the JSON text ends inside the value at byte {self.offset:,}")
        self._at = end
        if end - self._start > self._limit:
            raise TooLargeError(f"is larger than {self._limit:,} bytes")
        return self._text[self._start : end]

    def elements(self, after: tuple[bytes, ...] = (b"",)) -> Iterator[bytes | DamagedError | TooLargeError]:
        """Consume an array; yield the text of each element, or what is wrong with it.

        If the quotes or brackets of an element do not match, reading resumes at the next place that looks like the
        beginning of an element, that is, like the beginning that two elements have in common.

        Args:
            after: the bytes that may follow the array; if another byte does, the closing bracket was not its end.
        """
        self.take(b"[")
        if self.accept(b"]"):
            return
        head = FIRST.match(self.look(HEAD))
        pattern = _beginning(head[0]) if head else None
        earlier: bytes | None = b""
        while True:
            text: bytes | DamagedError | TooLargeError
            try:
                try:
                    text = self.value()
                except TooLargeError as why:
                    text = why
                yield text
                if self.accept(b"]"):
                    if self.peek() in after:
                        return
                    raise DamagedError(f"the JSON text goes on after the end of an array, at byte {self.offset:,}")
                self.take(b",")
            except DamagedError as why:
                if not self._recover(pattern):
                    raise
                yield why
                continue
            if earlier is not None and isinstance(text, bytes):
                if len(common := _common(earlier, text)) > 4:
                    pattern, earlier = _beginning(common), None
                else:
                    earlier = text

    def members(self) -> Iterator[str]:
        """Consume an object; yield each name, after which the caller must consume its value."""
        self.take(b"{")
        if self.accept(b"}"):
            return
        while True:
            if self.peek() != b'"':
                raise DamagedError(f"the JSON text has no name at byte {self.offset:,}")
            name = self.value().decode("utf-8", "replace")[1:-1]
            self.take(b":")
            yield name
            if self.accept(b"}"):
                return
            self.take(b",")

    def _scalar(self) -> bytes:
        """Consume a number, true, false or null."""
        while True:
            match = SCALAR.match(self._text, self._at)
            if match is None:
                raise DamagedError(f"the JSON text has no value at byte {self.offset:,}")
            if match.end() < len(self._text) or not self._more():
                self._at += len(match[0])  # and not match.end(): the window may have moved
                return match[0]
            if len(self._text) - self._at > CHUNK:
                raise DamagedError(f"the JSON text has no value at byte {self.offset:,}")

    def _pass_over(self, state: NDArray[np.int64]) -> None:
        """Consume the rest of a value that is too large, and forget it.

        Raises:
            TooLargeError: always, once that is done.
        """
        end = -1
        while end < 0:
            self._at = self._start = len(self._text)
            if not self._more():
                raise DamagedError("the JSON text ends inside a value that is larger than the limit")
            end = _value_end(self._bytes, 0, state)
        self._at = end
        raise TooLargeError(f"is larger than {self._limit:,} bytes")

    def _recover(self, pattern: re.Pattern[bytes] | None) -> bool:
        """Move to the next beginning of an element after that of the last value; return whether there is one."""
        match = pattern.search(self._text, self._start + 1) if pattern else None
        if match is None:
            return False
        self._at = match.end(1)
        return True

    def _more(self) -> bool:
        """Read on, and drop what lies before the last value; return whether there was more to read."""
        chunk = self._stream.exactly(max(CHUNK, len(self._text) - self._start))
        self._text = self._text[self._start :] + chunk
        self._bytes = np.frombuffer(self._text, np.uint8)
        self._before += self._start
        self._at -= self._start
        self._start = 0
        return bool(chunk)


def _beginning(text: bytes) -> re.Pattern[bytes]:
    """A pattern for the beginning of an element, after what should be the end of another."""
    return re.compile(rb"(,[ \t\r\n]*|\}.[ \t\r\n]*)" + re.escape(text))


def _common(first: bytes, second: bytes) -> bytes:
    """What two elements have in common at their beginning, up to a name or a bracket."""
    pairs = enumerate(zip(first, second, strict=False))
    common = first[: next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))]
    return common[: max(map(common.rfind, (b'"', b"[", b"{", b":"))) + 1]
