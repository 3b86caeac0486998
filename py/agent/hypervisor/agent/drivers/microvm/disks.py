"""The raw disk of a microVM out of its image, raw or qcow2: the image has been probed, but nobody knows its origin."""

import asyncio
import contextlib
import os
from pathlib import Path

from hypervisor.agent.drivers.machine_disks import DiskFormat
from hypervisor.agent.drivers.machine_files import MachineFile, invalid_file
from hypervisor.agent.drivers.microvm.files import copy_into, make_file
from hypervisor.core.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from hypervisor.core.names import shorten

__all__ = ["make_disk"]

_CONVERT_S = 240.0
_MAX_WORDS = 4096


async def make_disk(
    target: Path, *, image: MachineFile | None, format: DiskFormat, size_bytes: int, uid: int
) -> None:
    """Write the disk: a copy of the image, or nothing but zeros, in a file with holes. Raises OSError, InvalidArgument
    (``IMAGE_INVALID``), ResourceExhausted (``DISK_FULL``), DeadlineExceeded (``IMAGE_NOT_READ``), Unavailable."""
    if image is not None and format is DiskFormat.RAW:
        await asyncio.to_thread(copy_into, image.fd, target, uid=uid)
        await asyncio.to_thread(os.truncate, target, size_bytes)
        return
    fd = make_file(target, uid=uid)
    try:
        os.ftruncate(fd, size_bytes)
        if image is not None:
            await _convert(image, fd, size_bytes)
    finally:
        os.close(fd)


async def _convert(image: MachineFile, target: int, size_bytes: int) -> None:
    """qemu-img writes into a file that is there, under limits: no larger than the disk, little memory, some minutes."""
    limits = (
        f"--fsize={size_bytes}",
        "--as=2147483648",
        "--nofile=64",
        "--core=0",
        f"--cpu={int(_CONVERT_S)}",
    )
    paths = (f"/proc/self/fd/{image.fd}", f"/proc/self/fd/{target}")
    words = ("convert", "-U", "-n", "--target-is-zero", "-f", DiskFormat.QCOW2, "-O", DiskFormat.RAW, *paths)
    try:
        process = await asyncio.create_subprocess_exec(
            "prlimit",
            *limits,
            "--",
            "qemu-img",
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(image.fd, target),
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
        )
    except FileNotFoundError as exc:
        raise _missing("prlimit (util-linux)") from exc
    assert process.stderr is not None
    try:
        async with asyncio.timeout(_CONVERT_S):
            said = await process.stderr.read(_MAX_WORDS)
            code = await process.wait()
    except TimeoutError as exc:
        raise DeadlineExceeded(
            f"{image.field}: the image could not be made a raw disk in {_CONVERT_S:g} s: import it as a raw one",
            reason="IMAGE_NOT_READ",
            metadata={"field": image.field},
        ) from exc
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if code == 0:
        return
    text = said.decode("utf-8", errors="replace").strip()
    if code in (126, 127):
        raise _missing("qemu-img (qemu-utils)")
    if "No space left" in text:
        raise ResourceExhausted(
            f"{image.field}: the image does not fit on the node's disk: free some space, or move microvm.data_dir",
            reason="DISK_FULL",
            metadata={"field": image.field},
        )
    raise invalid_file(image.field, f"qemu-img cannot make it a raw disk: {shorten(text, 300)}")


def _missing(program: str) -> Unavailable:
    return Unavailable(
        f"this node cannot make raw disks of qcow2 images: {program} is not installed",
        reason="TOOL_MISSING",
        metadata={"program": program},
    )
