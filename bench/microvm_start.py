"""Claims: a Firecracker microVM made by the agent's driver says its first word within 3 times what a bare VMM takes
that a script starts, and within 60 ms; one that goes back to a snapshot answers sooner than one that boots; the agent
needs less than 1 MiB more for each microVM it runs.

Driver alone; microvm_platform.py has the platform around it. The reference: Firecracker of the same binary, spawned
with pipes, its API called by http.client, the same guest of a few kilobytes and the same memory; no jail, no control
group, no record, no console that outlives anybody. Ours is measured with its jail and without. Both sides' machines are
ended and removed outside the clock. Needs root, /dev/kvm, and what `make dev` puts into .venv/share.
"""

import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from measure import Claim, claim, interleave, publish, unmeasured
from measure_microvms import MEMORY_MIB, Bare, scratch

from hvtest_microvms import FirecrackerBench, assignment, missing
from hypervisor.agent.drivers.driver import Console
from hypervisor.agent.drivers.microvm import MicrovmDriver
from hypervisor.core.machines import SnapshotKind

PAIRS = 30
AT_ONCE = 50
MANY = 500
MEMORY_INSTANCES = 100
_GROWTH = "--growth"


async def seen(console: Console, wanted: bytes) -> None:
    """Read until the text was there."""
    text = b""
    while wanted not in text:
        more = await console.read()
        assert more, text
        text += more


class Ours:
    """The driver, for functions that are not coroutines."""

    def __init__(self, runner: asyncio.Runner, *, jail: bool) -> None:
        self.runner = runner
        self.node = FirecrackerBench(jail=jail)
        self.driver: MicrovmDriver = runner.run(self._open())

    async def _open(self) -> MicrovmDriver:
        return self.node.driver()

    def close(self) -> None:
        self.runner.run(self._close())
        assert self.node.leftovers() == {}
        with self.node:
            pass

    async def _close(self) -> None:
        for each in await self.driver.list():
            await self.driver.delete(each.instance_id)
        await self.driver.aclose()

    def first_word(self) -> float:
        return self.runner.run(self._first_word())

    async def _first_word(self) -> float:
        made = assignment(self.node.spec(memory_mb=MEMORY_MIB))
        begin = time.perf_counter()
        await self.driver.create(made)
        await self.driver.start(made.instance_id)
        console = await self.driver.attach(made.instance_id)
        word = await console.read()
        took = time.perf_counter() - begin
        assert word.startswith(b"H")
        await console.close()
        await self.driver.delete(made.instance_id)
        return took

    async def answering(self, work: "asyncio.Future[object]", instance_id: str) -> None:
        await work
        console = await self.driver.attach(instance_id)
        await console.write(b"echo x\n")
        await seen(console, b"\r\nx\r\n")
        await console.close()


def first_words(runner: asyncio.Runner) -> list[Claim]:
    """From create to the first byte on the console."""
    claims = []
    for jail in (True, False):
        ours = Ours(runner, jail=jail)
        try:
            with scratch() as directory:
                numbers = iter(range(10**6))

                def bare(directory: Path = directory, numbers: Iterator[int] = numbers) -> float:
                    begin = time.perf_counter()
                    vmm = Bare(directory, next(numbers))
                    word = vmm.read()
                    took = time.perf_counter() - begin
                    assert word.startswith(b"H")
                    vmm.end()
                    return took

                mine, theirs = interleave(ours.first_word, bare, pairs=PAIRS)
        finally:
            ours.close()
        where = "jailed" if jail else "without a jail"
        common = {"unit": "s", "better": "less"}
        claims.append(
            claim(
                f"create and start to first console byte, {where}",
                mine,
                theirs,
                reference_name="bare Firecracker",
                goal=3.0,
                **common,
            )
        )
        claims.append(
            claim(
                f"create and start to first console byte, {where}, against a budget",
                mine,
                [0.060] * len(mine),
                reference_name="60 ms",
                goal=1.0,
                **common,
            )
        )
    return claims


