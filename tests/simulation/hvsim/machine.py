"""A node: a machine with a runtime and a disk that outlive its agent, and the real agent, wired by ``app.py``."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextvars import Context
from pathlib import Path
from typing import Any, cast

from hvsim.clock import SimClock
from hvsim.disk import DiskThread, SimDisk
from hvsim.loop import Process, SimLoop
from hvsim.network import Broken, Network, TooLate
from hypervisor.agent.app import _Agent
from hypervisor.agent.cluster_link import GrpcClusterLink, NodeDescription
from hypervisor.agent.config import AgentSettings
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.agent.drivers.fake_instance import FakeInstance
from hypervisor.agent.drivers.guard import DriverDeadlines, GuardedDriver
from hypervisor.agent.drivers.health import OfferedDriver
from hypervisor.agent.drivers.registry import Drivers
from hypervisor.agent.journal import Journal
from hypervisor.core.errors import DeadlineExceeded, HypervisorError, Unavailable
from hypervisor.core.ids import IdSource
from hypervisor.core.model import Observation
from hypervisor.core.states import InstanceType, NodeRole
from hypervisor.server.failures import copy_of
from hypervisor.v1 import cluster_pb2

__all__ = ["Machine", "NoConsoles", "Runtime"]

_JOURNAL = Path("/var/lib/hypervisor/journal")
_PORT = 50052


class NoConsoles:
    """In place of the agent's consoles, which are made of sockets and threads."""

    def __init__(self, **_: Any) -> None:
        self._never = asyncio.Event()

    async def run(self) -> None:
        await self._never.wait()

    async def retain(self, instance_ids: frozenset[str]) -> None:
        """There are none."""

    def observed(self, seen: Observation) -> None:
        """There are none."""

    def deleted(self, instance_id: str) -> None:
        """There are none."""

    def detach_all(self) -> None:
        """There are none."""


class Runtime(FakeDriver):
    """The machine's runtime: its guests live whatever becomes of the agent. ``began`` and ``over`` are told of runs."""

    def __init__(
        self,
        loop: SimLoop,
        clock: SimClock,
        *,
        action_s: float,
        began: Callable[[str, int], None],
        over: Callable[[str, int], None],
    ) -> None:
        super().__init__(FakeConfig(action_s=action_s), clock=clock)
        self._loop = loop
        self._began = began
        self._over = over

    def running(self) -> dict[str, int]:
        """Epochs of the guests that run, by instance."""
        return {
            instance_id: instance.record.assignment.epoch
            for instance_id, instance in self._instances.items()
            if instance.record.running
        }

    def held(self) -> frozenset[str]:
        """All instances it has, running or not."""
        return frozenset(self._instances)

    def lose_power(self) -> None:
        """The machine dies: its guests end, what is on its disks stays."""
        for instance in self._instances.values():
            if instance.record.running:
                self._end(instance, 137)

    def reopen(self) -> None:
        """A new agent: what the one before it was not told any more is lost."""
        self._events.clear()
        self._event_waits = asyncio.Event()

    def _boot(self, instance: FakeInstance, *, resumed: bool = False) -> None:
        assignment = instance.record.assignment
        self._began(assignment.instance_id, assignment.epoch)
        super()._boot(instance, resumed=resumed)

    def _end(self, instance: FakeInstance, exit_code: int | None, **how: Any) -> None:
        super()._end(instance, exit_code, **how)
        assignment = instance.record.assignment
        self._over(assignment.instance_id, assignment.epoch)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        # Guests are nobody's children: an agent that crashes leaves them.
        task = self._loop.create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _RuntimeClient:
    """One agent's connection to the runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        runtime.reopen()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def events(self) -> AsyncIterator[Observation]:
        return self._runtime.events()

    async def aclose(self) -> None:
        """Guests live on."""


class SimLink(GrpcClusterLink):
    """The agent's real client of the servers, its calls sent over the simulated network."""

    def __init__(
        self, network: Network, process: Process, addresses: tuple[str, ...], clock: SimClock
    ) -> None:
        super().__init__(addresses, credentials=None, clock=clock)
        self._network = network
        self._process = process

    async def _call(self, method: str, request: object, _answer: type[Any]) -> Any:
        server = self.server
        error: HypervisorError
        try:
            return await self._network.call(
                self._process, server, f"agent/{method}", request, timeout_s=self._timeout_s
            )
        except Broken as exc:
            error = Unavailable(str(exc), reason="PEER_UNREACHABLE")
        except TooLate as exc:
            error = DeadlineExceeded(str(exc))
        except HypervisorError as exc:
            error = copy_of(exc)
        if isinstance(error, Unavailable | DeadlineExceeded):
            await self._fail_over(server, error.reason)
        raise error

    async def _beat(self, request: cluster_pb2.HeartbeatRequest) -> cluster_pb2.HeartbeatResponse:
        # The simulated network has no streams: as with a server that is too old for them.
        answer: cluster_pb2.HeartbeatResponse = await self._call(
            "Heartbeat", request, cluster_pb2.HeartbeatResponse
        )
        return answer


