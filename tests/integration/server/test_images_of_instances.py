"""Images and the instances that name them, over every store: what is decided when both change at the same time."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from msgspec import structs

from hvtest_agent import MemoryAgents
from hvtest_control_plane import add_node, control_plane, draft, mutation, registration, until
from hvtest_images import bzimage, sha256_of
from hypervisor.core.errors import HypervisorError
from hypervisor.core.images import ImageState
from hypervisor.core.states import InstanceType, OperationState
from hypervisor.server import keys
from hypervisor.server.control_plane import ControlPlane, ControlPlaneSettings, ImageSettings
from hypervisor.server.images.contract import Chunk, ImageRef, ImportHeader
from hypervisor.server.images.deleting import finish_delete
from hypervisor.server.images.naming import fetch_allowance_s
from hypervisor.server.services import Caller, InstanceDraft, InstanceRef, Mutation, StopOptions
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


async def cut_off_delete(plane: ControlPlane, request: Mutation, *, force: bool = False) -> None:
    """Begin to delete the image, and be gone between the two steps."""
    marked = asyncio.Event()

    async def never(revision: int) -> None:
        marked.set()
        await asyncio.Event().wait()

    with patch.object(plane.view, "wait_revision", never):
        deleting = asyncio.create_task(plane.images.delete(ImageRef("linux"), request, force=force))
        await asyncio.wait_for(marked.wait(), 10)
        deleting.cancel()
        await asyncio.wait({deleting})


async def test_the_leader_finishes_a_delete_whose_server_died_half_way(
    storage: Storage, tmp_path: Path
) -> None:
    request = mutation("4b1b8bb0-5a0e-4bb0-8c53-6a4bd1ae6a35")
    async with control_plane(storage, MemoryAgents(), change=with_images(tmp_path / "a")) as one:
        image_id = await import_kernel(one)
        await cut_off_delete(one, request)
        assert await storage.get(keys.image(image_id).path) is not None

    async with control_plane(
        storage, MemoryAgents(), change=with_images(tmp_path / "b"), server_id="s-2"
    ) as two:
        await until(lambda: not list(two.images.all()))

        again = await two.images.delete(ImageRef("linux"), request, force=False)
        assert (again.value.state, again.value.object_id) == (OperationState.SUCCEEDED, image_id)
        # The name is free.
        assert await import_kernel(two) != image_id


@pytest.mark.parametrize("force", [False, True])
async def test_an_image_that_is_used_is_kept_when_its_delete_is_finished_unless_it_was_forced(
    storage: Storage, tmp_path: Path, force: bool
) -> None:
    agents = MemoryAgents()
    async with (
        control_plane(storage, agents, change=with_images(tmp_path / "a")) as one,
        add_node(one, registration()),
    ):
        image_id = await import_kernel(one)
        await one.instances.create(machine("vm"), mutation())
        with patch("hypervisor.server.images.service.users_of", lambda *_: []):
            # As if it had been made on another server at this moment.
            await cut_off_delete(one, mutation(), force=force)

    async with control_plane(storage, agents, change=with_images(tmp_path / "b"), server_id="s-2") as two:
        if force:
            await until(lambda: not list(two.images.all()))
        else:
            await until(lambda: two.images.resolve(ImageRef(image_id)).value.state is ImageState.READY)
            assert two.images.resolve(ImageRef("linux")).value.deletion is None


async def test_a_delete_that_the_leader_finished_first_succeeds_all_the_same(
    storage: Storage, tmp_path: Path
) -> None:
    async with control_plane(storage, MemoryAgents(), change=with_images(tmp_path / "a")) as one:
        image_id = await import_kernel(one)
        wait = one.view.wait_revision

        async def meanwhile(revision: int) -> None:
            await wait(revision)
            (found,) = [i for i in one.images.all() if i.value.id == image_id] or [None]
            if found is not None and found.value.state is ImageState.DELETING:
                deletion = found.value.deletion
                await one.committer.commit(lambda d: finish_delete(d, found.value, deletion, used=False))

        with patch.object(one.view, "wait_revision", meanwhile):
            done = await one.images.delete(ImageRef("linux"), mutation(), force=False)

        assert (done.value.state, done.value.object_id) == (OperationState.SUCCEEDED, image_id)
