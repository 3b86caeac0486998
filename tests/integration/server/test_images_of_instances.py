"""Images and the instances that name them, over every store: what is decided when both change at the same time."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

from msgspec import structs

from hvtest_agent import MemoryAgents
from hvtest_control_plane import add_node, control_plane, draft, mutation, registration, until
from hvtest_images import bzimage, sha256_of
from hypervisor.core.errors import HypervisorError
from hypervisor.core.states import InstanceType
from hypervisor.server import keys
from hypervisor.server.control_plane import ControlPlane, ControlPlaneSettings, ImageSettings
from hypervisor.server.images.contract import Chunk, ImageRef, ImportHeader
from hypervisor.server.images.naming import fetch_allowance_s
from hypervisor.server.services import Caller, InstanceDraft, InstanceRef, StopOptions
from hypervisor.server.store.storage import Storage

KERNEL = bzimage()
ALICE = Caller("alice", "r-1")


def with_images(directory: Path) -> Callable[[ControlPlaneSettings], ControlPlaneSettings]:
    """A server with a store of images of its own."""
    return lambda settings: replace(settings, images=ImageSettings(directory))


async def import_kernel(plane: ControlPlane, name: str = "linux") -> str:
    """Import an image; its id."""

    async def chunks() -> AsyncIterator[Chunk]:
        yield Chunk(0, KERNEL)

    header = ImportHeader(
        upload_id=uuid.uuid4().hex, name=name, project="default", kind=None, size_bytes=len(KERNEL), sha256=""
    )
    return (await plane.images.upload(header, chunks(), ALICE)).value.id


def machine(name: str, image: str = "linux") -> InstanceDraft:
    order = draft(name, kernel_path=f"image:{image}")
    return replace(order, type=InstanceType.VM, spec=structs.replace(order.spec, image=""))


async def test_the_node_is_told_where_the_images_are(storage: Storage, tmp_path: Path) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents, change=with_images(tmp_path / "a")) as plane:
        plane.membership.describe(http_url="http://127.0.0.1:1", image_store=plane.image_store.id)
        async with add_node(plane, registration()) as node_id:
            image_id = await import_kernel(plane)
            created = await plane.instances.create(machine("vm"), mutation())

            (source,) = agents.by_node[node_id].images[created.value.object_id]
            instance = plane.instances.resolve(InstanceRef("vm")).value
            assert (source.name, source.sha256, source.size_bytes) == (
                "linux",
                sha256_of(KERNEL),
                len(KERNEL),
            )
            assert instance.images == {"linux": image_id}


async def test_a_create_is_given_time_for_the_images_it_may_have_to_fetch(
    storage: Storage, tmp_path: Path
) -> None:
    async with control_plane(storage, MemoryAgents(), change=with_images(tmp_path / "a")) as plane:
        await import_kernel(plane)

        assert fetch_allowance_s(plane.committer.known, machine("vm")) == len(KERNEL) / (10 << 20)
        assert fetch_allowance_s(plane.committer.known, machine("vm", "no-such-image")) == 0.0
        assert fetch_allowance_s(plane.committer.known, draft("web")) == 0.0


async def test_an_image_is_never_deleted_under_an_instance(storage: Storage, tmp_path: Path) -> None:
    agents = MemoryAgents()
    rng = random.Random(5)
    async with (
        control_plane(storage, agents, change=with_images(tmp_path / "a")) as one,
        control_plane(storage, agents, change=with_images(tmp_path / "b"), server_id="s-2") as two,
        add_node(one, registration(cpu_cores=1000)),
    ):
        outcomes = set()
        for round_number in range(25):
            await import_kernel(one)
            await until(lambda: any(True for _ in two.images.all()))

            async def create(number: int, name: str) -> str:
                await asyncio.sleep(rng.random() / 100)
                try:
                    await (one, two)[number].instances.create(machine(name), mutation())
                except HypervisorError as exc:
                    return f"create {exc.reason}"
                return "created"

            async def delete(number: int) -> str:
                await asyncio.sleep(rng.random() / 100)
                try:
                    await (one, two)[number].images.delete(ImageRef("linux"), mutation(), force=False)
                except HypervisorError as exc:
                    return f"delete {exc.reason}"
                return "deleted"

            names = [f"vm-{round_number}-{number}" for number in range(2)]
            done = await asyncio.gather(create(0, names[0]), delete(1), create(1, names[1]))
            outcomes.update(done)

            page = await storage.list(keys.PREFIX, limit=1000)
            paths = {item.key for item in page.items}
            await one.view.wait_revision(page.revision)
            for found in one.view.instances():
                for image_id in found.value.images.values():
                    assert keys.image(image_id).path in paths, done
            if "deleted" in done:
                assert "created" not in done
            for name, outcome in zip(names, (done[0], done[2]), strict=True):
                if outcome == "created":
                    ref = InstanceRef(name)
                    options = StopOptions(grace_s=0)
                    await one.view.wait_revision(two.view.revision)
                    await one.instances.delete(ref, mutation(), options=options, force=True)
            if "deleted" not in done:
                await one.images.delete(ImageRef("linux"), mutation(), force=True)
            await until(lambda: not list(one.images.all()) and not list(two.images.all()))

        assert {"created", "deleted"} <= outcomes
        assert outcomes & {"delete IMAGE_IN_USE"}


async def test_a_delete_that_was_cut_off_between_its_steps_is_finished_by_a_repeat(
    storage: Storage, tmp_path: Path
) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents, change=with_images(tmp_path / "a")) as plane:
        await import_kernel(plane)
        deleting = asyncio.ensure_future(plane.images.delete(ImageRef("linux"), mutation(), force=False))
        while True:
            await asyncio.sleep(0)
            (image,) = plane.images.all()
            if image.value.state.value == "deleting" or deleting.done():
                break
        deleting.cancel()
        await asyncio.wait({deleting})

        if list(plane.images.all()):
            await plane.images.delete(ImageRef("linux"), mutation(), force=False)

        await until(lambda: not list(plane.images.all()))
        await import_kernel(plane)
