"""Giving a virtual machine more or less memory and processors: at rest by its definition, while it runs by hot-plug.

While it runs, memory goes by the balloon, up to the maximum that it was started with; processors are plugged in up to
theirs, and out again where its guest lets them go.
"""

from typing import Any
from xml.etree import ElementTree

import libvirt

from hypervisor.agent.drivers.libvirt.machines import Machines
from hypervisor.agent.drivers.libvirt.observing import Phase
from hypervisor.agent.drivers.libvirt.tracking import Tracker
from hypervisor.agent.drivers.uninterrupted import uninterrupted
from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.model import Observation, Sizes

__all__ = ["Resizing", "resized"]

_PERIOD_US = 100_000
_KIB = 1024
_NOW_AND_LATER = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG


class Resizing:
    """The power ``Updating`` of the driver, with the instance's lock held by its method itself."""

    def __init__(self, tracker: Tracker, machines: Machines) -> None:
        self._tracker = tracker
        self._machines = machines

    async def update(self, instance_id: str, sizes: Sizes) -> Observation:
        """See ``Updating``."""
        async with self._tracker.locks.hold(instance_id):
            found = await self._tracker.find(instance_id)
            kept = await self._machines.with_domain(
                instance_id, f"list the snapshots of {instance_id}", lambda domain: domain.snapshotNum(0)
            )
            if kept:
                raise _refused(instance_id, "its snapshots have the sizes it has now: delete them first")
            if found.state.saved:
                raise _refused(instance_id, "its memory is on disk: start it, and stop it, first")
            change = _at_rest if found.state.phase is Phase.OFF else _running
            await uninterrupted(
                self._machines.with_domain(
                    instance_id,
                    f"change the sizes of {instance_id}",
                    lambda domain: change(domain, instance_id, sizes),
                )
            )
            return await self._tracker.told(instance_id)


def resized(document: str, sizes: Sizes) -> str:
    """The definition with the sizes; maxima grow where they have to. Pure."""
    root = ElementTree.fromstring(document)
    memory_kib = sizes.memory_mb * _KIB
    for name, at_least in (("memory", True), ("currentMemory", False)):
        element = root.find(name)
        if element is None:
            element = ElementTree.SubElement(root, name)
        known = int(element.text or 0) if at_least else 0
        element.text, element.attrib["unit"] = str(max(known, memory_kib)), "KiB"
    vcpus = _vcpus(sizes)
    processors = root.find("vcpu")
    if processors is None:
        processors = ElementTree.SubElement(root, "vcpu")
    processors.text = str(max(vcpus, int(processors.text or 1)))
    processors.set("current", str(vcpus))
    tuning = root.find("cputune")
    if tuning is None:
        tuning = ElementTree.SubElement(root, "cputune")
    for name, value in _quota(sizes).items():
        element = tuning.find(name)
        if element is None:
            element = ElementTree.SubElement(tuning, name)
        element.text = str(value)
    return ElementTree.tostring(root, encoding="unicode")


def _at_rest(domain: Any, instance_id: str, sizes: Sizes) -> None:
    # As libvirt prints it, amounts of memory are in KiB.
    document = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    domain.connect().defineXMLFlags(resized(document, sizes), libvirt.VIR_DOMAIN_DEFINE_VALIDATE)


def _running(domain: Any, instance_id: str, sizes: Sizes) -> None:
    vcpus, most = _vcpus(sizes), domain.maxVcpus()
    if vcpus > most:
        raise _refused(
            instance_id, f"it was started with at most {most} processors (spec.vm.max_cpus): stop it first"
        )
    memory_kib, most_kib = sizes.memory_mb * _KIB, domain.maxMemory()
    if memory_kib > most_kib:
        raise _refused(
            instance_id,
            f"it was started with at most {most_kib // _KIB} MiB of memory (spec.vm.max_memory_mb): stop it first",
        )
    before_kib = domain.info()[2]
    domain.setMemoryFlags(memory_kib, _NOW_AND_LATER)
    try:
        if vcpus != domain.vcpusFlags(libvirt.VIR_DOMAIN_AFFECT_LIVE):
            domain.setVcpusFlags(vcpus, _NOW_AND_LATER)
        # One after the other: libvirt-python first asks for what there is, which it can do for one of them alone.
        for where in (libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG):
            domain.setSchedulerParametersFlags(_quota(sizes), where)
    except libvirt.libvirtError as exc:
        domain.setMemoryFlags(before_kib, _NOW_AND_LATER)
        raise _refused(
            instance_id, f"its guest did not go along ({exc.get_error_message()}): stop it first"
        ) from exc


def _vcpus(sizes: Sizes) -> int:
    return max(1, -(-sizes.cpu_millis // 1000))


def _quota(sizes: Sizes) -> dict[str, int]:
    """What all its processors together may use; no limit (-1, for libvirt) where that is all they have."""
    whole = sizes.cpu_millis >= _vcpus(sizes) * 1000
    return {
        "global_period": _PERIOD_US,
        "global_quota": -1 if whole else sizes.cpu_millis * _PERIOD_US // 1000,
    }


def _refused(instance_id: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"instance {instance_id} cannot be given other sizes now: {why}",
        reason="UPDATE_REFUSED",
        metadata={"instance_id": instance_id},
    )
