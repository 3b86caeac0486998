"""Talking to QEMU when it does not talk as it should: what is at the other end here is a script of a test."""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hypervisor.agent.drivers.microvm import qemu_monitor
from hypervisor.agent.drivers.microvm.qemu_monitor import open_monitor
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import FailedPrecondition, ResourceExhausted, Unavailable

GREETING = {
    "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}
}
CLOCK = SystemClock()

Answer = Callable[[dict[str, Any]], dict[str, Any] | None]


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a socket: short enough for one, which the tests' own directory need not be."""
    with tempfile.TemporaryDirectory(prefix="hv-qmp-", dir="/tmp") as directory:
        yield Path(directory) / "q"


def refuse(text: str) -> dict[str, Any]:
    return {"error": {"class": "GenericError", "desc": text}}


async def requests(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Requests follow one another without anything between them."""
    text = ""
    while data := await reader.read(65536):
        text += data.decode()
        while text:
            try:
                request, end = json.JSONDecoder().raw_decode(text)
            except json.JSONDecodeError:
                break
            text = text[end:].lstrip()
            yield request


@asynccontextmanager
async def qemu(path: Path, answer: Answer) -> AsyncIterator[None]:
    """Answers commands by ``answer``; None hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def send(document: dict[str, Any]) -> None:
            writer.write(json.dumps(document).encode() + b"\r\n")

        send(GREETING)
        async for request in requests(reader):
            told = {"return": {}} if request["execute"] == "qmp_capabilities" else answer(request)
            if told is None:
                break
            send(told | ({"id": request["id"]} if "id" in request else {}))
        writer.close()

    async with listening(path, serve):
        yield


@asynccontextmanager
async def listening(
    path: Path, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> AsyncIterator[None]:
    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        server.close()


async def test_answers_are_handed_on(path: Path) -> None:
    async with (
        qemu(path, lambda request: {"return": {"status": request["arguments"]["x"]}}),
        open_monitor(path, clock=CLOCK) as monitor,
    ):
        assert await monitor.execute("query", {"x": 5}) == {"status": 5}


async def test_nothing_that_listens_is_told_at_once(path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        async with open_monitor(path, clock=CLOCK):
            pass

    assert caught.value.reason == "VMM_UNREACHABLE"


async def test_one_that_will_listen_is_waited_for(path: Path) -> None:
    async def connect() -> object:
        async with open_monitor(path, clock=CLOCK, within_s=10.0) as monitor:
            return await monitor.execute("x")

    connecting = asyncio.ensure_future(connect())
    await asyncio.sleep(0)
    async with qemu(path, lambda _: {"return": "late"}):
        assert await connecting == "late"


async def test_one_that_does_not_greet_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_monitor, "_GREETING_S", 0.05)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with listening(path, silent):
        with pytest.raises(Unavailable, match="has not greeted"):
            async with open_monitor(path, clock=CLOCK):
                pass


@pytest.mark.parametrize("greeting", [b"", b"no json\r\n", b'{"hello": 1}\r\n', b"[1]\r\n"])
async def test_one_that_greets_wrongly_is_given_up(path: Path, greeting: bytes) -> None:
    async def odd(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    async with listening(path, odd):
        with pytest.raises(Unavailable) as caught:
            async with open_monitor(path, clock=CLOCK):
                pass

    assert caught.value.reason == "VMM_UNREACHABLE"


async def test_a_refusal_is_told_in_its_words(path: Path) -> None:
    async with (
        qemu(path, lambda _: refuse("not now")),
        open_monitor(path, clock=CLOCK) as monitor,
    ):
        with pytest.raises(FailedPrecondition, match="QEMU refuses cont: not now") as caught:
            await monitor.execute("cont")
        await monitor.attempt("cont", {})

    assert caught.value.reason == "VMM_REFUSED"


async def test_a_full_disk_is_told_as_one(path: Path) -> None:
    async with (
        qemu(path, lambda _: refuse("Error: No space left on device")),
        open_monitor(path, clock=CLOCK) as monitor,
    ):
        with pytest.raises(ResourceExhausted) as caught:
            await monitor.execute("x")

    assert caught.value.reason == "DISK_FULL"


async def test_hanging_up_in_the_middle_is_unavailable(path: Path) -> None:
    async with qemu(path, lambda _: None), open_monitor(path, clock=CLOCK) as monitor:
        with pytest.raises(Unavailable, match="the connection ended at cont"):
            await monitor.execute("cont")


async def test_no_answer_is_unavailable_after_a_while(path: Path) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\r\n")
        request = await anext(requests(reader))
        writer.write(json.dumps({"return": {}, "id": request.get("id")}).encode() + b"\r\n")
        await reader.read()
        writer.close()

    async with listening(path, deaf), open_monitor(path, clock=CLOCK) as monitor:
        with pytest.raises(Unavailable, match="has not answered cont"):
            await monitor.execute("cont", timeout_s=0.05)


def jobs(*states: list[dict[str, Any]]) -> tuple[Answer, list[str]]:
    """Tells the states of jobs, one after another."""
    left, asked = list(states), []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request["execute"])
        return {"return": left.pop(0) if request["execute"] == "query-jobs" else {}}

    return answer, asked


async def test_a_job_is_waited_for_and_forgotten(path: Path) -> None:
    other = {"id": "other", "status": "running"}
    answer, asked = jobs(
        [other, {"id": "save", "status": "running"}], [{"id": "save", "status": "concluded"}, other]
    )
    async with qemu(path, answer), open_monitor(path, clock=CLOCK) as monitor:
        await monitor.run_job("snapshot-save", "save", {}, timeout_s=10.0)

    assert asked == ["snapshot-save", "query-jobs", "query-jobs", "job-dismiss"]


async def test_a_job_that_fails_is_a_refusal_and_forgotten(path: Path) -> None:
    answer, asked = jobs([{"id": "save", "status": "concluded", "error": "No space left on device"}])
    async with qemu(path, answer), open_monitor(path, clock=CLOCK) as monitor:
        with pytest.raises(ResourceExhausted):
            await monitor.run_job("snapshot-save", "save", {}, timeout_s=10.0)

    assert asked[-1] == "job-dismiss"


async def test_a_job_that_does_not_end_is_given_up(path: Path) -> None:
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return {"return": [{"id": "save", "status": "running"}] if request["execute"] == "query-jobs" else {}}

    async with qemu(path, answer), open_monitor(path, clock=CLOCK) as monitor:
        with pytest.raises(Unavailable, match="has not ended in"):
            await monitor.run_job("snapshot-save", "save", {}, timeout_s=0.05)
