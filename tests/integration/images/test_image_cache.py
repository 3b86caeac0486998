"""A node's cache of images, with real HTTP and a real directory: fetching, cuts, lies, collection, use."""

import asyncio
import gzip
import os
import random
from pathlib import Path

import pytest
from aiohttp import web

from hvtest_image_server import ContentServer, running_cache, source_of
from hvtest_images import files_of_at_most, sha256_of
from hvtest_tcp_proxy import TcpProxy
from hypervisor.agent.images.cache import ImageCache
from hypervisor.core.errors import (
    FailedPrecondition,
    HypervisorError,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from hypervisor.core.ids import new_id
from hypervisor.wire.image_http import tokens_for_known_hosts

DISK = random.Random(7).randbytes(3_000_000)
OTHER = random.Random(8).randbytes(2_000_000)
THIRD = random.Random(9).randbytes(1_000_000)


def kept(root: Path) -> set[str]:
    """Digests of the content in the cache."""
    return {path.name for path in (root / "sha256").glob("*/*")}


def partial(root: Path, data: bytes) -> Path:
    return root / "partial" / sha256_of(data)


async def get(cache: ImageCache, data: bytes, *servers: str, instance: str = "") -> Path:
    """Have an instance be given the image; its file."""
    found = await cache.obtain(instance or new_id("i"), [source_of(data, *servers)])
    return Path(found["debian-12"].path)


async def test_an_image_is_fetched_verified_and_read_only(tmp_path: Path) -> None:
    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        path = await get(cache, DISK, server.url)

    assert path.read_bytes() == DISK
    assert path.stat().st_mode & 0o777 == 0o444
    assert kept(tmp_path) == {sha256_of(DISK)}
    assert not partial(tmp_path, DISK).exists()


async def test_what_is_here_is_not_fetched_again_even_by_the_next_agent(tmp_path: Path) -> None:
    async with ContentServer(DISK) as server:
        for _ in range(2):
            async with running_cache(tmp_path) as cache:
                await get(cache, DISK, server.url)
                await get(cache, DISK, server.url)

        assert server.ranges == ["bytes=0-"]


async def test_fifty_instances_at_once_fetch_an_image_once(tmp_path: Path) -> None:
    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        paths = await asyncio.gather(*(get(cache, DISK, server.url) for _ in range(50)))

        assert server.ranges == ["bytes=0-"]
        assert len(set(paths)) == 50
        assert len({path.stat().st_ino for path in paths}) == 1


async def test_a_failure_is_told_to_everybody_who_waits_for_it(tmp_path: Path) -> None:
    async with ContentServer() as server, running_cache(tmp_path) as cache:
        server.gate.clear()
        waiting = [asyncio.create_task(get(cache, DISK, server.url)) for _ in range(20)]
        await server.arrived.wait()
        server.gate.set()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)

        assert [type(o) for o in outcomes] == [NotFound] * 20
        assert len({id(o) for o in outcomes}) == 20
        assert server.ranges == ["bytes=0-"]


async def test_a_fetch_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    async with (
        ContentServer(DISK) as server,
        TcpProxy(server.port) as proxy,
        running_cache(tmp_path) as cache,
    ):
        proxy.cut_after_answers(1_000_000, 500_000)
        path = await get(cache, DISK, f"http://{proxy.endpoint}")

        assert path.read_bytes() == DISK
        assert len(server.ranges) == 3
        begins = [int(text.removeprefix("bytes=").removesuffix("-")) for text in server.ranges]
        # A reset takes what was on its way with it.
        assert 0 < begins[1] <= 1_000_000
        assert begins[1] < begins[2]


async def test_the_next_agent_goes_on_with_what_a_crash_left(tmp_path: Path) -> None:
    partial(tmp_path, DISK).parent.mkdir(parents=True)
    partial(tmp_path, DISK).write_bytes(DISK[:2_000_000])

    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        path = await get(cache, DISK, server.url)

        assert path.read_bytes() == DISK
        assert server.ranges == ["bytes=2000000-"]


async def test_remains_that_a_power_failure_damaged_are_thrown_away(tmp_path: Path) -> None:
    partial(tmp_path, DISK).parent.mkdir(parents=True)
    partial(tmp_path, DISK).write_bytes(bytes(2_000_000))

    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        path = await get(cache, DISK, server.url)

        assert path.read_bytes() == DISK
        assert server.ranges == ["bytes=2000000-", "bytes=0-"]


