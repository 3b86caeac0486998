"""Where past output begins: ``--since`` as users write it."""

from dataclasses import dataclass
from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.names import shorten
from hypervisor.core.units import parse_duration

__all__ = ["Since", "parse_since"]


@dataclass(frozen=True, slots=True)
class Since:
    """Exactly one is there: so far back from now, a time, or a position (bytes printed before)."""

    ago: Duration | None = None
    time: Timestamp | None = None
    position: int | None = None


def parse_since(field: str, text: str) -> Since:
    """``5m`` (so far back), ``2026-01-31T12:00:00Z`` (that time; without a zone the local one) or ``@4096`` (that
    position). InvalidArgument names the field."""
    if text.startswith("@") and text[1:].isascii() and text[1:].isdigit() and len(text) <= 19:
        return Since(position=int(text[1:]))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        pass
    else:
        stamp = Timestamp()
        stamp.FromDatetime(moment.astimezone(UTC))
        return Since(time=stamp)
    try:
        seconds = parse_duration(text)
    except ValueError as exc:
        raise InvalidArgument.of_field(
            field,
            f"{shorten(text)}: give a span such as 5m, a time such as 2026-01-31T12:00Z, or a position such as @4096",
        ) from exc
    ago = Duration()
    ago.FromNanoseconds(round(seconds * 1e9))
    return Since(ago=ago)
