"""Durable creates a second through the control plane, beside the bare limit of the same store.

Ours: ``CALLERS`` callers at once, each calling the control plane's ``Instances.create`` and waiting for the instance to
run, over the real store (SQLite; etcd of one member). Inside the clock is all the control plane does for a create:
scheduling, the transaction that reserves (instance, name, allocation, operation), driving the operation, the fake
driver's create and start, the transaction that ends it (instance, operation), and its own watch, until the caller has
its answer and the server has seen its revision; with a server's logging and collector settings. Outside: gRPC and
validation of the API (get_instance.py measures such a call), the agent's gRPC and journal: the driver is called in this
process.

A figure is the keys written a second: of each create the two versions of its instance, the two of its operation and
its name; allocations, which creates share, are not counted. After each run every one of them is read from the store,
which has to hold the instance, running, and the operation, succeeded, both rewritten since they were made, and the
name; and the allocations have to be the sum of the instances.

Reference: the same number of keys, with values of the same sizes, by a client that does nothing else: 32 puts in a
transaction; sqlite3 one transaction after another, etcd 16 at once.

Single: one create after another, the median of each run less the time inside the driver, beside the time allowed. The
note has the least it can take: two bare transactions of its four and its two keys, one after the other.
"""

import asyncio
import gc
import itertools
import random
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc.aio
import uvloop
from etcdserverpb import rpc_pb2 as pb
from etcdserverpb import rpc_pb2_grpc
from measure import Claim, Reference, claim, interleave, publish, unmeasured
from measure_etcd import RunningEtcd, running_etcd

from hvtest_control_plane import add_node, registration
from hypervisor.agent.drivers.driver import Assignment
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.core.clock import SystemClock
from hypervisor.core.consoles import ConsoleOptions, LogOptions, LogPiece
from hypervisor.core.ids import new_id
from hypervisor.core.images import ImageSource
from hypervisor.core.logging import LogFormat, configure
from hypervisor.core.model import (
    Allocation,
    Instance,
    InstanceSpec,
    InstanceStats,
    Node,
    Observation,
    OperationRecord,
    decode,
)
from hypervisor.core.resources import GIB, ZERO, Resources
from hypervisor.core.states import DesiredState, InstanceStatus, InstanceType, OperationState
from hypervisor.server import keys
from hypervisor.server.agents import CallContext
from hypervisor.server.control_plane import ControlPlane, ControlPlaneSettings, ImageSettings
from hypervisor.server.records import NameClaim
from hypervisor.server.scheduler.default import DefaultScheduler
from hypervisor.server.services import Caller, ConsoleSession, InstanceDraft, Mutation
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.open import open_storage
from hypervisor.server.store.storage import Item, Storage

PAIRS = 7
NODES = 8
CALLERS = 256
CREATES = 2000
SINGLES = 100
KEYS_OF_A_CREATE = 5
PUTS = 32
ALLOWED_MS = 3.0
ETCD_CALLERS = 16

_serial = itertools.count()


