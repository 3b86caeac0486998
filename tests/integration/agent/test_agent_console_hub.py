"""A console hub over consoles that misbehave, and a real console holder, without gRPC."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hvtest_agent_waiting import until, within
from hypervisor.agent.console import ConsoleHub, ConsoleLimits
from hypervisor.agent.console_holder import protocol
from hypervisor.agent.console_holder.client import HolderClient
from hypervisor.agent.console_holder.launching import EmbeddedHolder
from hypervisor.agent.console_holder.protocol import ConsoleState
from hypervisor.agent.console_items import Data, End, Ended, Output, Skipped
from hypervisor.agent.console_link import MESSAGE_BYTES
from hypervisor.agent.console_viewer import OWN_WINDOW_BYTES, Viewer
from hypervisor.agent.drivers.driver import ConsoleEndpoint
from hypervisor.core.clock import SystemClock
from hypervisor.core.consoles import MAX_WINDOW_BYTES, ConsoleOptions
from hypervisor.core.errors import (
    FailedPrecondition,
    HypervisorError,
    InvalidArgument,
    Unavailable,
    Unimplemented,
)
from hypervisor.core.model import ConsoleSize, Observation
from hypervisor.core.states import InstanceStatus
from hypervisor.ext.console_mux.frames import HEADER_BYTES

START = datetime(2026, 1, 1, tzinfo=UTC)
MUCH = b"x" * (1 << 20)
"""More than all buffers between a viewer and its guest hold."""


class Terminal:
    """A driver's console that prints what the test says."""

    def __init__(self) -> None:
        self.output: asyncio.Queue[bytes | BaseException] = asyncio.Queue()
        self.typed = b""
        self.sizes: list[ConsoleSize] = []
        self.closed = 0
        self.input_ended = False
        self.takes_at_once = 1
        self.takes_input = asyncio.Event()
        self.takes_input.set()

    @property
    def resizable(self) -> bool:
        return True

    async def read(self, limit: int = 65536) -> bytes:
        item = await self.output.get()
        if isinstance(item, BaseException):
            raise item
        return item

    async def write(self, data: bytes) -> None:
        for at in range(0, len(data), self.takes_at_once):
            await self.takes_input.wait()
            if self.input_ended:
                raise FailedPrecondition("the console has ended", reason="CONSOLE_ENDED")
            await asyncio.sleep(0)
            self.typed += data[at : at + self.takes_at_once]

    async def resize(self, size: ConsoleSize) -> None:
        self.sizes.append(size)

    async def close(self) -> None:
        self.closed += 1


class Node:
    """A hub, and the consoles its instance had."""

    def __init__(self, directory: Path) -> None:
        self.terminals: list[Terminal] = []
        self.refuse: list[HypervisorError] = []
        self.holder = HolderClient(
            EmbeddedHolder(directory), clock=SystemClock(), rng=random.Random(1), on_event=self._event
        )
        self.hub = ConsoleHub(
            "i-1",
            attach=self._attach,
            holder=self.holder,
            limits=ConsoleLimits(scrollback_bytes=4096, log_bytes=64 << 10, log_files=2),
            clock=SystemClock(),
            rng=random.Random(1),
        )

    def _event(self, event: protocol.Event) -> None:
        assert isinstance(event, protocol.RunEnded), event
        self.hub.run_ended(event.run, event.position)

    async def _attach(self, _: str) -> Terminal:
        if self.refuse:
            raise self.refuse.pop(0)
        self.terminals.append(Terminal())
        return self.terminals[-1]

    def runs(self, run: int = 0) -> None:
        self._observe(InstanceStatus.RUNNING, run)

    def ended(self, run: int = 0, *, exit_code: int = 0) -> None:
        self._observe(InstanceStatus.STOPPED, run, exit_code=exit_code)

    def _observe(self, status: InstanceStatus, run: int, exit_code: int | None = None) -> None:
        self.hub.observed(
            Observation(
                instance_id="i-1",
                generation=1,
                epoch=1,
                status=status,
                observed_at=START,
                started_at=START + timedelta(seconds=run),
                exit_code=exit_code,
            )
        )

    async def terminal(self, number: int = 0) -> Terminal:
        await until(lambda: len(self.terminals) > number, what="the hub attaches")
        return self.terminals[number]


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path)
    holding = asyncio.ensure_future(node.holder.run())
    task = asyncio.ensure_future(node.hub.run())
    yield node
    for ending in (task, holding):
        ending.cancel()
        await asyncio.wait({ending})
        assert ending.cancelled(), ending


