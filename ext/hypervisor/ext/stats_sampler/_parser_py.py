"""The specification of the parser, and the oracle of its tests. See :mod:`._parser_c` for the one in use."""

import itertools
import os
import re

__all__ = ["MAX_FILE_BYTES", "UNLIMITED", "parse_counters", "read_counters"]

UNLIMITED = (1 << 63) - 1
"""What ``max`` counts as, and the largest value: larger ones count as this."""

MAX_FILE_BYTES = 65_536
"""Longest file that is read."""

_SEPARATORS = re.compile(rb"[ \t\n=]+")


def _value(token: bytes) -> int | None:
    if token == b"max":
        return UNLIMITED
    if token and all(0x30 <= byte <= 0x39 for byte in token):
        return min(int(token), UNLIMITED)
    return None


def parse_counters(data: bytes, names: tuple[bytes, ...]) -> tuple[int | None, ...]:
    """The value of each name in the text of a control group file; None for a name that is not there.

    The text is a sequence of words between blanks, line ends and ``=``. A name's value is the word after it, where
    that is a number or ``max``; values of a name that occurs several times (one line a device) are added up. The empty
    name is the file's first word. So this reads ``key value`` lines (cpu.stat), ``device key=value ...`` lines
    (io.stat), ``device key value`` lines (blkio) and single numbers (pids.current) alike.
    """
    words = [word for word in _SEPARATORS.split(data) if word]
    totals: list[int | None] = [None] * len(names)
    for position, name in enumerate(names):
        found = [words[0]] if name == b"" and words else []
        if name != b"":
            found = [after for word, after in itertools.pairwise(words) if word == name]
        for word in found:
            value = _value(word)
            if value is not None:
                totals[position] = min(UNLIMITED, (totals[position] or 0) + value)
    return tuple(totals)


def read_counters(fd: int, names: tuple[bytes, ...]) -> tuple[int | None, ...]:
    """Read an open file from its beginning and parse it; see :func:`parse_counters`.

    Raises OSError when it cannot be read (ENODEV: the control group is gone) and ValueError when it is longer than
    ``MAX_FILE_BYTES``.
    """
    data = b""
    while len(data) <= MAX_FILE_BYTES:
        part = os.pread(fd, MAX_FILE_BYTES + 1 - len(data), len(data))
        if not part:
            return parse_counters(data, names)
        data += part
    raise ValueError(f"the file of descriptor {fd} is longer than {MAX_FILE_BYTES} bytes")
