"""The console multiplexer beside tmux, conmon and shellinabox: output of a terminal carried to one attached viewer.

All run the same guest, which prints numbered lines to its pty as fast as they are taken; the figure is bytes of that
per CPU-second of the processes that carry it (all their threads), from the first byte to the viewer's having the last.

* ours: the multiplexer reads the pty into the scrollback and hands it to a raw viewer on a Unix socket.
* conmon: reads the pty and hands it to a viewer on its attach socket; its log is off. A script of ours is its runtime.
* tmux: server and attached client; interprets the output and draws a screen of 80 by 24, so its viewer gets only what
  was to be seen, which is less work for the viewer and more for tmux.
* shellinabox: hands the output over HTTP as JSON, a request at a time.

Ours, conmon and shellinabox must deliver every byte; of tmux the last line must appear.
"""

import array
import contextlib
import http.client
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tty
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

from measure import Claim, Reference, claim, interleave, publish, unmeasured

from hypervisor.ext.console_mux import ConsoleMux, implementation

PAIRS = 5
LINES = 200_000
LIMIT_S = 60.0
LAST = b"the last line"
ME = (sys.executable, str(Path(__file__).resolve()))


def output() -> bytes:
    """What the guest prints."""
    return b"".join(b"%077d\r\n" % number for number in range(LINES)) + LAST


def guest(directory: Path) -> None:
    """Print it once somebody says so, and stay."""
    tty.setraw(1)
    data = memoryview(output())
    with (directory / "go").open("rb") as go:
        go.read(1)
    while data:
        data = data[os.write(1, data[:65536]) :]
    signal.pause()


def _spawn_guest(directory: Path) -> tuple[int, int]:
    """The guest on a pty of its own; returns the master's descriptor and the process id."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    process = subprocess.Popen(
        [*ME, "guest", str(directory)], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    return master, process.pid


def carrier(directory: Path) -> None:
    """Ours, as a process: the guest's pty to whoever connects to ``attach``."""
    master, child = _spawn_guest(directory)
    with ConsoleMux() as mux, socket.socket(socket.AF_UNIX) as listener:
        console = mux.create_console(scrollback_bytes=64 << 20)
        mux.attach_guest(console, master, master)
        listener.bind(str(directory / "attach"))
        listener.listen()
        viewer, _ = listener.accept()
        mux.attach_viewer(console, viewer.detach())
        signal.sigwait({signal.SIGTERM})
        os.kill(child, signal.SIGKILL)


def runtime(directory: Path, arguments: list[str]) -> None:
    """Stands for the OCI runtime that conmon calls: hands over the guest's pty and says its process id."""
    if "create" not in arguments:
        return
    master, child = _spawn_guest(directory)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(arguments[arguments.index("--console-socket") + 1])
        sock.sendmsg([b"pty"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [master]))])
    Path(arguments[arguments.index("--pid-file") + 1]).write_text(str(child))