async def _until_printed(node: Node, count: int) -> None:
    while (await node.hub.open()).end < count:  # noqa: ASYNC110 - the holder tells nobody
        await asyncio.sleep(0)


@asynccontextmanager
async def _seeing(viewer: Viewer) -> AsyncIterator[list[Output]]:
    items: list[Output] = []

    async def collect() -> None:
        async for item in viewer.output():
            items.append(item)  # noqa: PERF401 - seen while it is collected

    task = asyncio.ensure_future(collect())
    try:
        yield items
    finally:
        task.cancel()
        await asyncio.wait({task})


def _text(items: list[Output]) -> bytes:
    return b"".join(item.data for item in items if isinstance(item, Data))


async def test_output_is_drained_without_viewers(node: Node) -> None:
    node.runs()
    terminal = await node.terminal()
    for _ in range(100):
        terminal.output.put_nowait(b"x" * 1000)

    await within(_until_printed(node, 100_000), what="all output is taken")


async def test_whole_writes_of_several_writers_do_not_mix(node: Node) -> None:
    node.runs()
    terminal = await node.terminal()
    async with (
        node.hub.view(ConsoleOptions()) as one,
        node.hub.view(ConsoleOptions()) as two,
    ):
        await asyncio.gather(one.write(b"aaaaaaaa"), two.write(b"bbbbbbbb"), one.write(b"cccccccc"))
        await until(lambda: len(terminal.typed) == 24, what="all is typed")

    assert {terminal.typed[n : n + 8] for n in (0, 8, 16)} == {b"aaaaaaaa", b"bbbbbbbb", b"cccccccc"}


async def test_a_guest_that_takes_no_input_holds_up_no_output(node: Node) -> None:
    node.runs()
    terminal = await node.terminal()
    terminal.takes_input.clear()
    terminal.takes_at_once = 64 << 10
    async with node.hub.view(ConsoleOptions()) as viewer, _seeing(viewer) as items:
        writing = asyncio.ensure_future(viewer.write(MUCH))
        terminal.output.put_nowait(b"alive")

        await until(lambda: _text(items) == b"alive", what="output goes on")
        await until(lambda: node.hub._writing.locked(), what="the write waits")
        writing.cancel()
        await asyncio.wait({writing})
        terminal.takes_input.set()
        await within(viewer.write(b"y"), what="others may type after a writer left")
        await until(lambda: terminal.typed.endswith(b"y"), what="what they type arrives")
    assert len(terminal.typed) < len(MUCH)


async def test_a_console_that_fails_is_attached_anew_and_viewers_stay(node: Node) -> None:
    node.runs()
    terminal = await node.terminal()
    async with node.hub.view(ConsoleOptions()) as viewer, _seeing(viewer) as items:
        terminal.output.put_nowait(b"before ")
        terminal.output.put_nowait(ZeroDivisionError("a driver's defect"))
        second = await within(_second(node), what="the hub attaches again", timeout_s=10.0)
        second.output.put_nowait(b"after")

        await until(lambda: _text(items) == b"before after", what="output goes on")
    assert terminal.closed == 1


async def _second(node: Node) -> Terminal:
    return await node.terminal(1)


