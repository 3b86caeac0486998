"""What guests put out reaches every viewer byte for byte, and who is slow or gone costs the others nothing."""

import os
import pty
import random
import resource
import socket
import threading
import tty
from pathlib import Path
from typing import Any

import pytest

from hypervisor.ext import console_mux
from hypervisor.ext.console_mux import VIEWER_MEMORY_BYTES, EventKind, ViewerEnd
from hypervisor.ext.console_mux._decoder_py import FrameDecoder
from hypervisor.ext.console_mux.frames import FrameType, encode_credit


def _receive(sock: socket.socket, count: int) -> bytes:
    parts = b""
    while len(parts) < count:
        part = sock.recv(count - len(parts))
        assert part, f"ended after {len(parts)} of {count} bytes"
        parts += part
    return parts


def _frames(sock: socket.socket, decoder: FrameDecoder, kind: FrameType) -> list[Any]:
    """Frames up to the first one of a kind."""
    frames: list[Any] = []
    while not any(frame.type is kind for frame in frames):
        part = sock.recv(1 << 16)
        assert part, "ended"
        frames += decoder.feed(part)
    return frames


def test_the_implementation_in_use_is_the_compiled_one_unless_told_otherwise() -> None:
    pure = os.environ.get("HYPERVISOR_EXT_PURE") == "1"

    assert console_mux.implementation == ("python" if pure else "native")
    assert console_mux.ConsoleMux.__module__.endswith("_mux_py" if pure else "_mux_c")
    if not pure:
        from hypervisor.ext.console_mux import _mux_c

        assert str(_mux_c.__file__).endswith(".so")


