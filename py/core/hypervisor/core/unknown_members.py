"""Members of stored records that this version does not know, kept through its own writes.

While a cluster is upgraded, servers of this version and of the next one write the same records. A field that the next
version has added must not be lost when this one changes another. So what is read keeps its unknown members beside the
value, and what is written in its place has them again. New fields need no new schema version (``v``) for that; a
version that changes the meaning of what is there raises it, and older servers then refuse the record.

Members of objects are kept, at any depth; objects inside of lists are not looked into, as nothing says which is which
once the list has changed.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["find_unknown", "with_unknown"]


def find_unknown(data: bytes, canonical: bytes) -> Mapping[str, Any] | None:
    """Members of the JSON object ``data`` that are not in ``canonical``; None where there are none.

    ``canonical`` is the same record read and written again by this version. Where both have the same length nothing is
    looked at.
    """
    if len(data) == len(canonical):
        return None
    return _beyond(msgspec.json.decode(data), msgspec.json.decode(canonical)) or None


def with_unknown(canonical: bytes, unknown: Mapping[str, Any]) -> bytes:
    """The JSON object ``canonical`` and the unknown members. What both have is taken from ``canonical``; an object that
    is not there any more takes its unknown members along."""
    written = msgspec.json.decode(canonical)
    _add(written, unknown)
    return msgspec.json.encode(written)


def _beyond(found: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    unknown: dict[str, Any] = {}
    for name, value in found.items():
        if name not in known:
            unknown[name] = value
        elif isinstance(value, dict) and isinstance(known[name], dict):
            inside = _beyond(value, known[name])
            if inside:
                unknown[name] = _Inside(inside)
    return unknown


class _Inside(dict[str, Any]):
    """Unknown members of an object that is itself known."""


def _add(written: dict[str, Any], unknown: Mapping[str, Any]) -> None:
    for name, value in unknown.items():
        there = written.get(name)
        if not isinstance(value, _Inside):
            written.setdefault(name, value)
        elif isinstance(there, dict):
            _add(there, value)