@pytest.mark.parametrize("left", [DISK, DISK + b"more"])
async def test_remains_that_are_all_of_it_or_more(tmp_path: Path, left: bytes) -> None:
    partial(tmp_path, DISK).parent.mkdir(parents=True)
    partial(tmp_path, DISK).write_bytes(left)

    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        assert (await get(cache, DISK, server.url)).read_bytes() == DISK
        assert server.ranges == ([] if left == DISK else ["bytes=0-"])


async def test_servers_are_asked_in_turn_until_one_has_it(tmp_path: Path) -> None:
    async with (
        ContentServer() as empty,
        ContentServer(DISK) as full,
        running_cache(tmp_path) as cache,
    ):
        path = await get(cache, DISK, "http://127.0.0.1:1", empty.url, full.url)

        assert path.read_bytes() == DISK
        assert len(empty.ranges) == len(full.ranges) == 1


async def test_another_server_goes_on_where_the_first_was_lost(tmp_path: Path) -> None:
    async with (
        ContentServer(DISK) as first,
        ContentServer(DISK) as second,
        TcpProxy(first.port) as proxy,
        running_cache(tmp_path) as cache,
    ):
        proxy.cut_after_answers(1_000_000)
        path = await get(cache, DISK, f"http://{proxy.endpoint}", second.url)

        assert path.read_bytes() == DISK
        assert second.ranges != ["bytes=0-"]
        assert len(first.ranges) == len(second.ranges) == 1


async def test_wrong_content_never_becomes_visible(tmp_path: Path) -> None:
    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        server.lies[sha256_of(DISK)] = bytes(len(DISK))

        with pytest.raises(FailedPrecondition) as caught:
            await get(cache, DISK, server.url)

        assert caught.value.reason == "IMAGE_CORRUPT"
        assert kept(tmp_path) == set()


async def test_a_server_that_lies_does_not_keep_the_node_from_one_that_does_not(tmp_path: Path) -> None:
    async with (
        ContentServer(DISK) as liar,
        ContentServer(DISK) as honest,
        running_cache(tmp_path) as cache,
    ):
        liar.lies[sha256_of(DISK)] = bytes(len(DISK))

        assert (await get(cache, DISK, liar.url, honest.url)).read_bytes() == DISK


async def test_content_of_another_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        server.lies[sha256_of(DISK)] = DISK + b"x"

        with pytest.raises(Unavailable, match="another size"):
            await get(cache, DISK, server.url)

        assert partial(tmp_path, DISK).stat().st_size == 0


async def test_a_decompression_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(64 << 20))
    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        server.answer = lambda: web.Response(body=bomb, headers={"Content-Encoding": "gzip"})

        with pytest.raises(Unavailable, match="compressed"):
            await get(cache, DISK, server.url)

        assert partial(tmp_path, DISK).stat().st_size == 0


async def test_an_endless_answer_is_cut_at_the_size_of_the_image(tmp_path: Path) -> None:
    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        server.answer = lambda: web.Response(status=200, body=DISK * 3)

        with pytest.raises(Unavailable, match=r"more than|answers 200"):
            await get(cache, DISK, server.url)

        assert partial(tmp_path, DISK).stat().st_size <= len(DISK)


async def test_redirects_are_not_followed(tmp_path: Path) -> None:
    async with ContentServer(DISK) as inner, ContentServer() as server, running_cache(tmp_path) as cache:
        server.answer = lambda: web.Response(
            status=302, headers={"Location": f"{inner.url}/images/sha256/{sha256_of(DISK)}"}
        )

        with pytest.raises(Unavailable, match="answers 302"):
            await get(cache, DISK, server.url)

        assert inner.ranges == []


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc",
        "ftp://127.0.0.1",
        "http://",
        "http://user:word@127.0.0.1",
        "http://127.0.0.1/path",
        "http://127.0.0.1?x=",
        "127.0.0.1:80",
        "unix:///run/x.sock",
    ],
)
async def test_what_is_no_address_of_a_server_is_not_asked(tmp_path: Path, address: str) -> None:
    async with running_cache(tmp_path) as cache:
        with pytest.raises(Unavailable, match="is not the HTTP address of a server"):
            await get(cache, DISK, address)


async def test_an_image_that_no_living_server_has_says_so(tmp_path: Path) -> None:
    async with running_cache(tmp_path) as cache:
        with pytest.raises(Unavailable) as caught:
            await get(cache, DISK)

    assert caught.value.reason == "IMAGE_FETCH_FAILED"


async def test_a_server_that_is_silent_is_given_up(tmp_path: Path) -> None:
    async with (
        ContentServer(DISK) as silent,
        ContentServer(DISK) as other,
        running_cache(tmp_path) as cache,
    ):
        silent.gate.clear()

        assert (await get(cache, DISK, silent.url, other.url)).read_bytes() == DISK
        silent.gate.set()


