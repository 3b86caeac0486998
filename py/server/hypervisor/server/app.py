"""The one place where the server's parts are chosen and joined, and the order in which they start and stop."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog

from hypervisor.core.clock import Clock
from hypervisor.core.ids import IdSource
from hypervisor.core.settings import split_address
from hypervisor.core.tls import (
    ClientTls,
    channel_credentials,
    client_ssl_context,
    server_credentials,
    server_ssl_context,
)
from hypervisor.ext import scoring
from hypervisor.server import auth, keys
from hypervisor.server.agents_grpc import AgentPool
from hypervisor.server.api.nodes import About
from hypervisor.server.api.rpc import Dispatcher
from hypervisor.server.api.service import Api, ApiServer, make_server
from hypervisor.server.config import ServerSettings
from hypervisor.server.control_plane import ControlPlane, ControlPlaneSettings, ImageSettings
from hypervisor.server.gateway.http import HttpGateway
from hypervisor.server.gateway.metrics import Metrics
from hypervisor.server.reconcile.loop import ReconcilerSettings
from hypervisor.server.reconcile.node_loop import NodeReconcilerSettings
from hypervisor.server.scheduler.registry import load_scheduler
from hypervisor.server.services import ClusterChange, HeartbeatTimes, Kind
from hypervisor.server.store.open import open_storage
from hypervisor.wire.image_http import BlobFetcher, fetch_session

__all__ = ["Addresses", "run_server"]

_HEALTH_INTERVAL_S = 0.5
_STOP_MARGIN_S = 1.0
"""Calls that were cut off get this long to answer so."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the server listens."""

    grpc: str
    http: str


async def run_server(
    settings: ServerSettings,
    *,
    stop: asyncio.Event,
    clock: Clock,
    rng: random.Random,
    new_id: IdSource,
    version: str,
    started: Callable[[Addresses], None] = lambda _: None,
) -> None:
    """Serve until ``stop`` is set, then end calls, hand operations over and close everything, in that order.

    ``started`` is called once calls are served. Raises classes of ``core.errors`` for what the configuration or the
    machine does not allow.
    """
    tls = settings.server_tls()
    agent_tls = settings.agent_tls()
    scheduler = load_scheduler(settings.scheduler.name, settings.scheduler.options())
    authenticator = auth.build(settings)
    server_id = new_id("s")
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        storage = await open_storage(settings.store_config(), clock, sessions=keys.SESSIONS)
        stack.push_async_callback(storage.aclose)
        pool = await stack.enter_async_context(
            AgentPool(
                credentials=None if agent_tls is None else channel_credentials(agent_tls),
                connect_timeout_s=settings.agents.connect_timeout,
            )
        )
        server, port = make_server(
            settings.server.grpc_address,
            credentials=None if tls is None else server_credentials(tls),
            max_message_bytes=settings.limits.max_message_size,
            max_concurrent_calls=settings.limits.max_concurrent_calls,
        )
        stack.push_async_callback(server.stop, None)
        grpc_address = _bound(settings.server.grpc_address, port)
        plane = ControlPlane(
            storage,
            pool,
            scheduler,
            clock,
            new_id=new_id,
            rng=rng,
            settings=ControlPlaneSettings(
                server_id=server_id,
                address=settings.server.advertise_address or grpc_address,
                version=version,
                images=ImageSettings(
                    directory=settings.image_dir(),
                    max_bytes=settings.image_store.max_bytes,
                    reserve_bytes=settings.image_store.reserve,
                    upload_idle_s=settings.image_store.upload_idle,
                    upload_retention_s=settings.image_store.upload_retention,
                ),
                heartbeat=HeartbeatTimes(settings.heartbeat.interval, settings.heartbeat.timeout),
                policy=settings.scheduler.policy,
                scheduler_seed=settings.scheduler.seed,
                allocation=settings.scheduler.allocation_rules(),
                penalty_half_life_s=settings.scheduler.penalty_half_life,
                losses=settings.reconcile.limits(),
                reconciler=ReconcilerSettings(
                    retention_s=settings.operations.retention,
                    nodes=NodeReconcilerSettings(
                        interval_s=settings.reconcile.interval,
                        orphan_grace_s=settings.reconcile.orphan_grace,
                        keep_older=settings.reconcile.keep_older,
                    ),
                ),
            ),
        )
        plane.view.add_listener(_channel_closer(plane, pool))
        dispatcher = Dispatcher(authenticator=authenticator, metrics=metrics, new_id=new_id)
        metrics.about(server_id=server_id, version=version, store=settings.store.backend.value)
        metrics.watch_cluster(
            plane.view,
            dispatcher,
            usage=plane.nodes.usage,
            leading=lambda: plane.reconciler.leading,
            orphans=lambda: plane.node_reconciler.orphans,
            repairs=lambda: plane.view.repairs,
        )
        plane.committer.on_commit(metrics.committed)
        Api(
            view=plane.view,
            identity=plane.view,
            instances=plane.instances,
            moves=plane.moves,
            maintenance=plane.maintenance,
            nodes=plane.nodes,
            operations=plane.operations,
            images=plane.images,
            explainer=plane.explainer,
            backups=plane.backups,
            clock=clock,
            about=About(version=version, store_backend=settings.store.backend.value, started_at=clock.now()),
        ).register(server, dispatcher)
        api = ApiServer(server, port)
        readiness = _Readiness(plane)
        gateway = await stack.enter_async_context(
            HttpGateway(
                settings.server.http_address,
                tls=None if tls is None else server_ssl_context(tls),
                authenticator=authenticator,
                metrics=metrics,
                unready=readiness.why_not,
                image_file=plane.image_store.find,
            )
        )
        plane.membership.describe(http_url=settings.http_url(gateway.port), image_store=plane.image_store.id)
        if settings.image_store.replicate:
            plane.image_keeper.fetcher = await stack.enter_async_context(
                _image_fetcher(settings, plane, clock=clock, rng=rng)
            )
        addresses = Addresses(grpc_address, _bound(settings.server.http_address, gateway.port))
        log.info("scoring_table", implementation=scoring.implementation)
        log.info("server_starting", server_id=server_id, version=version, store=settings.store.backend.value)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(plane.run(), name="control-plane")
            serving = group.create_task(
                _serve(
                    api,
                    plane,
                    dispatcher,
                    readiness,
                    stop,
                    clock,
                    grace_s=settings.server.shutdown_grace,
                    announce=lambda: _announce(addresses, started),
                ),
                name="serving",
            )
            await asyncio.wait({serving})
            # The lease of this server ends with it: others take its unfinished operations over at once.
            running.cancel()
        log.info("server_stopped", server_id=server_id)


