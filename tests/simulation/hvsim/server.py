"""A server of the cluster: the real control plane and the real API handlers, put together as ``app.py`` does."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

from hvsim.clock import SimClock
from hvsim.loop import Process
from hvsim.network import Broken, Network, TooLate
from hvsim.storage import StoreClient
from hypervisor.core.errors import DeadlineExceeded, HypervisorError
from hypervisor.core.ids import IdSource
from hypervisor.core.model import Node
from hypervisor.server.agents import CallContext
from hypervisor.server.agents_grpc import GrpcAgent
from hypervisor.server.api.nodes import About
from hypervisor.server.api.rpc import Call
from hypervisor.server.api.service import Api
from hypervisor.server.control_plane import ControlPlane, ControlPlaneSettings, ImageSettings
from hypervisor.server.failures import copy_of
from hypervisor.server.reconcile.loop import ReconcilerSettings
from hypervisor.server.scheduler.default import DefaultScheduler

__all__ = ["Server", "SimAgents"]

Handlers = dict[str, Callable[[Any, Call], Awaitable[Any]]]


class _Names:
    """In place of a gRPC stub: each method is its name."""

    def __getattr__(self, name: str) -> str:
        return name


class SimAgent(GrpcAgent):
    """The server's real client of an agent, its calls sent over the simulated network."""

    def __init__(self, network: Network, process: Process, node: Node) -> None:
        self._network = network
        self._process = process
        self._address = f"{node.address}:{node.port}"
        self._stub = cast(Any, _Names())
        self._hostname = node.hostname
        self._peer = f"the agent of node {node.hostname} at {self._address}"

    async def _call(self, method: Any, request: object, context: CallContext) -> Any:
        try:
            return await self._network.call(
                self._process, self._address, method, request, timeout_s=max(context.timeout_s, 0.001)
            )
        except Broken as exc:
            raise self._unreachable(str(exc)) from exc
        except TooLate as exc:
            raise DeadlineExceeded(str(exc)) from exc
        except HypervisorError as exc:
            raise copy_of(exc) from exc


class SimAgents:
    """Implements ``Agents``."""

    def __init__(self, network: Network, process: Process) -> None:
        self._network = network
        self._process = process

    def agent(self, node: Node) -> SimAgent:
        return SimAgent(self._network, self._process, node)


class _Collected:
    """In place of a gRPC server and its dispatcher: keeps the handlers by method."""

    def __init__(self) -> None:
        self.handlers: Handlers = {}

    def service(self, descriptor: Any, handlers: Handlers) -> Handlers:
        return handlers

    def add_generic_rpc_handlers(self, services: tuple[Handlers, ...]) -> None:
        for handlers in services:
            self.handlers.update(handlers)


class _Context:
    """What a call's handler may ask of gRPC."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def time_remaining(self) -> float:
        return self._timeout_s


class Server:
    """One incarnation of a server: it lives as long as its process."""

    def __init__(
        self,
        process: Process,
        *,
        address: str,
        store: Callable[[Process, SimClock], StoreClient],
        network: Network,
        clock: SimClock,
        rng: random.Random,
        new_id: IdSource,
        ended: Callable[["Server", BaseException | None], None],
        settings: Callable[[ControlPlaneSettings], ControlPlaneSettings],
    ) -> None:
        self.process = process
        self.address = address
        self.clock = clock
        self._network = network
        self._new_id = new_id
        self._ended = ended
        self.ready = False
        self.store = store(process, clock)
        self._parts = (rng, settings)
        process.start(self._run())

    async def _run(self) -> None:
        # In a task of the process: what the parts make at once belongs to it.
        rng, change = self._parts
        self.plane = plane = ControlPlane(
            self.store,
            SimAgents(self._network, self.process),
            DefaultScheduler(),
            self.clock,
            new_id=self._new_id,
            rng=rng,
            settings=change(
                ControlPlaneSettings(
                    server_id=self._new_id("s"),
                    address=self.address,
                    version="simulated",
                    images=ImageSettings(Path("/nonexistent/hypervisor-simulated-images")),
                    reconciler=ReconcilerSettings(),
                )
            ),
        )
        plane.membership.describe(http_url="", image_store=plane.image_store.id)
        collected = _Collected()
        Api(
            view=plane.view,
            identity=plane.view,
            instances=plane.instances,
            moves=plane.moves,
            maintenance=plane.maintenance,
            nodes=plane.nodes,
            operations=plane.operations,
            images=plane.images,
            backups=plane.backups,
            explainer=plane.explainer,
            clock=self.clock,
            about=About(version="simulated", store_backend="etcd", started_at=self.clock.now()),
        ).register(cast(Any, collected), cast(Any, collected))
        self._handlers = collected.handlers
        self.process.start(self._serve_when_ready(), name=f"{self.process.name}.serving")
        failure: BaseException | None = None
        try:
            await plane.run()
        except BaseException as exc:
            failure = exc
            raise
        finally:
            self._ended(self, failure)

    async def _serve_when_ready(self) -> None:
        await self.plane.ready()
        self.ready = True
        self._network.listen(self.address, self.process, self._handle)

    async def _handle(self, method: str, request: Any, timeout_s: float) -> Any:
        principal, _, name = method.rpartition("/")
        call = Call(cast(Any, _Context(timeout_s)), self._new_id("r"))
        call.principal = principal
        return await self._handlers[name](request, call)


StreamOfReplies = AsyncIterator[Any]
