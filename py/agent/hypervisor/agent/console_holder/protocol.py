"""What the agent and the console holder say to each other.

A unix socket of type SOCK_SEQPACKET in the agent's data directory, mode 0600: one packet is one message, a MessagePack
array whose first element names its kind (``msgspec`` structs below). The agent sends requests, each with a number of
its own; the holder answers each with :class:`Reply` or :class:`Refusal` of the same number, in any order, and sends
:class:`Event` when something happens. Descriptors travel with the packet that speaks of them (SCM_RIGHTS) and are the
holder's from then on.

A holder serves one agent: a new connection takes over, and the older one is closed (an agent that was killed leaves
one behind for a moment). Nothing of the holder's state depends on a connection.

Versions: ``Hello`` and ``Stop`` never change, so that an agent of any version can end a holder that it does not
understand and start its own; guests do not notice, and what the log files have is there again.
"""

import array
import os
import socket
from dataclasses import dataclass

import msgspec

__all__ = [
    "MAX_PACKET",
    "VERSION",
    "Attach",
    "Bye",
    "ConsoleState",
    "EndViewers",
    "Event",
    "Forget",
    "Hello",
    "HelloReply",
    "Locate",
    "LocateReply",
    "LogFailed",
    "Open",
    "Packet",
    "ProtocolError",
    "Read",
    "ReadReply",
    "Refusal",
    "Reply",
    "Request",
    "Resize",
    "ResizeReply",
    "Retain",
    "RunEnded",
    "Stop",
    "View",
    "ViewReply",
    "close_all",
    "decode_answer",
    "decode_request",
    "encode",
    "encode_request",
    "raw",
    "receive",
    "send",
]

VERSION = 1
MAX_PACKET = 80 << 10
"""Larger than any message: data is at most 64 KiB."""
_MAX_DESCRIPTORS = 4


class ProtocolError(Exception):
    """The other side sent what is no message."""


