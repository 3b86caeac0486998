"""The part of a manifest that only machines have: ``cloud_init``, ``networks``, ``vm`` and ``microvm`` of a ``spec``.

::

    cloud_init: {hostname: web, ssh_authorized_keys: [ssh-ed25519 AAAA me], user_data: "#cloud-config\\n..."}
    networks: [br0, {bridge: br1, mac: "52:54:00:12:34:56"}]
    vm: {firmware: uefi, host_devices: ["0000:01:00.0"], max_cpus: 4, max_memory_mb: 4096}
    microvm: {vmm: auto, vsock: true, disk_limit: {bytes_per_second: 10000000}}
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import yaml

from hypervisor.v1.instance_pb2 import Firmware, InstanceSpec, Vmm

__all__ = ["MACHINE_KEYS", "read_machine"]

MACHINE_KEYS = ("cloud_init", "networks", "vm", "microvm")

_LIMIT = ("bytes_per_second", "operations_per_second")
_FIELDS: Mapping[str, Mapping[str, str]] = {
    "cloud_init": {
        "hostname": "text",
        "ssh_authorized_keys": "words",
        "user_data": "text",
        "network_config": "text",
    },
    "vm": {"firmware": "firmware", "host_devices": "words", "max_cpus": "number", "max_memory_mb": "number"},
    "microvm": {
        "vmm": "vmm",
        "metadata": "text",
        "vsock": "flag",
        "balloon": "flag",
        "disk_limit": "limit",
        "network_limit": "limit",
    },
}


class Reader(Protocol):
    """What is needed of a manifest's reader: each notes mistakes with their line and goes on."""

    def mapping(self, node: yaml.Node, path: str, known: tuple[str, ...]) -> dict[str, yaml.Node]: ...

    def each(self, node: yaml.Node, path: str, read: Callable[[yaml.Node, str], Any]) -> list[Any]: ...

    def text(self, node: yaml.Node, path: str) -> str: ...

    def integer(self, node: yaml.Node, path: str) -> int: ...

    def flag(self, node: yaml.Node, path: str) -> bool: ...

    def words(self, node: yaml.Node, path: str) -> Sequence[str]: ...

    def enum(self, node: yaml.Node, path: str, enum: Any, prefix: str, values: Callable[[], Any]) -> Any: ...


def read_machine(reader: Reader, key: str, node: yaml.Node, path: str, spec: InstanceSpec) -> None:
    """Read one of :data:`MACHINE_KEYS` into the specification."""
    if key == "networks":
        reader.each(node, path, lambda child, at: _network(reader, child, at, spec))
        return
    # Present even where it is empty: the server says what does not go with the type.
    message = getattr(spec, key)
    message.SetInParent()
    fields = _FIELDS[key]
    for name, child in reader.mapping(node, path, tuple(fields)).items():
        _field(reader, fields[name], message, name, child, f"{path}.{name}")


def _network(reader: Reader, node: yaml.Node, path: str, spec: InstanceSpec) -> None:
    network = spec.networks.add()
    if isinstance(node, yaml.ScalarNode):
        network.bridge = reader.text(node, path)
        return
    for name, child in reader.mapping(node, path, ("bridge", "mac")).items():
        setattr(network, name, reader.text(child, f"{path}.{name}"))


def _field(reader: Reader, kind: str, message: Any, name: str, node: yaml.Node, path: str) -> None:
    match kind:
        case "text":
            setattr(message, name, reader.text(node, path))
        case "words":
            getattr(message, name).extend(reader.words(node, path))
        case "number":
            setattr(message, name, reader.integer(node, path))
        case "flag":
            setattr(message, name, reader.flag(node, path))
        case "firmware":
            setattr(message, name, reader.enum(node, path, Firmware, "FIRMWARE_", Firmware.values))
        case "vmm":
            setattr(message, name, reader.enum(node, path, Vmm, "VMM_", Vmm.values))
        case "limit":
            limit = getattr(message, name)
            limit.SetInParent()
            for part, child in reader.mapping(node, path, _LIMIT).items():
                setattr(limit, part, reader.integer(child, f"{path}.{part}"))
