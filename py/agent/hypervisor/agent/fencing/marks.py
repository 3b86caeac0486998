"""Which instances have to be stopped when the lease ends: a file each, so that the guard knows without the journal."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["MARKS", "Marks", "marked"]

MARKS = "fenced"
"""Name of the directory in the agent's data directory."""


def marked(directory: Path) -> frozenset[str]:
    """Ids of the instances that are marked in an agent's data directory."""
    try:
        return frozenset(os.listdir(directory / MARKS))
    except FileNotFoundError:
        return frozenset()


class Marks:
    """The marks of one agent. OSError where the disk does not take one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / MARKS

    def keep(self, instance_ids: Iterable[str]) -> None:
        """Have exactly these."""
        wanted = frozenset(instance_ids)
        for instance_id in marked(self._directory.parent) - wanted:
            self.remove(instance_id)
        for instance_id in wanted:
            self.add(instance_id)

    def add(self, instance_id: str) -> None:
        """Mark one; again is no error."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        (self._directory / instance_id).touch(mode=0o600)

    def remove(self, instance_id: str) -> None:
        """Mark it no more."""
        with contextlib.suppress(FileNotFoundError):
            (self._directory / instance_id).unlink()
