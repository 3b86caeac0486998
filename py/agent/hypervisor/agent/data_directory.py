"""The agent's data directory: one agent at a time, and the node's id, made once and kept.

The directories in which drivers of machines keep theirs are locked in the same way: two agents over one would adopt,
and delete, each other's guests.
"""

import asyncio
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from hypervisor.agent.disk import Disk
from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.ids import is_id

__all__ = ["DataDirectory", "LockedDirectory"]


class LockedDirectory:
    """A directory of one agent. Entering it makes it where it is missing, with ``mode``, and raises FailedPrecondition:
    ``DATA_DIR_UNUSABLE`` when it cannot be written, ``DATA_DIR_IN_USE`` while another agent holds it. ``setting`` is
    what names it in the configuration.
    """

    def __init__(self, path: Path, *, setting: str, mode: int = 0o700) -> None:
        self.path = path
        self._setting = setting
        self._mode = mode
        self._lock_fd = -1

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._acquire)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _acquire(self) -> None:
        try:
            self.path.mkdir(mode=self._mode, parents=True, exist_ok=True)
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise FailedPrecondition(
                f"{self._setting} {self.path} cannot be used: {exc.strerror}. Choose a directory the agent may write",
                reason="DATA_DIR_UNUSABLE",
                metadata={"path": str(self.path)},
            ) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(fd)
            raise FailedPrecondition(
                f"{self._setting} {self.path} is in use by another agent: stop it, or give this one a directory "
                "of its own",
                reason="DATA_DIR_IN_USE",
                metadata={"path": str(self.path)},
            ) from exc
        self._lock_fd = fd


class DataDirectory(LockedDirectory):
    """``agent.data_dir``."""

    def __init__(self, path: Path, *, disk: Disk | None = None) -> None:
        super().__init__(path, setting="agent.data_dir")
        self._disk = disk or Disk()

    @property
    def journal(self) -> Path:
        """Where the journal lies."""
        return self.path / "journal"

    async def node_id(self, new_id: Callable[[str], str]) -> str:
        """This node's id; made with ``new_id`` the first time."""
        return await asyncio.to_thread(self._node_id, new_id)

    def _node_id(self, new_id: Callable[[str], str]) -> str:
        path = self.path / "node_id"
        try:
            text = path.read_text(encoding="ascii").strip() if path.exists() else ""
        except (OSError, UnicodeDecodeError) as exc:
            raise self._bad_node_id(path) from exc
        if text:
            if not is_id(text, "n"):
                raise self._bad_node_id(path)
            return text
        made = new_id("n")
        fresh = path.with_name("node_id.new")
        try:
            self._disk.remove(fresh)
            fd = self._disk.open(fresh)
            try:
                self._disk.write(fd, made.encode() + b"\n", 0)
                self._disk.sync(fd)
            finally:
                self._disk.close(fd)
            self._disk.replace(fresh, path)
            self._disk.sync_directory(self.path)
        except OSError as exc:
            raise FailedPrecondition(
                f"the node's id cannot be kept in {path}: {exc.strerror}. Free space there",
                reason="DATA_DIR_UNUSABLE",
                metadata={"path": str(path)},
            ) from exc
        return made

    def _bad_node_id(self, path: Path) -> FailedPrecondition:
        return FailedPrecondition(
            f"{path} holds no node id: restore it, or remove the file to join as a new node",
            reason="NODE_ID_UNREADABLE",
            metadata={"path": str(path)},
        )