@pytest.mark.parametrize("kind", ["pty", "fifo", "socket"])
def test_every_viewer_gets_every_byte(rig: Any, kind: str, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(150_000)
    console = rig.mux.create_console()
    if kind == "pty":
        master, slave = pty.openpty()
        tty.setraw(slave)
        rig.mux.attach_guest(console, master, master)
        out = slave
    elif kind == "fifo":
        os.mkfifo(tmp_path / "out")
        rig.mux.attach_guest(console, os.open(tmp_path / "out", os.O_RDONLY | os.O_NONBLOCK))
        out = os.open(tmp_path / "out", os.O_WRONLY)
    else:
        guest = rig.guest(console)
        guest.settimeout(None)
        out = guest.detach()
    viewers = [rig.viewer(console)[0] for _ in range(5)]
    writer = threading.Thread(
        target=lambda: [os.write(out, data[i : i + 997]) for i in range(0, len(data), 997)]
    )

    writer.start()
    got = [_receive(viewer, len(data)) for viewer in viewers]

    writer.join()
    os.close(out)
    assert all(seen == data for seen in got)
    assert rig.mux.read(console, 0, 1 << 20).data == data
    assert rig.event(EventKind.GUEST_GONE).value == 0
    assert rig.mux.stats(console).attached is False


def test_a_slow_viewer_is_skipped_with_the_right_count_and_the_others_are_not(rig: Any) -> None:
    data = random.Random(2).randbytes(2_000_000)
    console = rig.mux.create_console(scrollback_bytes=64 << 10)
    guest = rig.guest(console)
    fast, _ = rig.viewer(console)
    slow, slow_id = rig.viewer(console, framed=True)
    seen = b""
    for begin in range(0, len(data), 16 << 10):
        piece = data[begin : begin + (16 << 10)]
        guest.sendall(piece)
        seen += _receive(fast, len(piece))
        assert rig.mux.viewer_stats(slow_id).memory_bytes <= VIEWER_MEMORY_BYTES
    rig.mux.end_viewers(console, 9)

    frames = _frames(slow, FrameDecoder(from_viewer=False), FrameType.ENDED)

    assert seen == data
    at = skipped = 0
    for frame in frames:
        if frame.type is FrameType.DATA:
            assert frame.position == at
            assert frame.payload == data[at : at + len(frame.payload)]
            at += len(frame.payload)
        elif frame.type is FrameType.SKIPPED:
            lost = int.from_bytes(frame.payload, "little")
            assert frame.position == at + lost
            at, skipped = frame.position, skipped + lost
    assert at == len(data)
    assert frames[-1].code == 9
    assert 0 < skipped == rig.mux.stats(console).skipped


def test_a_raw_viewer_reads_how_much_it_missed(rig: Any) -> None:
    console = rig.mux.create_console(scrollback_bytes=1000, history=bytes(5000))
    viewer, _ = rig.viewer(console, position=0)

    expected = b"\r\n[... 4500 bytes skipped ...]\r\n" + bytes(500)
    assert _receive(viewer, len(expected)) == expected


def test_replay_is_as_long_as_asked(rig: Any) -> None:
    console = rig.mux.create_console(position=100, history=b"0123456789")
    ours, theirs = socket.socketpair()
    with ours:
        attached = rig.mux.attach_viewer(console, theirs.detach(), replay_bytes=4)

        assert (attached.position, attached.end) == (106, 110)
        assert ours.recv(100) == b"6789"


def test_no_more_is_sent_than_was_granted(rig: Any) -> None:
    console = rig.mux.create_console(history=bytes(range(256)) * 4)
    viewer, viewer_id = rig.viewer(console, framed=True, credit=10)
    decoder = FrameDecoder(from_viewer=False)

    assert _frames(viewer, decoder, FrameType.DATA)[0].payload == bytes(range(10))
    assert rig.mux.viewer_stats(viewer_id).credit == 0
    viewer.sendall(encode_credit(5))
    assert _frames(viewer, decoder, FrameType.DATA)[0].payload == bytes(range(10, 15))
    viewer.sendall(encode_credit(5000))
    assert _frames(viewer, decoder, FrameType.DATA)[0].payload == (bytes(range(256)) * 4)[15:]
    assert rig.mux.viewer_stats(viewer_id).credit == 5000 - (1024 - 15)


def test_a_viewer_that_vanishes_harms_nobody(rig: Any) -> None:
    console = rig.mux.create_console(scrollback_bytes=32 << 10)
    guest = rig.guest(console)
    gone, gone_id = rig.viewer(console)
    stays, _ = rig.viewer(console)
    total = 0
    for _ in range(40):  # the one that does not read has its socket full in the middle of a write
        guest.sendall(b"x" * 16384)
        total += len(_receive(stays, 16384))
    gone.close()

    event = rig.event(EventKind.VIEWER_GONE)

    assert (event.viewer, event.value) == (gone_id, ViewerEnd.CLOSED)
    guest.sendall(b"still here")
    assert _receive(stays, 10) == b"still here"
    with pytest.raises(KeyError):
        rig.mux.viewer_stats(gone_id)


def test_bytes_that_are_no_frame_end_that_viewer_alone(rig: Any) -> None:
    console = rig.mux.create_console()
    bad, bad_id = rig.viewer(console, framed=True)
    good, _ = rig.viewer(console)

    bad.sendall(b"\xff" * 16)

    event = rig.event(EventKind.VIEWER_GONE)
    assert (event.viewer, event.value) == (bad_id, ViewerEnd.PROTOCOL_ERROR)
    rig.guest(console).sendall(b"ok")
    assert _receive(good, 2) == b"ok"


def test_a_console_outlives_its_guests_and_its_viewers_see_the_next(rig: Any) -> None:
    console = rig.mux.create_console()
    viewer, _ = rig.viewer(console)
    for text in (b"first", b"second"):
        guest = rig.guest(console)
        guest.sendall(text)
        assert _receive(viewer, len(text)) == text
        guest.close()
        assert rig.event(EventKind.GUEST_GONE).console == console

    assert rig.mux.read(console, 0, 100).data == b"firstsecond"


def test_changes_are_of_consoles_with_output_alone(rig: Any) -> None:
    consoles = [rig.mux.create_console() for _ in range(3)]
    viewer, _ = rig.viewer(consoles[1])
    rig.guest(consoles[1]).sendall(b"news")
    _receive(viewer, 4)

    assert rig.mux.changes() == [(consoles[1], 4)]
    assert rig.mux.changes() == []


def test_a_thousand_consoles_each_have_their_own_output(rig: Any) -> None:
    wanted = 4200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < wanted:
        pytest.skip(f"at most {hard} descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        consoles = []
        for i in range(1000):
            console = rig.mux.create_console()
            consoles.append((console, rig.guest(console), rig.viewer(console)[0], b"console %d" % i))
        for _, guest, _, text in consoles:
            guest.sendall(text)
        for console, _, viewer, text in consoles:
            assert _receive(viewer, len(text)) == text
            assert rig.mux.stats(console).end == len(text)
        for console, guest, viewer, _ in consoles:
            rig.mux.remove_console(console)
            assert viewer.recv(1) == b""
            guest.close()
            viewer.close()
        assert rig.mux.consoles() == ()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_not_there_or_not_right_is_refused_and_stays_the_callers(rig: Any, tmp_path: Path) -> None:
    console = rig.mux.create_console()
    read, write = os.pipe()
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    try:
        with pytest.raises(KeyError):
            rig.mux.stats(console + 1)
        with pytest.raises(OSError, match="non-socket"):
            rig.mux.attach_viewer(console, read)
        with pytest.raises(PermissionError):  # epoll takes no files
            rig.mux.attach_guest(console, file)
        with pytest.raises(ValueError, match="scrollback"):
            rig.mux.create_console(scrollback_bytes=1)
    finally:
        for fd in (read, write, file):
            os.close(fd)
    rig.mux.close()
    with pytest.raises(ValueError, match="closed"):
        rig.mux.stats(console)
