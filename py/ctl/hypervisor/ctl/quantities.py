"""Sizes, durations and numbers: what users type for the fields of a request, and how quantities are shown.

Typing: ``256MiB`` (or a plain number in the field's own unit) for memory and disk, ``1m30s`` for spans.
"""

import math

from hypervisor.core.errors import FieldViolation, InvalidArgument
from hypervisor.core.names import shorten
from hypervisor.core.units import parse_bytes, parse_duration

__all__ = [
    "age",
    "columns_and_rows",
    "cpu_cores",
    "duration_s",
    "readable_bytes",
    "replay_bytes",
    "whole_gib",
    "whole_mib",
]

_MIB = 1 << 20
_GIB = 1 << 30
ALL_REPLAY = -1


def _whole(field: str, text: object, unit: int, name: str) -> int:
    plain = str(text).strip()
    if plain.isascii() and plain.isdigit():
        return int(plain)  # a bare number is in the field's own unit, as in the API
    try:
        size = parse_bytes(text)
    except ValueError as exc:
        raise InvalidArgument.of_field(
            field, f"{shorten(plain)}: give a size such as 256MiB or 2GiB, or a number of {name}"
        ) from exc
    if size % unit:
        raise InvalidArgument.of_field(field, f"{shorten(plain)} is not a whole number of {name}: round it")
    return size // unit


def whole_mib(field: str, text: object) -> int:
    """MiB of ``256MiB``, ``1GiB`` or ``256``. InvalidArgument names the field."""
    return _whole(field, text, _MIB, "MiB")


def whole_gib(field: str, text: object) -> int:
    """GiB of ``10GiB``, ``1TiB`` or ``10``. InvalidArgument names the field."""
    return _whole(field, text, _GIB, "GiB")


def cpu_cores(field: str, text: object) -> float:
    """Processors of ``2``, ``0.5`` or ``500m`` (thousandths). InvalidArgument names the field."""
    plain = str(text).strip()
    try:
        number = float(plain[:-1]) / 1000 if plain.endswith("m") else float(plain)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidArgument.of_field(field, f"{shorten(plain)}: give processors such as 2, 0.5 or 500m")
    return number


def duration_s(field: str, text: object) -> float:
    """Seconds of ``30s``, ``1m30s``, ``250ms``; a bare number is seconds. InvalidArgument names the field."""
    plain = str(text).strip()
    try:
        return float(plain) if plain.replace(".", "", 1).isdigit() else parse_duration(plain)
    except ValueError as exc:
        raise InvalidArgument.of_fields((FieldViolation(field, f"{shorten(plain)}: {exc}"),)) from exc


def replay_bytes(field: str, text: str) -> int:
    """Bytes of past output to ask for: ``all`` (-1), ``none`` (0) or a size."""
    if text == "all":
        return ALL_REPLAY
    if text == "none":
        return 0
    try:
        return parse_bytes(text)
    except ValueError as exc:
        raise InvalidArgument.of_field(
            field, f"{shorten(text)}: give all, none or a size such as 64KiB"
        ) from exc


def columns_and_rows(field: str, text: str) -> tuple[int, int]:
    """Columns and rows of ``100x30``. InvalidArgument names the field."""
    columns, _, rows = text.partition("x")
    for amount in (columns, rows):
        if not (amount.isascii() and amount.isdigit() and 1 <= int(amount[:6]) <= 10_000):
            raise InvalidArgument.of_field(
                field, f"{shorten(text)}: give COLUMNSxROWS, such as 100x30, of 1 to 10000"
            )
    return int(columns), int(rows)


def readable_bytes(size: int) -> str:
    """About three digits and a binary unit, such as ``1.5GiB``; for people, not for reading back."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024 or (unit == "B" and abs(amount) < 1000):
            break
        amount /= 1024
    else:
        unit = "TiB"
    if unit == "B" or amount == int(amount) or abs(amount) >= 100:
        return f"{amount:.0f}{unit}"
    return f"{amount:.1f}{unit}"


def age(seconds: float) -> str:
    """How long ago, in one or two units, such as ``42s``, ``3m10s``, ``5h``, ``12d``."""
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole}s"
    if whole < 600:
        return f"{whole // 60}m{whole % 60}s" if whole % 60 else f"{whole // 60}m"
    if whole < 7200:
        return f"{whole // 60}m"
    if whole < 2 * 86400:
        return f"{whole // 3600}h"
    return f"{whole // 86400}d"
