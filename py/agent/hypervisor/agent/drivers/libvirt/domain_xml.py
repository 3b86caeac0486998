"""libvirt's description of a virtual machine, built of values. Pure.

Every name and path that goes into it is untrusted. It is built as a tree and serialised by the library, so that a value
stays a value whatever is in it; characters that XML has no way to write are refused here, with the field's name.
https://libvirt.org/formatdomain.html describes the elements.
"""

import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from hypervisor.agent.drivers.libvirt.record import Record
from hypervisor.core.errors import InvalidArgument

__all__ = [
    "Card",
    "Disk",
    "Domain",
    "PciAddress",
    "build_domain",
    "build_snapshot",
    "domain_uuid",
    "legal_text",
]

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_UUIDS = uuid.UUID("6b6f2a2c-54cf-4c0b-9d0b-6f1c2b7f5a10")
_QUOTA_PERIOD_US = 100_000
_BALLOON_PERIOD_S = 2


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk of an instance: a qcow2 overlay, and what it lies on, nearest first, as (path, format)."""

    path: Path
    bases: tuple[tuple[Path, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Card:
    """A network card in a bridge of the node."""

    bridge: str
    mac: str


@dataclass(frozen=True, slots=True)
class PciAddress:
    """A PCI device of the node."""

    domain: int
    bus: int
    slot: int
    function: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """All of a virtual machine that libvirt is told. ``vcpus`` and ``memory_mb`` are what it starts with, the maxima
    what it can grow to. ``cpu_millis`` limits what its processors use together where it is less than theirs."""

    record: Record
    kind: str
    """Type of domain: ``kvm``, ``qemu``, or ``test`` for libvirt's own test driver."""
    vcpus: int
    max_vcpus: int
    cpu_millis: int
    memory_mb: int
    max_memory_mb: int
    console: Path
    """FIFOs ``<console>.in`` and ``<console>.out``, made before it starts."""
    kernel: Path | None = None
    initrd: Path | None = None
    kernel_args: str = ""
    disk: Disk | None = None
    seed: Path | None = None
    cards: tuple[Card, ...] = ()
    host_devices: tuple[PciAddress, ...] = ()
    uefi: bool = False


def legal_text(value: str, field: str) -> str:
    """The value; InvalidArgument that names the field when XML cannot hold it (NUL, other control characters)."""
    found = _NOT_IN_XML.search(value)
    if found is not None:
        raise InvalidArgument.of_field(
            field,
            f"has the character U+{ord(found[0]):04X} in it, which cannot be handed to libvirt: remove it",
        )
    return value


def domain_uuid(instance_id: str) -> str:
    """The UUID of an instance's domain: the same whenever and wherever it is defined."""
    return str(uuid.uuid5(_UUIDS, instance_id))


