"""ImageService of a whole server over gRPC, and the content over HTTP: imports, interruptions, refusals, deletion."""

import asyncio
import os
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import grpc
import grpc.aio
import pytest

from hvtest_control_plane import until
from hvtest_images import (
    Uploader,
    bzimage,
    eventually,
    files_of_at_most,
    messages,
    oci_archive,
    qcow2,
    raw_disk,
    sha256_of,
)
from hvtest_whole_cluster import WholeServer, container, failure_of, whole_server
from hypervisor.core.errors import FailedPrecondition, HypervisorError
from hypervisor.v1 import image_pb2, instance_pb2, operation_pb2

DISK = raw_disk(sectors=2000)
"""A megabyte, in sixteen pieces."""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[WholeServer]:
    async with whole_server(tmp_path) as running:
        yield running


@pytest.fixture
def uploader(server: WholeServer) -> Uploader:
    return Uploader(server)


def content_in(directory: Path) -> list[str]:
    """Digests of what a server in the directory keeps."""
    return sorted(path.name for path in (directory / "images" / "sha256").glob("*/*"))


def partials_in(directory: Path) -> list[Path]:
    return sorted((directory / "images" / "partial").glob("*"))


async def refused(call: object) -> HypervisorError:
    with pytest.raises(grpc.RpcError) as caught:
        await call  # type: ignore[misc]
    return failure_of(caught.value)


async def test_an_image_is_imported_and_found_by_name_id_and_list(uploader: Uploader, tmp_path: Path) -> None:
    made = await uploader.send(qcow2(virtual_bytes=3 << 30), name="debian-12")

    assert (made.name, made.project, made.format) == ("debian-12", "default", "qcow2")
    assert made.kind == image_pb2.IMAGE_KIND_DISK
    assert made.virtual_size_bytes == 3 << 30
    assert made.state == image_pb2.IMAGE_STATE_READY
    assert made.created_by == "anonymous"
    by_name = await uploader.stub.GetImage(image_pb2.GetImageRequest(image="debian-12"))
    by_id = await uploader.stub.GetImage(image_pb2.GetImageRequest(image=made.id))
    listed = await uploader.stub.ListImages(image_pb2.ListImagesRequest())
    assert by_name == by_id == made == listed.images[0]
    assert content_in(tmp_path) == [made.sha256]
    assert partials_in(tmp_path) == []


async def test_lists_are_paged_filtered_and_ordered(uploader: Uploader) -> None:
    for number in range(3):
        await uploader.send(raw_disk(sectors=8 * (3 - number)), name=f"disk-{number}")
    await uploader.send(bzimage(), name="linux")

    first = await uploader.stub.ListImages(image_pb2.ListImagesRequest(page_size=2))
    rest = await uploader.stub.ListImages(
        image_pb2.ListImagesRequest(page_size=2, page_token=first.next_page_token)
    )
    kernels = await uploader.stub.ListImages(image_pb2.ListImagesRequest(filter="kind=kernel"))
    largest = await uploader.stub.ListImages(
        image_pb2.ListImagesRequest(filter="name=disk*", order_by="size_bytes desc")
    )

    assert [i.name for i in (*first.images, *rest.images)] == ["disk-0", "disk-1", "disk-2", "linux"]
    assert rest.next_page_token == ""
    assert [i.name for i in kernels.images] == ["linux"]
    assert [i.name for i in largest.images] == ["disk-0", "disk-1", "disk-2"]


async def test_an_import_is_in_the_history_of_operations(server: WholeServer, uploader: Uploader) -> None:
    made = await uploader.send(DISK)

    found = await server.operations.ListOperations(
        operation_pb2.ListOperationsRequest(filter="object_kind=image")
    )

    assert [(o.verb, o.object_id, o.done) for o in found.operations] == [("import", made.id, True)]


async def test_the_same_import_again_is_the_same_image(uploader: Uploader) -> None:
    made = await uploader.send(DISK)

    assert await uploader.send(DISK) == made
    assert await uploader.send(DISK, sha256="") == made


async def test_another_image_cannot_have_the_name(uploader: Uploader, tmp_path: Path) -> None:
    made = await uploader.send(DISK)

    error = await refused(uploader.send(raw_disk(fill=b"x")))
    late = await refused(uploader.send(raw_disk(sectors=2000, fill=b"x"), sha256=""))

    assert (type(error).__name__, error.reason) == ("AlreadyExists", "IMAGE_NAME_TAKEN")
    assert late.reason == "IMAGE_NAME_TAKEN"
    assert content_in(tmp_path) == [made.sha256]


