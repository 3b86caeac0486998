"""Claims: a virtual machine made through the whole platform is ready within 1.1 times what `virsh define` and `virsh
start` take with the same kernel, and within 1.1 times what a bare QEMU takes that a script starts.

From the call of CreateInstance to READY on the guest's serial line, as AttachConsole shows it; all emulated (TCG).
Ours: server, agent and console holder of the release. virsh gets a definition with the serial line and nothing else, on
the same libvirtd; QEMU runs without libvirt, on pipes. Machines are ended and removed outside the clock. Needs root,
libvirtd and QEMU (tools/setup).
"""

import os
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from measure import Reference, claim, interleave_all, publish, unmeasured
from measure_cgroups import end_tidily
from measure_vms import READY, Bare

from hvtest_guests import KERNEL_ARGS, linux_guest
from hvtest_libvirtd import PrivateLibvirtd, missing_for_libvirt
from hvtest_programs import ProgramCluster
from hvtest_vms import MEMORY_MB
from hypervisor.v1 import compute_pb2, compute_pb2_grpc, instance_pb2

PAIRS = 6
CALL_S = 120.0
NAME = "CreateInstance to READY through the platform"
REFERENCES = ("virsh define, start", "QEMU")


class Ours:
    """The platform's side."""

    def __init__(self, compute: compute_pb2_grpc.ComputeServiceStub) -> None:
        self._compute = compute

    def made(self) -> float:
        """Seconds from the call to the guest's word."""
        guest = linux_guest()
        spec = instance_pb2.InstanceSpec(
            kernel_path=str(guest.kernel),
            initrd_path=str(guest.initrd),
            kernel_args=KERNEL_ARGS,
            cpu_cores=1.0,
            memory_mb=MEMORY_MB,
        )
        draft = instance_pb2.Instance(
            name=f"b-{uuid.uuid4().hex[:12]}", type=instance_pb2.INSTANCE_TYPE_VM, spec=spec
        )
        begin = time.perf_counter()
        done = self._compute.CreateInstance(compute_pb2.CreateInstanceRequest(instance=draft), timeout=CALL_S)
        assert done.instance.status == instance_pb2.INSTANCE_STATUS_RUNNING, done
        self._until_ready(done.instance.id)
        took = time.perf_counter() - begin
        self._compute.DeleteInstance(
            compute_pb2.DeleteInstanceRequest(instance=done.instance.id, force=True), timeout=CALL_S
        )
        return took

    def _until_ready(self, instance: str) -> None:
        leaving = threading.Event()

        def looking() -> Iterator[instance_pb2.ConsoleInput]:
            opened = instance_pb2.ConsoleInput.Open(instance=instance, read_only=True, replay_bytes=-1)
            yield instance_pb2.ConsoleInput(open=opened)
            leaving.wait()

        seen = b""
        call = self._compute.AttachConsole(looking(), timeout=CALL_S)
        try:
            while READY not in seen:
                seen += next(call).data
        finally:
            call.cancel()
            leaving.set()


def main() -> None:
    """Measure and publish."""
    end_tidily()
    missing = missing_for_libvirt()
    if missing:
        why = f"needs {', '.join(missing)}"
        publish(
            [
                unmeasured(NAME, reference_name=reference, better="less", goal=1.1, why=why)
                for reference in REFERENCES
            ]
        )
        return
    guest = linux_guest()
    directory = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    try:
        with PrivateLibvirtd(directory) as libvirtd:
            keys = {
                "drivers.enabled": "container,vm",
                "machines.roots": f"{guest.kernel.parent},{guest.initrd.parent}",
                "libvirt.uri": libvirtd.uri,
                "libvirt.data_dir": str(libvirtd.directory / "data"),
            }
            root = Path(os.environ["HYPERVISOR_BIN"]).parent
            with ProgramCluster(root, agent_keys=keys) as cluster, cluster.channel() as channel:
                ours, bare = Ours(cluster.compute(channel)), Bare(libvirtd)
                figures, *theirs = interleave_all((ours.made, bare.virsh, bare.qemu), pairs=PAIRS)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    publish(
        [
            claim(
                NAME,
                figures,
                their,
                unit="s",
                reference_name=reference,
                better="less",
                goal=1.1,
                against=Reference.PEER,
            )
            for their, reference in zip(theirs, REFERENCES, strict=True)
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
