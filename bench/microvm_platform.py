"""Claims: a Firecracker microVM made through the whole platform says its first word within 3 times what a bare VMM
takes that a script starts, and within 60 ms; one that goes back to a snapshot answers sooner than one that boots; 50
and 500 made at once all run and answer; the node's processes need less than 1 MiB more for each.

Ours: server, agent and console holder of the release, one node, driven over gRPC as any client does: CreateInstance,
which returns when the instance runs, and AttachConsole with all that is kept of the output. Once as the platform is by
default, with jails, and once without. The reference: Firecracker of the same binary, spawned with pipes, its API called
by http.client, the same guest of a few kilobytes and the same memory; once bare and once below its jailer; no control
group, no record, no console that outlives anybody. Machines are ended and removed outside the clock. Needs root,
/dev/kvm, and what `make dev` puts into .venv/share.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
from measure import Claim, claim, interleave, interleave_all, publish, unmeasured
from measure_cgroups import end_tidily
from measure_microvms import MEMORY_MIB, Bare, scratch

from hvtest_microvms import FIRECRACKER, GUEST, JAILER, missing
from hvtest_programs import ProgramCluster
from hypervisor.agent.drivers.microvm.control_groups import ControlGroups
from hypervisor.agent.drivers.microvm.processes import processes_in
from hypervisor.core.ids import new_id
from hypervisor.v1 import compute_pb2, compute_pb2_grpc, instance_pb2

PAIRS = 20
AT_ONCE, AT_ONCE_PAIRS = 50, 3
MANY = 500
SMALL_CORES, SMALL_MIB = 0.3, 32
CLOSERS = 16
"""How many are looked at, or deleted, at the same time outside the clock."""
FIRST_UID = 1_500_000_000
UIDS = 65_536
CALL_S = 300.0
HELLO = b"HELLO\r\n"


class Platform:
    """A server with one node, and a client of it."""

    def __init__(self, cluster: ProgramCluster, kernel: Path, channel: grpc.aio.Channel) -> None:
        self.cluster = cluster
        self._kernel = kernel
        self._compute: Any = compute_pb2_grpc.ComputeServiceStub(channel)

    async def create(self, *, cpu_cores: float = 1.0, memory_mib: int = MEMORY_MIB) -> str:
        """The id of one that runs."""
        spec = instance_pb2.InstanceSpec(
            kernel_path=str(self._kernel), cpu_cores=cpu_cores, memory_mb=memory_mib
        )
        draft = instance_pb2.Instance(name=new_id("b"), type=instance_pb2.INSTANCE_TYPE_MICROVM, spec=spec)
        done = await self._compute.CreateInstance(
            compute_pb2.CreateInstanceRequest(instance=draft), timeout=CALL_S
        )
        assert done.instance.status == instance_pb2.INSTANCE_STATUS_RUNNING, done
        return str(done.instance.id)

    async def delete(self, instance: str) -> None:
        """Remove it."""
        await self._compute.DeleteInstance(
            compute_pb2.DeleteInstanceRequest(instance=instance, force=True), timeout=CALL_S
        )

    async def stop(self, instance: str) -> None:
        """End it at once."""
        request = compute_pb2.StopInstanceRequest(instance=instance)
        request.stop.force = True
        await self._compute.StopInstance(request, timeout=CALL_S)

    async def start(self, instance: str) -> None:
        """From the beginning."""
        await self._compute.StartInstance(compute_pb2.StartInstanceRequest(instance=instance), timeout=CALL_S)

    async def snapshot(self, instance: str, name: str) -> None:
        """Keep its memory."""
        request = compute_pb2.CreateSnapshotRequest(instance=instance, snapshot=name)
        await self._compute.CreateSnapshot(request, timeout=CALL_S)

    async def restore(self, instance: str, name: str) -> None:
        """Go back to what was kept."""
        request = compute_pb2.RestoreSnapshotRequest(instance=instance, snapshot=name)
        await self._compute.RestoreSnapshot(request, timeout=CALL_S)

    async def shows(self, instance: str, wanted: bytes, *, typed: bytes = b"") -> None:
        """Return once its console has shown this, after something was typed or from its beginning on."""
        call = self._compute.AttachConsole(timeout=CALL_S)
        try:
            replay = 0 if typed else -1
            opened = instance_pb2.ConsoleInput.Open(instance=instance, replay_bytes=replay)
            await call.write(instance_pb2.ConsoleInput(open=opened))
            if typed:
                await call.write(instance_pb2.ConsoleInput(data=typed))
            text = b""
            while wanted not in text:
                message = await call.read()
                assert message is not grpc.aio.EOF, text
                text += message.data
        finally:
            call.cancel()

    async def answers(self, instance: str) -> None:
        """Return once its guest has done what was typed."""
        await self.shows(instance, b"\r\nx\r\n", typed=b"echo x\n")

    async def running(self) -> int:
        """How many instances run; all there are have to."""
        found, token = 0, ""
        while True:
            page = await self._compute.ListInstances(
                compute_pb2.ListInstancesRequest(page_size=500, page_token=token), timeout=CALL_S
            )
            states = {instance_pb2.InstanceStatus.Name(one.status) for one in page.instances}
            assert states <= {"INSTANCE_STATUS_RUNNING"}, states
            found += len(page.instances)
            token = page.next_page_token
            if not token:
                return found

    def memory_bytes(self) -> int:
        """Of the agent and the console holder: what they share with nobody, and their part of what they share."""
        pids = (self.cluster.agent.pid, *self.cluster.console_holders())
        return sum(_pss_bytes(pid) for pid in pids)


def _pss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"the kernel does not tell what process {pid} has in memory")


@contextlib.contextmanager
def platform(runner: asyncio.Runner, *, jail: bool) -> Iterator[Platform]:
    """A cluster; nothing of it is left afterwards, however it ends."""
    with contextlib.ExitStack() as stack:
        directories = [Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp")) for prefix in ("hvm", "hvg")]
        for directory in directories:
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
        run_dir, kernels = directories
        shutil.copyfile(GUEST, kernels / "guest.elf")
        cluster = ProgramCluster(
            Path(os.environ["HYPERVISOR_BIN"]).parent,
            # Hundreds of guests that do nothing, on a machine that has not so much.
            server_keys={
                "scheduler.overcommit.cpu": "100",
                "scheduler.overcommit.memory": "100",
                # As by default; tests have them shorter.
                "heartbeat.interval": "10s",
                "heartbeat.timeout": "30s",
            },
            agent_keys={
                "drivers.enabled": "container,microvm",
                "machines.roots": str(kernels),
                "microvm.run_dir": str(run_dir),
                "microvm.firecracker": str(FIRECRACKER),
                "microvm.jailer": str(JAILER),
                "microvm.vmm": "firecracker",
                "microvm.jail": "true" if jail else "false",
                # Other agents may have microVMs on the same machine.
                "microvm.first_uid": str(FIRST_UID),
            },
        )
        stack.enter_context(cluster)
        stack.callback(_end_what_is_left, cluster.directory)
        channel = grpc.aio.insecure_channel(cluster.address)
        stack.callback(lambda: runner.run(channel.close()))
        yield Platform(cluster, kernels / "guest.elf", channel)


def _end_what_is_left(directory: Path) -> None:
    """After a benchmark that failed; otherwise there is nothing."""
    groups = ControlGroups(Path("/sys/fs/cgroup"), "hypervisor-microvms")
    microvms = directory / "microvms"
    names = os.listdir(microvms / "instances") if (microvms / "instances").exists() else []
    for name in names:
        for run in processes_in((microvms,), uids=range(FIRST_UID, FIRST_UID + UIDS), word=name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(run.pid, signal.SIGKILL)
        groups.remove(name)


async def of_each(items: Sequence[str], do: Callable[[str], Any]) -> None:
    """Some at a time."""
    gate = asyncio.Semaphore(CLOSERS)

    async def one(item: str) -> None:
        async with gate:
            await do(item)

    async with asyncio.TaskGroup() as group:
        for item in items:
            group.create_task(one(item))


def first_words(runner: asyncio.Runner, ours: Platform, *, jail: bool) -> list[Claim]:
    """From the call to the first bytes on the console."""

    async def word() -> float:
        begin = time.perf_counter()
        instance = await ours.create()
        await ours.shows(instance, b"H")
        took = time.perf_counter() - begin
        await ours.delete(instance)
        return took

    with scratch() as directory:
        numbers = iter(range(10**6))

        def bare(*, jailed: bool) -> float:
            begin = time.perf_counter()
            vmm = Bare(directory, next(numbers), jailed=jailed)
            said = vmm.read()
            took = time.perf_counter() - begin
            assert said.startswith(b"H")
            vmm.end()
            return took

        runs = [lambda: runner.run(word()), lambda: bare(jailed=False)]
        if jail:
            runs.append(lambda: bare(jailed=True))
        mine, theirs, *jailed = interleave_all(runs, pairs=PAIRS)
    where = "jailed, as by default" if jail else "without a jail"
    name = f"CreateInstance to first console byte through the platform, {where}"
    claims = [claim(name, mine, theirs, unit="s", reference_name="bare Firecracker", better="less", goal=3.0)]
    claims += [
        claim(
            name, mine, their, unit="s", reference_name="Firecracker by its jailer", better="less", goal=3.0
        )
        for their in jailed
    ]
    claims.append(
        claim(name, mine, [0.060] * len(mine), unit="s", reference_name="60 ms", better="less", goal=1.0)
    )
    return claims


def restored(runner: asyncio.Runner, ours: Platform) -> Claim:
    """A snapshot that goes on, against a start, both until the guest answers."""
    instance = runner.run(ours.create())
    runner.run(ours.shows(instance, HELLO))
    runner.run(ours.snapshot(instance, "warm"))

    async def timed(*, restore: bool) -> float:
        await ours.stop(instance)
        begin = time.perf_counter()
        await (ours.restore(instance, "warm") if restore else ours.start(instance))
        await ours.answers(instance)
        return time.perf_counter() - begin

    mine, theirs = interleave(
        lambda: runner.run(timed(restore=True)), lambda: runner.run(timed(restore=False)), pairs=PAIRS
    )
    runner.run(ours.delete(instance))
    return claim(
        "restored from a snapshot to an answer through the platform, jailed",
        mine,
        theirs,
        unit="s",
        reference_name="a fresh start of the same",
        better="less",
        goal=1.0,
        note="the guest boots in a millisecond: what a kernel needs to boot is saved on top of this",
    )


async def made_at_once(ours: Platform, number: int) -> tuple[float, list[str]]:
    """Seconds until each of so many has said its word, and their ids. All have to run and to answer."""

    async def one() -> str:
        instance = await ours.create(cpu_cores=SMALL_CORES, memory_mib=SMALL_MIB)
        await ours.shows(instance, HELLO)
        return instance

    begin = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one()) for _ in range(number)]
    took = time.perf_counter() - begin
    instances = [task.result() for task in tasks]
    assert await ours.running() == number
    await of_each(instances, ours.answers)
    return took, instances


def bare_at_once(number: int) -> float:
    """The same by a script."""
    with scratch() as directory:
        begin = time.perf_counter()
        vmms = [Bare(directory, index, memory_mib=SMALL_MIB) for index in range(number)]
        for vmm in vmms:
            assert vmm.read().startswith(b"H")
        took = time.perf_counter() - begin
        for vmm in vmms:
            vmm.end()
    return took


def _at_once_claim(number: int, mine: Sequence[float], theirs: Sequence[float]) -> Claim:
    return claim(
        f"{number} created at once through the platform to the last first word, jailed, for each",
        [took / number for took in mine],
        [took / number for took in theirs],
        unit="s",
        reference_name="bare Firecrackers of a script",
        better="less",
        goal=3.0,
        note=f"{number} of {number} RUNNING, and each console answered",
    )


def at_once(runner: asyncio.Runner, ours: Platform) -> Claim:
    """Some at once."""

    async def run() -> float:
        took, instances = await made_at_once(ours, AT_ONCE)
        await of_each(instances, ours.delete)
        return took

    mine, theirs = interleave(lambda: runner.run(run()), lambda: bare_at_once(AT_ONCE), pairs=AT_ONCE_PAIRS)
    return _at_once_claim(AT_ONCE, mine, theirs)


def many_at_once(runner: asyncio.Runner, ours: Platform) -> list[Claim]:
    """Many at once, and the memory they take of the node's own processes."""

    async def warm() -> None:
        # What the first ones bring along is the agent's, not an instance's.
        _, instances = await made_at_once(ours, 10)
        await of_each(instances, ours.delete)

    runner.run(warm())
    before = ours.memory_bytes()
    theirs = bare_at_once(MANY)
    mine, instances = runner.run(made_at_once(ours, MANY))
    growth = (ours.memory_bytes() - before) / MANY
    runner.run(of_each(instances, ours.delete))
    return [
        _at_once_claim(MANY, [mine], [theirs]),
        claim(
            f"memory of agent and console holder for each of {MANY} microVMs",
            [growth],
            [float(1 << 20)],
            unit="B",
            reference_name="1 MiB",
            better="less",
            goal=1.0,
            note="proportional set size, before and after",
        ),
    ]


def main() -> None:
    """Measure and publish."""
    end_tidily()
    if why := missing():
        name = "CreateInstance to first console byte through the platform"
        publish([unmeasured(name, reference_name="bare Firecracker", better="less", goal=3.0, why=why)])
        return
    claims: list[Claim] = []
    with asyncio.Runner() as runner:
        with platform(runner, jail=False) as ours:
            claims += first_words(runner, ours, jail=False)
        with platform(runner, jail=True) as ours:
            claims += first_words(runner, ours, jail=True)
            claims.append(restored(runner, ours))
            claims.append(at_once(runner, ours))
        # Anew: what was freed by others would be used again.
        with platform(runner, jail=True) as ours:
            claims += many_at_once(runner, ours)
    publish(claims)


if __name__ == "__main__":
    sys.exit(main())
