"""What must hold before a development cluster is started; each failure is an error that says how to mend it."""

import contextlib
import os
import shlex
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from hypervisor.core.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from hypervisor.ctl.dev.mounts import read_mounts
from hypervisor.ctl.release import release_directory

__all__ = [
    "SYSTEM_CONTAINERD",
    "answers",
    "chosen_snapshotter",
    "find_program",
    "free_port",
    "has_libvirtd",
    "has_vmm",
    "require_libvirtd",
    "require_root",
    "require_runtime",
    "require_short_socket",
]

SYSTEM_CONTAINERD = Path("/run/containerd/containerd.sock")
_SOCKET_PATH_MAX = 107


def find_program(name: str, given: str | None, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The command that runs ``hypervisor-<name>``: as given, from the environment, beside this program, or on PATH.

    FailedPrecondition (PROGRAM_MISSING) where there is none.
    """
    variable = f"HYPERVISOR_{name.upper()}_PROGRAM"
    text = given or environ.get(variable)
    if text:
        words = tuple(shlex.split(text))
        if not words or shutil.which(words[0], path=environ.get("PATH")) is None:
            raise InvalidArgument.of_field(f"--{name}-program", f"{text!r} is no program that can be run")
        return words
    program = f"hypervisor-{name}"
    release = release_directory()
    if release is not None and os.access(release / "bin" / program, os.X_OK):
        return (str(release / "bin" / program),)
    found = shutil.which(program, path=environ.get("PATH"))
    if found is None:
        raise FailedPrecondition(
            f"{program} was found neither beside this program nor on PATH: give --{name}-program or {variable}",
            reason="PROGRAM_MISSING",
            metadata={"program": program},
        )
    return (found,)


def free_port(option: str, wanted: int, taken: Sequence[int]) -> int:
    """The port if it is free, any free one for 0. FailedPrecondition (PORT_IN_USE) names the option."""
    while True:
        with socket.socket(socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wanted))
                port: int = probe.getsockname()[1]
            except OSError as exc:
                raise FailedPrecondition(
                    f"port {wanted} on 127.0.0.1 cannot be used ({exc.strerror}): free it, or choose another with "
                    f"{option} ({option} 0 takes any free one)",
                    reason="PORT_IN_USE",
                    metadata={"port": str(wanted), "option": option},
                ) from exc
        if port not in taken:
            return port
        if wanted:
            raise InvalidArgument.of_field(option, f"port {wanted} is given twice: choose another")


def require_root() -> None:
    """Containers need root."""
    if os.geteuid() != 0:
        raise PermissionDenied(
            "running containers needs root: use 'sudo hypervisor-ctl dev up', or 'hypervisor-ctl dev up --simulated 3' "
            "for a cluster whose instances are not real",
            reason="ROOT_REQUIRED",
        )


def require_runtime(environ: Mapping[str, str], programs: Sequence[str]) -> None:
    """containerd and runc must be installed."""
    missing = [name for name in programs if shutil.which(name, path=environ.get("PATH")) is None]
    if missing:
        raise FailedPrecondition(
            f"{' and '.join(missing)} not found: install with 'apt-get install containerd runc', or use "
            "'hypervisor-ctl dev up --simulated 3' for a cluster whose instances are not real",
            reason="RUNTIME_MISSING",
            metadata={"missing": ",".join(missing)},
        )


def has_libvirtd(environ: Mapping[str, str]) -> bool:
    """Whether a libvirtd that can run QEMU is installed."""
    path = f"{environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return all(shutil.which(name, path=path) for name in ("libvirtd", "qemu-system-x86_64", "unshare"))


def require_libvirtd(environ: Mapping[str, str]) -> None:
    """libvirtd must be installed."""
    if not has_libvirtd(environ):
        raise FailedPrecondition(
            "libvirtd or QEMU not found: install with 'apt-get install libvirt-daemon-system qemu-system-x86', or "
            "leave virtual machines out with --libvirt none",
            reason="RUNTIME_MISSING",
            metadata={"missing": "libvirtd"},
        )


def has_vmm(environ: Mapping[str, str]) -> bool:
    """Whether a program that runs microVMs is installed."""
    return any(shutil.which(name, path=environ.get("PATH")) for name in ("firecracker", "qemu-system-x86_64"))


def require_short_socket(path: Path) -> None:
    """The kernel limits the path of a unix socket to 107 bytes."""
    # ".ttrpc" is the longest that is appended to it.
    if len(os.fsencode(path)) + len(".ttrpc") > _SOCKET_PATH_MAX:
        raise InvalidArgument.of_field(
            "--dir", f"{path} is too long for a socket: choose a shorter directory"
        )


def answers(path: Path) -> bool:
    """Whether something accepts connections on that socket."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.settimeout(2.0)
        probe.connect(str(path))
        return True
    return False


def chosen_snapshotter(directory: Path) -> str:
    """``overlayfs``, or ``native`` where the directory is itself on an overlay, which cannot be stacked."""
    best, kind = Path("/"), ""
    resolved = directory.resolve()
    for mount in read_mounts():
        if resolved.is_relative_to(mount.point) and len(mount.point.parts) >= len(best.parts):
            best, kind = mount.point, mount.kind
    return "native" if kind == "overlay" else "overlayfs"