@pytest.mark.parametrize("window", [0, 10_000])
async def test_a_viewer_that_takes_nothing_holds_little_and_costs_nobody_anything(
    node: Node, window: int
) -> None:
    total = 5 + (64 << 16)
    node.runs()
    terminal = await node.terminal()
    async with (
        node.hub.view(ConsoleOptions(window_bytes=window)) as stuck,
        node.hub.view(ConsoleOptions()) as quick,
        _seeing(quick) as items,
    ):
        output = stuck.output()
        terminal.output.put_nowait(b"first")
        assert await anext(output) == Data(b"first")
        for _ in range(64):
            terminal.output.put_nowait(b"x" * 65536)
            await asyncio.sleep(0)
        await within(_until_printed(node, total), what="the guest is not held up")
        await until(lambda: _passed(items) == total, what="the other viewer gets on")

        on_the_way = stuck.waiting_bytes
        following = await anext(output)
        kept = stuck.waiting_bytes

    # A frame has half the scrollback of 4 KiB, but for the first and the last.
    frames = on_the_way // 2048 + 2
    assert 0 < on_the_way <= (window or OWN_WINDOW_BYTES) + frames * HEADER_BYTES
    assert isinstance(following, Data)
    assert len(following.data) <= MESSAGE_BYTES
    assert kept + len(following.data) <= on_the_way


def _passed(items: list[Output]) -> int:
    return sum(
        len(item.data) if isinstance(item, Data) else item.count
        for item in items
        if isinstance(item, Data | Skipped)
    )


async def test_credit_is_what_a_viewer_with_a_window_gets(node: Node) -> None:
    node.runs()
    terminal = await node.terminal()
    async with node.hub.view(ConsoleOptions(window_bytes=4)) as viewer, _seeing(viewer) as items:
        terminal.output.put_nowait(b"0123456789")
        await until(lambda: _text(items) == b"0123", what="the window is used")
        viewer.grant(3)
        await until(lambda: _text(items) == b"0123456", what="the credit is used")

        with pytest.raises(InvalidArgument):
            viewer.grant(MAX_WINDOW_BYTES + 1)
    async with node.hub.view(ConsoleOptions()) as viewer:
        with pytest.raises(InvalidArgument):
            viewer.grant(1)


async def test_viewers_end_with_the_exit_code_that_comes_after_the_last_output(node: Node) -> None:
    node.runs()
    terminal = await node.terminal()
    async with node.hub.view(ConsoleOptions()) as viewer, _seeing(viewer) as items:
        terminal.output.put_nowait(b"bye")
        terminal.output.put_nowait(b"")
        await until(lambda: terminal.closed, what="the console is let go")
        node.ended(exit_code=7)

        await until(lambda: items and isinstance(items[-1], Ended), what="the viewer ends")
    assert items == [Data(b"bye"), Ended(End.EXITED, 7)]


async def test_what_is_typed_into_the_end_of_a_run_is_told_as_its_end(node: Node) -> None:
    node.runs()
    terminal = await node.terminal()
    async with node.hub.view(ConsoleOptions()) as viewer, _seeing(viewer) as items:
        terminal.takes_input.clear()
        writing = asyncio.ensure_future(viewer.write(MUCH))
        await until(lambda: node.hub._writing.locked(), what="the write waits")
        terminal.input_ended = True
        terminal.takes_input.set()
        terminal.output.put_nowait(b"")
        await until(lambda: terminal.closed, what="the console is let go")
        node.ended(exit_code=7)

        with pytest.raises(FailedPrecondition) as caught:
            await within(writing, what="the write ends")
        await until(lambda: items, what="the viewer ends")
    assert caught.value.reason == "NOT_RUNNING"
    assert items == [Ended(End.EXITED, 7)]


async def test_an_input_that_breaks_while_the_instance_runs_is_told_as_it_is(node: Node) -> None:
    node.runs()
    (await node.terminal()).input_ended = True
    async with node.hub.view(ConsoleOptions()) as viewer:
        with pytest.raises(FailedPrecondition) as caught:
            await within(_type_for_ever(viewer), what="the end of the input is told")
    assert caught.value.reason == "CONSOLE_ENDED"


async def _type_for_ever(viewer: Viewer) -> None:
    while True:
        await viewer.write(b"x")


async def test_a_restart_keeps_viewers(node: Node) -> None:
    node.runs(0)
    first = await node.terminal()
    async with node.hub.view(ConsoleOptions()) as viewer, _seeing(viewer) as items:
        first.output.put_nowait(b"one ")
        first.output.put_nowait(b"")
        node.runs(1)
        second = await node.terminal(1)
        second.output.put_nowait(b"two")

        await until(lambda: _text(items) == b"one two", what="the viewer sees both runs")


