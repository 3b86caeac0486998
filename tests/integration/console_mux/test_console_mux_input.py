"""What is typed reaches the guest whole and in order, or whoever typed hears that it did not; logs hold the output."""

import errno
import os
import pty
import socket
import tty
from pathlib import Path
from typing import Any

import pytest

from hypervisor.ext.console_mux import INPUT_QUEUE_BYTES, EventKind
from hypervisor.ext.console_mux._decoder_py import FrameDecoder
from hypervisor.ext.console_mux.frames import FrameType, InputResult, encode_input, encode_resize


def _answer(viewer: socket.socket, decoder: FrameDecoder) -> Any:
    frames: list[Any] = []
    while not frames:
        part = viewer.recv(1 << 16)
        assert part
        frames = decoder.feed(part)
    (frame,) = frames
    return frame


def test_writes_of_several_writers_are_not_mixed(rig: Any) -> None:
    console = rig.mux.create_console()
    guest = rig.guest(console)
    raw, _ = rig.viewer(console)
    framed, _ = rig.viewer(console, framed=True)
    decoder = FrameDecoder(from_viewer=False)
    for _ in range(50):
        framed.sendall(encode_input(b"f" * 100))
        assert _answer(framed, decoder).code == InputResult.ACCEPTED
        assert rig.mux.write(console, b"w" * 100) == 100
        raw.sendall(b"r" * 100)
        got = b""
        while len(got) < 300:
            got += guest.recv(300 - len(got))
        assert got == b"f" * 100 + b"w" * 100 + b"r" * 100
    assert rig.mux.stats(console).input_bytes == 15_000


def test_a_read_only_viewer_types_and_resizes_nothing(rig: Any) -> None:
    console = rig.mux.create_console()
    guest = rig.guest(console)
    raw, _ = rig.viewer(console, read_only=True)
    framed, _ = rig.viewer(console, framed=True, read_only=True)
    raw.sendall(b"no")
    framed.sendall(encode_resize(1, 2) + encode_input(b"no"))

    assert _answer(framed, FrameDecoder(from_viewer=False)).code == InputResult.READ_ONLY
    rig.mux.write(console, b"yes")
    assert guest.recv(10) == b"yes"
    assert [event.kind for event in rig.mux.drain_events()] == []


def test_a_guest_that_takes_nothing_fills_the_queue_and_no_more(rig: Any) -> None:
    console = rig.mux.create_console()
    guest = rig.guest(console)
    framed, _ = rig.viewer(console, framed=True)
    decoder = FrameDecoder(from_viewer=False)
    typed = 0
    while accepted := rig.mux.write(console, b"x" * 4096):
        typed += accepted
    assert INPUT_QUEUE_BYTES - 4096 < rig.mux.stats(console).input_queued <= INPUT_QUEUE_BYTES
    framed.sendall(encode_input(b"y" * 4096))
    assert _answer(framed, decoder).code == InputResult.FULL

    got = 0
    while got < typed:
        got += len(guest.recv(1 << 16))

    assert rig.event(EventKind.INPUT_READY).console == console
    assert _answer(framed, decoder).type is FrameType.INPUT_READY
    framed.sendall(encode_input(b"y" * 4096))
    assert _answer(framed, decoder).code == InputResult.ACCEPTED


def test_a_raw_writer_waits_and_loses_nothing(rig: Any) -> None:
    console = rig.mux.create_console()
    guest = rig.guest(console)
    raw, _ = rig.viewer(console)
    raw.setblocking(False)
    typed = 0
    while True:
        try:
            typed += raw.send(b"z" * 8192)
        except BlockingIOError:
            if rig.mux.stats(console).input_queued == INPUT_QUEUE_BYTES:
                break
    got = 0
    while got < typed:
        got += len(guest.recv(1 << 16))

    assert got == typed


def test_typing_without_a_guest_is_refused(rig: Any) -> None:
    console = rig.mux.create_console()
    framed, _ = rig.viewer(console, framed=True)

    framed.sendall(encode_input(b"x"))

    assert _answer(framed, FrameDecoder(from_viewer=False)).code == InputResult.NO_GUEST
    with pytest.raises(BrokenPipeError):
        rig.mux.write(console, b"x")


def test_a_guest_that_closes_its_input_is_still_heard(rig: Any) -> None:
    console = rig.mux.create_console()
    out_read, out_write = os.pipe()
    in_read, in_write = os.pipe()
    rig.mux.attach_guest(console, out_read, in_write)
    viewer, _ = rig.viewer(console)
    try:
        os.close(in_read)

        assert rig.event(EventKind.INPUT_CLOSED).value == errno.EPIPE
        os.write(out_write, b"alive")
        assert viewer.recv(10) == b"alive"
    finally:
        os.close(out_write)


def test_the_last_resize_sets_the_terminal(rig: Any) -> None:
    console = rig.mux.create_console()
    master, slave = pty.openpty()
    tty.setraw(slave)
    rig.mux.attach_guest(console, master, master)
    may, viewer_id = rig.viewer(console, framed=True)
    may_not, _ = rig.viewer(console, framed=True, may_resize=False)
    try:
        may_not.sendall(encode_resize(1, 2))
        may.sendall(encode_resize(30, 90))

        event = rig.event(EventKind.RESIZED)
        assert (event.viewer, event.rows, event.columns) == (viewer_id, 30, 90)
        assert os.get_terminal_size(slave) == (90, 30)
        assert rig.mux.resize(console, 40, 100)
        assert os.get_terminal_size(slave) == (100, 40)
    finally:
        os.close(slave)


def test_a_log_is_rotated_without_losing_or_doubling_a_byte(rig: Any, tmp_path: Path) -> None:
    console = rig.mux.create_console()
    guest = rig.guest(console)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    position = rig.mux.set_log(console, os.open(tmp_path / "0", flags), limit_bytes=10_000)
    assert position == 0
    written = b""
    for number in range(1, 5):
        while not any(event.kind == EventKind.LOG_FULL for event in rig.mux.drain_events()):
            text = b"line %d\n" % len(written)
            guest.sendall(text)
            written += text
        position = rig.mux.set_log(console, os.open(tmp_path / str(number), flags), limit_bytes=10_000)
        logged = b"".join((tmp_path / str(i)).read_bytes() for i in range(number))
        assert len(logged) == position
        assert written.startswith(logged)
    rig.until(lambda: rig.mux.stats(console).end == len(written))
    rig.mux.remove_console(console)

    assert b"".join((tmp_path / str(i)).read_bytes() for i in range(5)) == written


def test_a_full_disk_is_told_and_the_console_goes_on(rig: Any, tmp_path: Path) -> None:
    console = rig.mux.create_console()
    guest = rig.guest(console)
    rig.mux.set_log(console, os.open("/dev/full", os.O_WRONLY))
    guest.sendall(b"kept")

    assert rig.event(EventKind.LOG_FAILED).value == errno.ENOSPC
    path = tmp_path / "next"
    rig.mux.set_log(console, os.open(path, os.O_WRONLY | os.O_CREAT))
    rig.until(lambda: path.read_bytes() == b"kept")
