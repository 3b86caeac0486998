"""A guest's terminal over two FIFOs, which the process that runs the guest (a container's shim, a VMM) holds too.

How output survives: that process holds both ends of the output FIFO while the guest runs, so neither a missing reader
nor one that dies is an error to it; what nobody reads waits in the kernel's pipe (``buffer_bytes``), and past that the
guest's own writes wait. The driver keeps one more descriptor of the FIFO open from before the start until the next
start or the delete (:class:`ConsoleFifos`), so that the last words of a guest that has ended are there for whoever
attaches next. The process also holds a writer of the input FIFO: detaching is no end of input.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
from array import array
from collections.abc import Awaitable, Callable
from pathlib import Path
from termios import FIONREAD

from hypervisor.agent.drivers.driver import ConsoleEndpoint
from hypervisor.core.errors import FailedPrecondition, Unimplemented
from hypervisor.core.model import ConsoleSize

__all__ = ["ConsoleFifos", "FifoConsole"]

_F_SETPIPE_SZ = 1031


class ConsoleFifos:
    """Makes, holds and removes the FIFOs of each instance, in one private directory each."""

    def __init__(self, root: Path, *, buffer_bytes: int) -> None:
        self._root = root
        self._buffer_bytes = buffer_bytes
        self._held: dict[str, int] = {}

    def paths(self, instance_id: str) -> tuple[Path, Path]:
        """Input and output FIFO."""
        directory = self._root / instance_id
        return directory / "in", directory / "out"

    def make(self, instance_id: str) -> tuple[Path, Path]:
        """Fresh FIFOs for a start, the output held open. What an earlier run left unread is gone."""
        self.release(instance_id)
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        stdin, stdout = self.paths(instance_id)
        stdin.parent.mkdir(mode=0o700, exist_ok=True)
        for path in (stdin, stdout):
            path.unlink(missing_ok=True)
            os.mkfifo(path, 0o600)
        # Before it is opened for writing, which waits for a reader.
        fd = os.open(stdout, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        # Refused for unprivileged users above /proc/sys/fs/pipe-max-size; the default size will do then.
        with contextlib.suppress(PermissionError):
            fcntl.fcntl(fd, _F_SETPIPE_SZ, self._buffer_bytes)
        self._held[instance_id] = fd
        return stdin, stdout

    def adopt(self, instance_id: str) -> None:
        """Hold the output of a guest that another agent process started."""
        if instance_id in self._held:
            return
        with contextlib.suppress(FileNotFoundError):
            self._held[instance_id] = os.open(
                self.paths(instance_id)[1], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            )

    def unread_bytes(self, instance_id: str) -> int:
        """How much output waits to be read."""
        fd = self._held.get(instance_id)
        if fd is None:
            return 0
        count = array("i", [0])
        fcntl.ioctl(fd, FIONREAD, count)
        return count[0]

    def open(self, instance_id: str) -> tuple[int, int | None]:
        """Descriptors to read output and write input with, not blocking; no input when the guest has ended."""
        held = self._held.get(instance_id)
        stdin, stdout = self.paths(instance_id)
        reader = (
            os.open(stdout, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if held is None
            else fcntl.fcntl(held, fcntl.F_DUPFD_CLOEXEC, 0)
        )
        try:
            return reader, os.open(stdin, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno not in (errno.ENXIO, errno.ENOENT):
                os.close(reader)
                raise
            return reader, None

    def release(self, instance_id: str) -> None:
        """Let go of the output; what is unread is lost once the guest's process has gone too."""
        fd = self._held.pop(instance_id, None)
        if fd is not None:
            os.close(fd)

    def remove(self, instance_id: str) -> bool:
        """Remove the FIFOs and their directory; returns whether there was one."""
        self.release(instance_id)
        try:
            shutil.rmtree(self._root / instance_id)
        except FileNotFoundError:
            return False
        return True

    def close(self) -> None:
        """Let go of all; guests and their FIFOs stay."""
        for instance_id in tuple(self._held):
            self.release(instance_id)


class FifoConsole:
    """One attachment; implements the ``EndpointConsole`` contract. ``resize`` None: a line without a size."""

    def __init__(
        self,
        instance_id: str,
        *,
        reader: int,
        writer: int | None,
        resize: Callable[[ConsoleSize], Awaitable[None]] | None,
        on_close: Callable[[], None],
    ) -> None:
        self._instance_id = instance_id
        self._reader = reader
        self._writer = writer
        self._resize = resize
        self._on_close = on_close
        self._closed = False
        self._waiters: set[asyncio.Future[None]] = set()
        self._write_lock = asyncio.Lock()

    @property
    def resizable(self) -> bool:
        """Whether the guest can be told a size."""
        return self._resize is not None

    def endpoint(self) -> ConsoleEndpoint:
        """The two FIFOs."""
        return ConsoleEndpoint(output=self._reader, input=self._writer)

    async def read(self, limit: int = 65536) -> bytes:
        """The next output; empty once the guest has ended and all was read, or after ``close``."""
        while not self._closed:
            try:
                return os.read(self._reader, limit)
            except BlockingIOError:
                await self._ready(self._reader, write=False)
        return b""

    async def write(self, data: bytes) -> None:
        """Type; waits while the guest does not read. ``FailedPrecondition`` (``CONSOLE_ENDED``)."""
        rest = memoryview(data)
        async with self._write_lock:
            while rest:
                if self._closed or self._writer is None:
                    raise self._ended()
                try:
                    rest = rest[os.write(self._writer, rest) :]
                except BlockingIOError:
                    await self._ready(self._writer, write=True)
                except BrokenPipeError as exc:
                    raise self._ended() from exc

    async def resize(self, size: ConsoleSize) -> None:
        """Set the terminal's size. ``Unimplemented`` (``CAPABILITY_MISSING``) where there is none."""
        if self._closed:
            raise self._ended()
        if self._resize is None:
            raise Unimplemented(
                f"the console of {self._instance_id} is a serial line, which has no size: type `stty rows .. cols ..`",
                reason="CAPABILITY_MISSING",
                metadata={"instance_id": self._instance_id, "verb": "resize"},
            )
        await self._resize(size)

    async def close(self) -> None:
        """Detach. Idempotent."""
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._reader)
        os.close(self._reader)
        if self._writer is not None:
            loop.remove_writer(self._writer)
            os.close(self._writer)
        for waiter in self._waiters:
            _wake(waiter)
        self._on_close()

    def _ended(self) -> FailedPrecondition:
        return FailedPrecondition(
            f"the console of {self._instance_id} has ended: attach again while the instance runs",
            reason="CONSOLE_ENDED",
            metadata={"instance_id": self._instance_id},
        )

    async def _ready(self, fd: int, *, write: bool) -> None:
        """Wait until ``fd`` is ready or the console is closed."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.add(waiter)
        (loop.add_writer if write else loop.add_reader)(fd, _wake, waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
            # After close() the number may already be somebody else's; close() has unregistered it.
            if not self._closed:
                (loop.remove_writer if write else loop.remove_reader)(fd)


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
