"""The OCI runtime specification of a container: a pure function from what was asked for to the document runc takes.

Defaults are containerd's (capabilities, mounts, masked and read-only paths, seccomp), with namespaces of its own for
processes, mounts, IPC, host name, cgroups and network. The network namespace has the loopback interface only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypervisor.agent.drivers.containerd.accounts import Account
from hypervisor.agent.drivers.containerd.oci import ProcessConfig
from hypervisor.agent.drivers.containerd.seccomp import default_profile
from hypervisor.agent.drivers.cpu_quota import cpu_limit
from hypervisor.core.errors import InvalidArgument
from hypervisor.core.model import InstanceSpec
from hypervisor.core.resources import MIB

__all__ = [
    "CAPABILITIES",
    "MAX_OPEN_FILES",
    "HostFeatures",
    "build_runtime_spec",
    "merge_environment",
]

CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
"""containerd's default set."""

_DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DEFAULT_TERM = "TERM=xterm-256color"

_MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
_READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_MOUNTS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
    ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    (
        "/dev/pts",
        "devpts",
        "devpts",
        ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
    ),
    ("/dev/shm", "tmpfs", "shm", ("nosuid", "noexec", "nodev", "mode=1777", "size=65536k")),
    ("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
    ("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
    ("/sys/fs/cgroup", "cgroup", "cgroup", ("ro", "nosuid", "noexec", "nodev", "relatime")),
    ("/run", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
)
_NAMESPACES = ("pid", "ipc", "uts", "mount", "network", "cgroup")

# Many programs break when the soft limit is huge (they close every descriptor); they may raise it themselves.
_OPEN_FILES_SOFT = 1024
MAX_OPEN_FILES = 524_288


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFeatures:
    """What of the node a specification depends on."""

    architecture: str
    swap_limit: bool
    """Whether the specification limits swap (to none); see swap_limit.py."""
    open_files: int
    """How many files a process may raise its limit to, at most ``MAX_OPEN_FILES``; not more than the node allows."""


def merge_environment(image: Sequence[str], instance: Mapping[str, str]) -> list[str]:
    """The image's environment with the instance's winning over it, and a PATH and TERM where neither has one."""
    merged: dict[str, str] = {}
    for entry in (_DEFAULT_PATH, _DEFAULT_TERM, *image):
        key, _, value = entry.partition("=")
        if key:
            merged[key] = value
    merged.update(instance)
    return [f"{key}={value}" for key, value in merged.items()]


def _arguments(spec: InstanceSpec, config: ProcessConfig) -> list[str]:
    if spec.command:
        return list(spec.command)
    arguments = [*(config.entrypoint or ()), *(config.cmd or ())]
    if not arguments:
        raise InvalidArgument.of_field(
            "spec.command",
            "is required: the image has neither an entry point nor a command",
            reason="COMMAND_REQUIRED",
        )
    return arguments


def _check_strings(field: str, values: Sequence[str]) -> None:
    if any("\0" in value for value in values):
        raise InvalidArgument.of_field(field, "must not contain NUL characters")


def build_runtime_spec(
    spec: InstanceSpec,
    *,
    hostname: str,
    config: ProcessConfig,
    account: Account,
    cgroups_path: str,
    host: HostFeatures,
) -> dict[str, Any]:
    """The document, ready to be written as JSON. Raises InvalidArgument for a spec without a command and the like."""
    arguments = _arguments(spec, config)
    _check_strings("spec.command", arguments)
    _check_strings("spec.env", [*spec.env, *spec.env.values()])
    if any(not key or "=" in key for key in spec.env):
        raise InvalidArgument.of_field("spec.env", "names of variables must not be empty nor contain '='")
    working_dir = spec.working_dir or config.working_dir or "/"
    if not working_dir.startswith("/"):
        raise InvalidArgument.of_field("spec.working_dir", "must be an absolute path")
    memory_bytes = spec.memory_mb * MIB
    memory: dict[str, Any] = {"limit": memory_bytes}
    if host.swap_limit:
        memory["swap"] = memory_bytes
    user: dict[str, Any] = {"uid": account.uid, "gid": account.gid}
    if account.additional_gids:
        user["additionalGids"] = list(account.additional_gids)
    linux: dict[str, Any] = {
        "cgroupsPath": cgroups_path,
        "namespaces": [{"type": kind} for kind in _NAMESPACES],
        "resources": {
            # The quota is set before the start; see cpu_quota.py.
            "cpu": {"shares": cpu_limit(spec.cpu_millis).shares},
            "memory": memory,
            "pids": {"limit": spec.pids_limit},
            "devices": [{"allow": False, "access": "rwm"}],
        },
        "maskedPaths": list(_MASKED_PATHS),
        "readonlyPaths": list(_READONLY_PATHS),
    }
    profile = default_profile(host.architecture)
    if profile is not None:
        linux["seccomp"] = profile
    capabilities = list(CAPABILITIES)
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": True,
            "user": user,
            "args": arguments,
            "env": merge_environment(config.env or (), spec.env),
            "cwd": working_dir,
            "capabilities": {
                "bounding": capabilities,
                # A user other than root holds none, as with an ordinary login.
                "effective": capabilities if account.uid == 0 else [],
                "permitted": capabilities if account.uid == 0 else [],
            },
            "rlimits": [
                {
                    "type": "RLIMIT_NOFILE",
                    "soft": min(_OPEN_FILES_SOFT, host.open_files),
                    "hard": host.open_files,
                }
            ],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs"},
        "hostname": hostname,
        "mounts": [
            {"destination": destination, "type": kind, "source": source, "options": list(options)}
            for destination, kind, source, options in _MOUNTS
        ],
        "linux": linux,
    }