async def test_two_clients_that_import_one_name_at_once_get_one_image(
    uploader: Uploader, tmp_path: Path
) -> None:
    disks = [raw_disk(sectors=2000, fill=bytes([number])) for number in range(4)]

    answers = await asyncio.gather(*(uploader.send(disk) for disk in disks), return_exceptions=True)

    won = [a for a in answers if isinstance(a, image_pb2.Image)]
    lost = [failure_of(a) for a in answers if isinstance(a, grpc.RpcError)]
    assert len(won) == 1
    assert [error.reason for error in lost] == ["IMAGE_NAME_TAKEN"] * 3
    assert content_in(tmp_path) == [won[0].sha256]


async def test_two_clients_that_send_the_same_content_both_succeed(
    uploader: Uploader, tmp_path: Path
) -> None:
    same = await asyncio.gather(uploader.send(DISK), uploader.send(DISK), uploader.send(DISK, name="other"))

    assert same[0].id == same[1].id != same[2].id
    assert content_in(tmp_path) == [sha256_of(DISK)]


async def test_one_upload_is_sent_by_one_client_at_a_time(uploader: Uploader) -> None:
    header = image_pb2.ImportImageHeader(name="slow", size_bytes=len(DISK), upload_id="u-1")
    gate = threading.Event()

    def slowly() -> Iterator[image_pb2.ImportImageRequest]:
        for number, request in enumerate(messages(header, DISK)):
            yield request
            if number == 2:
                gate.wait(30)

    first = asyncio.create_task(uploader.stream(slowly()))
    await eventually(lambda: _received(uploader, "u-1"))
    error = await refused(uploader.stream(messages(header, DISK)))
    gate.set()

    assert (type(error).__name__, error.reason) == ("Conflict", "UPLOAD_IN_PROGRESS")
    assert (await first).sha256 == sha256_of(DISK)


async def _received(uploader: Uploader, upload_id: str) -> int:
    try:
        found = await uploader.stub.GetUpload(image_pb2.GetUploadRequest(upload_id=upload_id))
    except grpc.aio.AioRpcError as exc:
        if exc.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return 0
    return found.received_bytes


async def test_a_truncated_upload_is_kept_and_gone_on_with(uploader: Uploader, tmp_path: Path) -> None:
    half = 8 * (64 << 10)

    error = await refused(uploader.send(DISK, upload_id="u", until=half))
    received = await _received(uploader, "u")
    made = await uploader.send(DISK, upload_id="u", offset=received)

    assert (type(error).__name__, error.reason) == ("Conflict", "UPLOAD_INCOMPLETE")
    assert received == half
    assert made.sha256 == sha256_of(DISK)
    assert await _received(uploader, "u") == 0
    assert partials_in(tmp_path) == []


async def test_an_upload_goes_on_after_the_server_was_started_again(tmp_path: Path) -> None:
    half = 8 * (64 << 10)
    async with whole_server(tmp_path) as server:
        await refused(Uploader(server).send(DISK, upload_id="u", until=half))

    async with whole_server(tmp_path) as server:
        uploader = Uploader(server)
        assert await _received(uploader, "u") == half
        made = await uploader.send(DISK, upload_id="u", offset=half)
        assert len(made.servers) == 1

    async with whole_server(tmp_path) as server:
        # Its address and its id are other ones; the store is the same.
        found = await Uploader(server).stub.GetImage(image_pb2.GetImageRequest(image="debian-12"))
        assert found.servers == [f"http://{server.addresses.http}"]


async def test_pieces_out_of_order_are_refused_and_what_came_is_kept(uploader: Uploader) -> None:
    error = await refused(uploader.send(DISK, upload_id="u", offset=64 << 10))
    assert (type(error).__name__, error.reason) == ("OutOfRange", "UPLOAD_OFFSET")
    assert error.metadata["received_bytes"] == "0"

    await refused(uploader.send(DISK, upload_id="u", until=128 << 10))
    again = await refused(uploader.send(DISK, upload_id="u", offset=0))
    assert again.metadata["received_bytes"] == str(128 << 10)
    assert (await uploader.send(DISK, upload_id="u", offset=128 << 10)).size_bytes == len(DISK)