class FakeAgent:
    """A node whose fake driver is called in this process. Notes how long each create took in it."""

    def __init__(self) -> None:
        self._driver = FakeDriver(FakeConfig(), clock=SystemClock())
        self.times_s: list[float] = []

    async def create(
        self, instance: Instance, context: CallContext, *, start: bool, images: tuple[ImageSource, ...] = ()
    ) -> Observation:
        begin = time.perf_counter()
        await self._driver.create(
            Assignment(
                instance_id=instance.id,
                name=instance.name,
                project=instance.project,
                type=instance.type,
                spec=instance.spec,
                generation=instance.generation,
                epoch=instance.epoch,
            )
        )
        seen = await (self._driver.start(instance.id) if start else self._driver.get(instance.id))
        self.times_s.append(time.perf_counter() - begin)
        return seen

    async def list(self, context: CallContext) -> tuple[Observation, ...]:
        return await self._driver.list()

    async def start(self, instance: Instance, context: CallContext) -> Observation:
        raise AssertionError("this benchmark only creates")

    async def stop(self, instance: Instance, context: CallContext, *, grace_s: float) -> Observation:
        raise AssertionError("this benchmark only creates")

    async def restart(self, instance: Instance, context: CallContext, *, grace_s: float) -> Observation:
        raise AssertionError("this benchmark only creates")

    async def delete(self, instance: Instance, context: CallContext, *, grace_s: float) -> bool:
        raise AssertionError("this benchmark only creates")

    async def stats(self, instance_id: str, context: CallContext) -> InstanceStats:
        raise AssertionError("this benchmark only creates")

    def watch_stats(
        self, instance_id: str, context: CallContext, *, interval_s: float
    ) -> AsyncIterator[InstanceStats]:
        raise AssertionError("this benchmark only creates")

    async def attach_console(
        self,
        instance_id: str,
        context: CallContext,
        options: ConsoleOptions,
    ) -> ConsoleSession:
        raise AssertionError("this benchmark only creates")

    def logs(
        self, instance_id: str, context: CallContext, options: LogOptions
    ) -> AsyncGenerator[LogPiece, None]:
        raise AssertionError("this benchmark only creates")


class FakeAgents:
    """The agents by node."""

    def __init__(self) -> None:
        self._by_node: dict[str, FakeAgent] = {}

    def agent(self, node: Node) -> FakeAgent:
        found = self._by_node.get(node.id)
        if found is None:
            found = self._by_node[node.id] = FakeAgent()
        return found

    def take_times(self) -> list[float]:
        """How long the creates took that ended since the last time."""
        taken = [t for agent in self._by_node.values() for t in agent.times_s]
        for agent in self._by_node.values():
            agent.times_s.clear()
        return taken


@dataclass(frozen=True, slots=True)
class Sizes:
    """Length of the keys and values of one create, as the store holds them."""

    instance: tuple[int, int]
    operation: tuple[int, int]
    name: tuple[int, int]
    allocation: tuple[int, int]

    def puts(self) -> Sequence[tuple[int, int]]:
        """The keys that are counted."""
        return (self.instance, self.instance, self.operation, self.operation, self.name)


class Meter:
    """Wall and processor time of one side; on a shared machine the latter moves less."""

    def __init__(self, etcd: RunningEtcd | None) -> None:
        self._etcd = etcd
        self._keys = 0
        self._client_s = 0.0
        self._store_s = 0.0

    @contextmanager
    def measuring(self, keys_written: int) -> Iterator[list[float]]:
        """Measure what is inside; the list then has the keys written a second."""
        rate: list[float] = []
        client_s, store_s = time.process_time(), self._etcd.cpu_s() if self._etcd else 0.0
        begin = time.perf_counter()
        yield rate
        rate.append(keys_written / (time.perf_counter() - begin))
        self._keys += keys_written
        self._client_s += time.process_time() - client_s
        self._store_s += self._etcd.cpu_s() - store_s if self._etcd else 0.0

    def __str__(self) -> str:
        client, store = (1e6 * s / self._keys for s in (self._client_s, self._store_s))
        return f"{client:.0f} us" + (f" and {store:.0f} us in etcd" if self._etcd else "")