async def test_the_token_goes_to_configured_hosts_alone_unless_over_tls(tmp_path: Path) -> None:
    rule = tokens_for_known_hosts("secret", ["10.0.0.1", "Server-1"])

    assert rule("http://10.0.0.1:8080") == rule("http://server-1:8080") == "secret"
    assert rule("http://10.0.0.2:8080") == rule("http://127.0.0.1") == ""
    assert rule("https://10.0.0.2:8080") == "secret"

    async with (
        ContentServer(DISK) as server,
        running_cache(tmp_path, token_for=tokens_for_known_hosts("secret", ["10.0.0.1"])) as cache,
    ):
        await get(cache, DISK, server.url)
        assert server.tokens == [None]


# --- leaving


async def test_a_fetch_that_nobody_waits_for_any_more_ends_and_can_be_gone_on_with(tmp_path: Path) -> None:
    async with (
        ContentServer(DISK) as server,
        TcpProxy(server.port) as proxy,
        running_cache(tmp_path) as cache,
    ):
        url = f"http://{proxy.endpoint}"
        proxy.delay_s = 0.05
        first = asyncio.create_task(get(cache, DISK, url))
        second = asyncio.create_task(get(cache, DISK, url))
        await server.arrived.wait()
        first.cancel()
        await asyncio.wait({first})
        await asyncio.sleep(0.1)
        assert len(server.ranges) == 1
        second.cancel()
        await asyncio.wait({second})
        proxy.delay_s = 0.0

        path = await get(cache, DISK, url)

        assert path.read_bytes() == DISK
        assert len(server.ranges) == 2


async def test_someone_who_comes_right_after_all_have_left_gets_it(tmp_path: Path) -> None:
    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        for _ in range(20):
            leaving = asyncio.create_task(get(cache, DISK, server.url))
            await asyncio.sleep(random.Random(3).random() / 200)
            leaving.cancel()
            staying = asyncio.create_task(get(cache, DISK, server.url))
            assert (await staying).read_bytes() == DISK
            await asyncio.wait({leaving})
            for digest in kept(tmp_path):
                next((tmp_path / "sha256").glob(f"*/{digest}")).unlink()


# --- use and collection


async def test_unused_images_go_when_room_is_needed_the_longest_unused_first(tmp_path: Path) -> None:
    async with (
        ContentServer(DISK, OTHER, THIRD) as server,
        running_cache(tmp_path, limit_bytes=5_500_000) as cache,
    ):
        for data in (DISK, OTHER):
            instance = new_id("i")
            await get(cache, data, server.url, instance=instance)
            await cache.release(instance)
        age(tmp_path, OTHER, seconds=100)
        again = new_id("i")
        await get(cache, DISK, server.url, instance=again)
        await cache.release(again)

        await get(cache, THIRD, server.url)

        assert kept(tmp_path) == {sha256_of(DISK), sha256_of(THIRD)}


def age(root: Path, data: bytes, *, seconds: float) -> None:
    """Pretend that it was used so long ago."""
    digest = sha256_of(data)
    path = root / "sha256" / digest[:2] / digest
    status = path.stat()
    os.utime(path, (status.st_atime - seconds, status.st_mtime))


async def test_images_in_use_are_never_collected(tmp_path: Path) -> None:
    async with (
        ContentServer(DISK, OTHER) as server,
        running_cache(tmp_path, limit_bytes=4_000_000) as cache,
    ):
        holder = new_id("i")
        path = await get(cache, DISK, server.url, instance=holder)

        with pytest.raises(ResourceExhausted) as caught:
            await get(cache, OTHER, server.url)

        assert caught.value.reason == "IMAGE_CACHE_FULL"
        assert path.read_bytes() == DISK
        await cache.release(holder)
        await get(cache, OTHER, server.url)
        assert kept(tmp_path) == {sha256_of(OTHER)}


async def test_nothing_is_collected_in_vain(tmp_path: Path) -> None:
    async with (
        ContentServer(DISK, OTHER) as server,
        running_cache(tmp_path, limit_bytes=4_000_000) as cache,
    ):
        unused = new_id("i")
        await get(cache, OTHER, server.url, instance=unused)
        await cache.release(unused)

        huge = bytes(5_000_000)
        with pytest.raises(ResourceExhausted):
            await get(cache, huge, server.url)

        assert kept(tmp_path) == {sha256_of(OTHER)}


async def test_the_files_of_an_instance_stay_whatever_happens_to_the_cache(tmp_path: Path) -> None:
    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        path = await get(cache, DISK, server.url)
        next((tmp_path / "sha256").glob(f"*/{sha256_of(DISK)}")).unlink()

        assert path.read_bytes() == DISK


