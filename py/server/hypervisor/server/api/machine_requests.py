"""What only machines have in a specification, checked. Pure; every wrong field is reported.

What the node has to offer (bridges, devices, files) is looked at there; here it is only whether it can be meant.
"""

import json
import re

from hypervisor.core.names import check_dns_label, shorten
from hypervisor.core.states import InstanceType
from hypervisor.server.api.violations import Violations
from hypervisor.v1 import instance_pb2
from hypervisor.wire.enums import FIRMWARE, VMM

__all__ = ["check_machine"]

_MAX_KEYS = 64
_MAX_KEY_BYTES = 8 << 10
_MAX_USER_DATA_BYTES = 16 << 10
_MAX_METADATA_BYTES = 48 << 10
_MAX_NETWORKS = 8
_MAX_DEVICES = 16
_MAX_RATE = 1 << 40
_MAX_CPUS = 1024
_MAX_MEMORY_MB = 16_777_216
_BRIDGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_PCI_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")


def check_machine(
    wrong: Violations, spec: instance_pb2.InstanceSpec, kind: InstanceType | None, at: str
) -> None:
    """Note every wrong field of what only machines have. ``at``: the path of ``spec``, with its dot."""
    if kind is None:
        return
    machine = kind is not InstanceType.CONTAINER
    for field, present, fits in (
        ("cloud_init", spec.HasField("cloud_init"), machine),
        ("networks", bool(spec.networks), machine),
        ("vm", spec.HasField("vm"), kind is InstanceType.VM),
        ("microvm", spec.HasField("microvm"), kind is InstanceType.MICROVM),
    ):
        if present and not fits:
            wrong.add(f"{at}{field}", f"is not for instances of type {kind.value}: remove it")
    if spec.HasField("cloud_init"):
        _check_cloud_init(wrong, spec.cloud_init, f"{at}cloud_init.")
    _check_networks(wrong, spec, at)
    if spec.HasField("vm"):
        _check_vm(wrong, spec, f"{at}vm.")
    if spec.HasField("microvm"):
        _check_microvm(wrong, spec.microvm, f"{at}microvm.")


def _check_cloud_init(wrong: Violations, cloud_init: instance_pb2.CloudInit, at: str) -> None:
    if cloud_init.hostname:
        wrong.extend(check_dns_label(f"{at}hostname", cloud_init.hostname))
    keys = cloud_init.ssh_authorized_keys
    if len(keys) > _MAX_KEYS:
        wrong.add(f"{at}ssh_authorized_keys", f"has {len(keys)} keys: use at most {_MAX_KEYS}")
    for index, key in enumerate(keys[:_MAX_KEYS]):
        field = f"{at}ssh_authorized_keys[{index}]"
        wrong.text(field, key, max_bytes=_MAX_KEY_BYTES)
        if len(key.split()) < 2:
            wrong.add(field, f"{shorten(key)} is no public key: give a line such as 'ssh-ed25519 AAAA... me'")
    for name in ("user_data", "network_config"):
        _check_blob(wrong, f"{at}{name}", getattr(cloud_init, name), _MAX_USER_DATA_BYTES)


def _check_blob(wrong: Violations, field: str, text: str, max_bytes: int) -> None:
    size = len(text.encode())
    if size > max_bytes:
        wrong.add(field, f"is {size} bytes long: use at most {max_bytes}")
    if "\0" in text:
        wrong.add(field, "has a NUL character: remove it")


def _check_networks(wrong: Violations, spec: instance_pb2.InstanceSpec, at: str) -> None:
    if len(spec.networks) > _MAX_NETWORKS:
        wrong.add(f"{at}networks", f"has {len(spec.networks)} cards: use at most {_MAX_NETWORKS}")
    macs: set[str] = set()
    for index, network in enumerate(spec.networks[:_MAX_NETWORKS]):
        here = f"{at}networks[{index}]."
        if not _BRIDGE.fullmatch(network.bridge):
            wrong.add(
                f"{here}bridge",
                f"{shorten(network.bridge)} is not the name of a bridge: at most 15 letters, digits, '.', '_', '-'",
            )
        if not network.mac:
            continue
        if not _MAC.fullmatch(network.mac):
            wrong.add(
                f"{here}mac",
                f"{shorten(network.mac)} is no address: write it as 52:54:00:12:34:56, in lower case",
            )
        elif int(network.mac[:2], 16) & 1:
            wrong.add(f"{here}mac", f"{network.mac} is a group address: its first byte must be even")
        elif network.mac in macs:
            wrong.add(f"{here}mac", f"{network.mac} is another card's already: give each its own")
        macs.add(network.mac)


def _check_vm(wrong: Violations, spec: instance_pb2.InstanceSpec, at: str) -> None:
    vm = spec.vm
    if vm.firmware != 0 and FIRMWARE.from_wire(vm.firmware) is None:
        wrong.add(f"{at}firmware", "is not known: use BIOS or UEFI, or leave it out")
    if vm.firmware == instance_pb2.FIRMWARE_UEFI and spec.kernel_path:
        wrong.add(
            f"{at}firmware", "UEFI does not go with kernel_path, which is booted without firmware: remove one"
        )
    devices = vm.host_devices
    if len(devices) > _MAX_DEVICES:
        wrong.add(f"{at}host_devices", f"has {len(devices)} devices: use at most {_MAX_DEVICES}")
    for index, address in enumerate(devices[:_MAX_DEVICES]):
        if not _PCI_ADDRESS.fullmatch(address):
            wrong.add(
                f"{at}host_devices[{index}]",
                f"{shorten(address)} is no PCI address: write it as 0000:01:00.0, in lower case",
            )
        elif address in devices[:index]:
            wrong.add(f"{at}host_devices[{index}]", f"{address} is listed twice: leave one out")
    if vm.max_cpus:
        wrong.whole(f"{at}max_cpus", vm.max_cpus, low=max(1, int(-(-spec.cpu_cores // 1))), high=_MAX_CPUS)
    if vm.max_memory_mb:
        low = spec.memory_mb or 256
        wrong.whole(f"{at}max_memory_mb", vm.max_memory_mb, low=low, high=_MAX_MEMORY_MB)


def _check_microvm(wrong: Violations, microvm: instance_pb2.MicrovmOptions, at: str) -> None:
    if microvm.vmm != 0 and VMM.from_wire(microvm.vmm) is None:
        wrong.add(f"{at}vmm", "is not known: use AUTO, FIRECRACKER or QEMU, or leave it out")
    if microvm.metadata:
        _check_blob(wrong, f"{at}metadata", microvm.metadata, _MAX_METADATA_BYTES)
        try:
            parsed = json.loads(microvm.metadata)
        except (ValueError, RecursionError) as exc:
            wrong.add(f"{at}metadata", f'is no JSON ({exc}): give an object, such as {{"role": "web"}}')
        else:
            if not isinstance(parsed, dict):
                wrong.add(f"{at}metadata", 'is no JSON object: give one, such as {"role": "web"}')
    for name in ("disk_limit", "network_limit"):
        if microvm.HasField(name):
            limit = getattr(microvm, name)
            for part in ("bytes_per_second", "operations_per_second"):
                wrong.whole(f"{at}{name}.{part}", getattr(limit, part), low=0, high=_MAX_RATE)
