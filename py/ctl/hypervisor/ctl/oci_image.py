"""Packs one static program into an OCI image archive, without any image tool: for the demo, examples and tests.

The archive depends on its inputs alone: the same program gives the same bytes, so the same digests, on every machine.
Standard library only.
"""

import gzip
import hashlib
import io
import json
import os
import platform
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["BUSYBOX_APPLETS", "build_archive"]

BUSYBOX_APPLETS = (
    "[",
    "ash",
    "awk",
    "base64",
    "basename",
    "cat",
    "chmod",
    "chown",
    "clear",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "dirname",
    "dmesg",
    "du",
    "echo",
    "env",
    "expr",
    "false",
    "find",
    "free",
    "grep",
    "gunzip",
    "gzip",
    "head",
    "hostname",
    "id",
    "ifconfig",
    "ip",
    "kill",
    "killall",
    "less",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mknod",
    "more",
    "mount",
    "mv",
    "nc",
    "nproc",
    "od",
    "ping",
    "printenv",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "reset",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "stty",
    "sync",
    "tail",
    "tar",
    "tee",
    "test",
    "time",
    "timeout",
    "top",
    "touch",
    "tr",
    "true",
    "tty",
    "umount",
    "uname",
    "uniq",
    "uptime",
    "usleep",
    "vi",
    "wc",
    "wget",
    "which",
    "whoami",
    "xargs",
    "yes",
)
"""Applets of Debian's busybox-static that get a link in /bin."""

_DIRECTORIES = (
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("home", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var", 0o755),
)
_FILES = (
    ("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n"),
    ("etc/group", b"root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("etc/hosts", b"127.0.0.1 localhost\n::1 localhost\n"),
)
_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "riscv64": "riscv64",
    "s390x": "s390x",
    "ppc64le": "ppc64le",
}
_DEFAULT_ENV = ("PATH=/bin", "HOME=/root")


def build_archive(
    binary: Path,
    out: Path,
    *,
    name: str,
    command: Sequence[str] = ("sh",),
    env: Mapping[str, str] | None = None,
    applets: Sequence[str] = BUSYBOX_APPLETS,
    user: str = "",
) -> str:
    """Write an OCI layout tar to ``out`` and return the digest of its manifest (``sha256:...``).

    ``binary`` becomes /bin/<its name>, each of ``applets`` a link to it in /bin. ``name`` (``name:tag``) is how
    ``oci-archive:PATH#name:tag`` selects the image. ``out`` appears whole or not at all. Raises OSError.
    """
    layer = _layer(binary, applets)
    # mtime 0 and no file name: nothing of the moment and the machine in it.
    packed = gzip.compress(layer, compresslevel=6, mtime=0)
    machine = platform.machine()
    architecture = _ARCHITECTURES.get(machine, machine)
    environment = [*_DEFAULT_ENV, *(f"{key}={value}" for key, value in sorted((env or {}).items()))]
    config = _json(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Env": environment, "Cmd": list(command), "WorkingDir": "/", "User": user},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
            "history": [{"created_by": "hypervisor-ctl dev image"}],
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor("application/vnd.oci.image.config.v1+json", config),
            "layers": [_descriptor("application/vnd.oci.image.layer.v1.tar+gzip", packed)],
        }
    )
    listed = _descriptor("application/vnd.oci.image.manifest.v1+json", manifest) | {
        "platform": {"architecture": architecture, "os": "linux"},
        "annotations": {"org.opencontainers.image.ref.name": name},
    }
    index = _json(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [listed],
        }
    )
    _write_archive(
        out,
        {
            "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
            "index.json": index,
            **{"blobs/" + _digest(blob).replace(":", "/"): blob for blob in (manifest, config, packed)},
        },
    )
    return _digest(manifest)


def _json(document: Mapping[str, object]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _descriptor(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": _digest(data), "size": len(data)}


def _entry(name: str, *, kind: bytes, mode: int, size: int = 0, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size, info.linkname = kind, mode, size, target
    return info


def _layer(binary: Path, applets: Sequence[str]) -> bytes:
    program = binary.read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, mode in _DIRECTORIES:
            tar.addfile(_entry(name, kind=tarfile.DIRTYPE, mode=mode))
        for name, data in _FILES:
            tar.addfile(_entry(name, kind=tarfile.REGTYPE, mode=0o644, size=len(data)), io.BytesIO(data))
        tar.addfile(
            _entry(f"bin/{binary.name}", kind=tarfile.REGTYPE, mode=0o755, size=len(program)),
            io.BytesIO(program),
        )
        for applet in sorted(set(applets) - {binary.name}):
            tar.addfile(_entry(f"bin/{applet}", kind=tarfile.SYMTYPE, mode=0o777, target=binary.name))
    return buffer.getvalue()


def _write_archive(out: Path, files: Mapping[str, bytes]) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for name, data in files.items():
                    tar.addfile(
                        _entry(name, kind=tarfile.REGTYPE, mode=0o644, size=len(data)), io.BytesIO(data)
                    )
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, out)
    except BaseException:
        os.unlink(temporary)
        raise
