"""``hypervisor-ctl image`` against a whole server: import, interruptions, list, get, delete, completion."""

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from hvtest_images import bzimage, qcow2, raw_disk
from hvtest_tcp_proxy import TcpProxy
from hvtest_whole_cluster import WholeServer, whole_agent, whole_server
from hypervisor.ctl.invocation import Invocation

DISK = raw_disk(sectors=8000)


class Outcome:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def __repr__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


Ctl = Callable[..., Coroutine[Any, Any, Outcome]]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[WholeServer]:
    async with whole_server(tmp_path) as running:
        yield running


@pytest.fixture
def ctl(server: WholeServer, tmp_path: Path) -> Ctl:
    async def command(*arguments: str, address: str = "") -> Outcome:
        # A process of its own: the server logs to the standard output of this one.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hypervisor.ctl", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={
                "HOME": str(tmp_path),
                "PATH": os.environ["PATH"],
                "PYTHONPATH": os.pathsep.join(sys.path),
                "HYPERVISOR_SERVER": address or server.addresses.grpc,
                "HYPERVISOR_CTL_CONFIG": str(tmp_path / "ctl.yaml"),
            },
        )
        out, err = await process.communicate()
        return Outcome(process.returncode or 0, out.decode(), err.decode())

    return command


def written(directory: Path, data: bytes, name: str = "disk.img") -> str:
    path = directory / name
    path.write_bytes(data)
    return str(path)


async def test_import_shows_the_image_and_how_to_name_it(ctl: Ctl, tmp_path: Path) -> None:
    done = await ctl("image", "import", written(tmp_path, qcow2()), "--name", "debian-12")

    assert done.code == 0, done
    assert "image:debian-12" in done.out
    assert "qcow2" in done.out
    assert hashlib.sha256(qcow2()).hexdigest() in done.out
    quiet = await ctl("image", "import", written(tmp_path, qcow2()), "--name", "debian-12", "-q")
    assert quiet.out == "debian-12\n"


async def test_lists_and_details(ctl: Ctl, tmp_path: Path) -> None:
    disk = await ctl("image", "import", written(tmp_path, DISK), "--name", "a-disk")
    kernel = await ctl("image", "import", written(tmp_path, bzimage()), "--name", "linux", "--kind", "kernel")
    assert (disk.code, kernel.code) == (0, 0), (disk, kernel)

    table = await ctl("image", "list")
    kernels = await ctl("image", "list", "--filter", "kind=kernel", "-q")
    wide = await ctl("image", "list", "-o", "wide")
    found = (await ctl("image", "get", "linux", "-o", "json")).json

    assert [line.split()[:3] for line in table.out.splitlines()] == [
        ["NAME", "KIND", "FORMAT"],
        ["a-disk", "disk", "raw"],
        ["linux", "kernel", "bzimage"],
    ]
    assert kernels.out == "linux\n"
    assert "http://127.0.0.1:" in wide.out
    assert (found["kind"], found["size_bytes"]) == ("IMAGE_KIND_KERNEL", "8192")
    assert (await ctl("image", "get", "nothing")).code == 3


FIRST, MIDDLE = b"marker of the first part", b"marker of a cut"
MARKED = DISK[:100_000] + FIRST + DISK[100_000:2_000_000] + MIDDLE
MARKED += DISK[len(MARKED) :]
"""An image in which a proxy can find places."""


async def test_an_import_goes_on_over_a_broken_connection(
    server: WholeServer, ctl: Ctl, tmp_path: Path
) -> None:
    async with TcpProxy(int(server.addresses.grpc.rpartition(":")[2])) as proxy:
        proxy.cut_before(MIDDLE)

        done = await ctl(
            "image", "import", written(tmp_path, MARKED), "--name", "large", address=proxy.endpoint
        )

        assert done.code == 0, done
        assert proxy.seen.is_set()
    assert hashlib.sha256(MARKED).hexdigest() in done.out


async def test_an_import_waits_for_a_server_that_starts_again(
    server: WholeServer, ctl: Ctl, tmp_path: Path
) -> None:
    async with TcpProxy(int(server.addresses.grpc.rpartition(":")[2])) as proxy:

        async def be_away() -> None:
            await proxy.seen.wait()
            proxy.refuse()
            await asyncio.sleep(1.5)
            proxy.accept()

        proxy.cut_before(MIDDLE)
        away = asyncio.create_task(be_away())
        done = await ctl(
            "image", "import", written(tmp_path, MARKED), "--name", "large", address=proxy.endpoint
        )
        await away

    assert done.code == 0, done


