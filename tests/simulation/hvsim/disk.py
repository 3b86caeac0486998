"""A machine's disk for the agent's journal: files in memory, and the thread that writes them, cut off by a crash."""

import errno
import os
import random
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from hvsim.loop import Process, SimLoop
from hypervisor.agent.disk import Disk

__all__ = ["DiskThread", "SimDisk"]


class _Torn(BaseException):
    """The process was killed inside a disk operation."""


class SimDisk(Disk):
    """Implements ``Disk``. ``full``: nothing more can be allocated."""

    def __init__(self) -> None:
        self._files: dict[Path, bytearray] = {}
        self._open: dict[int, bytearray] = {}
        self._next_fd = 100
        self.full = False
        self._fuse: int | None = None
        self._torn_share = 1.0

    def tear(self, *, after: int, share: float) -> None:
        """The operation after ``after`` more is cut off; of a write so much gets to the disk."""
        self._fuse, self._torn_share = after, share

    def mend(self) -> None:
        """No more of that."""
        self._fuse = None

    def _step(self) -> None:
        if self._fuse is not None:
            if self._fuse == 0:
                raise _Torn
            self._fuse -= 1

    def open(self, path: Path) -> int:
        self._step()
        self._next_fd += 1
        self._open[self._next_fd] = self._files.setdefault(path, bytearray())
        return self._next_fd

    def close(self, fd: int) -> None:
        self._open.pop(fd, None)

    def size(self, fd: int) -> int:
        return len(self._open[fd])

    def read(self, fd: int) -> bytes:
        return bytes(self._open[fd])

    def write(self, fd: int, data: bytes, offset: int) -> None:
        torn = self._fuse == 0
        kept = data[: int(len(data) * self._torn_share)] if torn else data
        file = self._open[fd]
        if len(file) < offset + len(kept):
            file.extend(bytes(offset + len(kept) - len(file)))
        file[offset : offset + len(kept)] = kept
        self._step()

    def allocate(self, fd: int, offset: int, length: int) -> None:
        self._step()
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file = self._open[fd]
        if len(file) < offset + length:
            file.extend(bytes(offset + length - len(file)))

    def sync(self, fd: int) -> None:
        self._step()

    def replace(self, source: Path, target: Path) -> None:
        self._step()
        self._files[target] = self._files.pop(source)

    def remove(self, path: Path) -> None:
        self._step()
        self._files.pop(path, None)

    def sync_directory(self, path: Path) -> None:
        self._step()


class DiskThread:
    """In place of the journal's executor: jobs one after another, each some time later. A crash of its process loses
    what waits, cuts off what is being written, or comes just after it."""

    def __init__(self, loop: SimLoop, rng: random.Random, process: Process, disk: SimDisk) -> None:
        self._loop = loop
        self._rng = rng
        self._process = process
        self._disk = disk
        self._waiting: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._free_at = 0.0
        self.slow_s = 0.0
        process.on_death.append(self._died)

    def submit(self, work: Callable[[], Any]) -> "Future[Any]":
        """As ``Executor.submit``."""
        future: Future[Any] = Future()
        self._waiting.append((work, future))
        took_s = self._rng.uniform(0.0005, 0.004) + (
            self._rng.uniform(0.0, self.slow_s) if self.slow_s else 0.0
        )
        self._free_at = max(self._free_at, self._loop.time()) + took_s
        self._process.later(self._free_at - self._loop.time(), self._next)
        return future

    def shutdown(self, wait: bool = True) -> None:
        """As ``Executor.shutdown``."""

    def _next(self) -> None:
        work, future = self._waiting.pop(0)
        try:
            future.set_result(work())
        except Exception as exc:
            future.set_exception(exc)

    def _died(self) -> None:
        waiting, self._waiting = self._waiting, []
        for work, future in waiting:
            self._loop.kept.append(future)
            fate = self._rng.random()
            if fate < 0.4:
                return
            if fate < 0.7:
                self._disk.tear(after=self._rng.randrange(3), share=self._rng.random())
            try:
                work()
            except _Torn:
                return
            finally:
                self._disk.mend()
