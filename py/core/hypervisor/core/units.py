"""Durations and sizes as people write them: ``30s``, ``1m30s``, ``16MiB``."""

import math
import re

__all__ = ["format_bytes", "format_duration", "parse_bytes", "parse_duration"]

_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SIZE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(B|KiB|MiB|GiB|TiB)")


def parse_duration(text: object) -> float:
    """Seconds of ``1h30m``, ``10s``, ``250ms`` or a float that is in seconds already (a default in code).

    Raises ValueError, with a sentence that says how to write it.
    """
    if isinstance(text, float) and math.isfinite(text) and text >= 0:
        return text
    wanted = str(text).strip()
    if wanted == "0":
        return 0.0
    parts = _DURATION_PART.findall(wanted)
    if not parts or "".join(number + unit for number, unit in parts) != wanted:
        raise ValueError("give a duration with its unit (ms, s, m, h, d), such as 30s or 1h30m")
    return sum(float(number) * _DURATION_UNITS[unit] for number, unit in parts)


def format_duration(seconds: float) -> str:
    """The shortest spelling that :func:`parse_duration` reads back, such as ``1m30s``."""
    millis = round(seconds * 1000)
    if millis == 0:
        return "0"
    text = ""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        amount, millis = divmod(millis, size)
        if amount:
            text += f"{amount}{unit}"
    return text


def parse_bytes(text: object) -> int:
    """Bytes of ``64KiB``, ``1.5GiB`` or an int that is in bytes already (a default in code).

    Raises ValueError, with a sentence that says how to write it.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    wanted = str(text).strip()
    if wanted.isascii() and wanted.isdigit():
        return int(wanted)
    found = _SIZE.fullmatch(wanted)
    if found is None:
        raise ValueError(
            "give a size with its unit (KiB, MiB, GiB, TiB), such as 16MiB, or a number of bytes"
        )
    number = int(found[1]) if found[1].isdigit() else float(found[1])
    return round(number * _SIZE_UNITS[found[2]])


def format_bytes(size: int) -> str:
    """The size in the largest unit that divides it, such as ``16MiB``."""
    for unit, factor in reversed(_SIZE_UNITS.items()):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return "0B"
