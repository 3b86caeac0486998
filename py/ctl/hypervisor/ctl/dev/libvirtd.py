"""A libvirtd of a development cluster's own: what it is started with. Pure; nothing of the machine's own is touched.

libvirt's directories are fixed, so this one runs in a mount namespace in which they are directories of the cluster's.
Its guests are in that namespace too and outlive it, as with any libvirtd.
"""

import shlex
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SYSTEM_LIBVIRT", "PrivateLibvirtd"]

SYSTEM_LIBVIRT = Path("/run/libvirt/libvirt-sock")

_MOUNTED = {
    "etc": "/etc/libvirt",
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}


@dataclass(frozen=True, slots=True)
class PrivateLibvirtd:
    """``root``: its directory. ``run``: one with a short path, for its sockets."""

    root: Path
    run: Path

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.run / "libvirt-sock"

    @property
    def uri(self) -> str:
        """How the agent connects to it."""
        return f"qemu+unix:///system?socket={self.socket}"

    @property
    def qemu_logs(self) -> Path:
        """Where it keeps what QEMU says."""
        return self.root / "log" / "qemu"

    @property
    def pid_file(self) -> Path:
        """Where it writes its process's number, and by what its command line is known."""
        return self.run / "libvirtd.pid"

    def directories(self) -> tuple[Path, ...]:
        """What has to be there before it is started."""
        return (self.run, *(self.root / name for name in _MOUNTED))

    def files(self) -> Mapping[Path, str]:
        """Its configuration, and the script that starts it."""
        return {
            self.root / "etc" / "libvirtd.conf": "\n".join(
                [
                    f'unix_sock_dir = "{self.run}"',
                    'unix_sock_rw_perms = "0700"',
                    'auth_unix_rw = "none"',
                    'auth_unix_ro = "none"',
                    # Two daemons of one machine must not take each other's guests for their own.
                    f'host_uuid = "{uuid.uuid5(uuid.NAMESPACE_URL, f"file://{self.root}")}"',
                    "",
                ]
            ),
            self.root / "etc" / "qemu.conf": "\n".join(
                [
                    'user = "root"',
                    'group = "root"',
                    "dynamic_ownership = 0",
                    "remember_owner = 0",
                    'security_driver = "none"',
                    # QEMU's own words go to a file: no virtlogd is needed.
                    'stdio_handler = "file"',
                    "namespaces = []",
                    "",
                ]
            ),
            self.script: self._script(),
        }

    @property
    def script(self) -> Path:
        """Starts it."""
        return self.root / "start"

    def _script(self) -> str:
        inside = [
            f"mkdir -p {target} && mount --bind {shlex.quote(str(self.root / name))} {target}"
            for name, target in _MOUNTED.items()
        ]
        command = f"exec libvirtd --pid-file {shlex.quote(str(self.pid_file))}"
        return "\n".join(
            [
                "#!/bin/sh",
                "set -e",
                'if [ "${1:-}" != inside ]; then exec unshare --mount --propagation private sh "$0" inside; fi',
                *inside,
                "export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C",
                command,
                "",
            ]
        )
