"""Options of ``instance create`` that only machines have."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from hypervisor.core.errors import InvalidArgument
from hypervisor.v1.instance_pb2 import FIRMWARE_UEFI, Instance, InstanceSpec, Vmm

__all__ = ["MACHINE_OPTIONS", "add_machine_options", "machine_options"]

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--cloud-init",
        metavar="FILE",
        help="vm, microvm: user data for the guest's cloud-init, such as #cloud-config.",
    ),
    click.option(
        "--ssh-key",
        "ssh_keys",
        metavar="FILE",
        multiple=True,
        help="vm, microvm: public keys for the guest's default user, by cloud-init; repeatable.",
    ),
    click.option(
        "--network",
        "networks",
        metavar="BRIDGE[,MAC]",
        multiple=True,
        help="vm, microvm: a network card plugged into a bridge of the node; repeatable.",
    ),
    click.option("--uefi", is_flag=True, help="vm: begin with UEFI instead of a BIOS."),
    click.option(
        "--host-device",
        "host_devices",
        metavar="ADDRESS",
        multiple=True,
        help="vm: a PCI device of the node, such as 0000:01:00.0; repeatable.",
    ),
    click.option(
        "--vmm", type=click.Choice(["auto", "firecracker", "qemu"]), help="microvm: which program runs it."
    ),
)

MACHINE_OPTIONS = frozenset({"cloud_init", "ssh_keys", "networks", "uefi", "host_devices", "vmm"})
"""Names of their parameters."""


def machine_options(command: F) -> F:
    """Add the options to a command; its function takes them as ``**machine``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def add_machine_options(instance: Instance, machine: dict[str, Any]) -> None:
    """Put what was given into the instance. InvalidArgument for a file that cannot be read."""
    spec: InstanceSpec = instance.spec
    if machine["cloud_init"]:
        spec.cloud_init.user_data = _read("--cloud-init", machine["cloud_init"])
    for file in machine["ssh_keys"]:
        spec.cloud_init.ssh_authorized_keys.extend(_keys(_read("--ssh-key", file)))
    for text in machine["networks"]:
        bridge, _, mac = text.partition(",")
        spec.networks.add(bridge=bridge, mac=mac)
    if machine["uefi"]:
        spec.vm.firmware = FIRMWARE_UEFI
    if machine["host_devices"]:
        spec.vm.host_devices.extend(machine["host_devices"])
    if machine["vmm"]:
        spec.microvm.vmm = Vmm.Value(f"VMM_{machine['vmm'].upper()}")


def _keys(text: str) -> Sequence[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _read(option: str, file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidArgument.of_field(
            option, f"{file} cannot be read: {exc}", reason="FILE_UNREADABLE"
        ) from exc
