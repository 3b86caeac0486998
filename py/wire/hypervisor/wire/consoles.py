"""Consoles and their logs on the wire: what is asked for, checked on its way in."""

from google.protobuf.timestamp_pb2 import Timestamp

from hypervisor.core.consoles import (
    ALL_KEPT,
    MAX_WINDOW_BYTES,
    ConsoleOptions,
    FromPosition,
    FromTime,
    LastBytes,
    LastLines,
    LogOptions,
    LogPiece,
    Since,
    Start,
)
from hypervisor.core.errors import FieldViolation, InvalidArgument
from hypervisor.core.model import ConsoleSize
from hypervisor.v1 import instance_pb2
from hypervisor.wire.times import datetime_of, duration_of, seconds_of, timestamp_of

__all__ = [
    "MAX_TAIL_LINES",
    "console_data_from_wire",
    "console_data_to_wire",
    "console_options_from_wire",
    "console_options_to_wire",
    "console_size_from_wire",
    "credit_from_wire",
    "log_options_from_wire",
    "log_options_to_wire",
    "log_piece_from_wire",
    "log_piece_to_wire",
]

MAX_TAIL_LINES = 1_000_000
_MAX_SIDE = 10_000

_Open = instance_pb2.ConsoleInput.Open
_DATA_TAG = bytes([instance_pb2.ConsoleOutput.DATA_FIELD_NUMBER << 3 | 2])
_FIXED = instance_pb2.ConsoleInput.RESIZE_POLICY_FIXED
_POLICIES = frozenset(instance_pb2.ConsoleInput.ResizePolicy.values())


def console_data_from_wire(message: bytes) -> memoryview | None:
    """The ``data`` of an encoded ConsoleOutput, uncopied. None for one with anything else in it, and for what is none:
    decode that."""
    if message[:1] != _DATA_TAG:
        return None
    at, shift, length = 1, 0, 0
    for byte in message[1:6]:
        at += 1
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return memoryview(message)[at:] if at + length == len(message) else None
    return None


def console_data_to_wire(data: bytes | memoryview) -> bytes:
    """A ConsoleOutput with ``data``, encoded: the bulk of a console, which a message object would copy once more."""
    length, rest = bytearray(), len(data)
    while rest > 0x7F:
        length.append(rest & 0x7F | 0x80)
        rest >>= 7
    length.append(rest)
    return b"".join((_DATA_TAG, length, data))


def console_size_from_wire(size: instance_pb2.ConsoleInput.Resize, field: str) -> ConsoleSize:
    """The size of a viewer's terminal. InvalidArgument names ``field``."""
    wrong = tuple(
        FieldViolation(f"{field}.{side}", f"is {length}: use 1 to {_MAX_SIDE}")
        for side, length in (("width", size.width), ("height", size.height))
        if not 1 <= length <= _MAX_SIDE
    )
    if wrong:
        raise InvalidArgument.of_fields(wrong)
    return ConsoleSize(size.width, size.height)


def credit_from_wire(credit: int) -> int:
    """More bytes a viewer takes. InvalidArgument."""
    if not 1 <= credit <= MAX_WINDOW_BYTES:
        raise InvalidArgument.of_field("credit", f"is {credit}: grant 1 byte to 16 MiB at a time")
    return credit


def console_options_from_wire(opening: _Open) -> ConsoleOptions:
    """How to attach. InvalidArgument with every wrong field, below ``open``."""
    wrong: list[FieldViolation] = []
    size: ConsoleSize | None = None
    if opening.HasField("size"):
        try:
            size = console_size_from_wire(opening.size, "open.size")
        except InvalidArgument as exc:
            wrong.extend(exc.violations)
    replay: Start = LastBytes(opening.replay_bytes)
    match opening.WhichOneof("replay_from"):
        case "replay_since":
            replay = Since(_not_negative(seconds_of(opening.replay_since), "open.replay_since", wrong))
        case "replay_from_time":
            replay = _time(opening.replay_from_time)
        case "replay_from_position":
            position = _not_negative(opening.replay_from_position, "open.replay_from_position", wrong)
            replay = FromPosition(int(position))
        case _:
            pass
    fixed = opening.resize_policy == _FIXED
    if opening.resize_policy not in _POLICIES:
        wrong.append(FieldViolation("open.resize_policy", "is not a policy that this version knows"))
    elif fixed and size is None and not opening.read_only and not wrong:
        wrong.append(FieldViolation("open.size", "is required where the size is to stay: give it"))
    _not_negative(opening.window_bytes, "open.window_bytes", wrong)
    if wrong:
        raise InvalidArgument.of_fields(tuple(wrong))
    return ConsoleOptions(
        read_only=opening.read_only,
        replay=replay,
        size=size,
        fixed_size=fixed,
        window_bytes=min(opening.window_bytes, MAX_WINDOW_BYTES),
    )


