"""The one id generator: sortable by creation time, safe in URLs, file names, cgroup and container names.

An id is ``<prefix>-<26 characters of Crockford base 32>`` in lower case: 48 bits of milliseconds since the epoch
and 80 random bits (the ULID layout), so ids made later sort later and collisions are out of the question.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable

__all__ = ["ID_PATTERN", "IdSource", "derived_id", "is_id", "new_id"]

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = tuple(first + second for first in _ALPHABET for second in _ALPHABET)
_SHIFTS = range(120, -1, -10)
ID_PATTERN = re.compile(r"^[a-z]{1,4}-[0-9a-hjkmnp-tv-z]{26}$")

IdSource = Callable[[str], str]
"""Takes a prefix (``i`` instance, ``n`` node, ``op`` operation, ``s`` server), returns a fresh id."""


def _encode(value: int) -> str:
    return "".join([_PAIRS[value >> shift & 1023] for shift in _SHIFTS])


def new_id(prefix: str) -> str:
    """A fresh id. Source: the machine's clock and ``os.urandom``."""
    millis = time.time_ns() // 1_000_000
    return f"{prefix}-{_encode((millis << 80) | int.from_bytes(os.urandom(10), 'big'))}"


def derived_id(prefix: str, *parts: str) -> str:
    """The same id for the same parts, always: how a repeated request finds the operation it began."""
    digest = hashlib.sha256("\x00".join(parts).encode()).digest()
    return f"{prefix}-{_encode(int.from_bytes(digest[:16], 'big'))}"


def is_id(text: str, prefix: str) -> bool:
    """Whether ``text`` has the shape of an id with this prefix."""
    return text.startswith(prefix + "-") and ID_PATTERN.match(text) is not None
