"""One agent, wired: the single place where its parts are chosen and put together."""

import asyncio
import random
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import structlog

from hypervisor.agent.api.agent_service import AgentService
from hypervisor.agent.api.console_stream import ConsoleStreams
from hypervisor.agent.api.server import AgentServer
from hypervisor.agent.cluster_link import GrpcClusterLink, NodeDescription
from hypervisor.agent.config import AgentSettings, GuardMode, HolderMode
from hypervisor.agent.console import ConsoleLimits
from hypervisor.agent.console_holder.launching import EmbeddedHolder, HolderProcess, Launcher
from hypervisor.agent.consoles import ConsoleHubs
from hypervisor.agent.data_directory import DataDirectory, LockedDirectory
from hypervisor.agent.drivers.guard import DriverDeadlines
from hypervisor.agent.drivers.health import DriverHealth
from hypervisor.agent.drivers.instances import LocalInstances
from hypervisor.agent.drivers.manager import Manager
from hypervisor.agent.drivers.observed import ObservationBook
from hypervisor.agent.drivers.registry import DriverContext, Drivers, make_drivers
from hypervisor.agent.fencing.fence import FENCED, Fence, Fencing, Guard, NoGuard
from hypervisor.agent.fencing.launching import GuardProcess
from hypervisor.agent.fencing.lease import Lease
from hypervisor.agent.fencing.marks import Marks
from hypervisor.agent.images.cache import ImageCache
from hypervisor.agent.images.providing import NoImages
from hypervisor.agent.journal import Journal
from hypervisor.agent.metrics.http import MetricsServer
from hypervisor.agent.metrics.node import NodeMetrics
from hypervisor.agent.registration import Membership
from hypervisor.agent.reporter import Reporter
from hypervisor.agent.resources import FixedResources, MeasuredResources, ResourceSource
from hypervisor.agent.stats.service import StatsService
from hypervisor.core.blobs import BlobDirectory
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, HypervisorError
from hypervisor.core.ids import IdSource
from hypervisor.core.model import Observation
from hypervisor.core.resources import Resources
from hypervisor.core.settings import split_address
from hypervisor.core.taints import parse_taint
from hypervisor.core.tls import (
    channel_credentials,
    client_ssl_context,
    server_credentials,
    server_ssl_context,
)
from hypervisor.wire.image_http import BlobFetcher, fetch_session, tokens_for_known_hosts

__all__ = ["run_agent"]

DEFAULT_HEARTBEAT_S = 10.0
"""Until a server says how often it wants one."""

_log = structlog.get_logger(__name__)


class _Listener:
    """Hands what the manager sees to the consoles, to the statistics and to the reporter."""

    def __init__(
        self, *, consoles: ConsoleHubs, reporter: Reporter, stats: StatsService, fence: Fence
    ) -> None:
        self._fence = fence
        self._consoles = consoles
        self._reporter = reporter
        self._stats = stats

    def observed(self, seen: Observation, *, driver: str, answered: bool) -> None:
        self._consoles.observed(seen)
        self._stats.observed(seen)
        if not answered:
            _log.info(
                "instance_observed",
                instance=seen.instance_id,
                driver=driver,
                status=str(seen.status),
                reason=seen.reason,
            )
            self._reporter.observation(seen)

    def deleted(self, instance_id: str) -> None:
        self._consoles.deleted(instance_id)
        self._stats.deleted(instance_id)
        self._reporter.deleted(instance_id)
        self._fence.released(instance_id)


async def run_agent(
    settings: AgentSettings,
    *,
    stop: asyncio.Event,
    clock: Clock,
    rng: random.Random,
    new_id: IdSource,
    version: str,
    simulated: bool = False,
    drivers: Drivers | None = None,
) -> None:
    """Run one agent until ``stop`` is set. Instances run on, and the node stays registered.

    ``drivers`` replaces those of the settings. Raises HypervisorError when it cannot start.
    """
    server_tls, client_tls = settings.server_tls(), settings.client_tls()
    async with AsyncExitStack() as stack:
        data = await stack.enter_async_context(DataDirectory(settings.agent.data_dir))
        journal = await stack.enter_async_context(Journal(data.journal))
        server = AgentServer(
            bind=settings.agent.bind,
            port=settings.agent.port,
            credentials=None if server_tls is None else server_credentials(server_tls),
            new_id=new_id,
            grace_s=settings.agent.shutdown_grace,
        )
        node = NodeDescription(
            id=await data.node_id(new_id),
            hostname=settings.hostname(),
            address=settings.address(),
            port=server.port,
            region=settings.node.region,
            zone=settings.node.zone,
            role=settings.node.role,
            labels=settings.node.labels,
            taints=tuple(map(parse_taint, settings.node.taints)),
            agent_version=version,
            incarnation=new_id("a"),
            simulated=simulated,
        )
        if simulated:
            structlog.contextvars.bind_contextvars(node=node.hostname)
        link = GrpcClusterLink(
            settings.agent.server_address,
            credentials=None if client_tls is None else channel_credentials(client_tls),
            token=settings.agent.token.get_secret_value(),
            clock=clock,
        )
        stack.push_async_callback(link.aclose)
        lease = Lease(settings.agent.data_dir, clock)
        stack.callback(lease.close)
        made = drivers or _make_drivers(settings, clock=clock, rng=rng, new_id=new_id)
        if drivers is None:
            await _lock_machines(settings, made, stack)
        stack.push_async_callback(_close_drivers, made)
        fetcher = await stack.enter_async_context(_fetcher(settings, clock=clock, rng=rng))
        agent = _Agent(
            settings,
            node=node,
            made=made,
            journal=journal,
            link=link,
            fetcher=fetcher,
            lease=lease,
            clock=clock,
            rng=rng,
        )
        await agent.run(server, stop=stop)