class _Struct(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


class ConsoleState(msgspec.Struct, frozen=True, array_like=True):
    """One console. Positions count all bytes it ever printed.

    ``start``, ``end``: what is kept, in memory or in log files, up to the newest byte; ``ring_start``: what is in
    memory. ``run``: the run of the instance that was attached last (its agent's word for it); ``live``: whether that
    still has an output; ``run_end``: where the output of the last run that ended did end.
    """

    console: str
    start: int
    ring_start: int
    end: int
    run: str
    live: bool
    run_end: int


class Hello(_Struct, frozen=True):
    """First of a connection. Answered by :class:`HelloReply`."""

    version: int


class Open(_Struct, frozen=True):
    """Make a console, or find the one there is; answered by its :class:`ConsoleState`. A new one continues its log.

    ``scrollback``: bytes kept in memory; ``log_bytes``, ``log_files``: see LogLimits; ``position``: where counting
    begins at least, where the agent knows more than the log.
    """

    console: str
    scrollback: int
    log_bytes: int
    log_files: int
    position: int


class Attach(_Struct, frozen=True):
    """Take output from here on from the descriptor that comes along, and give input to the second one or, where there
    is none and ``same``, to the first; else there is no input. Replaces what was attached. Answered by the
    :class:`ConsoleState`."""

    console: str
    run: str
    same: bool


class View(_Struct, frozen=True):
    """A viewer: the descriptor that comes along is its socket, which speaks the framed protocol of console_mux. It
    begins at ``position`` and has ``credit`` bytes of it. Answered by :class:`ViewReply`."""

    console: str
    position: int
    read_only: bool
    credit: int


class Locate(_Struct, frozen=True):
    """Where output begins: exactly one of ``time_ns`` (since the epoch) and ``lines`` (so many last lines) is not
    negative. Answered by :class:`LocateReply`."""

    console: str
    time_ns: int
    lines: int


class Read(_Struct, frozen=True):
    """Up to ``limit`` (at most 64 KiB) bytes from ``position`` on, from memory or the log. Answered by
    :class:`ReadReply`."""

    console: str
    position: int
    limit: int


class Resize(_Struct, frozen=True):
    """Set the size of the attached terminal. Answered by :class:`ResizeReply`."""

    console: str
    width: int
    height: int


class EndViewers(_Struct, frozen=True):
    """End all viewers of a console once they have got the output of now, with this code. Answered by None."""

    console: str
    code: int


class Forget(_Struct, frozen=True):
    """Remove a console with its log; viewers end with this code, and have a moment to get what was printed. Answered by
    None; a console that is not there is no error."""

    console: str
    code: int


class Retain(_Struct, frozen=True):
    """Forget all consoles and logs but these."""

    consoles: tuple[str, ...]


class Bye(_Struct, frozen=True):
    """The agent leaves in order: the holder ends as soon as nothing is live. Answered by None."""


class Stop(_Struct, frozen=True):
    """End now, whatever is attached. Answered by None, then the connection closes."""


Request = Hello | Open | Attach | View | Locate | Read | Resize | EndViewers | Forget | Retain | Bye | Stop


class HelloReply(msgspec.Struct, frozen=True, array_like=True):
    """``pid``: the holder's process; ``implementation``: of console_mux, ``native`` or ``python``."""

    version: int
    pid: int
    implementation: str
    consoles: tuple[ConsoleState, ...]


class ViewReply(msgspec.Struct, frozen=True, array_like=True):
    """Where the viewer really begins, and the newest position then."""

    position: int
    end: int


class LocateReply(msgspec.Struct, frozen=True, array_like=True):
    """A position that is kept."""

    position: int


class ReadReply(msgspec.Struct, frozen=True, array_like=True):
    """``data`` begins at ``position``, which is later than asked for where that is no longer kept; ``end``: the newest
    position."""

    position: int
    data: bytes
    end: int


class ResizeReply(msgspec.Struct, frozen=True, array_like=True):
    """Whether there was a terminal to resize."""

    done: bool


class RunEnded(_Struct, frozen=True):
    """The output of a run ended at ``position``: its guest closed it."""

    console: str
    run: str
    position: int


class LogFailed(_Struct, frozen=True):
    """The log of a console cannot be written and is given up until the next ``Open``; its scrollback goes on."""

    console: str
    reason: str


Event = RunEnded | LogFailed


class _Numbered(msgspec.Struct, frozen=True, array_like=True):
    number: int
    request: Request


class Reply(_Struct, frozen=True):
    """``result``: what the request's docstring says, encoded."""

    number: int
    result: msgspec.Raw


class Refusal(_Struct, frozen=True):
    """``reason``: UNKNOWN_CONSOLE, INVALID, NOT_ATTACHED or FAILED."""

    number: int
    reason: str
    message: str


Answer = Reply | Refusal | RunEnded | LogFailed

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(_Numbered)
_answers: "msgspec.msgpack.Decoder[Answer]" = msgspec.msgpack.Decoder(Answer)


@dataclass(frozen=True, slots=True)
class Packet:
    """What came: no data at the end of the connection."""

    data: bytes
    descriptors: tuple[int, ...] = ()


def encode(value: object) -> bytes:
    """A message, or a result."""
    return _encoder.encode(value)


def raw(value: object) -> msgspec.Raw:
    """A result as it goes into a :class:`Reply`."""
    return msgspec.Raw(_encoder.encode(value))


def encode_request(number: int, request: Request) -> bytes:
    """A request under its number."""
    return _encoder.encode(_Numbered(number, request))


def decode_request(data: bytes) -> tuple[int, Request]:
    """Number and request. ProtocolError."""
    try:
        numbered = _requests.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"this is no request: {exc}") from exc
    return numbered.number, numbered.request


def decode_answer(data: bytes) -> Answer:
    """Reply, refusal or event. ProtocolError."""
    try:
        return _answers.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"this is no answer: {exc}") from exc


def send(sock: socket.socket, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
    """One packet, at once. BlockingIOError when the other side does not keep up."""
    ancillary = []
    if descriptors:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> Packet:
    """One packet. BlockingIOError when there is none; ProtocolError for one that is too large."""
    space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
    data, ancillary, flags, _ = sock.recvmsg(MAX_PACKET, space, socket.MSG_CMSG_CLOEXEC)
    received = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received.frombytes(content[: len(content) - len(content) % received.itemsize])
    packet = Packet(data, tuple(received))
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(packet.descriptors)
        raise ProtocolError("a packet was cut off")
    return packet


def close_all(descriptors: tuple[int, ...]) -> None:
    """Close descriptors nobody wants."""
    for fd in descriptors:
        os.close(fd)
