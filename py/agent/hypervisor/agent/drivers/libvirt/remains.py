"""What libvirt leaves of a virtual machine that it has forgotten: QEMU's log, and the control group of a QEMU that
ended while libvirtd was away. Both bear the instance's id, which nothing else on the node does."""

import os
from collections.abc import Iterator
from pathlib import Path

from hypervisor.agent.stats.cgroups import uses_v2
from hypervisor.core.ids import is_id

__all__ = ["sweep_remains"]


def sweep_remains(instance_id: str, *, logs: Path, cgroups: Path) -> list[str]:
    """Remove them, following no link; returns what could not be removed, in words. Blocks. ``cgroups``: the root of all
    hierarchies, of version 1 or 2. Nothing is done for what is no instance's id."""
    if not is_id(instance_id, "i"):
        return []
    left = []
    for log in _logs_of(instance_id, logs):
        try:
            log.unlink(missing_ok=True)
        except OSError as exc:
            left.append(f"{log} ({exc.strerror})")
    for group in _groups_of(instance_id, cgroups):
        # The groups of its threads are in it.
        for directory, _, _ in os.walk(group, topdown=False):
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                continue
            except OSError as exc:
                left.append(f"control group {directory} ({exc.strerror})")
    return left


def _logs_of(instance_id: str, logs: Path) -> Iterator[Path]:
    """``ID.log``, and ``ID.log.0`` and so on where virtlogd has begun another."""
    name = f"{instance_id}.log"
    for entry in _entries(logs):
        if entry.name == name or (
            entry.name.startswith(f"{name}.") and entry.name[len(name) + 1 :].isdigit()
        ):
            yield Path(entry.path)


def _groups_of(instance_id: str, root: Path) -> Iterator[Path]:
    """``machine/qemu-NUMBER-ID.libvirt-qemu`` in each hierarchy. systemd removes those that it made."""
    # Names for controllers that are mounted together are links, and lead to where another entry leads.
    tops = [root] if uses_v2(root) else [Path(entry.path) for entry in _entries(root) if _is_directory(entry)]
    for top in tops:
        for entry in _entries(top / "machine"):
            first, _, rest = entry.name.partition("-")
            number, _, name = rest.partition("-")
            ours = first == "qemu" and number.isdigit() and name == f"{instance_id}.libvirt-qemu"
            if ours and _is_directory(entry):
                yield Path(entry.path)


def _is_directory(entry: "os.DirEntry[str]") -> bool:
    return entry.is_dir(follow_symlinks=False)


def _entries(directory: Path) -> list["os.DirEntry[str]"]:
    """Nothing where it cannot be looked into: what an agent without the rights for it may not see it has not made."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
