"""The console multiplexer beside C: reading a pty, handing 64 KiB pieces to 10 and 100 raw viewers, being idle.

All figures are bytes per CPU-second of the process that does the work (the writer and the viewers are another one).
Every viewer counts what it gets and compares every eighth piece byte for byte. The source of the fan-out waits until
every viewer has got a piece, as a guest that is faster than its viewers would have them skipped, which is another
subject.
"""

import os
import pty
import resource
import select
import socket
import subprocess
import sys
import tempfile
import time
import tty
from pathlib import Path

import measure

from hypervisor.ext.console_mux import ConsoleMux, EventKind, implementation

_PAIRS = 5
_PIECE = 64 << 10
_IDLE_S = 3.0
_BATCH = 2  # pieces in flight: half of the ring


def _compiled(name: str, directory: str) -> str:
    source = Path(__file__).with_name("limits") / f"{name}.c"
    target = f"{directory}/{name}"
    subprocess.run(["cc", "-O3", "-march=native", "-o", target, str(source), "-lutil"], check=True)
    return target


def _cpu_s() -> float:
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


def _pty_read(megabytes: int) -> float:
    total = megabytes << 20
    master, slave = pty.openpty()
    tty.setraw(slave)
    with ConsoleMux() as mux:
        console = mux.create_console()
        pid = os.fork()
        if pid == 0:
            data, sent = b"x" * _PIECE, 0
            while sent < total:
                sent += os.write(slave, data)
            os._exit(0)
        os.close(slave)
        begin = _cpu_s()
        mux.attach_guest(console, master, master)
        os.waitpid(pid, 0)
        while not any(event.kind == EventKind.GUEST_GONE for event in mux.drain_events()):
            select.select([mux.event_fd], [], [])
        spent = _cpu_s() - begin
        assert mux.stats(console).end == total
        assert mux.read(console, total - 1000, 1000).data == b"x" * 1000
    return total / spent


def _drain(guest: socket.socket, ends: list[socket.socket], pieces: int) -> bool:
    """Write the output piece by piece and have every viewer get it; whether each got exactly that."""
    data = [os.urandom(_PIECE) for _ in range(_BATCH)]
    whole = b"".join(data)
    buffer = bytearray(len(whole))
    for number in range(pieces // _BATCH):
        guest.sendall(whole)
        # Every eighth round is compared byte for byte at every viewer; the others by length, which is cheap.
        for end in ends:
            got, view = 0, memoryview(buffer)
            while got < len(whole):
                size = end.recv_into(view[got:])
                if size == 0:
                    return False
                got += size
            if number % 8 == 0 and buffer != whole:
                return False
    return True


def _fanout(viewers: int, megabytes: int) -> float:
    pieces = (megabytes << 20) // _PIECE
    pairs = [socket.socketpair() for _ in range(viewers)]
    guest, console_end = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ok = False
        try:
            for mine, _ in pairs:
                mine.close()
            console_end.close()
            ok = _drain(guest, [theirs for _, theirs in pairs], pieces)
        finally:
            os._exit(0 if ok else 1)
    guest.close()
    with ConsoleMux() as mux:
        console = mux.create_console()
        for mine, theirs in pairs:
            theirs.close()
            mux.attach_viewer(console, mine.detach())
        begin = _cpu_s()
        fd = console_end.detach()
        mux.attach_guest(console, fd, fd)
        _, status = os.waitpid(pid, 0)
        spent = _cpu_s() - begin
        assert status == 0, "a viewer did not get exactly the output"
        assert mux.stats(console).end == pieces * _PIECE
        assert mux.stats(console).skipped == 0
    return pieces * _PIECE * viewers / spent


def _idle() -> float:
    """Share of a core that 1,000 consoles with a guest and a viewer each take when nothing happens."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    others = []
    with ConsoleMux() as mux:
        for _ in range(1000):
            console = mux.create_console()
            guest, guest_end = socket.socketpair()
            viewer, viewer_end = socket.socketpair()
            others += [guest, viewer]
            fd = guest_end.detach()
            mux.attach_guest(console, fd, fd)
            mux.attach_viewer(console, viewer_end.detach())
        begin, at = _cpu_s(), time.monotonic()
        time.sleep(_IDLE_S)
        share = (_cpu_s() - begin) / (time.monotonic() - at)
        others[-2].sendall(b"alive")
        assert others[-1].recv(5) == b"alive"
    for end in others:
        end.close()
    return share


def _limit(command: list[str]) -> float:
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0])


def main() -> None:
    """Measure all, and say it."""
    if implementation != "native":
        sys.exit("the compiled multiplexer is what is measured: unset HYPERVISOR_EXT_PURE")
    claims = []
    with tempfile.TemporaryDirectory() as directory:
        pty_read, fanout = _compiled("pty_read", directory), _compiled("fanout", directory)
        mine, theirs = measure.interleave(
            lambda: _pty_read(48), lambda: _limit([pty_read, "48"]), pairs=_PAIRS
        )
        claims.append(
            measure.claim(
                "console: pty read",
                mine,
                theirs,
                unit="bytes per CPU-second",
                reference_name="a C read loop",
                better="more",
                goal=0.8,
            )
        )
        for viewers, megabytes in ((10, 96), (100, 12)):
            mine, theirs = measure.interleave(
                lambda v=viewers, m=megabytes: _fanout(v, m),  # type: ignore[misc]
                lambda v=viewers, m=megabytes: _limit([fanout, str(v), str(m)]),  # type: ignore[misc]
                pairs=_PAIRS,
            )
            claims.append(
                measure.claim(
                    f"console: {viewers} raw viewers",
                    mine,
                    theirs,
                    unit="bytes delivered per CPU-second",
                    reference_name="C writev of 64 KiB",
                    better="more",
                    goal=0.5,
                    note="ours also reads the output from a socket",
                )
            )
    mine = [_idle() for _ in range(_PAIRS)]
    claims.append(
        measure.claim(
            "console: 1,000 idle consoles",
            mine,
            [1.0] * len(mine),
            unit="cores",
            reference_name="one core",
            better="less",
            goal=0.005,
        )
    )
    measure.publish(claims)


if __name__ == "__main__":
    main()
