"""The control plane on etcd, and etcd away for a while: reads go on and say so, writes are refused, guests run on."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from hvtest_containerd import eventually
from hvtest_etcd import EtcdServer
from hvtest_programs import ProgramCluster
from hypervisor.v1 import compute_pb2, instance_pb2

SMALL = ("--cpu", "0.1", "--memory", "32MiB")


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(release: Path, etcd: EtcdServer) -> Iterator[ProgramCluster]:
    keys = {
        "store.backend": "etcd",
        "etcd.endpoints": etcd.endpoint,
        "etcd.dial_timeout": "1s",
        "store.request_timeout": "2s",
        "heartbeat.timeout": "15s",
    }
    with ProgramCluster(release, server_keys=keys) as running:
        yield running


def test_a_store_outage_is_survived_and_told(cluster: ProgramCluster, etcd: EtcdServer, image: str) -> None:
    cluster.must("instance", "create", "kept", "--image", image, *SMALL, "--", "sleep", "600")
    rows = cluster.containerd.ctr("tasks", "ls").stdout.splitlines()[1:]
    pid = rows[0].split()[1]

    etcd.kill()
    with cluster.channel() as channel:
        compute = cluster.compute(channel)

        def stale() -> bool:
            return compute.ListInstances(compute_pb2.ListInstancesRequest(), timeout=5).stale

        eventually(stale, what="lists say that they are stale", timeout_s=20)
        spec = instance_pb2.InstanceSpec(image=image, cpu_cores=0.1, memory_mb=16)
        draft = instance_pb2.Instance(name="late", type=instance_pb2.INSTANCE_TYPE_CONTAINER, spec=spec)
        with pytest.raises(grpc.RpcError) as caught:
            compute.CreateInstance(compute_pb2.CreateInstanceRequest(instance=draft), timeout=30)
    failure = caught.value
    assert failure.code() is grpc.StatusCode.UNAVAILABLE
    details = dict(failure.trailing_metadata())["grpc-status-details-bin"]
    kinds = [detail.type_url for detail in status_pb2.Status.FromString(details).details]
    assert any(kind.endswith(error_details_pb2.RetryInfo.DESCRIPTOR.full_name) for kind in kinds)
    assert cluster.instance("kept")["status"] == "INSTANCE_STATUS_RUNNING"
    assert Path(f"/proc/{pid}").exists()

    etcd.start()
    eventually(
        lambda: cluster.must("cluster", "info", "-o", "json").json().get("store_available") is not False,
        what="the store is available again",
        timeout_s=30,
    )
    cluster.wait_ready()
    eventually(
        lambda: (
            cluster.ctl("instance", "create", "after", "--image", image, *SMALL, "--", "sleep", "60").code
            == 0
        ),
        what="creates work again",
        timeout_s=30,
    )
    listed = {i["name"]: i["status"] for i in cluster.must("instance", "list", "-o", "json").json()}
    assert listed == {"kept": "INSTANCE_STATUS_RUNNING", "after": "INSTANCE_STATUS_RUNNING"}
    assert Path(f"/proc/{pid}").exists()

    cluster.must("instance", "delete", "kept", "after", "--force")
    cluster.assert_nothing_left()
