"""One run: a cluster from a seed, users and faults for a while, then peace, in which everything has to settle."""

import asyncio
import gc
import random
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypervisor.agent.app as agent_app
from hvsim.checks import RuntimeTruth, StoreTruth
from hvsim.client import Client, ClientPlan
from hvsim.clock import SimClock
from hvsim.faults import FaultPlan, Faults
from hvsim.loop import Process, SimLoop, SimulationStuck
from hvsim.machine import Machine, NoConsoles, Runtime
from hvsim.network import Network
from hvsim.server import Server
from hvsim.storage import STORE_HOST, SimStore, StoreClient
from hvsim.trace import Trace
from hypervisor.agent.config import AgentSettings
from hypervisor.core import ids
from hypervisor.core.states import TRANSITIONAL, DesiredState, InstanceStatus, NodeStatus
from hypervisor.server.control_plane import ControlPlaneSettings
from hypervisor.v1 import instance_pb2

__all__ = ["Cluster", "Plan", "Result", "plan_of", "run_seed"]

_PORT = 50051
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a seed is about; drawn by :func:`plan_of`, or given by a test. Times in seconds."""

    servers: int = 2
    machines: int = 3
    clients: int = 2
    client: ClientPlan = field(default_factory=ClientPlan)
    faults: FaultPlan = field(default_factory=lambda: FaultPlan(5.0, dict.fromkeys(Faults.kinds(), 1.0)))
    turmoil_s: float = 90.0
    peace_s: float = 900.0
    """Within so long after the last fault everything must have settled."""
    drift: float = 0.002
    settings: Callable[[ControlPlaneSettings], ControlPlaneSettings] = lambda given: given


@dataclass(frozen=True, slots=True)
class Result:
    """How a run went. ``violation``: what did not hold; empty when all did."""

    seed: int
    violation: str
    digest: str
    steps: int
    virtual_s: float
    faults: int
    operations: int
    starts: int
    trace: tuple[str, ...]


def plan_of(seed: int) -> Plan:
    """The plan of a seed: its own mix of sizes and faults."""
    rng = random.Random(f"plan/{seed}")
    kinds = Faults.kinds()
    if rng.random() < 0.1:
        chosen: tuple[str, ...] = ("guest-ends",)
    elif rng.random() < 0.5:
        chosen = tuple(rng.sample(kinds, rng.randint(1, 4)))
    else:
        chosen = kinds
    weights = {kind: rng.choice((0.3, 1.0, 3.0)) for kind in chosen}
    rough = rng.random() < 0.4
    return Plan(
        servers=rng.choice((1, 2, 2, 3)),
        machines=rng.choice((1, 2, 3)),
        clients=rng.choice((1, 2, 2)),
        client=ClientPlan(names=rng.choice((2, 3, 4)), pause_s=rng.choice((0.5, 1.5, 4.0))),
        faults=FaultPlan(
            every_s=rng.choice((2.0, 5.0, 10.0)),
            weights=weights,
            loss=rng.choice((0.0, 0.005, 0.05)) if rough else 0.0,
            duplicates=rng.choice((0.0, 0.02, 0.1)) if rough else 0.0,
        ),
        turmoil_s=rng.choice((40.0, 70.0, 110.0)),
    )


class Cluster:
    """Everything of one run."""

    def __init__(self, loop: SimLoop, seed: int, plan: Plan) -> None:
        self.loop = loop
        self.plan = plan
        self._rng = random.Random(f"cluster/{seed}")
        self.trace = Trace(loop)
        self.violation = ""
        self.network = Network(loop, self._stream("network"))
        self.records = StoreTruth(self.trace, self.fail)
        self.guests = RuntimeTruth(self.trace, self.fail)
        self.store = SimStore(loop, self.records.changed)
        self._ids = self._stream("ids")
        self.addresses = tuple(f"s{n}:{_PORT}" for n in range(1, plan.servers + 1))
        self.clocks: dict[str, SimClock] = {}
        self.servers: list[Server | None] = [None] * plan.servers
        self.machines = [self._machine(n) for n in range(1, plan.machines + 1)]
        self.clients: list[Client] = []
        self.hosts = [
            STORE_HOST,
            *(address.partition(":")[0] for address in self.addresses),
            *(machine.host for machine in self.machines),
        ]
        self.faults = Faults(self, self._stream("faults"), plan.faults)

    def _stream(self, name: str) -> random.Random:
        """Randomness of its own, so that one part's draws do not shift another's."""
        return random.Random(f"{name}/{self._rng.random()}")

    def fail(self, what: str) -> None:
        """Something does not hold: the run ends."""
        if not self.violation:
            self.violation = what
            self.trace.add(f"VIOLATION {what}")
            self.loop.stop()

    def new_id(self, prefix: str) -> str:
        """As ``core.ids.new_id``, by the seed."""
        millis = 1_900_000_000_000 + int(self.loop.time() * 1000)
        return f"{prefix}-{ids._encode((millis << 80) | self._ids.getrandbits(80))}"

    def clock_of(self, host: str) -> SimClock:
        """The clock of a host: the same for all processes that ever run there."""
        if host not in self.clocks:
            drift = self.plan.drift
            self.clocks[host] = SimClock(
                self.loop,
                rate=1.0 + self._rng.uniform(-drift, drift),
                offset_s=self._rng.uniform(-0.5, 0.5),
                base=self._rng.uniform(0.0, 1e5),
            )
        return self.clocks[host]

    def _machine(self, number: int) -> Machine:
        name = f"n{number}"
        clock = self.clock_of(name)
        runtime = Runtime(
            self.loop,
            clock,
            action_s=self._rng.choice((0.0, 0.02, 0.3)),
            began=lambda instance_id, epoch: self.guests.began(name, instance_id, epoch),
            over=lambda instance_id, epoch: self.guests.over(name, instance_id, epoch),
        )
        return Machine(
            self.loop,
            name,
            network=self.network,
            clock=clock,
            rng=self._stream(name),
            new_id=self.new_id,
            servers=self.addresses[number % len(self.addresses) :]
            + self.addresses[: number % len(self.addresses)],
            settings=_agent_settings(name, self.addresses),
            runtime=runtime,
            zone=f"z{number % 2}",
            ended=self._agent_ended,
        )

    def _agent_ended(self, machine: Machine, failure: BaseException | None) -> None:
        text = "".join(traceback.format_exception(failure)) if failure else ""
        self.fail(f"the agent of {machine.name} ended by itself: {text}")

    def start_server(self, index: int) -> None:
        """Start a server where none lives."""
        running = self.servers[index]
        if running is not None and running.process.alive:
            return
        address = self.addresses[index]
        host = address.partition(":")[0]
        process = Process(self.loop, host, host)
        self.servers[index] = Server(
            process,
            address=address,
            store=lambda process, clock: StoreClient(
                self.store, self.network, process, self._stream("store"), clock
            ),
            network=self.network,
            clock=self.clock_of(host),
            rng=self._stream("server"),
            new_id=self.new_id,
            ended=self._server_ended,
            settings=self.plan.settings,
        )

    def crash_server(self, index: int) -> None:
        """``kill -9`` of a server."""
        server = self.servers[index]
        if server is not None and server.process.alive:
            server.process.crash()

    def _server_ended(self, server: Server, failure: BaseException | None) -> None:
        text = "".join(traceback.format_exception(failure)) if failure else ""
        self.fail(f"server {server.process.name} ended by itself: {text}")

    async def run(self) -> None:
        """Turmoil, then peace."""
        opening = Process(self.loop, STORE_HOST, STORE_HOST)
        await opening.start(self.store.open())
        for index in range(len(self.servers)):
            self.start_server(index)
        for machine in self.machines:
            machine.boot()
        await self._until(self._started, within_s=60.0, what="the cluster is not up")
        for number in range(1, self.plan.clients + 1):
            process = Process(self.loop, f"c{number}", f"c{number}")
            self.clients.append(
                Client(
                    process,
                    network=self.network,
                    servers=self.addresses,
                    rng=self._stream(process.name),
                    trace=self.trace,
                    fail=self.fail,
                    plan=self.plan.client,
                    create=_instance,
                )
            )
        breaking = self.loop.create_task(self.faults.run(), name="faults")
        await asyncio.sleep(self.plan.turmoil_s)
        self.faults.stop()
        await breaking
        self._mend()
        for client in self.clients:
            client.stopping = True
        self.trace.add("peace")
        await self._until(self._settled, within_s=self.plan.peace_s, what="the cluster does not settle")
        self.records.check_names()

    def _mend(self) -> None:
        for machine in self.machines:
            machine.runtime.faults._failing.clear()
        for server in self.servers:
            if server is not None:
                server.store.forget_events = 0

    def _started(self) -> str:
        if not all(server is not None and server.ready for server in self.servers):
            return "a server is not ready"
        return "" if len(self.records.nodes) == len(self.machines) else "a node has not joined"

    async def _until(self, why_not: Callable[[], str], *, within_s: float, what: str) -> None:
        until = self.loop.time() + within_s
        while cause := why_not():
            if self.loop.time() >= until:
                self.fail(f"{what} within {within_s:g} s: {cause}")
                await asyncio.sleep(1.0)
            await asyncio.sleep(_LOOK_EVERY_S)

    def _settled(self) -> str:
        """Why the cluster is not at rest; empty when it is."""
        for client in self.clients:
            if not client.done:
                return "a user waits for an answer"
        for operation in self.records.operations.values():
            if not operation.done:
                return f"operation {operation.id} ({operation.verb} {operation.object_name}) goes on"
        machines = {machine.node_id: machine for machine in self.machines}
        for node in self.records.nodes.values():
            if node.status is not NodeStatus.READY:
                return f"node {node.hostname} is {node.status.value}"
        for instance in self.records.instances.values():
            shown = (
                f"instance {instance.name} ({instance.id}) on {machines[instance.node_id].name} is "
                f"{instance.status.value} ({instance.status_reason}), wanted {instance.desired.value}"
            )
            if (
                instance.operation_id
                or instance.status in TRANSITIONAL
                or instance.status is InstanceStatus.UNKNOWN
            ):
                return shown
            if instance.desired is DesiredState.DELETED:
                return shown
            runs = self.guests.where(instance.id)
            if instance.status is InstanceStatus.RUNNING:
                if runs != {machines[instance.node_id].name: instance.epoch}:
                    return f"{shown}; it runs on {runs}"
            elif runs:
                return f"{shown}; it runs on {runs}"
        for machine in self.machines:
            placed = {i.id for i in self.records.instances.values() if i.node_id == machine.node_id}
            if left := machine.runtime.held() - placed:
                return f"{machine.name} has {sorted(left)}, which nobody has placed there"
        for server in self.servers:
            assert server is not None
            if difference := self._view_differs(server):
                return difference
        return ""

    def _view_differs(self, server: Server) -> str:
        view = server.plane.view
        if view.stale:
            return f"server {server.process.name} takes its view for stale"
        if {i.value.id: i.value for i in view.instances()} != self.records.instances:
            return f"server {server.process.name} sees other instances than the store has"
        if {n.value.id: n.value for n in view.nodes()} != self.records.nodes:
            return f"server {server.process.name} sees other nodes than the store has"
        if {o.value.id: o.value for o in view.operations()} != self.records.operations:
            return f"server {server.process.name} sees other operations than the store has"
        return ""


def _agent_settings(name: str, servers: tuple[str, ...]) -> AgentSettings:
    return AgentSettings.model_validate(
        {
            "node": {"hostname": name},
            "agent": {
                "server_address": servers,
                "data_dir": Path("/nonexistent/hypervisor-simulated") / name,
            },
            "drivers": {"enabled": ("fake",)},
            "stats": {"interval": 30.0, "slow_interval": 600.0, "history": 2},
            "metrics": {"address": ""},
            "simulated": {"cpu_cores": 4},
        }
    )


def _instance(rng: random.Random, name: str) -> instance_pb2.Instance:
    return instance_pb2.Instance(
        name=name,
        type=rng.choice(
            (
                instance_pb2.INSTANCE_TYPE_CONTAINER,
                instance_pb2.INSTANCE_TYPE_VM,
            )
        ),
        spec=instance_pb2.InstanceSpec(
            image=rng.choice(("busybox", "busybox", "busybox", "busybox", "missing")),
            cpu_cores=rng.choice((0.5, 1.0, 2.0)),
            memory_mb=64,
            command=rng.choice(((), (), (), ("sleep", "20"), ("exit", "1"))),
        ),
    )


def run_seed(seed: int, plan: Plan | None = None) -> Result:
    """Run it. The result says what did not hold."""
    plan = plan or plan_of(seed)
    with _no_real_world():
        loop = SimLoop(random.Random(f"order/{seed}"))
        cluster = Cluster(loop, seed, plan)
        cluster.trace.listen()

        def look() -> None:
            if cluster.trace.defects:
                cluster.fail(f"a defect was logged: {cluster.trace.defects[0]}")

        loop.after_step = look
        loop.set_exception_handler(lambda _, context: _unhandled(cluster, context))
        try:
            loop.run_until_complete(loop.create_task(cluster.run(), context=Context()))
        except SimulationStuck as exc:
            cluster.fail(f"the simulation is stuck: {exc}")
        except RuntimeError as exc:
            if not cluster.violation:
                cluster.violation = f"the simulation failed: {exc!r}"
        except Exception:
            cluster.violation = cluster.violation or f"the simulation failed: {traceback.format_exc()}"
        result = Result(
            seed=seed,
            violation=cluster.violation,
            digest=cluster.trace.digest(),
            steps=loop.steps,
            virtual_s=loop.time(),
            faults=cluster.faults.count,
            operations=len(cluster.records.operations),
            starts=sum(cluster.guests.starts.values()),
            trace=tuple(cluster.trace.newest),
        )
        _bury(loop)
    return result


def _unhandled(cluster: Cluster, context: dict[str, Any]) -> None:
    exc = context.get("exception")
    text = "".join(traceback.format_exception(exc)) if exc is not None else ""
    cluster.fail(f"nobody handled: {context.get('message')} {text}")


def _bury(loop: SimLoop) -> None:
    """Let go of what never ended, without a word: there is no world any more in which it could matter."""
    for kept in loop.kept:
        if isinstance(kept, asyncio.Task):
            kept._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.set_exception_handler(lambda *_: None)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loop.close()
            loop.kept.clear()
            gc.collect()
        finally:
            sys.unraisablehook = hook


@contextmanager
def _no_real_world() -> Iterator[None]:
    """No thread starts, no real time passes, and no garbage is collected in an order of its own."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("simulated code uses real time or threads")

    replaced: list[tuple[Any, str, Any]] = [
        (agent_app, "ConsoleHubs", NoConsoles),
        (threading.Thread, "start", refuse),
        (time, "time", refuse),
        (time, "time_ns", refuse),
        (time, "monotonic", refuse),
        (time, "sleep", refuse),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    enabled = gc.isenabled()
    gc.disable()
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)
        if enabled:
            gc.enable()
