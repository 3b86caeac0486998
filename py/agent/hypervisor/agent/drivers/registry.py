"""Which drivers there are: one visible table of ours, and those of other packages by entry point.

An entry point of the group ``hypervisor.drivers`` names a :class:`DriverFactory`. A driver that cannot be made says
why, at start-up and in the node's DriverInfo, and the others go on.
"""

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import structlog

from hypervisor.agent.config import ContainerdSection
from hypervisor.agent.config_machines import LibvirtSection, MachinesSection, MicrovmSection
from hypervisor.agent.drivers.driver import Driver
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.agent.drivers.guard import DriverDeadlines, GuardedDriver
from hypervisor.agent.drivers.health import OfferedDriver
from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, Unavailable
from hypervisor.core.ids import IdSource
from hypervisor.core.model import DriverInfo
from hypervisor.core.states import InstanceType

__all__ = ["DRIVERS", "ENTRY_POINTS", "DriverContext", "DriverFactory", "Drivers", "make_drivers"]

ENTRY_POINTS = "hypervisor.drivers"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DriverContext:
    """What a factory gets. ``options`` is the driver's own part of the configuration, for third parties' drivers."""

    clock: Clock
    rng: random.Random
    new_id: IdSource
    data_dir: Path
    containerd: ContainerdSection
    archive_roots: tuple[Path, ...]
    machines: MachinesSection
    libvirt: LibvirtSection
    microvm: MicrovmSection
    options: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DriverFactory:
    """How a driver is made. ``make`` may raise HypervisorError when it cannot work here."""

    name: str
    types: tuple[InstanceType, ...]
    make: Callable[[DriverContext], Driver]


@dataclass(frozen=True, slots=True)
class Drivers:
    """The drivers of a node, and those it lacks with the reason."""

    offered: tuple[OfferedDriver, ...]
    missing: tuple[DriverInfo, ...]


def _make_containerd(context: DriverContext) -> Driver:
    # Imported here: containerd's API is large, and nodes without containers do not need it.
    from hypervisor.agent.drivers.containerd import ContainerdConfig, ContainerdDriver

    section = context.containerd
    config = ContainerdConfig(
        address=section.address,
        namespace=section.namespace,
        snapshotter=section.snapshotter,
        runtime=section.runtime,
        console_root=section.console_root,
        archive_roots=context.archive_roots,
    )
    return ContainerdDriver(config, clock=context.clock, rng=context.rng, new_id=context.new_id)


def _make_microvm(context: DriverContext) -> Driver:
    # Imported here: nodes without microVMs do not need an HTTP client.
    from hypervisor.agent.drivers.microvm import FirecrackerVmm, MicrovmConfig, MicrovmDriver
    from hypervisor.agent.drivers.microvm.qemu import QemuVmm
    from hypervisor.agent.drivers.microvm.qemu_command import Accelerator

    section, machines = context.microvm, context.machines
    config = MicrovmConfig(
        data_dir=section.data_dir,
        run_dir=section.run_dir,
        roots=machines.roots,
        bridges=machines.bridges,
        kernel=machines.kernel,
        vmm=section.vmm,
        probe_timeout_s=section.probe_timeout,
        jail=section.jail,
        first_uid=section.first_uid,
    )
    jailer = section.jailer if section.jail and os.geteuid() == 0 else None
    vmms = (
        FirecrackerVmm(section.firecracker, jailer=jailer, clock=context.clock),
        QemuVmm(section.qemu, Accelerator.KVM, clock=context.clock),
        QemuVmm(section.qemu, Accelerator.TCG, clock=context.clock),
    )
    return MicrovmDriver(config, vmms, clock=context.clock, new_id=context.new_id)


def _make_libvirt(context: DriverContext) -> Driver:
    try:
        # Imported here: libvirt's module needs libvirt's shared library, and nodes without virtual machines have none.
        from hypervisor.agent.drivers.libvirt import LibvirtConfig, LibvirtDriver
    except ImportError as exc:
        raise Unavailable(
            f"libvirt's library is not on this node ({exc}): install it (Debian: apt-get install libvirt0 "
            "libvirt-daemon-system qemu-system-x86 qemu-utils) and restart the agent",
            reason="DRIVER_UNAVAILABLE",
        ) from exc

    config = LibvirtConfig(
        uri=context.libvirt.uri,
        data_dir=context.libvirt.data_dir,
        qemu_logs=context.libvirt.qemu_logs,
        roots=context.machines.roots,
        bridges=context.machines.bridges,
        host_devices=context.machines.host_devices,
    )
    return LibvirtDriver(config, clock=context.clock, rng=context.rng)


def _make_fake(context: DriverContext) -> Driver:
    return FakeDriver(FakeConfig(state_dir=context.data_dir / "fake"), clock=context.clock)


DRIVERS: Mapping[str, DriverFactory] = {
    "containerd": DriverFactory("containerd", (InstanceType.CONTAINER,), _make_containerd),
    "microvm": DriverFactory("microvm", (InstanceType.MICROVM,), _make_microvm),
    "fake": DriverFactory("fake", tuple(InstanceType), _make_fake),
    "libvirt": DriverFactory("libvirt", (InstanceType.VM,), _make_libvirt),
}
"""Drivers of this package."""

_BY_TYPE: Mapping[str, str] = {"container": "containerd", "vm": "libvirt", "microvm": "microvm"}
"""Which of them ``drivers.enabled`` means by an instance type."""


def make_drivers(
    enabled: Sequence[str],
    context: DriverContext,
    *,
    deadlines: DriverDeadlines,
    table: Mapping[str, DriverFactory] = DRIVERS,
    third_party: Iterable[EntryPoint] | None = None,
) -> Drivers:
    """The drivers of ``drivers.enabled``: instance types (vm, container, microvm) or names of drivers.

    A type that an earlier driver of the list runs already is not given to a later one.
    """
    found = {
        entry.name: entry
        for entry in (entry_points(group=ENTRY_POINTS) if third_party is None else third_party)
    }
    offered: list[OfferedDriver] = []
    missing: list[DriverInfo] = []
    taken: set[InstanceType] = set()
    for word in dict.fromkeys(enabled):
        name = _BY_TYPE.get(word, word)
        try:
            factory = table[name] if name in table else _load(found, name)
            driver = factory.make(context)
        except HypervisorError as exc:
            missing.append(_failed(table.get(name), name, exc.message))
            continue
        except Exception as exc:
            # A plug-in boundary: whatever a factory does wrong, the node's other drivers go on.
            _log.exception("driver_not_made", driver=name)
            missing.append(_failed(table.get(name), name, f"it could not be made: {exc}"))
            continue
        types = tuple(kind for kind in factory.types if kind not in taken)
        taken.update(types)
        offered.append(OfferedDriver(GuardedDriver(driver, deadlines=deadlines), types))
    return Drivers(tuple(offered), tuple(missing))


def _load(found: Mapping[str, EntryPoint], name: str) -> DriverFactory:
    if name not in found:
        raise LookupError(
            f"no driver is named {name}: drivers.enabled takes vm, container, microvm, fake"
            + "".join(f", {other}" for other in sorted(found))
        )
    factory = found[name].load()
    if not isinstance(factory, DriverFactory):
        raise TypeError(f"the entry point {found[name].value} is no DriverFactory")
    return factory


def _failed(factory: DriverFactory | None, name: str, reason: str) -> DriverInfo:
    return DriverInfo(
        name=name, types=factory.types if factory is not None else (), available=False, reason=reason
    )
