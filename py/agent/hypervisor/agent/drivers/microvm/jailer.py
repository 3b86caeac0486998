"""Firecracker's jailer: each VMM as a user of its own, in a chroot, with an empty network unless it has cards.

The jail is ``JAIL/PROGRAM/ID/root`` in the instance's directory, as the jailer wants it; without a jail it is the root
all the same. The jailer makes devices in it, copies the program there, and becomes Firecracker: same process, same
session, no PID namespace, so that its end is seen and signals reach it. It tidies up nothing: :func:`clear` does before
the next start, and the directory goes with the instance. The control group is the driver's.
"""

import asyncio
import ctypes
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from hypervisor.agent.drivers.microvm.files import remove_tree
from hypervisor.core.errors import FailedPrecondition

__all__ = ["Jailer", "clear", "empty_network", "jail_root"]

_JAIL = "jail"
_CLONE_NEWNET = 0x40000000
_MADE_BY_JAILER = ("dev", "run", "sys", "proc")


@dataclass(frozen=True, slots=True)
class Jailer:
    """The program."""

    program: str

    def command(
        self, firecracker: Path, *, instance_id: str, directory: Path, uid: int, network: str | None
    ) -> tuple[str, ...]:
        """The command line up to Firecracker's own arguments. ``network``: path of a network namespace."""
        words = [
            self.program,
            "--id",
            instance_id,
            "--exec-file",
            str(firecracker),
            "--uid",
            str(uid),
            "--gid",
            str(uid),
            "--chroot-base-dir",
            str(directory / _JAIL),
        ]
        if network is not None:
            words += ["--netns", network]
        return (*words, "--")


def jail_root(directory: Path, firecracker: Path) -> Path:
    """The root of an instance, which keeps the name of the program that it was made with."""
    jail = directory / _JAIL
    try:
        names = sorted(os.listdir(jail))
    except FileNotFoundError:
        names = []
    return jail / (names[0] if names else firecracker.name) / directory.name / "root"


def clear(root: Path, directory: Path, firecracker: Path) -> Path:
    """Make an old root ready for another run; returns where it is then. Raises OSError."""
    made_for = root.parents[1]
    if made_for.name != firecracker.name:
        # The program is called otherwise by now, and the jailer goes by that.
        made_for.rename(made_for.with_name(firecracker.name))
        (made_for.with_name(firecracker.name) / directory.name / "root" / made_for.name).unlink(
            missing_ok=True
        )
        root = jail_root(directory, firecracker)
    for name in _MADE_BY_JAILER:
        path = root / name
        if path.is_symlink():
            path.unlink()
        else:
            remove_tree(path)
    for name in (firecracker.name, f"{firecracker.name}.pid"):
        (root / name).unlink(missing_ok=True)
    return root


async def empty_network() -> int:
    """A descriptor of a new network namespace with nothing in it, which lives as long as somebody holds it.

    ``FailedPrecondition`` (``NETWORK_REFUSED``) where the kernel makes none.
    """
    # A thread of its own: the namespace a thread has entered is its own until it ends.
    loop = asyncio.get_running_loop()
    made: asyncio.Future[int] = loop.create_future()
    thread = threading.Thread(target=_make_network, args=(loop, made), name="microvm-network", daemon=True)
    thread.start()
    try:
        return await made
    except OSError as exc:
        raise FailedPrecondition(
            f"no network namespace can be made for a jail ({exc.strerror}): the agent needs CAP_SYS_ADMIN, or "
            "microvm.jail set to false",
            reason="NETWORK_REFUSED",
        ) from exc


def _make_network(loop: asyncio.AbstractEventLoop, made: "asyncio.Future[int]") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if libc.unshare(_CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        loop.call_soon_threadsafe(_fail, made, exc)
    else:
        loop.call_soon_threadsafe(_hand_over, made, fd)


def _fail(made: "asyncio.Future[int]", exc: OSError) -> None:
    if not made.done():
        made.set_exception(exc)


def _hand_over(made: "asyncio.Future[int]", fd: int) -> None:
    if made.done():
        os.close(fd)
    else:
        made.set_result(fd)