class Bare(Protocol):
    """The reference: a client of the store alone."""

    async def write(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Write one key of each size, ``PUTS`` in a transaction."""
        ...

    async def transaction(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Write one key of each size, durably."""
        ...


def fresh_rows(sizes: Sequence[tuple[int, int]]) -> list[tuple[str, bytes]]:
    """Keys that were never written, and values."""
    return [(f"/bench/{next(_serial):09d}".ljust(key, "-"), b"v" * value) for key, value in sizes]


class BareSqlite:
    """sqlite3 with the least that is durable: one table, WAL, synchronous=FULL."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE kv (key TEXT PRIMARY KEY, value BLOB)")

    async def write(self, sizes: Sequence[tuple[int, int]]) -> None:
        for batch in _batched(sizes):
            await self.transaction(batch)

    async def transaction(self, sizes: Sequence[tuple[int, int]]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany("INSERT OR REPLACE INTO kv VALUES (?, ?)", fresh_rows(sizes))
        self._connection.execute("COMMIT")


class BareEtcd:
    """grpc.aio and transactions without compares."""

    def __init__(self, stub: "rpc_pb2_grpc.KVAsyncStub") -> None:
        self._stub = stub

    async def write(self, sizes: Sequence[tuple[int, int]]) -> None:
        left = iter(_batched(sizes))

        async def caller() -> None:
            for batch in left:
                await self.transaction(batch)

        async with asyncio.TaskGroup() as group:
            for _ in range(ETCD_CALLERS):
                group.create_task(caller())

    async def transaction(self, sizes: Sequence[tuple[int, int]]) -> None:
        puts = [pb.PutRequest(key=key.encode(), value=value) for key, value in fresh_rows(sizes)]
        answer = await self._stub.Txn(pb.TxnRequest(success=[pb.RequestOp(request_put=put) for put in puts]))
        assert len(answer.responses) == len(sizes), answer


def _batched(sizes: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
    return [sizes[at : at + PUTS] for at in range(0, len(sizes), PUTS)]


async def all_items(storage: Storage) -> dict[str, Item]:
    """Everything in the store."""
    items: dict[str, Item] = {}
    start, revision = "", None
    while True:
        page = await storage.list(keys.PREFIX, start_key=start, limit=5000, revision=revision)
        items.update((item.key, item) for item in page.items)
        start, revision = page.next_key, page.revision
        if not start:
            return items


class Creates:
    """A control plane and what is measured of it."""

    def __init__(self, plane: ControlPlane, storage: Storage, agents: FakeAgents) -> None:
        self._plane = plane
        self._storage = storage
        self._agents = agents
        # Until the first run, whose figure is not counted.
        self.sizes = Sizes((0, 0), (0, 0), (0, 0), (0, 0))

    async def many(self, count: int, meter: Meter) -> float:
        """Create so many with ``CALLERS`` at once; keys a second."""
        done: list[OperationRecord] = []
        left = iter(range(count))

        async def caller() -> None:
            for _ in left:
                made = await self._create()
                done.append(made)

        with meter.measuring(count * KEYS_OF_A_CREATE) as rate:
            async with asyncio.TaskGroup() as group:
                for _ in range(CALLERS):
                    group.create_task(caller())
        assert len({operation.object_id for operation in done}) == count
        self._agents.take_times()
        await self._verify(done)
        return rate[0]

    async def singles(self, count: int) -> float:
        """Create so many one after another; the median of the seconds that were not the driver's."""
        done = []
        times = []
        for _ in range(count):
            self._agents.take_times()
            begin = time.perf_counter()
            done.append(await self._create())
            took = time.perf_counter() - begin
            (driver_s,) = self._agents.take_times()
            times.append(took - driver_s)
        await self._verify(done)
        return statistics.median(times)

    async def _create(self) -> OperationRecord:
        order = InstanceDraft(
            name=f"web-{uuid.uuid4().hex[:16]}",
            project="default",
            type=InstanceType.CONTAINER,
            spec=InstanceSpec(image="docker.io/library/nginx:1.27", cpu_millis=100, memory_mb=64),
            labels={"app": "web", "tier": "front"},
            desired=DesiredState.RUNNING,
        )
        mutation = Mutation(Caller("bench", uuid.uuid4().hex), "", "0" * 64, True)
        return (await self._plane.instances.create(order, mutation)).value

    async def _verify(self, operations: Sequence[OperationRecord]) -> None:
        """Every create is in the store, finished; what is reserved is the sum of what is placed."""
        items = await all_items(self._storage)
        for operation in operations:
            instance_item = items[keys.instance(operation.object_id).path]
            instance = decode(Instance, instance_item.value, key=instance_item.key)
            assert (instance.status, instance.operation_id) == (InstanceStatus.RUNNING, ""), instance
            operation_item = items[keys.operation(operation.id).path]
            recorded = decode(OperationRecord, operation_item.value, key=operation_item.key)
            assert recorded.state is OperationState.SUCCEEDED, recorded
            name_item = items[keys.name(instance.project, instance.name).path]
            assert decode(NameClaim, name_item.value, key=name_item.key).instance_id == instance.id
            assert instance_item.create_revision == operation_item.create_revision == name_item.mod_revision
            assert instance_item.mod_revision == operation_item.mod_revision > name_item.mod_revision
        allocation_item = _check_allocations(items)
        shown = (instance_item, operation_item, name_item, allocation_item)
        self.sizes = Sizes(*((len(item.key), len(item.value)) for item in shown))


def _check_allocations(items: dict[str, Item]) -> Item:
    """Each allocation is the sum of the instances placed on its node; returns one."""
    placed: dict[str, list[Resources]] = {}
    for path, item in items.items():
        if path.startswith(keys.instance("").path):
            instance = decode(Instance, item.value, key=path)
            placed.setdefault(instance.node_id, []).append(instance.spec.resources)
    found = [item for path, item in items.items() if path.startswith(keys.allocation("").path)]
    assert len(found) == NODES
    for item in found:
        held = decode(Allocation, item.value, key=item.key)
        here = placed.pop(held.node_id, [])
        assert (held.reserved, held.instances) == (sum(here, ZERO), len(here)), held
    assert not placed, f"instances on nodes without an allocation: {list(placed)}"
    return found[0]


@asynccontextmanager
async def control_plane(storage: Storage) -> AsyncIterator[Creates]:
    """A server's control plane with its default settings, and ``NODES`` nodes that are as large as it takes."""
    agents = FakeAgents()
    settings = ControlPlaneSettings(
        server_id=new_id("s"),
        address="127.0.0.1:50051",
        version="bench",
        images=ImageSettings(Path(tempfile.gettempdir()) / new_id("none")),
    )
    plane = ControlPlane(
        storage,
        agents,
        DefaultScheduler(),
        SystemClock(),
        new_id=new_id,
        rng=random.Random(1),
        settings=settings,
    )
    running = asyncio.create_task(plane.run(), name="control-plane")
    try:
        async with AsyncExitStack() as stack:
            await plane.ready()
            for number in range(NODES):
                joining = registration(f"node-{number}", cpu_cores=100_000, memory_bytes=100_000 * GIB)
                await stack.enter_async_context(add_node(plane, joining))
            yield Creates(plane, storage, agents)
    finally:
        running.cancel()
        await asyncio.wait({running})


class Bench:
    """Both sides over one store."""

    def __init__(
        self, runner: asyncio.Runner, creates: Creates, bare: Bare, *, etcd: RunningEtcd | None
    ) -> None:
        self._runner = runner
        self._creates = creates
        self._bare = bare
        self._ours, self._theirs = Meter(etcd), Meter(etcd)

    def claims(self, store: str, reference: str) -> list[Claim]:
        """Measure all."""
        mine, theirs = interleave(self._many, self._bare_many, pairs=PAIRS)
        rate = statistics.median(mine) / KEYS_OF_A_CREATE
        many = claim(
            f"durable creates, {store}, {CALLERS} callers",
            mine,
            theirs,
            unit="keys/s",
            reference_name=f"{reference}, {PUTS} puts in a transaction",
            better="more",
            goal=0.6,
            note=f"{rate:.0f} creates/s; processor time of a key: ours {self._ours}, reference {self._theirs}",
        )
        mine, theirs = interleave(self._single, self._bare_pair, pairs=PAIRS)
        single = claim(
            f"single create beyond the driver's time, p50, {store}",
            mine,
            [ALLOWED_MS] * len(mine),
            unit="ms",
            reference_name=f"{ALLOWED_MS:g} ms",
            better="less",
            goal=1.0,
            note=f"two bare transactions {statistics.median(theirs):.2f} ms",
        )
        return [many, single]

    def _many(self) -> float:
        """Our keys a second."""
        return self._runner.run(self._creates.many(CREATES, self._ours))

    def _bare_many(self) -> float:
        """The reference's keys a second."""
        return self._runner.run(self._bare_rate())

    async def _bare_rate(self) -> float:
        wanted = list(self._creates.sizes.puts()) * CREATES
        with self._theirs.measuring(len(wanted)) as rate:
            await self._bare.write(wanted)
        return rate[0]

    def _single(self) -> float:
        """Milliseconds of one create that were not the driver's."""
        return 1000 * self._runner.run(self._creates.singles(SINGLES))

    def _bare_pair(self) -> float:
        """Milliseconds of the two transactions."""
        return 1000 * self._runner.run(self._bare_pairs())

    async def _bare_pairs(self) -> float:
        sizes = self._creates.sizes
        begun = (sizes.instance, sizes.operation, sizes.name, sizes.allocation)
        ended = (sizes.instance, sizes.operation)
        times = []
        for _ in range(SINGLES):
            begin = time.perf_counter()
            await self._bare.transaction(begun)
            await self._bare.transaction(ended)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)