class _AgentServer:
    """In place of the agent's gRPC server."""

    def __init__(self, network: Network, process: Process, address: str) -> None:
        self._network = network
        self._process = process
        self._address = address
        self._handlers: Any = {}

    def offer(self, service: Any) -> None:
        self._handlers = service.handlers()

    async def __aenter__(self) -> "_AgentServer":
        self._network.listen(self._address, self._process, self._handle)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._network.close(self._address)

    async def _handle(self, method: str, request: Any, _: float) -> Any:
        return await self._handlers[method](request, None)


class Machine:
    """See the module's docstring. :meth:`boot` starts its agent."""

    def __init__(
        self,
        loop: SimLoop,
        name: str,
        *,
        network: Network,
        clock: SimClock,
        rng: random.Random,
        new_id: IdSource,
        servers: tuple[str, ...],
        settings: AgentSettings,
        runtime: Runtime,
        zone: str,
        ended: Callable[["Machine", BaseException | None], None],
    ) -> None:
        self._loop = loop
        self.name = name
        self.host = name
        self.address = f"{name}:{_PORT}"
        self.clock = clock
        self.runtime = runtime
        self.disk = SimDisk()
        self.node_id = new_id("n")
        self.zone = zone
        self._network = network
        self._rng = rng
        self._new_id = new_id
        self._servers = servers
        self._settings = settings
        self._ended = ended
        self.process: Process | None = None
        self.thread: DiskThread | None = None
        self.boots = 0

    @property
    def up(self) -> bool:
        """Whether its agent lives."""
        return self.process is not None and self.process.alive

    def boot(self) -> None:
        """Start the agent."""
        self.boots += 1
        self.process = Process(self._loop, self.name, self.host)
        self.thread = DiskThread(self._loop, self._rng, self.process, self.disk)
        self.process.start(self._run(self.process, self.thread))

    def crash(self) -> None:
        """``kill -9`` of the agent."""
        if self.process is not None and self.process.alive:
            self.process.crash()

    async def _run(self, process: Process, thread: DiskThread) -> None:
        failure: BaseException | None = None
        try:
            await self._agent(process, thread)
        except BaseException as exc:
            failure = exc
            raise
        finally:
            self._ended(self, failure)

    async def _agent(self, process: Process, thread: DiskThread) -> None:
        rng = random.Random(self._rng.random())
        opening = Journal(_JOURNAL, disk=self.disk)
        opening._executor = cast(Any, thread)
        async with opening as journal:
            node = NodeDescription(
                id=self.node_id,
                hostname=self.name,
                address=self.name,
                port=_PORT,
                region="default",
                zone=self.zone,
                role=NodeRole.WORKER,
                labels={},
                agent_version="simulated",
                incarnation=self._new_id("a"),
                simulated=True,
            )
            driver = GuardedDriver(cast(Any, _RuntimeClient(self.runtime)), deadlines=DriverDeadlines())
            agent = _Agent(
                self._settings,
                node=node,
                made=Drivers((OfferedDriver(driver, tuple(InstanceType)),), ()),
                journal=journal,
                link=SimLink(self._network, process, self._servers, self.clock),
                fetcher=cast(Any, None),
                clock=self.clock,
                rng=rng,
            )
            await agent.run(
                cast(Any, _AgentServer(self._network, process, self.address)), stop=asyncio.Event()
            )
