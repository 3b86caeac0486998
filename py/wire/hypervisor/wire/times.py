"""Timestamp and Duration: aware UTC datetimes and seconds, None where the wire field is absent."""

from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

__all__ = ["datetime_of", "duration_of", "seconds_of", "timestamp_of"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def timestamp_of(value: datetime | None) -> Timestamp | None:
    """The wire form, exact to the microsecond; None stays None (an absent field)."""
    if value is None:
        return None
    seconds, micros = divmod((value - _EPOCH) // _MICROSECOND, 1_000_000)
    return Timestamp(seconds=seconds, nanos=micros * 1000)


def datetime_of(value: Timestamp) -> datetime | None:
    """The domain form; the zero Timestamp (also an absent field) is None."""
    if not value.seconds and not value.nanos:
        return None
    return _EPOCH + timedelta(seconds=value.seconds, microseconds=value.nanos // 1000)


def duration_of(seconds: float) -> Duration:
    """The wire form of a span, exact to the nanosecond as far as the float is."""
    result = Duration()
    result.FromNanoseconds(round(seconds * 1e9))
    return result


def seconds_of(value: Duration) -> float:
    """A span in seconds."""
    return value.seconds + value.nanos / 1e9