def measure(
    runner: asyncio.Runner, config: StoreConfig, bare: Bare, *, etcd: RunningEtcd | None
) -> list[Claim]:
    """The claims of one store."""
    storage = runner.run(open_storage(config, SystemClock()))
    context = control_plane(storage)
    creates = runner.run(context.__aenter__())
    try:
        reference = "a bare client" if etcd else "sqlite3"
        return Bench(runner, creates, bare, etcd=etcd).claims(config.backend, reference)
    finally:
        runner.run(context.__aexit__(None, None, None))
        runner.run(storage.aclose())


def sqlite_claims(runner: asyncio.Runner, directory: Path) -> list[Claim]:
    """On SQLite."""
    with closing(sqlite3.connect(directory / "bare.db", isolation_level=None)) as connection:
        config = StoreConfig(backend="sqlite", path=str(directory / "store.db"))
        return measure(runner, config, BareSqlite(connection), etcd=None)


def etcd_claims(runner: asyncio.Runner, directory: Path) -> list[Claim]:
    """On etcd."""
    binary = shutil.which("etcd")
    if binary is None:
        return [
            unmeasured(
                "durable creates, etcd",
                reference_name="a bare client",
                better="more",
                goal=0.6,
                why="etcd is not installed",
                against=Reference.LIMIT,
            )
        ]
    with running_etcd(binary, directory) as etcd:
        config = StoreConfig(backend="etcd", endpoints=(etcd.endpoint,), dial_timeout_s=30)
        channel = runner.run(_channel(etcd.endpoint))
        try:
            return measure(runner, config, BareEtcd(rpc_pb2_grpc.KVStub(channel)), etcd=etcd)
        finally:
            runner.run(channel.close(None))


async def _channel(endpoint: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(endpoint)


def main() -> None:
    """Measure and publish; names of stores as arguments measure only these."""
    stores = {"sqlite": sqlite_claims, "etcd": etcd_claims}
    with tempfile.TemporaryDirectory(prefix="hypervisor-bench-") as scratch:
        directory = Path(scratch)
        with (
            (directory / "server.log").open("w") as log,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            configure(program="hypervisor-server", format=LogFormat.JSON, stream=log)
            gc.freeze()
            gc.set_threshold(20_000, 20, 50)
            publish([c for name in sys.argv[1:] or stores for c in stores[name](runner, directory)])


if __name__ == "__main__":
    main()
