"""A machine as Firecracker's configuration: the requests of its API that make it, in order. Pure but for one header."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hypervisor.agent.drivers.machine_files import IMAGE_INVALID
from hypervisor.agent.drivers.microvm.files import open_own
from hypervisor.agent.drivers.microvm.vmm import DISK, INITRD, KERNEL, Machine
from hypervisor.core.errors import InvalidArgument
from hypervisor.core.machines import RateLimit

__all__ = ["METRICS", "VSOCK", "check", "metadata", "rate_limiter", "requests"]

METRICS = "metrics"
VSOCK = "vsock.sock"

_GUEST_CID = 3
_MAX_VCPUS = 32
_MIN_MEMORY_MIB = 32
_MAX_ARGS_BYTES = 1800
"""Firecracker adds a word for each device, and the kernel takes 2,048 bytes."""
_ARGS = "console=ttyS0 reboot=k panic=1 pci=off"
_ELF_X86_64 = (b"\x7fELF\x02\x01", b"\x3e\x00")


def check(machine: Machine, root: Path) -> None:
    """Refuse what Firecracker cannot run; InvalidArgument names the field."""
    if machine.vcpus > _MAX_VCPUS:
        raise InvalidArgument.of_field(
            "spec.cpu_cores",
            f"Firecracker gives a guest at most {_MAX_VCPUS} processors, not {machine.vcpus}",
        )
    if machine.memory_mib < _MIN_MEMORY_MIB:
        raise InvalidArgument.of_field(
            "spec.memory_mb",
            f"a guest of Firecracker needs at least {_MIN_MEMORY_MIB} MiB, not {machine.memory_mib}",
        )
    if len(machine.kernel_args.encode()) > _MAX_ARGS_BYTES:
        raise InvalidArgument.of_field(
            "spec.kernel_args", f"Firecracker takes at most {_MAX_ARGS_BYTES} bytes of them: shorten them"
        )
    options = machine.options
    if options.metadata:
        if not machine.cards:
            raise InvalidArgument.of_field(
                "spec.microvm.metadata",
                "the metadata service is reached by a network card: add one to spec.networks",
            )
        try:
            wrong = not isinstance(json.loads(options.metadata), dict)
        except (ValueError, RecursionError):
            wrong = True
        if wrong:
            raise InvalidArgument.of_field("spec.microvm.metadata", "it is no JSON object")
    _check_kernel(root / KERNEL)


def _check_kernel(path: Path) -> None:
    with open(open_own(path), "rb") as file:
        head = file.read(0x206)
    if head[:6] == _ELF_X86_64[0] and head[18:20] == _ELF_X86_64[1]:
        return
    what = "a compressed kernel (bzImage)" if head[0x202:0x206] == b"HdrS" else "no kernel for x86-64"
    raise InvalidArgument.of_field(
        "spec.kernel_path",
        f"it is {what}; Firecracker boots an uncompressed one (ELF, vmlinux): extract it with the kernel's "
        "scripts/extract-vmlinux, or set spec.microvm.vmm to qemu",
        reason=IMAGE_INVALID,
    )


def requests(machine: Machine, *, fresh: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Paths and bodies of the PUT requests before a start; not ``fresh``: before a state is loaded, which has the
    devices."""
    yield "/metrics", {"metrics_path": METRICS}
    if not fresh:
        return
    options = machine.options
    yield (
        "/machine-config",
        {
            "vcpu_count": machine.vcpus,
            "mem_size_mib": machine.memory_mib,
            "track_dirty_pages": machine.track_changes,
        },
    )
    source: dict[str, Any] = {
        "kernel_image_path": KERNEL,
        "boot_args": f"{_ARGS} {machine.kernel_args}".strip(),
    }
    if machine.initrd:
        source["initrd_path"] = INITRD
    yield "/boot-source", source
    if machine.disk:
        yield (
            "/drives/root",
            {
                "drive_id": "root",
                "path_on_host": DISK,
                "is_root_device": True,
                "is_read_only": False,
                "cache_type": "Writeback",
                **_limited("rate_limiter", options.disk_limit),
            },
        )
    for index, card in enumerate(machine.cards):
        yield (
            f"/network-interfaces/eth{index}",
            {
                "iface_id": f"eth{index}",
                "host_dev_name": card.tap,
                "guest_mac": card.mac,
                **_limited("rx_rate_limiter", options.network_limit),
                **_limited("tx_rate_limiter", options.network_limit),
            },
        )
    if options.vsock:
        yield "/vsock", {"guest_cid": _GUEST_CID, "uds_path": VSOCK}
    if options.balloon:
        yield "/balloon", {"amount_mib": 0, "deflate_on_oom": True, "stats_polling_interval_s": 0}
    yield "/entropy", {}
    told = metadata(machine)
    if told is not None:
        interfaces = [f"eth{index}" for index in range(len(machine.cards))]
        yield "/mmds/config", {"version": "V2", "network_interfaces": interfaces}
        yield "/mmds", told


def metadata(machine: Machine) -> Mapping[str, Any] | None:
    """What the metadata service tells, if there is one."""
    if not machine.options.metadata or not machine.cards:
        return None
    told: dict[str, Any] = json.loads(machine.options.metadata)
    return told


def rate_limiter(limit: RateLimit) -> dict[str, Any]:
    """Token buckets that are filled up once a second."""
    limiter: dict[str, Any] = {}
    if limit.bytes_per_second:
        limiter["bandwidth"] = {"size": limit.bytes_per_second, "refill_time": 1000}
    if limit.operations_per_second:
        limiter["ops"] = {"size": limit.operations_per_second, "refill_time": 1000}
    return limiter


def _limited(name: str, limit: RateLimit | None) -> dict[str, Any]:
    limiter = {} if limit is None else rate_limiter(limit)
    return {name: limiter} if limiter else {}
