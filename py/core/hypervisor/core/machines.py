"""What only machines (VMs and microVMs) have in their specification, and snapshots; see instance.proto for each field.

Strings here are what users wrote: the server has checked lengths and characters, drivers still treat them as hostile.
"""

from datetime import datetime
from enum import StrEnum

import msgspec

__all__ = [
    "CloudInit",
    "Firmware",
    "MicrovmOptions",
    "NetworkInterface",
    "RateLimit",
    "Snapshot",
    "SnapshotKind",
    "VmOptions",
    "VmmChoice",
]


class Firmware(StrEnum):
    """What a virtual machine begins with."""

    BIOS = "bios"
    UEFI = "uefi"


class VmmChoice(StrEnum):
    """Which program runs a microVM."""

    AUTO = "auto"
    FIRECRACKER = "firecracker"
    QEMU = "qemu"


class CloudInit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a guest's cloud-init is told, by a NoCloud seed. ``hostname`` empty: the instance's name.

    ``user_data``: as cloud-init takes it (``#cloud-config``, ``#!`` script ...), handed on byte for byte.
    """

    hostname: str = ""
    ssh_authorized_keys: tuple[str, ...] = ()
    user_data: str = ""
    network_config: str = ""


class NetworkInterface(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One network card, plugged into a bridge of the node. ``mac`` empty: derived from the instance's id."""

    bridge: str
    mac: str = ""


class RateLimit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Most that a device may do per second. 0: not limited."""

    bytes_per_second: int = 0
    operations_per_second: int = 0


class VmOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Virtual machines only. ``host_devices``: PCI addresses of the node, ``0000:01:00.0`` each."""

    firmware: Firmware = Firmware.BIOS
    host_devices: tuple[str, ...] = ()
    max_cpus: int = 0
    """Processors that can be plugged in later, those it starts with included. 0: none more."""
    max_memory_mb: int = 0
    """Memory up to which it can grow later. 0: no more than it starts with."""


class MicrovmOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """MicroVMs only. ``metadata``: a JSON object that the guest reads from its metadata service (Firecracker)."""

    vmm: VmmChoice = VmmChoice.AUTO
    metadata: str = ""
    vsock: bool = False
    balloon: bool = False
    disk_limit: RateLimit | None = None
    network_limit: RateLimit | None = None


class SnapshotKind(StrEnum):
    """What a snapshot holds."""

    FULL = "full"
    """Disk, and memory where it was taken of a guest that had one."""
    DIFF = "diff"
    """As FULL, of memory only what changed since the snapshot it is based on."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A state of an instance that can be gone back to. Lives on the instance's node, told by its driver.

    ``parent`` is the name of the snapshot it is based on, if any; ``memory``: whether it holds the guest's memory, so
    that going back to it goes on from there. ``size_bytes``: what it takes on the node's disk, where known.
    """

    name: str
    created_at: datetime
    kind: SnapshotKind = SnapshotKind.FULL
    parent: str = ""
    memory: bool = False
    current: bool = False
    size_bytes: int | None = None
