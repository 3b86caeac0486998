"""A look into a container's file system from the snapshotter's mount description, without mounting it. Blocks."""

import os
import stat
from collections.abc import Sequence
from typing import Protocol

__all__ = ["read_accounts"]

_MAX_BYTES = 1 << 20


class _Mount(Protocol):
    @property
    def type(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def options(self) -> Sequence[str]: ...


def _layers(mounts: Sequence[_Mount]) -> list[str]:
    """Directories that make up the file system, topmost first."""
    directories: list[str] = []
    for mount in mounts:
        if mount.type == "bind":
            directories.append(mount.source)
        for option in mount.options:
            key, _, value = option.partition("=")
            if key == "upperdir":
                directories.insert(0, value)
            elif key == "lowerdir":
                directories.extend(value.split(":"))
    return directories


def _read(directory: str, name: str) -> str | None:
    """``etc/<name>`` below a layer; None where that layer has none. No symbolic link of the image is followed."""
    try:
        etc = os.open(
            os.path.join(directory, "etc"), os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
        )
    except OSError:
        return None
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=etc)
    except OSError:
        return None
    finally:
        os.close(etc)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            # A character device 0/0 says that the file was deleted in this layer.
            return ""
        return os.pread(fd, _MAX_BYTES, 0).decode("utf-8", "replace")
    finally:
        os.close(fd)


def read_accounts(mounts: Sequence[_Mount]) -> tuple[str, str]:
    """The texts of etc/passwd and etc/group; empty where there is none."""
    layers = _layers(mounts)
    texts = []
    for name in ("passwd", "group"):
        found = (_read(layer, name) for layer in layers)
        texts.append(next((text for text in found if text is not None), ""))
    return texts[0], texts[1]