class _Readiness:
    """Whether this server should get calls."""

    def __init__(self, plane: ControlPlane) -> None:
        self._view = plane.view
        self.serving = False
        self.stopping = False

    def why_not(self) -> str:
        """Why not, in a few words; empty when it should."""
        if self.stopping:
            return "stopping"
        if self._view.stale:
            return "the store cannot be reached"
        return "" if self.serving else "starting"


async def _serve(
    api: ApiServer,
    plane: ControlPlane,
    dispatcher: Dispatcher,
    readiness: _Readiness,
    stop: asyncio.Event,
    clock: Clock,
    *,
    grace_s: float,
    announce: Callable[[], None],
) -> None:
    """Serve calls from when the cluster is known until ``stop``, then end them in order."""
    await api.set_healthy(False)
    if not await _first_of(plane.ready(), stop):
        return
    await api.start()
    readiness.serving = True
    async with asyncio.TaskGroup() as group:
        health = group.create_task(_follow_health(api, readiness, clock), name="health")
        announce()
        await stop.wait()
        log.info("server_stopping", calls=dispatcher.in_progress)
        readiness.stopping = True
        health.cancel()
    # Streams have no end of their own, so they are ended at once; calls get the grace time.
    dispatcher.stop_streams()
    stopping = asyncio.create_task(api.stop(grace_s=grace_s + _STOP_MARGIN_S), name="stopping")
    try:
        await asyncio.wait({stopping}, timeout=grace_s)
        dispatcher.stop_calls()
    finally:
        await stopping


async def _first_of(ready: Coroutine[None, None, None], stop: asyncio.Event) -> bool:
    """Wait for ``ready`` (True) or, if it comes first, for ``stop`` (False)."""
    becoming = asyncio.create_task(ready, name="ready")
    stopped = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait({becoming, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return becoming.done() and not stop.is_set()
    finally:
        becoming.cancel()
        stopped.cancel()
        await asyncio.wait({becoming, stopped})


async def _follow_health(api: ApiServer, readiness: _Readiness, clock: Clock) -> None:
    shown: bool | None = None
    while True:
        healthy = not readiness.why_not()
        if healthy is not shown:
            shown = healthy
            await api.set_healthy(healthy)
            log.info("server_health", healthy=healthy)
        await clock.sleep(_HEALTH_INTERVAL_S)


def _announce(addresses: Addresses, started: Callable[[Addresses], None]) -> None:
    log.info("server_started", grpc_address=addresses.grpc, http_address=addresses.http)
    started(addresses)


def _bound(address: str, port: int) -> str:
    """The address with the port that the system chose."""
    host, _ = split_address(address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@asynccontextmanager
async def _image_fetcher(
    settings: ServerSettings, plane: ControlPlane, *, clock: Clock, rng: random.Random
) -> AsyncIterator[BlobFetcher]:
    """What brings this server the images of others; it shows them what agents show."""
    tls = settings.tls
    context = client_ssl_context(ClientTls(tls.ca_file, tls.cert_file, tls.key_file)) if tls.enabled else None
    token = next((t.get_secret_value() for t in settings.auth.tokens.values()), "")
    session = fetch_session(context)
    try:
        yield BlobFetcher(plane.image_store.blobs, session, clock=clock, rng=rng, token_for=lambda _: token)
    finally:
        await session.close()


def _channel_closer(plane: ControlPlane, pool: AgentPool) -> Callable[[tuple[ClusterChange, ...]], None]:
    """Closes the channels of nodes that left the cluster."""

    def look(changes: tuple[ClusterChange, ...]) -> None:
        if any(change.kind is Kind.NODE and change.current is None for change in changes):
            pool.forget_all_but(node.value.id for node in plane.view.nodes())

    return look