async def test_a_server_that_is_not_there_is_an_error_at_once(ctl: Ctl, tmp_path: Path) -> None:
    refused = await ctl("image", "import", written(tmp_path, DISK), "--name", "x", address="127.0.0.1:1")

    assert refused.code == 1, refused
    assert "127.0.0.1:1" in refused.err


async def test_a_second_run_of_the_command_sends_the_rest_only(
    server: WholeServer, ctl: Ctl, tmp_path: Path
) -> None:
    port = int(server.addresses.grpc.rpartition(":")[2])
    path = written(tmp_path, MARKED)
    async with TcpProxy(port) as proxy:

        async def break_for_good() -> None:
            await proxy.seen.wait()
            proxy.refuse()

        # Slowly: a reset takes with it what the server has not read yet.
        proxy.delay_s = 0.02
        proxy.cut_before(MIDDLE)
        breaking = asyncio.create_task(break_for_good())
        failed = await ctl("image", "import", path, "--name", "large", address=proxy.endpoint)
        await breaking
        assert failed.code == 1, failed
    assert max(p.stat().st_size for p in (tmp_path / "images" / "partial").iterdir()) > 1_000_000

    async with TcpProxy(port) as proxy:
        proxy.cut_before(FIRST)
        done = await ctl("image", "import", path, "--name", "large", address=proxy.endpoint)
        assert done.code == 0, done
        assert not proxy.seen.is_set(), "what the server had was sent again"

    async with TcpProxy(port) as proxy:
        proxy.cut_before(FIRST)
        fresh = await ctl("image", "import", path, "--name", "other", "--no-resume", address=proxy.endpoint)
        assert fresh.code == 0, fresh


async def test_what_is_wrong_with_a_file_is_said_before_anything_is_sent(ctl: Ctl, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "empty").touch()
    for path, *more, problem in (
        (str(tmp_path / "no-such"), "cannot be opened: No such file"),
        (str(tmp_path), "is not an ordinary file"),
        (str(fifo), "is not an ordinary file"),
        (str(tmp_path / "empty"), "is empty"),
        (written(tmp_path, DISK), "--sha256", "0" * 64, "has the SHA-256"),
    ):
        refused = await ctl("image", "import", path, "--name", "x", *more)
        assert refused.code in (1, 2, 4), refused
        assert problem in refused.err
    assert not (tmp_path / "images").exists()


async def test_the_servers_refusals_are_shown(ctl: Ctl, tmp_path: Path) -> None:
    disk = written(tmp_path, qcow2(backing_offset=512))
    await ctl("image", "import", written(tmp_path, DISK, "a"), "--name", "taken")

    backing = await ctl("image", "import", disk, "--name", "bad")
    taken = await ctl("image", "import", written(tmp_path, bzimage(), "b"), "--name", "taken")
    name = await ctl("image", "import", written(tmp_path, bzimage(), "b"), "--name", "Not Legal")
    kind = await ctl("image", "import", written(tmp_path, bzimage(), "b"), "--name", "k", "--kind", "initrd")

    assert "backing file" in backing.err
    assert "another image named taken" in taken.err
    assert "header.name" in name.err
    assert "cpio" in kind.err
    assert 0 not in {backing.code, taken.code, name.code, kind.code}


async def test_delete_and_use(server: WholeServer, ctl: Ctl, tmp_path: Path) -> None:
    await ctl("image", "import", written(tmp_path, DISK), "--name", "debian-12")
    async with whole_agent(server, tmp_path):
        made = await ctl(
            *("instance", "create", "db", "--type", "vm", "--image", "debian-12", "--cpu", "0.1"),
            *("--memory", "64MiB"),
        )
        assert made.code == 0, made

        used = await ctl("image", "delete", "debian-12")
        forced = await ctl("image", "delete", "debian-12", "--force")

        assert used.code == 4, used
        assert "is used by db" in used.err
        assert forced.out == "image debian-12 deleted\n"
    assert (await ctl("image", "list", "-q")).out == ""


async def test_names_of_images_are_completed(server: WholeServer, ctl: Ctl, tmp_path: Path) -> None:
    from click import Context

    from hypervisor.ctl.app import cli
    from hypervisor.ctl.completing import names

    await ctl("image", "import", written(tmp_path, DISK), "--name", "debian-12")
    await ctl("image", "import", written(tmp_path, bzimage()), "--name", "linux")

    def completed() -> list[str]:
        context = Context(cli)
        context.obj = Invocation(environ={"HYPERVISOR_SERVER": server.addresses.grpc, "HOME": str(tmp_path)})
        return names(context, "image", "deb")

    assert await asyncio.to_thread(completed) == ["debian-12"]
