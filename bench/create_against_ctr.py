"""Claim: a container made through the whole platform runs within 1.3 times what `ctr run -d` takes for the same image.

Reference: `ctr run -d IMAGE NAME sleep 600` on the same containerd, from process start to its return. Ours: once as an
API call (CreateInstance, which returns when the instance runs), once as the command line. After each creation both
sides' containers are looked at and removed, outside the clock.
"""

import os
import sys
import time
import uuid
from pathlib import Path

import grpc
from measure import Reference, claim, interleave, publish

from hvtest_programs import ProgramCluster
from hypervisor.v1 import compute_pb2, compute_pb2_grpc, instance_pb2

PAIRS = 20
IMAGE = "bench.local/busybox:1"


def main() -> None:
    """Measure and publish."""
    root = Path(os.environ["HYPERVISOR_BIN"]).parent
    with ProgramCluster(root) as cluster, grpc.insecure_channel(cluster.address) as channel:
        cluster.containerd.ctr("images", "import", str(cluster.make_image(name=IMAGE)))
        compute = compute_pb2_grpc.ComputeServiceStub(channel)

        def by_api() -> float:
            name = f"b-{uuid.uuid4().hex[:12]}"
            spec = instance_pb2.InstanceSpec(
                image=IMAGE, cpu_cores=0.1, memory_mb=32, command=["sleep", "600"]
            )
            draft = instance_pb2.Instance(name=name, type=instance_pb2.INSTANCE_TYPE_CONTAINER, spec=spec)
            begin = time.perf_counter()
            done = compute.CreateInstance(compute_pb2.CreateInstanceRequest(instance=draft), timeout=60)
            took = time.perf_counter() - begin
            assert done.instance.status == instance_pb2.INSTANCE_STATUS_RUNNING, done
            compute.DeleteInstance(compute_pb2.DeleteInstanceRequest(instance=name, force=True), timeout=60)
            return took

        def by_command_line() -> float:
            name = f"b-{uuid.uuid4().hex[:12]}"
            begin = time.perf_counter()
            cluster.must(
                "instance",
                "create",
                name,
                "--image",
                IMAGE,
                "--cpu",
                "0.1",
                "--memory",
                "32MiB",
                "--",
                "sleep",
                "600",
            )
            took = time.perf_counter() - begin
            assert cluster.instance(name)["status"] == "INSTANCE_STATUS_RUNNING"
            cluster.must("instance", "delete", name, "--force")
            return took

        def by_ctr() -> float:
            name = f"c-{uuid.uuid4().hex[:12]}"
            begin = time.perf_counter()
            cluster.containerd.ctr("run", "-d", IMAGE, name, "sleep", "600")
            took = time.perf_counter() - begin
            assert "RUNNING" in cluster.containerd.ctr("tasks", "ls").stdout
            cluster.containerd.ctr("tasks", "rm", "-f", name)
            cluster.containerd.ctr("containers", "rm", name)
            return took

        claims = []
        for label, ours in (("API", by_api), ("command line", by_command_line)):
            mine, theirs = interleave(ours, by_ctr, pairs=PAIRS)
            claims.append(
                claim(
                    f"create to running, {label}",
                    mine,
                    theirs,
                    unit="s",
                    reference_name="ctr run -d",
                    better="less",
                    goal=1.3,
                    against=Reference.PEER,
                )
            )
        publish(claims)


if __name__ == "__main__":
    sys.exit(main())
