"""Disks of instances: qcow2 overlays over an image that is never written to, made by qemu-img."""

import asyncio
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from hypervisor.agent.drivers.machine_disks import DiskFormat
from hypervisor.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    HypervisorError,
    ResourceExhausted,
    Unavailable,
)
from hypervisor.core.names import shorten

__all__ = ["Base", "make_disk"]

_LIMITS = ("--as=2147483648", "--cpu=60", "--nofile=64", "--core=0")


@dataclass(frozen=True, slots=True)
class Base:
    """What an overlay lies on: a file that nobody writes to, and its format."""

    path: Path
    format: DiskFormat


async def make_disk(
    target: Path, *, base: Base | None, size_bytes: int, qemu_img: str, timeout_s: float = 60.0
) -> None:
    """Make a qcow2 disk of this size at ``target``, unless there is one: an overlay over ``base``, or an empty one.

    It appears whole or not at all. ``ResourceExhausted`` (``DISK_FULL``), ``Unavailable`` (``TOOL_MISSING``),
    ``DeadlineExceeded`` (``DISK_NOT_MADE``), ``FailedPrecondition`` (``DISK_NOT_MADE``) with qemu-img's own words.
    """
    if await asyncio.to_thread(target.exists):
        return
    partial = target.with_suffix(".partial")
    arguments = ["create", "-q", "-f", DiskFormat.QCOW2]
    if base is not None:
        arguments += ["-b", str(base.path), "-F", base.format]
    try:
        await _run(qemu_img, [*arguments, str(partial), str(size_bytes)], timeout_s)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


async def _run(qemu_img: str, arguments: list[str], timeout_s: float) -> None:
    process = await asyncio.create_subprocess_exec(
        "prlimit",
        *_LIMITS,
        qemu_img,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
    )
    try:
        async with asyncio.timeout(timeout_s):
            _, errors = await process.communicate()
    except TimeoutError as exc:
        raise DeadlineExceeded(
            f"qemu-img did not make the disk in {timeout_s:g} s: try again when the node has less to do",
            reason="DISK_NOT_MADE",
        ) from exc
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        raise _failed(qemu_img, process.returncode, errors.decode(errors="replace").strip())


def _failed(qemu_img: str, code: int, words: str) -> HypervisorError:
    if code in (126, 127):
        return Unavailable(
            f"this node cannot make disks: {qemu_img} is not installed (Debian: apt-get install qemu-utils)",
            reason="TOOL_MISSING",
        )
    text = f"qemu-img could not make the disk: {shorten(words or f'exit code {code}', 300)}"
    if "No space left" in words or "Disk quota" in words:
        return ResourceExhausted(text, reason="DISK_FULL")
    return FailedPrecondition(text, reason="DISK_NOT_MADE")