def build_domain(domain: Domain) -> str:
    """The document for ``virDomainDefineXML``."""
    root = Element("domain", type=domain.kind)
    _text(root, "name", domain.record.instance_id)
    _text(root, "uuid", domain_uuid(domain.record.instance_id))
    _text(root, "title", f"{domain.record.project}/{domain.record.name}")
    SubElement(root, "metadata").append(domain.record.element())
    _text(root, "memory", domain.max_memory_mb, unit="MiB")
    _text(root, "currentMemory", domain.memory_mb, unit="MiB")
    _text(root, "vcpu", domain.max_vcpus, placement="static", current=domain.vcpus)
    if domain.cpu_millis < domain.vcpus * 1000:
        tuning = SubElement(root, "cputune")
        _text(tuning, "global_period", _QUOTA_PERIOD_US)
        _text(tuning, "global_quota", domain.cpu_millis * _QUOTA_PERIOD_US // 1000)
    _add_boot(root, domain)
    _add_machine(root, domain)
    devices = SubElement(root, "devices")
    _add_disks(devices, domain)
    _add_cards(devices, domain)
    for address in domain.host_devices:
        device = SubElement(devices, "hostdev", mode="subsystem", type="pci", managed="yes")
        SubElement(
            SubElement(device, "source"),
            "address",
            domain=f"0x{address.domain:04x}",
            bus=f"0x{address.bus:02x}",
            slot=f"0x{address.slot:02x}",
            function=f"0x{address.function:x}",
        )
    _add_lines(devices, domain)
    return ElementTree.tostring(root, encoding="unicode")


def build_snapshot(name: str) -> str:
    """The document for ``virDomainSnapshotCreateXML``: disk and, of a guest that runs, its memory."""
    root = Element("domainsnapshot")
    _text(root, "name", name)
    return ElementTree.tostring(root, encoding="unicode")


def _add_boot(root: Element, domain: Domain) -> None:
    if domain.kind == "test":
        _text(SubElement(root, "os"), "type", "hvm")
        return
    boot = SubElement(root, "os", firmware="efi") if domain.uefi else SubElement(root, "os")
    _text(boot, "type", "hvm", arch="x86_64", machine="q35")
    if domain.uefi:
        firmware = SubElement(boot, "firmware")
        SubElement(firmware, "feature", enabled="no", name="secure-boot")
        SubElement(firmware, "feature", enabled="no", name="enrolled-keys")
    if domain.kernel is not None:
        _text(boot, "kernel", domain.kernel)
        if domain.initrd is not None:
            _text(boot, "initrd", domain.initrd)
        if domain.kernel_args:
            _text(boot, "cmdline", domain.kernel_args)
    else:
        SubElement(boot, "boot", dev="hd")


def _add_machine(root: Element, domain: Domain) -> None:
    features = SubElement(root, "features")
    SubElement(features, "acpi")
    SubElement(features, "apic")
    if domain.kind == "kvm":
        SubElement(root, "cpu", mode="host-passthrough", check="none")
    elif domain.kind == "qemu":
        SubElement(root, "cpu", mode="maximum", check="none")
    clock = SubElement(root, "clock", offset="utc")
    if domain.kind != "test":
        SubElement(clock, "timer", name="rtc", tickpolicy="catchup")
        SubElement(clock, "timer", name="pit", tickpolicy="delay")
        SubElement(clock, "timer", name="hpet", present="no")
    _text(root, "on_poweroff", "destroy")
    _text(root, "on_reboot", "restart")
    _text(root, "on_crash", "destroy")


def _add_disks(devices: Element, domain: Domain) -> None:
    if domain.disk is not None:
        disk = SubElement(devices, "disk", type="file", device="disk")
        SubElement(disk, "driver", name="qemu", type="qcow2", discard="unmap")
        SubElement(disk, "source", file=str(domain.disk.path))
        _add_backing(disk, domain.disk.bases)
        SubElement(disk, "target", dev="vda", bus="virtio")
    if domain.seed is not None:
        # Not a CD drive: kernels made for clouds have the drivers of virtio alone. cloud-init goes by the label.
        seed = SubElement(devices, "disk", type="file", device="disk")
        SubElement(seed, "driver", name="qemu", type="raw")
        SubElement(seed, "source", file=str(domain.seed))
        SubElement(seed, "target", dev="vdb", bus="virtio")
        SubElement(seed, "readonly")


def _add_backing(parent: Element, bases: tuple[tuple[Path, str], ...]) -> None:
    """Every layer is named with its format: none is ever guessed from what a guest may have written into it."""
    if not bases:
        SubElement(parent, "backingStore")
        return
    (path, kind), *rest = bases
    store = SubElement(parent, "backingStore", type="file")
    SubElement(store, "format", type=kind)
    SubElement(store, "source", file=str(path))
    _add_backing(store, tuple(rest))


def _add_cards(devices: Element, domain: Domain) -> None:
    for card in domain.cards:
        interface = SubElement(devices, "interface", type="bridge")
        SubElement(interface, "mac", address=card.mac)
        SubElement(interface, "source", bridge=card.bridge)
        SubElement(interface, "model", type="virtio")


def _add_lines(devices: Element, domain: Domain) -> None:
    """Console, guest agent, random numbers, balloon; and a device by which a guest tells that it panicked."""
    serial = SubElement(devices, "serial", type="pipe")
    SubElement(serial, "source", path=str(domain.console))
    if domain.kind == "test":
        return
    SubElement(serial, "target", type="isa-serial", port="0")
    SubElement(devices, "controller", type="usb", model="none")
    channel = SubElement(devices, "channel", type="unix")
    SubElement(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    rng = SubElement(devices, "rng", model="virtio")
    _text(rng, "backend", "/dev/urandom", model="random")
    balloon = SubElement(devices, "memballoon", model="virtio", freePageReporting="on")
    SubElement(balloon, "stats", period=str(_BALLOON_PERIOD_S))
    SubElement(devices, "panic", model="isa")


def _text(parent: Element, name: str, text: object, **attributes: object) -> Element:
    element = SubElement(parent, name, {key: str(value) for key, value in attributes.items()})
    element.text = str(text)
    return element