async def test_an_upload_cannot_become_another_one(uploader: Uploader) -> None:
    await refused(uploader.send(DISK, upload_id="u", until=64 << 10))

    error = await refused(uploader.send(raw_disk(fill=b"y"), upload_id="u"))

    assert (type(error).__name__, error.reason) == ("InvalidArgument", "UPLOAD_CHANGED")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sha256": "0" * 64}, "DIGEST_MISMATCH"),
        ({"size": len(DISK) - 1, "sha256": ""}, "UPLOAD_TOO_LONG"),
        ({"kind": image_pb2.IMAGE_KIND_KERNEL}, "IMAGE_INVALID"),
    ],
)
async def test_content_that_is_not_what_was_announced_is_refused_and_not_kept(
    uploader: Uploader, tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    error = await refused(uploader.send(DISK, upload_id="u", **change))  # type: ignore[arg-type]

    assert (type(error).__name__, error.reason) == ("InvalidArgument", reason)
    assert partials_in(tmp_path) == content_in(tmp_path) == []
    assert (await uploader.send(DISK)).size_bytes == len(DISK)


async def test_a_disk_that_reads_other_files_of_the_node_is_refused(
    uploader: Uploader, tmp_path: Path
) -> None:
    error = await refused(uploader.send(qcow2(backing_offset=1024)))

    assert "backing file" in error.message
    assert content_in(tmp_path) == []


@pytest.mark.parametrize(
    ("field", "header"),
    [
        ("header.name", {"name": ""}),
        ("header.name", {"name": "../../etc/passwd"}),
        ("header.name", {"name": "a\0b"}),
        ("header.name", {"name": "x" * 64}),
        ("header.name", {"name": "Debian 12"}),
        ("header.project", {"project": "../x"}),
        ("header.size_bytes", {"size_bytes": 0}),
        ("header.size_bytes", {"size_bytes": -5}),
        ("header.sha256", {"sha256": "../../../../etc/shadow"}),
        ("header.sha256", {"sha256": "0" * 63}),
        ("header.upload_id", {"upload_id": ""}),
        ("header.upload_id", {"upload_id": "a b"}),
        ("header.upload_id", {"upload_id": "x" * 65}),
        ("header.kind", {"kind": 99}),
    ],
)
async def test_a_wrong_header_is_refused_by_its_field(
    uploader: Uploader, tmp_path: Path, field: str, header: dict[str, object]
) -> None:
    legal = {"name": "x", "size_bytes": 10, "upload_id": "u"}
    sent = image_pb2.ImportImageHeader(**legal | header)  # type: ignore[arg-type]

    error = await refused(uploader.stream(messages(sent, b"x" * 10)))

    assert (type(error).__name__, error.metadata["field"]) == ("InvalidArgument", field)
    assert not (tmp_path / "images").exists()


async def test_hostile_upload_ids_stay_inside_the_store(uploader: Uploader, tmp_path: Path) -> None:
    await refused(uploader.send(DISK, upload_id="../../../../tmp/x", until=64 << 10))

    assert [path.name[:3] for path in partials_in(tmp_path)] == ["up-", "up-"]


async def test_a_stream_without_header_or_with_two_is_refused(uploader: Uploader) -> None:
    def nothing() -> Iterator[image_pb2.ImportImageRequest]:
        for _ in range(0):
            yield image_pb2.ImportImageRequest()

    def twice() -> Iterator[image_pb2.ImportImageRequest]:
        header = image_pb2.ImportImageHeader(name="x", size_bytes=10, upload_id="u")
        yield image_pb2.ImportImageRequest(header=header)
        yield image_pb2.ImportImageRequest(header=header)

    def too_much() -> Iterator[image_pb2.ImportImageRequest]:
        header = image_pb2.ImportImageHeader(name="x", size_bytes=8 << 20, upload_id="v")
        yield image_pb2.ImportImageRequest(header=header)
        yield image_pb2.ImportImageRequest(
            chunk=image_pb2.ImportImageChunk(offset=0, data=bytes((1 << 20) + 1))
        )

    assert (await refused(uploader.stream(nothing()))).metadata["field"] == "header"
    assert (await refused(uploader.stream(twice()))).metadata["field"] == "chunk"
    assert (await refused(uploader.stream(too_much()))).metadata["field"] == "chunk.data"


async def test_a_client_that_stops_sending_is_let_go(tmp_path: Path) -> None:
    async with whole_server(tmp_path, "image_store.upload_idle=200ms") as server:
        uploader = Uploader(server)
        never = threading.Event()

        def stalls() -> Iterator[image_pb2.ImportImageRequest]:
            header = image_pb2.ImportImageHeader(name="x", size_bytes=len(DISK), upload_id="u")
            yield from messages(header, DISK[: 64 << 10])
            never.wait(30)

        error = await refused(uploader.stream(stalls()))
        never.set()

        assert (type(error).__name__, error.reason) == ("DeadlineExceeded", "UPLOAD_STALLED")
        assert await _received(uploader, "u") == 64 << 10


async def test_an_image_larger_than_the_limit_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    async with whole_server(tmp_path, "image_store.max_bytes=1MiB") as server:
        error = await refused(Uploader(server).send(DISK, size=(1 << 20) + 1))

    assert (type(error).__name__, error.reason) == ("ResourceExhausted", "IMAGE_TOO_LARGE")


async def test_an_image_that_the_disk_cannot_hold_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    async with whole_server(tmp_path, "image_store.max_bytes=100TiB") as server:
        error = await refused(Uploader(server).send(DISK, size=90 << 40, sha256=""))

    assert (type(error).__name__, error.reason) == ("ResourceExhausted", "DISK_FULL")
    assert partials_in(tmp_path) == []


async def test_a_disk_that_is_full_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    large = raw_disk(sectors=64_000)
    async with whole_server(tmp_path) as server:
        uploader = Uploader(server)
        with files_of_at_most(20 << 20):
            error = await refused(uploader.send(large))

        assert (type(error).__name__, error.reason) == ("ResourceExhausted", "DISK_FULL")
        assert partials_in(tmp_path) == content_in(tmp_path) == []
        assert (await uploader.send(large)).size_bytes == len(large)


# --- over HTTP


async def test_content_is_served_by_its_digest_whole_and_by_ranges(
    server: WholeServer, uploader: Uploader
) -> None:
    made = await uploader.send(DISK)
    url = f"{made.servers[0]}/images/sha256/{made.sha256}"

    async with aiohttp.ClientSession() as session:
        async with session.get(url) as whole:
            assert (whole.status, await whole.read()) == (200, DISK)
            assert whole.headers["ETag"] == f'"{made.sha256}"'
        async with session.get(url, headers={"Range": "bytes=1000000-"}) as rest:
            assert (rest.status, await rest.read()) == (206, DISK[1_000_000:])
            assert rest.headers["Content-Range"] == f"bytes 1000000-{len(DISK) - 1}/{len(DISK)}"
        async with session.head(url) as head:
            assert (head.status, int(head.headers["Content-Length"])) == (200, len(DISK))
        async with session.get(url, headers={"Range": f"bytes={len(DISK)}-"}) as beyond:
            assert beyond.status == 416
        for path in (
            "0" * 64,
            "../store_id",
            "..%2F..%2Fstore.db",
            made.sha256.upper(),
            made.sha256[:63],
            "",
        ):
            async with session.get(f"{made.servers[0]}/images/sha256/{path}") as other:
                assert other.status == 404, path
        async with session.delete(url) as forbidden:
            assert forbidden.status == 405


async def test_content_is_for_those_whom_the_api_knows(tmp_path: Path) -> None:
    token = uuid.uuid4().hex
    async with whole_server(tmp_path, "auth.mode=token", f"auth.tokens.alice={token}") as server:
        made = await Uploader(server).send(DISK, token=token)
        url = f"{made.servers[0]}/images/sha256/{made.sha256}"

        async with aiohttp.ClientSession() as session:
            async with session.get(url) as unknown:
                assert unknown.status == 401
            async with session.get(url, headers={"Authorization": f"Bearer {token}"}) as known:
                assert await known.read() == DISK
        stranger = await refused(Uploader(server).send(DISK))
        assert stranger.reason == "TOKEN_MISSING"


# --- deletion


async def test_a_deleted_image_and_its_content_are_gone(uploader: Uploader, tmp_path: Path) -> None:
    made = await uploader.send(DISK)
    twin = await uploader.send(DISK, name="twin")

    first = await uploader.stub.DeleteImage(image_pb2.DeleteImageRequest(image="debian-12"))
    assert (first.done, first.verb, first.object_id) == (True, "delete", made.id)
    assert content_in(tmp_path) == [twin.sha256]
    error = await refused(uploader.stub.GetImage(image_pb2.GetImageRequest(image="debian-12")))
    assert (type(error).__name__, error.reason) == ("NotFound", "IMAGE_NOT_FOUND")

    await uploader.stub.DeleteImage(image_pb2.DeleteImageRequest(image=twin.id))
    await until(lambda: not content_in(tmp_path))
    assert (await uploader.send(DISK)).id not in (made.id, twin.id)


async def test_a_repeat_of_a_delete_has_no_second_effect(uploader: Uploader) -> None:
    await uploader.send(DISK)
    request = image_pb2.DeleteImageRequest(image="debian-12", request_id=str(uuid.uuid4()))

    first = await uploader.stub.DeleteImage(request)
    again = await uploader.send(DISK)
    second = await uploader.stub.DeleteImage(request)

    assert second == first
    assert (await uploader.stub.GetImage(image_pb2.GetImageRequest(image="debian-12"))) == again


async def test_a_delete_of_another_version_is_refused(uploader: Uploader) -> None:
    made = await uploader.send(DISK)
    request = image_pb2.DeleteImageRequest(image="debian-12", resource_version=made.resource_version + 1)

    error = await refused(uploader.stub.DeleteImage(request))

    assert error.reason == "RESOURCE_VERSION_MISMATCH"


@pytest.mark.parametrize("name", ["", "x/../y", "../../nodes/n-1", "no-such", "x" * 300])
async def test_images_that_do_not_exist_are_not_found(uploader: Uploader, name: str) -> None:
    for call in (
        uploader.stub.GetImage(image_pb2.GetImageRequest(image=name)),
        uploader.stub.DeleteImage(image_pb2.DeleteImageRequest(image=name)),
    ):
        error = await refused(call)
        assert error.reason in ("IMAGE_NOT_FOUND", "INVALID_FIELD")


# --- specifications that name images


async def test_a_create_is_refused_where_the_image_is_missing_or_of_another_kind(
    server: WholeServer, uploader: Uploader
) -> None:
    await uploader.send(bzimage(), name="linux")
    missing, wrong, illegal = container("a"), container("b"), container("c")
    missing.instance.spec.image = "image:nothing-like-it"
    wrong.instance.spec.image = "image:linux"
    illegal.instance.spec.image = "image:../../x"

    not_found = await refused(server.compute.CreateInstance(missing))
    other_kind = await refused(server.compute.CreateInstance(wrong))
    no_name = await refused(server.compute.CreateInstance(illegal))

    assert (type(not_found).__name__, not_found.reason) == ("NotFound", "IMAGE_NOT_FOUND")
    assert "is a kernel" in other_kind.message
    assert other_kind.metadata["field"] == "spec.image"
    assert no_name.metadata["field"] == "instance.spec.image"


async def test_a_machine_names_disk_kernel_and_initrd(server: WholeServer, uploader: Uploader) -> None:
    await uploader.send(oci_archive(), name="web")
    request = container("vm")
    request.instance.type = instance_pb2.INSTANCE_TYPE_VM
    request.instance.spec.image = "web"

    error = await refused(server.compute.CreateInstance(request))

    assert "is an OCI archive" in error.message
    request.instance.spec.image = ""
    request.instance.spec.kernel_path = "image:web"
    kernel = await refused(server.compute.CreateInstance(request))
    assert kernel.metadata["field"] == "spec.kernel_path"


async def test_a_store_in_use_by_another_server_is_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    shared = f"image_store.dir={tmp_path / 'shared'}"
    async with whole_server(first, shared) as one, whole_server(second, shared) as two:
        await Uploader(one).send(DISK)
        error = await refused(Uploader(two).send(DISK))

    assert (type(error).__name__, error.reason) == ("FailedPrecondition", "IMAGE_STORE_IN_USE")


async def test_a_store_that_cannot_be_written_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(
        FailedPrecondition, match=f"image_store.dir {tmp_path}/file/images cannot be used"
    ) as caught:
        async with whole_server(tmp_path, f"image_store.dir={tmp_path / 'file' / 'images'}"):
            pass

    assert caught.value.reason == "IMAGE_STORE_UNUSABLE"


async def test_content_that_the_disk_lost_can_be_imported_again(tmp_path: Path) -> None:
    async with whole_server(tmp_path) as server:
        made = await Uploader(server).send(DISK)
    os.unlink(tmp_path / "images" / "sha256" / made.sha256[:2] / made.sha256)

    async with whole_server(tmp_path) as server:
        uploader = Uploader(server)

        async def known_to_be_lost() -> bool:
            found = await uploader.stub.GetImage(image_pb2.GetImageRequest(image=made.id))
            return not found.servers

        await eventually(known_to_be_lost)
        again = await uploader.send(DISK)
        assert (again.id, len(again.servers)) == (made.id, 1)
