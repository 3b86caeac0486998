"""What a specification asks of a virtual machine, checked. Pure but for a look at the node's devices."""

import hashlib
import re
from dataclasses import dataclass

from hypervisor.agent.drivers.driver import Assignment
from hypervisor.agent.drivers.libvirt.config import LibvirtConfig
from hypervisor.agent.drivers.libvirt.domain_xml import Card, PciAddress, legal_text
from hypervisor.agent.drivers.libvirt.seed import MAX_FILE_BYTES
from hypervisor.core.errors import InvalidArgument
from hypervisor.core.machines import CloudInit, Firmware, VmOptions
from hypervisor.core.model import InstanceSpec
from hypervisor.core.names import shorten
from hypervisor.core.states import InstanceType

__all__ = ["Wanted", "check"]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_PCI = re.compile(r"([0-9a-f]{4}):([0-9a-f]{2}):([01][0-9a-f])\.([0-7])")
_MAX_CPUS = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A specification in the terms of :class:`.domain_xml.Domain`; files are still paths of the user."""

    vcpus: int
    max_vcpus: int
    cpu_millis: int
    memory_mb: int
    max_memory_mb: int
    kernel_args: str
    cards: tuple[Card, ...]
    host_devices: tuple[PciAddress, ...]
    uefi: bool


def check(assignment: Assignment, config: LibvirtConfig) -> Wanted:
    """Refuse what this driver cannot run: InvalidArgument that names the field and says how to mend it."""
    spec = assignment.spec
    options = spec.vm or VmOptions()
    if not _ID.fullmatch(assignment.instance_id):
        raise InvalidArgument.of_field(
            "id", f"{shorten(assignment.instance_id)} cannot name a virtual machine"
        )
    if assignment.type is not InstanceType.VM:
        raise InvalidArgument.of_field("type", f"libvirt runs virtual machines, not {assignment.type}")
    legal_text(assignment.name, "name")
    legal_text(assignment.project, "project")
    _check_boot(spec)
    if spec.cloud_init is not None:
        _check_cloud_init(spec.cloud_init)
    vcpus = max(1, -(-spec.cpu_millis // 1000))
    max_vcpus = options.max_cpus or vcpus
    if not vcpus <= max_vcpus <= _MAX_CPUS:
        raise InvalidArgument.of_field(
            "spec.vm.max_cpus",
            f"is {max_vcpus}: use {vcpus} (what it starts with) to {_MAX_CPUS}, or 0 for none more",
        )
    max_memory_mb = options.max_memory_mb or spec.memory_mb
    if max_memory_mb < spec.memory_mb:
        raise InvalidArgument.of_field(
            "spec.vm.max_memory_mb",
            f"is {max_memory_mb}, less than spec.memory_mb ({spec.memory_mb}): use at least that, or 0 for no more",
        )
    return Wanted(
        vcpus=vcpus,
        max_vcpus=max_vcpus,
        cpu_millis=spec.cpu_millis,
        memory_mb=spec.memory_mb,
        max_memory_mb=max_memory_mb,
        kernel_args=legal_text(spec.kernel_args, "spec.kernel_args"),
        cards=_cards(assignment.instance_id, spec, config),
        host_devices=tuple(
            _host_device(text, f"spec.vm.host_devices[{index}]", config)
            for index, text in enumerate(options.host_devices)
        ),
        uefi=options.firmware is Firmware.UEFI,
    )


def _check_boot(spec: InstanceSpec) -> None:
    for field, given in (
        ("spec.command", spec.command),
        ("spec.env", spec.env),
        ("spec.working_dir", spec.working_dir),
    ):
        if given:
            raise InvalidArgument.of_field(
                field, "a virtual machine runs what its disk or kernel begins with: leave it out"
            )
    if spec.microvm is not None:
        raise InvalidArgument.of_field(
            "spec.microvm", "is for microVMs: leave it out, or use the type microvm"
        )
    if not spec.image and not spec.kernel_path:
        raise InvalidArgument.of_field(
            "spec.image",
            "is empty: give a disk image to boot from, or spec.kernel_path with spec.initrd_path",
        )
    for field, value in (("spec.initrd_path", spec.initrd_path), ("spec.kernel_args", spec.kernel_args)):
        if value and not spec.kernel_path:
            raise InvalidArgument.of_field(
                field, "needs spec.kernel_path beside it: give that, or leave it out"
            )


def _check_cloud_init(cloud_init: CloudInit) -> None:
    values = {
        "spec.cloud_init.hostname": cloud_init.hostname,
        "spec.cloud_init.user_data": cloud_init.user_data,
        "spec.cloud_init.network_config": cloud_init.network_config,
        **{
            f"spec.cloud_init.ssh_authorized_keys[{index}]": key
            for index, key in enumerate(cloud_init.ssh_authorized_keys)
        },
    }
    for field, value in values.items():
        try:
            size = len(value.encode())
        except UnicodeEncodeError as exc:
            raise InvalidArgument.of_field(field, "holds half of a character (a lone surrogate)") from exc
        if size > MAX_FILE_BYTES:
            raise InvalidArgument.of_field(field, f"has {size} bytes, more than {MAX_FILE_BYTES}: shorten it")
    for field in ("spec.cloud_init.hostname", *(f for f in values if "ssh_authorized_keys" in f)):
        if any(ord(character) < 0x20 for character in values[field]):
            raise InvalidArgument.of_field(field, "has a control character in it: write it on one line")


def _cards(instance_id: str, spec: InstanceSpec, config: LibvirtConfig) -> tuple[Card, ...]:
    cards = []
    for index, network in enumerate(spec.networks):
        field = f"spec.networks[{index}]"
        if network.bridge not in config.bridges:
            allowed = ", ".join(config.bridges) or "none is configured"
            raise InvalidArgument.of_field(
                f"{field}.bridge",
                f"{shorten(network.bridge)} is not one of this node's bridges for machines ({allowed}): use one of "
                "those, or add it to machines.bridges in the agent's configuration",
            )
        mac = network.mac.lower() or _mac_of(instance_id, index)
        if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1:
            raise InvalidArgument.of_field(
                f"{field}.mac",
                f"{shorten(network.mac)} is not the address of one card: such as 52:54:00:12:34:56",
            )
        cards.append(Card(network.bridge, mac))
    return tuple(cards)


def _mac_of(instance_id: str, index: int) -> str:
    digest = hashlib.sha256(f"{instance_id}/{index}".encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


def _host_device(text: str, field: str, config: LibvirtConfig) -> PciAddress:
    found = _PCI.fullmatch(text.lower())
    if found is None:
        raise InvalidArgument.of_field(
            field, f"{shorten(text)} is not the address of a PCI device: such as 0000:01:00.0"
        )
    if text.lower() not in (device.lower() for device in config.host_devices):
        raise InvalidArgument.of_field(
            field,
            f"{text} may not be given to machines: add it to machines.host_devices in the agent's configuration",
        )
    if not (config.pci_root / text.lower()).exists():
        raise InvalidArgument.of_field(field, f"this node has no PCI device {text}: look at `lspci -D` there")
    return PciAddress(*(int(part, 16) for part in found.groups()))
