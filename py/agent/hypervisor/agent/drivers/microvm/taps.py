"""Taps: the node's end of each network card, plugged into a bridge. By ioctl, without a program."""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import socket
import struct
from pathlib import Path

from hypervisor.core.errors import FailedPrecondition

__all__ = ["bridge_exists", "make_tap", "remove_tap", "tap_mac", "tap_name"]

_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOWNER = 0x400454CC
_IFF_TAP_NO_PI_VNET = 0x0002 | 0x1000 | 0x4000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCBRADDIF = 0x8913, 0x8914, 0x89A2
_IFF_UP = 1
_NET = Path("/sys/class/net")


def tap_name(instance_id: str, index: int) -> str:
    """The name of a card's tap: at most 15 characters, and others for every instance and card."""
    return f"hv{hashlib.sha256(instance_id.encode()).hexdigest()[:10]}.{index}"


def tap_mac(instance_id: str, index: int) -> str:
    """The address of a card whose specification names none: locally administered, the same for the instance always."""
    digest = hashlib.sha256(f"{instance_id}/{index}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x06, *digest[:5]))


def bridge_exists(name: str) -> bool:
    """Whether the node has a bridge of that name."""
    return (_NET / name / "bridge").is_dir()


def make_tap(name: str, *, bridge: str, uid: int) -> None:
    """Make a tap that ``uid`` may open, plugged into the bridge and up; one that is there is used again.

    ``FailedPrecondition`` (``NETWORK_REFUSED``) when the node does not let it.
    """
    try:
        _configure(name, persist=True, uid=uid)
        index = socket.if_nametoindex(name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            if not (_NET / name / "brport").is_dir():
                fcntl.ioctl(control, _SIOCBRADDIF, struct.pack("16si20x", bridge.encode(), index))
            flags = struct.unpack_from(
                "H", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("40s", name.encode())), 16
            )
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags[0] | _IFF_UP))
    except OSError as exc:
        with contextlib.suppress(OSError):
            remove_tap(name)
        raise FailedPrecondition(
            f"no tap could be plugged into bridge {bridge} ({exc.strerror or exc}): check that it is there, and that "
            "the agent may change the network (CAP_NET_ADMIN)",
            reason="NETWORK_REFUSED",
            metadata={"bridge": bridge, "tap": name},
        ) from exc


def remove_tap(name: str) -> bool:
    """Remove it, which its VMM no longer holds; whether there was one. Raises OSError."""
    if not (_NET / name).exists():
        return False
    _configure(name, persist=False, uid=None)
    return True


def _configure(name: str, *, persist: bool, uid: int | None) -> None:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP_NO_PI_VNET))
        if uid is not None:
            fcntl.ioctl(fd, _TUNSETOWNER, ctypes.c_uint32(uid).value)
        fcntl.ioctl(fd, _TUNSETPERSIST, int(persist))
    finally:
        os.close(fd)
