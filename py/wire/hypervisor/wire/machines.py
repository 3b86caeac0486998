"""What only machines have in their specification, and snapshots, on the wire."""

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.machines import (
    CloudInit,
    Firmware,
    MicrovmOptions,
    NetworkInterface,
    RateLimit,
    Snapshot,
    SnapshotKind,
    VmmChoice,
    VmOptions,
)
from hypervisor.v1 import instance_pb2
from hypervisor.wire.enums import FIRMWARE, SNAPSHOT_KIND, VMM
from hypervisor.wire.times import datetime_of, timestamp_of

__all__ = [
    "cloud_init_from_wire",
    "cloud_init_to_wire",
    "microvm_from_wire",
    "microvm_to_wire",
    "network_from_wire",
    "network_to_wire",
    "snapshot_from_wire",
    "snapshot_to_wire",
    "vm_from_wire",
    "vm_to_wire",
]


def cloud_init_to_wire(cloud_init: CloudInit | None) -> instance_pb2.CloudInit | None:
    """What cloud-init is told; None stays None."""
    if cloud_init is None:
        return None
    return instance_pb2.CloudInit(
        hostname=cloud_init.hostname,
        ssh_authorized_keys=cloud_init.ssh_authorized_keys,
        user_data=cloud_init.user_data,
        network_config=cloud_init.network_config,
    )


def cloud_init_from_wire(spec: instance_pb2.InstanceSpec) -> CloudInit | None:
    """Of a specification; None where it has none."""
    if not spec.HasField("cloud_init"):
        return None
    found = spec.cloud_init
    return CloudInit(
        hostname=found.hostname,
        ssh_authorized_keys=tuple(found.ssh_authorized_keys),
        user_data=found.user_data,
        network_config=found.network_config,
    )


def network_to_wire(network: NetworkInterface) -> instance_pb2.NetworkInterface:
    """A network card."""
    return instance_pb2.NetworkInterface(bridge=network.bridge, mac=network.mac)


def network_from_wire(network: instance_pb2.NetworkInterface) -> NetworkInterface:
    """A network card."""
    return NetworkInterface(bridge=network.bridge, mac=network.mac)


def vm_to_wire(vm: VmOptions | None) -> instance_pb2.VmOptions | None:
    """What only virtual machines have."""
    if vm is None:
        return None
    return instance_pb2.VmOptions(
        firmware=FIRMWARE.to_wire(vm.firmware),
        host_devices=vm.host_devices,
        max_cpus=vm.max_cpus,
        max_memory_mb=vm.max_memory_mb,
    )


def vm_from_wire(spec: instance_pb2.InstanceSpec) -> VmOptions | None:
    """Of a specification; None where it has none."""
    if not spec.HasField("vm"):
        return None
    return VmOptions(
        firmware=FIRMWARE.from_wire(spec.vm.firmware) or Firmware.BIOS,
        host_devices=tuple(spec.vm.host_devices),
        max_cpus=spec.vm.max_cpus,
        max_memory_mb=spec.vm.max_memory_mb,
    )


def microvm_to_wire(microvm: MicrovmOptions | None) -> instance_pb2.MicrovmOptions | None:
    """What only microVMs have."""
    if microvm is None:
        return None
    return instance_pb2.MicrovmOptions(
        vmm=VMM.to_wire(microvm.vmm),
        metadata=microvm.metadata,
        vsock=microvm.vsock,
        balloon=microvm.balloon,
        disk_limit=_limit_to_wire(microvm.disk_limit),
        network_limit=_limit_to_wire(microvm.network_limit),
    )


def microvm_from_wire(spec: instance_pb2.InstanceSpec) -> MicrovmOptions | None:
    """Of a specification; None where it has none."""
    if not spec.HasField("microvm"):
        return None
    found = spec.microvm
    return MicrovmOptions(
        vmm=VMM.from_wire(found.vmm) or VmmChoice.AUTO,
        metadata=found.metadata,
        vsock=found.vsock,
        balloon=found.balloon,
        disk_limit=_limit_from_wire(found.disk_limit) if found.HasField("disk_limit") else None,
        network_limit=_limit_from_wire(found.network_limit) if found.HasField("network_limit") else None,
    )


def snapshot_to_wire(snapshot: Snapshot) -> instance_pb2.Snapshot:
    """A snapshot."""
    return instance_pb2.Snapshot(
        name=snapshot.name,
        created_at=timestamp_of(snapshot.created_at),
        kind=SNAPSHOT_KIND.to_wire(snapshot.kind),
        parent=snapshot.parent,
        memory=snapshot.memory,
        current=snapshot.current,
        size_bytes=snapshot.size_bytes,
    )


def snapshot_from_wire(snapshot: instance_pb2.Snapshot) -> Snapshot:
    """A snapshot. InvalidArgument where it has no time."""
    created_at = datetime_of(snapshot.created_at)
    if created_at is None:
        raise InvalidArgument.of_field("snapshots", "each needs created_at")
    return Snapshot(
        name=snapshot.name,
        created_at=created_at,
        kind=SNAPSHOT_KIND.from_wire(snapshot.kind) or SnapshotKind.FULL,
        parent=snapshot.parent,
        memory=snapshot.memory,
        current=snapshot.current,
        size_bytes=snapshot.size_bytes if snapshot.HasField("size_bytes") else None,
    )


def _limit_to_wire(limit: RateLimit | None) -> instance_pb2.RateLimit | None:
    if limit is None:
        return None
    return instance_pb2.RateLimit(
        bytes_per_second=limit.bytes_per_second, operations_per_second=limit.operations_per_second
    )


def _limit_from_wire(limit: instance_pb2.RateLimit) -> RateLimit:
    return RateLimit(
        bytes_per_second=limit.bytes_per_second, operations_per_second=limit.operations_per_second
    )
