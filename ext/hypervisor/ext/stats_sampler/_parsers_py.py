"""How each format is parsed: the specification of ``_parsers.pxd``, and the oracle of its tests. Pure.

Text is a sequence of lines, a line a sequence of words between blanks, tabs and ``=``. A number is a word of digits, or
``max``; what is larger than ``UNLIMITED`` counts as that. Anything else is no number, and no error: kernels add lines.
"""

import itertools
import re
from collections.abc import Iterator, Sequence

from hypervisor.ext.stats_sampler._record import UNLIMITED

__all__ = ["parse_keyed", "parse_net_dev", "parse_number", "parse_pressure"]

_SEPARATORS = re.compile(rb"[ \t=]+")


def _lines(data: bytes) -> Iterator[list[bytes]]:
    """The words of each line."""
    for line in data.split(b"\n"):
        yield [word for word in _SEPARATORS.split(line) if word]


def _value(word: bytes) -> int | None:
    if word == b"max":
        return UNLIMITED
    if all(0x30 <= byte <= 0x39 for byte in word):
        return min(int(word), UNLIMITED)
    return None


def _add(total: int | None, value: int) -> int:
    return min(UNLIMITED, (total or 0) + value)


def parse_number(data: bytes) -> int | None:
    """The first word of the text, where that is a number (memory.current); None where not."""
    for words in _lines(data):
        if words:
            return _value(words[0])
    return None


def parse_keyed(data: bytes, names: Sequence[bytes]) -> tuple[int | None, ...]:
    """The value of each name: the number that is the next word of the same line; None for one that is not there.

    Values of a name that occurs several times (one line a device) are added up. So this reads ``key value`` lines
    (cpu.stat), ``device key=value ...`` lines (io.stat) and ``device key value`` lines (blkio) alike.
    """
    totals: list[int | None] = [None] * len(names)
    for words in _lines(data):
        for word, after in itertools.pairwise(words):
            value = _value(after)
            if value is None:
                continue
            for position, name in enumerate(names):
                if word == name:
                    totals[position] = _add(totals[position], value)
    return tuple(totals)


def parse_pressure(data: bytes, names: Sequence[bytes]) -> tuple[int | None, ...]:
    """The ``total`` of the line that begins with each name (``some``, ``full``), in microseconds as it is written."""
    totals: list[int | None] = [None] * len(names)
    for words in _lines(data):
        for word, after in itertools.pairwise(words):
            value = _value(after)
            if word != b"total" or value is None:
                continue
            for position, name in enumerate(names):
                if words[0] == name:
                    totals[position] = _add(totals[position], value)
    return tuple(totals)


def parse_net_dev(data: bytes) -> tuple[int | None, int | None, int | None, int | None]:
    """Bytes and packets received, bytes and packets sent, of a /proc/PID/net/dev: the sum over all interfaces but lo.

    An interface is a line with a colon: its name before the first one, and columns after it, of which the 1st, 2nd, 9th
    and 10th have to be numbers; a line where they are not does not count. All are None when no line counts.
    """
    totals: list[int] | None = None
    for line in data.split(b"\n"):
        name, colon, rest = line.partition(b":")
        columns = [word for word in _SEPARATORS.split(rest) if word]
        if not colon or len(columns) < 10:
            continue
        values = [_value(columns[column]) for column in (0, 1, 8, 9)]
        if None in values:
            continue
        totals = totals or [0, 0, 0, 0]
        if name.strip(b" \t=") != b"lo":
            totals = [_add(total, value or 0) for total, value in zip(totals, values, strict=True)]
    return (None, None, None, None) if totals is None else (totals[0], totals[1], totals[2], totals[3])