async def test_a_viewer_that_comes_right_after_the_start_waits_for_the_attachment(node: Node) -> None:
    node.refuse = [Unavailable("not yet") for _ in range(2)]
    node.runs()

    with pytest.raises(Unavailable):
        async with node.hub.view(ConsoleOptions()):
            await until(lambda: False, what="never")
    await node.terminal()

    async with node.hub.view(ConsoleOptions()) as viewer:
        assert viewer.resizable


async def test_a_driver_without_consoles_says_so(node: Node) -> None:
    node.refuse = [Unimplemented("no console", reason="CAPABILITY_MISSING")]
    node.runs()

    with pytest.raises(Unimplemented):
        async with node.hub.view(ConsoleOptions()):
            pass


async def test_a_stopped_instance_has_no_console_and_a_started_one_has(node: Node) -> None:
    node.runs(0)
    (await node.terminal()).output.put_nowait(b"")
    node.ended(0)

    with pytest.raises(FailedPrecondition) as caught:
        async with node.hub.view(ConsoleOptions()):
            pass

    assert caught.value.reason == "NOT_RUNNING"
    node.runs(1)
    async with node.hub.view(ConsoleOptions()) as viewer:
        assert viewer.resizable


async def test_output_of_a_run_that_ended_before_the_attachment_is_kept(node: Node) -> None:
    node.ended(0, exit_code=0)

    terminal = await node.terminal()
    terminal.output.put_nowait(b"quick words")
    terminal.output.put_nowait(b"")

    await within(_until_printed(node, len(b"quick words")), what="the output is taken")


async def test_all_viewers_are_let_go_at_the_agents_end(node: Node) -> None:
    node.runs()
    await node.terminal()
    async with node.hub.view(ConsoleOptions(read_only=True)) as viewer, _seeing(viewer) as items:
        node.hub.end(End.DETACHED)

        await until(lambda: items, what="the viewer ends")
    assert items == [Ended(End.DETACHED)]


async def test_a_resize_reaches_the_terminal(node: Node) -> None:
    node.runs()
    terminal = await node.terminal()
    async with node.hub.view(ConsoleOptions()) as viewer:
        await viewer.resize(ConsoleSize(100, 30))

    assert terminal.sizes == [ConsoleSize(100, 30)]


async def test_a_read_only_viewer_may_neither_type_nor_resize(node: Node) -> None:
    node.runs()
    terminal = await node.terminal()
    async with node.hub.view(ConsoleOptions(read_only=True)) as viewer:
        for call in (viewer.write(b"x"), viewer.resize(ConsoleSize(1, 1))):
            with pytest.raises(FailedPrecondition) as caught:
                await call
            assert caught.value.reason == "CONSOLE_READ_ONLY"

    assert (terminal.typed, terminal.sizes) == (b"", [])


class Over(Terminal):
    """A console of descriptors whose output is at its end."""

    def endpoint(self) -> ConsoleEndpoint:
        ours, theirs = socket.socketpair()
        theirs.close()
        self.held = ours
        return ConsoleEndpoint(output=ours.fileno(), input=None)

    async def close(self) -> None:
        self.held.close()


async def test_an_output_that_ends_while_it_is_handed_over_is_seen_to_end(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = asyncio.Event()
    hand_over, run_ended = node.holder.attach, node.hub.run_ended

    async def slowly(*args: Any, **more: Any) -> ConsoleState:
        state = await hand_over(*args, **more)
        await told.wait()
        return state

    def tell(run: str, position: int) -> None:
        run_ended(run, position)
        told.set()

    monkeypatch.setattr(node.holder, "attach", slowly)
    monkeypatch.setattr(node.hub, "run_ended", tell)
    monkeypatch.setattr(f"{__name__}.Terminal", Over)
    node.runs()
    async with node.hub.view(ConsoleOptions()) as viewer, _seeing(viewer) as items:
        node.ended(exit_code=3)
        await until(lambda: items == [Ended(End.EXITED, 3)], what="the viewer is told")
