"""QEMU's command line for one microVM: q35 with direct kernel boot and the fewest devices. Pure.

Every word is one element of the list, and what stands inside a word is written either as JSON or with QEMU's own
escape of commas, so that no text of a user can become an option. The machine has no default devices, no graphics, no
disk controller, no USB: a serial line on standard input and output, virtio devices on PCI Express, a panic notifier
(so that a guest that dies is seen to), and QMP on a socket. It starts stopped (``-S``): ``boot`` lets it run.
"""

import json
import uuid
import zlib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from hypervisor.agent.drivers.microvm.vmm import DISK, INITRD, KERNEL, Card, Machine
from hypervisor.core.machines import RateLimit

__all__ = [
    "TRANSLATED_MIB",
    "VHOST_VSOCK",
    "Accelerator",
    "build_command",
    "escape",
    "kernel_command_line",
    "vsock_cid",
]

TRANSLATED_MIB = 64
"""Memory for translated code of a guest, MiB: QEMU would take a gigabyte; a Linux boots as fast with this."""
VHOST_VSOCK = Path("/dev/vhost-vsock")
_FIRST_CID = 3
_CIDS = 2**32 - 1 - _FIRST_CID
_NAMESPACE = uuid.UUID("5ba2b1c9-6b0f-4d46-9f0c-6a6e2c0f9b1d")


class Accelerator(StrEnum):
    """What runs the guest's instructions; the values are QEMU's names."""

    KVM = "kvm"
    TCG = "tcg"


def build_command(
    machine: Machine, *, program: Path, setpriv: Path, accelerator: Accelerator, qmp: Path
) -> tuple[str, ...]:
    """The arguments, the program first. Files of the machine are named relative to its root.

    ``setpriv``: that of util-linux; used where the machine has a user of its own. QEMU's sandbox cannot forbid gaining
    privileges and still let QEMU change its user, which it does once it has opened what it needs.
    """
    words = [
        *((str(setpriv), "--no-new-privs", "--") if machine.uid else ()),
        str(program),
        "-no-user-config",
        "-nodefaults",
        *("-name", _options(guest=machine.instance_id, process=f"vm-{machine.instance_id}")),
        *("-uuid", str(uuid.uuid5(_NAMESPACE, machine.instance_id))),
        *(
            "-sandbox",
            f"on,obsolete=deny,elevateprivileges={_privileges(machine)},spawn=deny,resourcecontrol=deny",
        ),
        *(("-runas", f"{machine.uid}:{machine.uid}") if machine.uid else ()),
        *(
            "-machine",
            "q35,usb=off,sata=off,smbus=off,hpet=off,vmport=off,smm=off,i8042=off,dump-guest-core=off",
        ),
        *(
            "-accel",
            accelerator if accelerator is Accelerator.KVM else f"tcg,thread=multi,tb-size={TRANSLATED_MIB}",
        ),
        *("-cpu", "host" if accelerator is Accelerator.KVM else "max"),
        *("-smp", str(machine.vcpus)),
        *("-m", f"{machine.memory_mib}M"),
        *("-rtc", "base=utc"),
        *("-display", "none"),
        *("-chardev", "stdio,id=console,signal=off"),
        *("-serial", "chardev:console"),
        *("-chardev", "socket,id=qmp," + _options(path=qmp) + ",server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-action", "panic=exit-failure"),
        # Tells in the log why it ended; see qemu_log.
        *("-trace", "qemu_system_shutdown_request"),
        "-S",
        *("-kernel", KERNEL),
        *("-append", kernel_command_line(machine.kernel_args)),
    ]
    if machine.initrd:
        words += ("-initrd", INITRD)
    if machine.disk:
        words += _disk(machine.options.disk_limit)
    for number, card in enumerate(machine.cards):
        words += _card(number, card)
    words += ("-object", _json({"qom-type": "rng-builtin", "id": "random"}))
    words += _device("virtio-rng-pci", rng="random")
    words += _device("pvpanic-pci")
    if machine.options.balloon:
        words += _device("virtio-balloon-pci", **{"free-page-reporting": True, "deflate-on-oom": True})
    if machine.options.vsock:
        words += _device("vhost-vsock-pci", **{"guest-cid": vsock_cid(machine.instance_id)})
    return tuple(words)


def escape(value: str) -> str:
    """A value as it stands in a list of ``name=value,name=value``: QEMU ends it at a single comma."""
    return value.replace(",", ",,")


def kernel_command_line(arguments: str) -> str:
    """What the kernel is told: the words of the specification, and where its console is unless they say so."""
    if any(word.startswith("console=") for word in arguments.split()):
        return arguments
    return f"console=ttyS0 {arguments}".rstrip()


def vsock_cid(instance_id: str) -> int:
    """The guest's address for vsock, the same at every start. Two that collide are refused by the kernel."""
    return _FIRST_CID + zlib.crc32(instance_id.encode()) % _CIDS


def _privileges(machine: Machine) -> str:
    return "allow" if machine.uid else "deny"


def _options(**values: object) -> str:
    return ",".join(f"{name}={escape(str(value))}" for name, value in values.items())


def _json(document: Mapping[str, object]) -> str:
    return json.dumps(document, separators=(",", ":"))


def _device(driver: str, **properties: object) -> tuple[str, str]:
    return "-device", _json({"driver": driver, **properties})


def _disk(limit: RateLimit | None) -> tuple[str, ...]:
    file = {"driver": "file", "node-name": "disk-file", "filename": DISK, "discard": "unmap"}
    disk: dict[str, object] = {
        "driver": "raw",
        "node-name": "disk",
        "file": "disk-file",
        "discard": "unmap",
        "detect-zeroes": "unmap",
    }
    words: tuple[str, ...] = ("-blockdev", _json(file), "-blockdev", _json(disk))
    node = "disk"
    if limit is not None and (limit.bytes_per_second or limit.operations_per_second):
        limits = {"bps-total": limit.bytes_per_second, "iops-total": limit.operations_per_second}
        throttle = {
            "driver": "throttle",
            "node-name": "disk-limited",
            "throttle-group": "limit",
            "file": "disk",
        }
        words = (
            "-object",
            _json({"qom-type": "throttle-group", "id": "limit", "limits": limits}),
            *words,
            "-blockdev",
            _json(throttle),
        )
        node = "disk-limited"
    # Errors of the host's disk are the guest's to see; stopping it would look like a pause that nobody asked for.
    return (*words, *_device("virtio-blk-pci", drive=node, serial="disk", werror="report", rerror="report"))


def _card(number: int, card: Card) -> tuple[str, ...]:
    name = f"net{number}"
    netdev = f"tap,id={name},{_options(ifname=card.tap)},script=no,downscript=no"
    # Without the ROM that would boot from the network.
    return ("-netdev", netdev, *_device("virtio-net-pci", netdev=name, mac=card.mac, romfile=""))
