"""A strict reader of asciicasts, version 2: what the format's description allows and nothing else."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Recording", "read_cast"]

_HEADER = {
    "version",
    "width",
    "height",
    "timestamp",
    "duration",
    "idle_time_limit",
    "command",
    "title",
    "env",
    "theme",
}


@dataclass(frozen=True)
class Recording:
    """Its size at the beginning and its events: seconds, code, text."""

    width: int
    height: int
    events: tuple[tuple[float, str, str], ...]

    @property
    def output(self) -> str:
        """All that was printed."""
        return "".join(text for _, code, text in self.events if code == "o")


def read_cast(path: Path) -> Recording:
    """Read a recording; AssertionError where it is not one."""
    text = path.read_bytes().decode("utf-8", errors="strict")
    assert text.endswith("\n"), "the last line is cut off"
    first, *rest = text.split("\n")[:-1]
    header = json.loads(first)
    assert header["version"] == 2
    assert set(header) <= _HEADER, header
    for side in ("width", "height"):
        assert type(header[side]) is int, header
        assert header[side] > 0, header
    assert type(header.get("timestamp", 0)) is int
    assert all(type(value) is str for value in header.get("env", {}).values())
    events: list[tuple[float, str, str]] = []
    for line in rest:
        event = json.loads(line)
        assert type(event) is list, line
        assert len(event) == 3, line
        seconds, code, data = event
        assert type(seconds) in (int, float), line
        assert seconds >= (events[-1][0] if events else 0), f"time goes back: {line}"
        assert code in ("o", "i", "m", "r"), line
        assert type(data) is str, line
        assert code != "r" or re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", data), line
        events.append((float(seconds), code, data))
    return Recording(header["width"], header["height"], tuple(events))