def restored(runner: asyncio.Runner) -> list[Claim]:
    """A snapshot that goes on, against a start, both until the guest answers."""
    ours = Ours(runner, jail=True)
    try:
        made = assignment(ours.node.spec(memory_mb=MEMORY_MIB))
        instance_id = made.instance_id
        runner.run(ours.driver.create(made))
        runner.run(ours.driver.start(instance_id))
        runner.run(ours.driver.create_snapshot(instance_id, "warm", kind=SnapshotKind.FULL))

        def timed(restore: bool) -> float:
            async def go() -> float:
                await ours.driver.stop(instance_id, grace_s=0.0)
                begin = time.perf_counter()
                work = (
                    ours.driver.restore_snapshot(instance_id, "warm")
                    if restore
                    else ours.driver.start(instance_id)
                )
                await ours.answering(asyncio.ensure_future(work), instance_id)
                return time.perf_counter() - begin

            return runner.run(go())

        mine, theirs = interleave(lambda: timed(True), lambda: timed(False), pairs=PAIRS)
    finally:
        ours.close()
    return [
        claim(
            "restored from a snapshot to an answer, jailed",
            mine,
            theirs,
            unit="s",
            reference_name="a fresh start of the same",
            better="less",
            goal=1.0,
            note="the guest boots in a millisecond: what a kernel needs to boot is saved on top of this",
        )
    ]


def at_once(runner: asyncio.Runner, number: int, *, pairs: int) -> Claim:
    """So many created at once until each has said its word; none may be lost."""
    ours = Ours(runner, jail=True)
    try:

        async def all_ours() -> float:
            made = [assignment(ours.node.spec(memory_mb=32)) for _ in range(number)]

            async def one(index: int) -> None:
                await ours.driver.create(made[index])
                await ours.driver.start(made[index].instance_id)
                console = await ours.driver.attach(made[index].instance_id)
                await seen(console, b"HELLO\r\n")
                await console.close()

            begin = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for index in range(number):
                    group.create_task(one(index))
            took = time.perf_counter() - begin
            assert {each.status for each in await ours.driver.list()} == {"running"}
            for each in made:
                await ours.driver.delete(each.instance_id)
            return took

        with scratch() as directory:
            numbers = iter(range(10**6))

            def all_bare() -> float:
                begin = time.perf_counter()
                vmms = [Bare(directory, next(numbers), memory_mib=32) for _ in range(number)]
                for vmm in vmms:
                    assert vmm.read().startswith(b"H")
                took = time.perf_counter() - begin
                for vmm in vmms:
                    vmm.end()
                return took

            mine, theirs = interleave(lambda: runner.run(all_ours()), all_bare, pairs=pairs)
    finally:
        ours.close()
    return claim(
        f"{number} created at once to the last first word, jailed",
        mine,
        theirs,
        unit="s",
        reference_name="bare Firecrackers one after another",
        better="less",
        goal=3.0,
        note="none lost",
    )


def memory() -> Claim:
    """What a process grows by for each microVM that its driver runs, with the console attached. In a process of its
    own: this one has memory left over that is used again."""
    done = subprocess.run(
        [sys.executable, __file__, _GROWTH],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    growth: list[float] = json.loads(done.stdout.splitlines()[-1])
    return claim(
        "memory of the agent's driver for each microVM",
        growth,
        [float(1 << 20)] * len(growth),
        unit="B",
        reference_name="1 MiB",
        better="less",
        goal=1.0,
    )


def print_growth() -> None:
    """Bytes for each of some more microVMs, several times."""
    with asyncio.Runner() as runner:
        ours = Ours(runner, jail=True)
        try:

            async def run(number: int) -> None:
                for _ in range(number):
                    made = assignment(ours.node.spec(memory_mb=32))
                    await ours.driver.create(made)
                    await ours.driver.start(made.instance_id)
                    await ours.driver.attach(made.instance_id)

            # What the first ones bring along is the driver's, not an instance's.
            runner.run(run(10))
            growth = []
            for _ in range(3):
                before = _resident_bytes()
                runner.run(run(MEMORY_INSTANCES))
                growth.append((_resident_bytes() - before) / MEMORY_INSTANCES)
        finally:
            ours.close()
    print(json.dumps(growth))


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> None:
    """Measure and publish."""
    if why := missing():
        publish(
            [
                unmeasured(
                    "create and start to first console byte",
                    reference_name="bare Firecracker",
                    better="less",
                    goal=3.0,
                    why=why,
                )
            ]
        )
        return
    with asyncio.Runner() as runner:
        claims = first_words(runner)
        claims += restored(runner)
        claims.append(at_once(runner, AT_ONCE, pairs=5))
        claims.append(at_once(runner, MANY, pairs=1))
    claims.append(memory())
    publish(claims)


if __name__ == "__main__":
    sys.exit(print_growth() if sys.argv[1:] == [_GROWTH] else main())