async def test_use_survives_a_restart_of_the_agent(tmp_path: Path) -> None:
    holder = new_id("i")
    async with ContentServer(DISK, OTHER) as server:
        async with running_cache(tmp_path) as cache:
            path = await get(cache, DISK, server.url, instance=holder)
        async with running_cache(tmp_path, limit_bytes=4_000_000, known=[holder]) as cache:
            with pytest.raises(ResourceExhausted):
                await get(cache, OTHER, server.url)
            assert path.exists()


async def test_links_of_instances_that_are_gone_are_taken_away(tmp_path: Path) -> None:
    here, gone = new_id("i"), new_id("i")
    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        kept_path = await get(cache, DISK, server.url, instance=here)
        lost_path = await get(cache, DISK, server.url, instance=gone)
        await cache.tidy()
        assert lost_path.exists(), "while it is not certain which instances there are, none loses a file"

    async with running_cache(tmp_path, known=[here]) as cache:
        await cache.tidy()

    assert kept_path.exists()
    assert not lost_path.parent.exists()


async def test_what_drivers_made_of_images_is_collected_with_them(tmp_path: Path) -> None:
    collected = asyncio.Event()

    async def collect() -> None:
        collected.set()

    async with running_cache(tmp_path, collect=collect):
        await asyncio.wait_for(collected.wait(), 10)


async def test_a_release_is_idempotent_and_of_nothing_is_no_error(tmp_path: Path) -> None:
    async with running_cache(tmp_path) as cache:
        await cache.release(new_id("i"))
        await cache.release("../../etc")


@pytest.mark.parametrize("instance", ["", "..", "../x", "i-1", "/etc"])
async def test_what_is_no_instance_id_never_becomes_a_path(tmp_path: Path, instance: str) -> None:
    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        with pytest.raises(Internal):
            await cache.obtain(instance, [source_of(DISK, server.url)])


async def test_content_that_was_damaged_on_the_disk_is_fetched_again(tmp_path: Path) -> None:
    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        holder = new_id("i")
        path = await get(cache, DISK, server.url, instance=holder)
        os.chmod(path, 0o644)
        os.truncate(path, 1000)

        fresh = await get(cache, DISK, server.url)

        assert fresh.read_bytes() == DISK
        assert (await get(cache, DISK, server.url, instance=holder)).read_bytes() == DISK


async def test_a_full_disk_refuses_the_image_and_keeps_nothing_of_it(tmp_path: Path) -> None:
    async with ContentServer(DISK, THIRD) as server, running_cache(tmp_path) as cache:
        with files_of_at_most(2_000_000):
            held = await get(cache, THIRD, server.url)
            with pytest.raises(ResourceExhausted) as caught:
                await get(cache, DISK, server.url)

        assert caught.value.reason == "DISK_FULL"
        assert held.read_bytes() == THIRD
        assert not partial(tmp_path, DISK).exists()
        assert (await get(cache, DISK, server.url)).read_bytes() == DISK


async def test_a_full_disk_makes_unused_images_go_before_an_instance_is_refused(tmp_path: Path) -> None:
    async with ContentServer(DISK, OTHER, THIRD) as server, running_cache(tmp_path) as cache:
        for data in (OTHER, THIRD):
            unused = new_id("i")
            await get(cache, data, server.url, instance=unused)
            await cache.release(unused)

        with files_of_at_most(2_500_000), pytest.raises(ResourceExhausted):
            await get(cache, DISK, server.url)

        assert kept(tmp_path) == set()
        assert len(server.ranges) == 2 + 3


async def test_two_images_at_once_that_fit_alone_but_not_together(tmp_path: Path) -> None:
    async with (
        ContentServer(DISK, OTHER) as server,
        running_cache(tmp_path, limit_bytes=4_000_000) as cache,
    ):
        outcomes = await asyncio.gather(
            get(cache, DISK, server.url), get(cache, OTHER, server.url), return_exceptions=True
        )

        failed = [o for o in outcomes if isinstance(o, HypervisorError)]
        assert [error.reason for error in failed] == ["IMAGE_CACHE_FULL"]
        assert len(kept(tmp_path)) == 1


async def test_instances_that_share_an_image_and_one_of_them_goes(tmp_path: Path) -> None:
    async with ContentServer(DISK) as server, running_cache(tmp_path) as cache:
        first, second = new_id("i"), new_id("i")
        gone = await get(cache, DISK, server.url, instance=first)
        stays = await get(cache, DISK, server.url, instance=second)

        await cache.release(first)

        assert not gone.exists()
        assert stays.read_bytes() == DISK