def console_options_to_wire(options: ConsoleOptions, *, instance: str, project: str = "") -> _Open:
    """The first message of a session."""
    opening = _Open(
        instance=instance, project=project, read_only=options.read_only, window_bytes=options.window_bytes
    )
    match options.replay:
        case LastBytes(count=count):
            opening.replay_bytes = count
        case Since(seconds=seconds):
            opening.replay_since.CopyFrom(duration_of(seconds))
        case FromTime(time=time):
            opening.replay_from_time.MergeFrom(timestamp_of(time) or Timestamp())
        case FromPosition(position=position):
            opening.replay_from_position = position
        case LastLines():
            raise ValueError("a console does not replay by lines")
    if options.size is not None:
        opening.size.width, opening.size.height = options.size.width, options.size.height
    if options.fixed_size:
        opening.resize_policy = _FIXED
    return opening


def log_options_from_wire(request: instance_pb2.GetInstanceLogsRequest) -> LogOptions:
    """Which part of a log. InvalidArgument with every wrong field."""
    wrong: list[FieldViolation] = []
    start: Start = ALL_KEPT
    match request.WhichOneof("start"):
        case "since":
            start = Since(_not_negative(seconds_of(request.since), "since", wrong))
        case "from_time":
            start = _time(request.from_time)
        case "from_position":
            start = FromPosition(int(_not_negative(request.from_position, "from_position", wrong)))
        case "tail_bytes":
            start = LastBytes(int(_not_negative(request.tail_bytes, "tail_bytes", wrong)))
        case "tail_lines":
            start = LastLines(request.tail_lines)
            if not 0 <= request.tail_lines <= MAX_TAIL_LINES:
                wrong.append(FieldViolation("tail_lines", f"is {request.tail_lines}: give 0 to 1,000,000"))
        case _:
            pass
    if wrong:
        raise InvalidArgument.of_fields(tuple(wrong))
    return LogOptions(start=start, follow=request.follow)


def log_options_to_wire(
    options: LogOptions, *, instance: str, project: str = ""
) -> instance_pb2.GetInstanceLogsRequest:
    """The request for it."""
    request = instance_pb2.GetInstanceLogsRequest(instance=instance, project=project, follow=options.follow)
    match options.start:
        case LastBytes(count=count):
            if count >= 0:
                request.tail_bytes = count
        case LastLines(count=count):
            request.tail_lines = count
        case Since(seconds=seconds):
            request.since.CopyFrom(duration_of(seconds))
        case FromTime(time=time):
            request.from_time.MergeFrom(timestamp_of(time) or Timestamp())
        case FromPosition(position=position):
            request.from_position = position
    return request


def log_piece_to_wire(piece: LogPiece) -> instance_pb2.InstanceLogChunk:
    """One message of a log."""
    return instance_pb2.InstanceLogChunk(
        position=piece.position, data=piece.data, skipped_bytes=piece.skipped
    )


def log_piece_from_wire(chunk: instance_pb2.InstanceLogChunk) -> LogPiece:
    """The same, back."""
    return LogPiece(chunk.position, chunk.data, chunk.skipped_bytes)


def _time(value: Timestamp) -> Start:
    time = datetime_of(value)
    # The zero time is before everything.
    return FromPosition(0) if time is None else FromTime(time)


def _not_negative(value: float, field: str, wrong: list[FieldViolation]) -> float:
    if value < 0:
        wrong.append(FieldViolation(field, f"is {value:g}: it cannot be negative"))
    return value