def _cpu_s(*pids: int) -> float:
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def _until(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not look():
        if time.monotonic() > deadline:
            raise TimeoutError(f"in vain: {what}")
        time.sleep(0.01)


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hv-peers-") as name:
        directory = Path(name)
        os.mkfifo(directory / "go")
        yield directory


def _script(directory: Path, mode: str) -> Path:
    """A program that is this one in that mode: for peers that start it with another environment."""
    script = directory / mode
    path = os.pathsep.join(sys.path)
    script.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {ME[0]} {ME[1]} {mode} {directory} "$@"\n')
    script.chmod(0o755)
    return script


def _go(directory: Path) -> None:
    (directory / "go").write_bytes(b"!")


@contextlib.contextmanager
def _running(*command: str, ready: Path | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        if ready is not None:
            _until(ready.exists, f"{command[0]} makes {ready.name}")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ours() -> float:
    """Bytes per CPU-second of the multiplexer."""
    wanted = output()
    with (
        _directory() as directory,
        _running(*ME, "carrier", str(directory), ready=directory / "attach") as process,
        socket.socket(socket.AF_UNIX) as viewer,
    ):
        _until(lambda: viewer.connect_ex(str(directory / "attach")) == 0, "the carrier takes a viewer")
        begin = _cpu_s(process.pid)
        _go(directory)
        got = bytearray()
        while len(got) < len(wanted):
            data = viewer.recv(1 << 16)
            assert data, "the viewer was let go"
            got += data
        spent = _cpu_s(process.pid) - begin
        assert got == wanted, "not what the guest printed"
    return len(wanted) / spent


def conmon() -> float:
    """Bytes per CPU-second of conmon."""
    wanted = output()
    with _directory() as directory:
        script = _script(directory, "runtime")
        identity = f"peer-{os.getpid()}"
        command = [
            "conmon",
            "--sync",
            "-c",
            identity,
            "-u",
            identity,
            "-n",
            identity,
            "-r",
            str(script),
            "-t",
        ]
        command += ["-b", str(directory), "-p", str(directory / "pid"), "-l", "none", "--full-attach"]
        attach = directory / "attach"
        child = 0
        with _running(*command, ready=directory / "pid") as process:
            try:
                child = int((directory / "pid").read_text())
                _until(attach.exists, "conmon listens")
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as viewer:
                    viewer.connect(str(attach))
                    begin = _cpu_s(process.pid)
                    _go(directory)
                    got = bytearray()
                    while len(got) < len(wanted):
                        # The first byte of a packet names the stream.
                        data = viewer.recv(1 << 16)
                        assert data, "the viewer was let go"
                        got += data[1:]
                    spent = _cpu_s(process.pid) - begin
                assert got == wanted, "not what the guest printed"
            finally:
                if child:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
    return len(wanted) / spent


def tmux() -> float:
    """Bytes per CPU-second of tmux's server and client."""
    with _directory() as directory:
        control = ["tmux", "-S", str(directory / "tmux"), "-f", "/dev/null"]
        command = " ".join([*ME, "guest", str(directory)])
        subprocess.run([*control, "new-session", "-d", "-x", "80", "-y", "24", command], check=True)
        try:
            told = subprocess.run(
                [*control, "display", "-p", "#{pid}"], check=True, capture_output=True, text=True
            )
            server = int(told.stdout)
            master, slave = pty.openpty()
            client = subprocess.Popen(
                [*control, "attach"],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
                env=os.environ | {"TERM": "xterm"},
            )
            os.close(slave)
            begin = _cpu_s(server, client.pid)
            _go(directory)
            tail = b""
            while LAST not in tail:
                tail = tail[-4096:] + os.read(master, 1 << 16)
            spent = _cpu_s(server, client.pid) - begin
            os.close(master)
            client.kill()
            client.wait()
        finally:
            subprocess.run([*control, "kill-server"], check=False)
    return len(output()) / spent


def shellinabox() -> float:
    """Bytes per CPU-second of shellinabox's processes."""
    wanted = output()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with _directory() as directory:
        service = f"/:{os.getuid()}:{os.getgid()}:{directory}:{_script(directory, 'guest')}"
        arguments = ["shellinaboxd", "-t", "-q", "--localhost-only", "--no-beep", "-p", str(port)]
        with _running(*arguments, "-s", service) as process:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)

            def answers() -> bool:
                with socket.socket() as sock:
                    return sock.connect_ex(("127.0.0.1", port)) == 0

            _until(answers, "shellinabox listens")

            def ask(**more: str) -> dict[str, str]:
                fields = {"width": "80", "height": "24", "rooturl": f"http://127.0.0.1:{port}/"} | more
                head = {"Content-Type": "application/x-www-form-urlencoded"}
                client.request("POST", "/?", urllib.parse.urlencode(fields), head)
                answer: dict[str, str] = json.loads(client.getresponse().read().decode("latin-1"))
                return answer

            session = ask()["session"]
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            carriers = (process.pid, *map(int, children))
            begin = _cpu_s(*carriers)
            _go(directory)
            got = ""
            while LAST.decode() not in got[-4096:]:
                got += ask(session=session).get("data", "")
            spent = _cpu_s(*carriers) - begin
            assert got.encode("latin-1").endswith(wanted), "not what the guest printed"
    return len(wanted) / spent


def _beside(peer: Callable[[], float], program: str, note: str) -> Claim:
    name = f"console: terminal output carried to a viewer, beside {peer.__name__}"
    if shutil.which(program) is None:
        return unmeasured(
            name, reference_name=peer.__name__, better="more", goal=1.0, why=f"{program} is not here"
        )
    mine, theirs = interleave(ours, peer, pairs=PAIRS)
    return claim(
        name,
        mine,
        theirs,
        unit="bytes per CPU-second",
        reference_name=peer.__name__,
        better="more",
        goal=1.0,
        note=note,
        against=Reference.PEER,
    )


def main() -> None:
    """Measure and publish."""
    if implementation != "native":
        sys.exit("the compiled multiplexer is what is measured: unset HYPERVISOR_EXT_PURE")
    publish(
        [
            _beside(conmon, "conmon", "attach socket, log off"),
            _beside(tmux, "tmux", "server and client; it draws a screen, so its viewer gets less"),
            _beside(shellinabox, "shellinaboxd", "JSON over HTTP"),
        ]
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["guest", directory]:
            guest(Path(directory))
        case ["carrier", directory]:
            # Blocked before there is a thread that could take it.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            carrier(Path(directory))
        case ["runtime", directory, *arguments]:
            runtime(Path(directory), arguments)
        case _:
            main()
