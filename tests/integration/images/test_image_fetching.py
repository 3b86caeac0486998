"""Images from the import to the instance: a whole server, whole agents, the fake driver, real HTTP that breaks."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from hvtest_control_plane import until
from hvtest_etcd import EtcdServer, free_port, require_etcd
from hvtest_images import Uploader, bzimage, elf, eventually, initrd, oci_archive, qcow2, raw_disk, sha256_of
from hvtest_tcp_proxy import TcpProxy
from hvtest_whole_cluster import WholeServer, container, failure_of, whole_agent, whole_server
from hypervisor.core.errors import HypervisorError, InvalidArgument
from hypervisor.v1 import cluster_pb2, compute_pb2, image_pb2, instance_pb2, operation_pb2

RUNNING = instance_pb2.INSTANCE_STATUS_RUNNING
DISK = qcow2(padding=200_000)
LARGE = raw_disk(sectors=16_000)
"""Eight megabytes."""


def machine(name: str = "vm", **spec: str) -> compute_pb2.CreateInstanceRequest:
    """A small virtual machine."""
    request = container(name)
    request.instance.type = instance_pb2.INSTANCE_TYPE_VM
    request.instance.spec.image = ""
    request.instance.spec.MergeFrom(instance_pb2.InstanceSpec(**spec))  # type: ignore[arg-type]
    return request


def given(directory: Path, instance_id: str) -> dict[str, Any]:
    """The images that the fake driver was given for an instance, by name."""
    record = json.loads((directory / "node-1" / "fake" / f"{instance_id}.json").read_bytes())
    images: dict[str, Any] = record["assignment"]["images"]
    return images


def file_of(directory: Path, instance_id: str, name: str) -> Path:
    """The file of one of them."""
    return Path(given(directory, instance_id)[name]["path"])


def content_of(directory: Path, instance_id: str, name: str) -> bytes:
    return file_of(directory, instance_id, name).read_bytes()


def cached(directory: Path) -> list[str]:
    """Digests of the content that the node keeps."""
    return sorted(p.name for p in (directory / "node-1" / "images" / "sha256").glob("*/*"))


def links(directory: Path) -> list[Path]:
    """Files of instances."""
    return sorted((directory / "node-1" / "images" / "instances").glob("*/*"))


async def refused(call: object) -> HypervisorError:
    with pytest.raises(grpc.RpcError) as caught:
        await call  # type: ignore[misc]
    return failure_of(caught.value)


@asynccontextmanager
async def proxied_server(directory: Path, *overrides: str) -> AsyncIterator[tuple[WholeServer, TcpProxy]]:
    """A server whose content is fetched through a proxy."""
    async with (
        TcpProxy(1) as proxy,
        whole_server(directory, f"server.advertise_http_address={proxy.endpoint}", *overrides) as server,
    ):
        proxy.redirect(int(server.addresses.http.rpartition(":")[2]))
        yield server, proxy


async def test_a_machine_is_given_its_images_as_files(tmp_path: Path) -> None:
    contents = {"debian-12": DISK, "linux": bzimage(), "ramdisk": initrd()}
    async with whole_server(tmp_path) as server, whole_agent(server, tmp_path):
        uploader = Uploader(server)
        for name, data in contents.items():
            await uploader.send(data, name=name)

        done = await server.compute.CreateInstance(
            machine(image="debian-12", kernel_path="image:linux", initrd_path="image:ramdisk")
        )

        assert done.instance.status == RUNNING
        images = given(tmp_path, done.object_id)
        assert {name: image["format"] for name, image in images.items()} == {
            "debian-12": "qcow2",
            "linux": "bzimage",
            "ramdisk": "cpio",
        }
        for name, data in contents.items():
            assert content_of(tmp_path, done.object_id, name) == data


async def test_a_container_is_given_an_archive_which_goes_once_it_is_unpacked(tmp_path: Path) -> None:
    archive = oci_archive()
    async with whole_server(tmp_path) as server, whole_agent(server, tmp_path):
        await Uploader(server).send(archive, name="web")
        request = container("c")
        request.instance.spec.image = "image:web"

        done = await server.compute.CreateInstance(request)

        assert given(tmp_path, done.object_id)["web"]["sha256"] == sha256_of(archive)
        assert cached(tmp_path) == [sha256_of(archive)]
        assert links(tmp_path) == []


async def test_an_image_in_use_is_not_deleted_unless_forced_and_instances_keep_it(tmp_path: Path) -> None:
    async with whole_server(tmp_path) as server, whole_agent(server, tmp_path):
        uploader = Uploader(server)
        await uploader.send(DISK)
        done = await server.compute.CreateInstance(machine(image="image:debian-12"))
        delete = image_pb2.DeleteImageRequest(image="debian-12")

        error = await refused(uploader.stub.DeleteImage(delete))
        kept = await uploader.stub.GetImage(image_pb2.GetImageRequest(image="debian-12"))
        assert (type(error).__name__, error.reason) == ("FailedPrecondition", "IMAGE_IN_USE")
        assert error.metadata["instances"] == "vm"
        assert kept.state == image_pb2.IMAGE_STATE_READY

        delete.force = True
        assert (await uploader.stub.DeleteImage(delete)).done
        assert content_of(tmp_path, done.object_id, "debian-12") == DISK
        again = await refused(server.compute.CreateInstance(machine("other", image="image:debian-12")))
        assert again.reason == "IMAGE_NOT_FOUND"


async def test_a_deleted_instance_lets_go_of_its_images(tmp_path: Path) -> None:
    async with whole_server(tmp_path) as server, whole_agent(server, tmp_path):
        uploader = Uploader(server)
        await uploader.send(DISK)
        await server.compute.CreateInstance(machine(image="debian-12"))
        assert len(links(tmp_path)) == 1

        await server.compute.DeleteInstance(compute_pb2.DeleteInstanceRequest(instance="vm", force=True))

        assert links(tmp_path) == []
        assert cached(tmp_path) == [sha256_of(DISK)]
        assert (await uploader.stub.DeleteImage(image_pb2.DeleteImageRequest(image="debian-12"))).done


async def test_a_create_that_fails_on_the_node_lets_go_of_its_images(tmp_path: Path) -> None:
    async with whole_server(tmp_path) as server, whole_agent(server, tmp_path) as agent:
        await Uploader(server).send(DISK)
        agent.driver.faults.fail("create", InvalidArgument("no such machine", reason="NO"))

        error = await refused(server.compute.CreateInstance(machine(image="debian-12")))

        assert error.reason == "NO"
        assert links(tmp_path) == []
        assert cached(tmp_path) == [sha256_of(DISK)]


async def test_a_cut_in_the_middle_is_gone_on_from(tmp_path: Path) -> None:
    async with proxied_server(tmp_path) as (server, proxy), whole_agent(server, tmp_path):
        await Uploader(server).send(LARGE, name="large")
        proxy.cut_after_answers(3_000_000, 1_000_000)

        done = await server.compute.CreateInstance(machine(image="large"))

        assert content_of(tmp_path, done.object_id, "large") == LARGE
        assert proxy.accepted == 3


async def test_a_server_that_lost_the_content_fails_the_create_and_nothing_is_left(tmp_path: Path) -> None:
    async with whole_server(tmp_path) as server, whole_agent(server, tmp_path):
        made = await Uploader(server).send(DISK)
        os.unlink(tmp_path / "images" / "sha256" / made.sha256[:2] / made.sha256)

        error = await refused(server.compute.CreateInstance(machine(image="debian-12")))

        # Whether the server has noticed by itself yet, or is asked for it in vain.
        assert error.reason in ("IMAGE_FETCH_FAILED", "IMAGE_NOT_FOUND")
        listed = await server.compute.ListInstances(compute_pb2.ListInstancesRequest())
        assert list(listed.instances) == []
        assert links(tmp_path) == []


async def test_a_server_whose_content_was_damaged_fails_the_create(tmp_path: Path) -> None:
    async with whole_server(tmp_path) as server, whole_agent(server, tmp_path):
        made = await Uploader(server).send(DISK)
        path = tmp_path / "images" / "sha256" / made.sha256[:2] / made.sha256
        path.chmod(0o644)
        path.write_bytes(bytes(len(DISK)))

        error = await refused(server.compute.CreateInstance(machine(image="debian-12")))

        assert (type(error).__name__, error.reason) == ("FailedPrecondition", "IMAGE_CORRUPT")
        assert cached(tmp_path) == []


async def test_a_delete_does_not_wait_for_images_of_a_create_that_it_ends(tmp_path: Path) -> None:
    async with proxied_server(tmp_path) as (server, proxy), whole_agent(server, tmp_path):
        await Uploader(server).send(LARGE, name="large")
        proxy.delay_s = 0.2
        request = machine(image="large")
        request.no_wait = True
        begun = await server.compute.CreateInstance(request)
        partial = tmp_path / "node-1" / "images" / "partial" / sha256_of(LARGE)
        await until(lambda: partial.exists() and partial.stat().st_size > 0)

        async with asyncio.timeout(4):
            await server.operations.CancelOperation(operation_pb2.CancelOperationRequest(operation=begun.id))
            ended = await server.operations.WaitOperation(
                operation_pb2.WaitOperationRequest(operation=begun.id)
            )

        assert ended.done
        assert ended.error.message
        assert links(tmp_path) == []
        listed = await server.compute.ListInstances(compute_pb2.ListInstancesRequest())
        assert list(listed.instances) == []
        # The next one goes on with what came.
        proxy.delay_s = 0.0
        done = await server.compute.CreateInstance(machine("again", image="large"))
        assert content_of(tmp_path, done.object_id, "large") == LARGE


class AgentProcess:
    """``hypervisor-agent`` with the fake driver, as a process that can be killed."""

    def __init__(self, directory: Path, server: WholeServer) -> None:
        self._directory = directory
        self._server = server
        # The same again: the server would take another one for another agent, while the first may be alive.
        self._port = free_port()
        self._process: asyncio.subprocess.Process | None = None
        self.log = directory / "agent.log"

    async def start(self) -> None:
        settings: Mapping[str, str] = {
            "agent.data_dir": str(self._directory / "node-1"),
            "agent.server_address": self._server.addresses.grpc,
            "agent.port": str(self._port),
            "drivers.enabled": "fake",
            "metrics.address": "127.0.0.1:0",
            "console.holder": "embedded",
            "node.hostname": "node-1",
            "log.format": "json",
        }
        flags = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        env = {k: v for k, v in os.environ.items() if not k.startswith("HYPERVISOR_")}
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "hypervisor.agent", *flags, stderr=log, env=env
            )

    async def end(self, number: int = signal.SIGKILL) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)
            await self._process.wait()

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [event for event in found if event.get("event") == name]


async def test_an_agent_killed_during_a_fetch_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    async with proxied_server(tmp_path, "heartbeat.timeout=20s") as (server, proxy):
        await Uploader(server).send(LARGE, name="large")
        agent = AgentProcess(tmp_path, server)
        partial = tmp_path / "node-1" / "images" / "partial" / sha256_of(LARGE)
        try:
            await agent.start()

            async def ready() -> bool:
                nodes = await server.cluster.ListNodes(cluster_pb2.ListNodesRequest())
                return any(driver.available for node in nodes.nodes for driver in node.drivers)

            await eventually(ready, timeout_s=20)
            proxy.delay_s = 0.05
            creating = asyncio.ensure_future(server.compute.CreateInstance(machine(image="large")))
            await until(lambda: partial.exists() and partial.stat().st_size > 1_000_000)
            await agent.end()
            received = partial.stat().st_size
            assert received < len(LARGE)
            proxy.delay_s = 0.0
            await agent.start()

            async with asyncio.timeout(30):
                done = await creating

            assert done.instance.status == RUNNING
            assert [event["received"] for event in agent.events("image_fetch_resumed")] == [received]
            assert content_of(tmp_path, done.object_id, "large") == LARGE
            assert len(links(tmp_path)) == 1
        finally:
            await agent.end()


async def test_an_agent_killed_and_started_again_keeps_the_images_of_its_instances(tmp_path: Path) -> None:
    async with whole_server(tmp_path, "heartbeat.timeout=20s") as server:
        await Uploader(server).send(DISK)
        async with whole_agent(server, tmp_path):
            done = await server.compute.CreateInstance(machine(image="debian-12"))
        path = file_of(tmp_path, done.object_id, "debian-12")
        async with whole_agent(server, tmp_path):
            assert path.read_bytes() == DISK
            assert links(tmp_path) == [path]


async def test_every_server_gets_every_image_and_one_of_them_is_enough(tmp_path: Path) -> None:
    require_etcd()
    (tmp_path / "etcd").mkdir()
    with EtcdServer(tmp_path / "etcd") as etcd:
        store = ("store.backend=etcd", f"etcd.endpoints={etcd.endpoint}")
        one, two = tmp_path / "one", tmp_path / "two"
        async with whole_server(two, f"image_store.dir={two}", *store) as second:
            async with whole_server(one, f"image_store.dir={one}", *store) as first:
                made = await Uploader(first).send(LARGE, name="large")
                assert made.servers == [f"http://{first.addresses.http}"]
                theirs = Uploader(second)

                async def both() -> bool:
                    found = await theirs.stub.ListImages(image_pb2.ListImagesRequest())
                    return bool(found.images) and len(found.images[0].servers) == 2

                await eventually(both)

            async def alone() -> bool:
                found = await theirs.stub.GetImage(image_pb2.GetImageRequest(image="large"))
                return found.servers == [f"http://{second.addresses.http}"]

            await eventually(alone)
            async with whole_agent(second, tmp_path):
                done = await second.compute.CreateInstance(machine(image="large"))
                assert content_of(tmp_path, done.object_id, "large") == LARGE


async def test_an_image_deleted_on_one_server_goes_from_all(tmp_path: Path) -> None:
    require_etcd()
    (tmp_path / "etcd").mkdir()
    with EtcdServer(tmp_path / "etcd") as etcd:
        store = ("store.backend=etcd", f"etcd.endpoints={etcd.endpoint}")
        one, two = tmp_path / "one", tmp_path / "two"
        async with (
            whole_server(two, f"image_store.dir={two}", *store) as second,
            whole_server(one, f"image_store.dir={one}", *store) as first,
        ):
            await Uploader(first).send(elf(), name="tiny")
            await until(lambda: len(list(two.glob("sha256/*/*"))) == 1)

            await Uploader(second).stub.DeleteImage(image_pb2.DeleteImageRequest(image="tiny"))

            await until(lambda: not list(one.glob("sha256/*/*")) and not list(two.glob("sha256/*/*")))


async def test_a_node_that_has_the_image_is_preferred(tmp_path: Path) -> None:
    weights = ("scheduler.weights.image=1000", "scheduler.weights.utilisation=0")
    async with (
        whole_server(tmp_path, *weights) as server,
        whole_agent(server, tmp_path, hostname="node-1"),
        whole_agent(server, tmp_path, hostname="node-2") as second,
    ):
        await Uploader(server).send(DISK)
        there = machine("first", image="debian-12")
        there.instance.spec.node = "node-2"
        first = await server.compute.CreateInstance(there)
        await server.compute.DeleteInstance(
            compute_pb2.DeleteInstanceRequest(instance=first.object_id, force=True)
        )

        async def known() -> bool:
            asked = compute_pb2.ExplainPlacementRequest(would_be=machine(image="image:debian-12").instance)
            found = await server.compute.ExplainPlacement(asked)
            parts = {node.hostname: {p.name: p.value for p in node.parts} for node in found.nodes}
            return parts["node-2"]["image"] == 1000 and parts["node-1"]["image"] == 0

        await eventually(known)
        for number in range(5):
            made = await server.compute.CreateInstance(machine(f"vm-{number}", image="debian-12"))
            assert made.instance.node_id == second.node_id