class _Agent:
    def __init__(
        self,
        settings: AgentSettings,
        *,
        node: NodeDescription,
        made: Drivers,
        journal: Journal,
        link: GrpcClusterLink,
        fetcher: BlobFetcher,
        clock: Clock,
        rng: random.Random,
        lease: Lease | None = None,
    ) -> None:
        self._settings = settings
        self._node = node
        self._registered = asyncio.Event()
        self._adoption_done = False
        self._resources = _resources(settings, simulated=node.simulated)
        self._health = DriverHealth(
            made.offered, missing=made.missing, clock=clock, poll_s=settings.drivers.health_interval
        )
        self._consoles = ConsoleHubs(
            attach=lambda instance_id: self._manager.attach(instance_id),
            clock=clock,
            rng=rng,
            launcher=_console_launcher(settings, simulated=node.simulated),
            limits=ConsoleLimits(
                scrollback_bytes=settings.agent.console_scrollback,
                log_bytes=settings.console.log.max_bytes,
                log_files=0 if node.simulated else settings.console.log.files,
            ),
        )
        self._reporter = Reporter(
            node,
            link=link,
            clock=clock,
            rng=rng,
            registered=self._registered,
            register_again=lambda: self._membership.register_again(),
        )
        self._stats = StatsService(
            locate=lambda instance_id: self._manager.stats_source(instance_id),
            clock=clock,
            interval_s=settings.stats.interval,
            slow_interval_s=settings.stats.slow_interval,
            history=settings.stats.history,
            max_open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4,
        )
        lease = lease or Lease(None, clock)
        fence = Fence(
            lease,
            marks=Marks(settings.agent.data_dir),
            guard=_guard(settings, simulated=node.simulated),
            clock=clock,
            enabled=settings.fencing.enabled,
        )
        instances = LocalInstances(
            journal=journal,
            book=ObservationBook(starts=journal.starts),
            clock=clock,
            rng=rng,
            listener=_Listener(
                consoles=self._consoles, reporter=self._reporter, stats=self._stats, fence=fence
            ),
        )
        self._images = ImageCache(
            BlobDirectory(_image_dir(settings)),
            fetcher,
            limit_bytes=settings.images.cache_bytes,
            clock=clock,
            known=self._certainly_known,
            collect=self._health.collect,
        )
        self._manager = Manager(
            instances=instances,
            drivers=self._health,
            clock=clock,
            rng=rng,
            images=NoImages() if node.simulated else self._images,
            gate=fence,
        )
        self._fencing = Fencing(
            fence,
            lease,
            instances=instances,
            stop=lambda instance_id: self._manager.fence(instance_id, why=FENCED),
            clock=clock,
        )
        self._membership = Membership(
            node,
            link=link,
            resources=self._resources,
            stats=self._stats,
            drivers=self._health.infos,
            observations=self._manager.for_registration,
            clock=clock,
            rng=rng,
            registered=self._registered,
            default_interval_s=DEFAULT_HEARTBEAT_S,
            images=lambda: self._images.digests,
            lease=lease,
            fencing=fence.state,
        )
        self._health.on_change(lambda _name: self._reporter.drivers(self._health.infos()))

    async def run(self, server: AgentServer, *, stop: asyncio.Event) -> None:
        server.offer(
            AgentService(
                manager=self._manager,
                drivers=self._health,
                resources=self._resources,
                consoles=ConsoleStreams(self._consoles),
                stats=self._stats,
            )
        )
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._consoles.run()),
                group.create_task(self._stats.run()),
                group.create_task(self._manager.run()),
                group.create_task(self._fencing.run()),
            ]
            if not self._node.simulated:
                tasks.append(group.create_task(self._images.run()))
            if await self._adopted(stop):
                self._adoption_done = True
                await self._consoles.retain(self._manager.known())
                async with self._metrics_served(), server:
                    tasks += [
                        group.create_task(self._health.run()),
                        group.create_task(self._reporter.run()),
                        group.create_task(self._membership.run()),
                    ]
                    _log.info(
                        "agent_ready",
                        node_id=self._node.id,
                        hostname=self._node.hostname,
                        port=self._node.port,
                    )
                    await stop.wait()
                    _log.info("agent_stopping", node_id=self._node.id)
                    self._consoles.detach_all()
            for task in tasks:
                task.cancel()
        _log.info("agent_stopped", node_id=self._node.id)

    def _certainly_known(self) -> frozenset[str] | None:
        """All instances of the node; None while a driver that may have more has not told of them."""
        told = self._adoption_done and all(self._health.available(name) for name in self._health.names)
        return self._manager.known() if told else None

    @asynccontextmanager
    async def _metrics_served(self) -> AsyncIterator[None]:
        """Serve metrics, if that is configured."""
        if not self._settings.metrics.address:
            yield
            return
        tls = self._settings.server_tls()
        metrics = NodeMetrics(
            self._node,
            manager=self._manager,
            drivers=self._health,
            stats=self._stats,
            reporter=self._reporter,
            resources=_resources(self._settings, simulated=self._node.simulated),
            registered=self._registered.is_set,
            max_instances=self._settings.metrics.max_instances,
        )
        async with MetricsServer(
            self._settings.metrics.address,
            tls=None if tls is None else server_ssl_context(tls),
            text=metrics.text,
        ) as served:
            _log.info("metrics_served", address=self._settings.metrics.address, port=served.port)
            yield

    async def _adopted(self, stop: asyncio.Event) -> bool:
        """Wait until what runs is adopted; False when the agent is to stop before: a runtime that hangs must not hold
        that up."""
        waiting = [asyncio.ensure_future(self._manager.ready()), asyncio.ensure_future(stop.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        return not stop.is_set()


def _make_drivers(settings: AgentSettings, *, clock: Clock, rng: random.Random, new_id: IdSource) -> Drivers:
    context = DriverContext(
        clock=clock,
        rng=rng,
        new_id=new_id,
        data_dir=settings.agent.data_dir,
        containerd=settings.containerd,
        archive_roots=settings.images.archive_roots,
        machines=settings.machines,
        libvirt=settings.libvirt,
        microvm=settings.microvm,
        options=settings.drivers.options,
    )
    deadlines = DriverDeadlines(
        create_s=settings.drivers.create_timeout,
        action_s=settings.drivers.action_timeout,
        query_s=settings.drivers.query_timeout,
    )
    return make_drivers(settings.drivers.enabled, context, deadlines=deadlines)


async def _lock_machines(settings: AgentSettings, drivers: Drivers, stack: AsyncExitStack) -> None:
    """Keep other agents from the directories of the drivers that there are. One that cannot be written is for its
    driver to tell: the others go on."""
    offered = {offered.driver.name for offered in drivers.offered}
    directories = {
        # QEMU's user goes through it.
        "libvirt": LockedDirectory(settings.libvirt.data_dir, setting="libvirt.data_dir", mode=0o711),
        "microvm": LockedDirectory(settings.microvm.data_dir, setting="microvm.data_dir"),
    }
    for name in offered & directories.keys():
        try:
            await stack.enter_async_context(directories[name])
        except FailedPrecondition as exc:
            if exc.reason != "DATA_DIR_UNUSABLE":
                raise
            _log.warning("driver_directory_unusable", driver=name, error=exc.message)


def _image_dir(settings: AgentSettings) -> Path:
    """Where fetched images are."""
    return settings.images.cache_dir or settings.agent.data_dir / "images"


@asynccontextmanager
async def _fetcher(
    settings: AgentSettings, *, clock: Clock, rng: random.Random
) -> AsyncIterator[BlobFetcher]:
    """What brings images from the servers: as the agent shows itself to their API."""
    tls = settings.client_tls()
    token = settings.agent.token.get_secret_value()
    hosts = [split_address(address)[0] for address in settings.agent.server_address]
    async with fetch_session(None if tls is None else client_ssl_context(tls)) as session:
        yield BlobFetcher(
            BlobDirectory(_image_dir(settings)),
            session,
            clock=clock,
            rng=rng,
            token_for=tokens_for_known_hosts(token, hosts),
        )


def _console_launcher(settings: AgentSettings, *, simulated: bool) -> Launcher:
    if simulated or settings.console.holder is HolderMode.EMBEDDED:
        return EmbeddedHolder(settings.agent.data_dir)
    return HolderProcess(settings.agent.data_dir)


def _guard(settings: AgentSettings, *, simulated: bool) -> Guard:
    if simulated or settings.fencing.guard is GuardMode.NONE:
        return NoGuard()
    return GuardProcess(settings.agent.data_dir)


async def _close_drivers(drivers: Drivers) -> None:
    for offered in drivers.offered:
        try:
            await offered.driver.aclose()
        except HypervisorError as exc:
            _log.warning("driver_close_failed", driver=offered.driver.name, reason=exc.reason)


def _resources(settings: AgentSettings, *, simulated: bool) -> ResourceSource:
    if not simulated:
        return MeasuredResources(disk_path=settings.agent.data_dir)
    pretended = settings.simulated
    return FixedResources(
        Resources(
            cpu_millis=pretended.cpu_cores * 1000,
            memory_bytes=pretended.memory,
            disk_bytes=pretended.disk,
        )
    )
