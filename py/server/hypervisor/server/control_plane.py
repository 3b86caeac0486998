"""The domain half of the server, put together: everything behind the API, over any store and any agents.

``app.py`` makes one from the configuration; tests make several over one store.
"""

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path

from hypervisor.core.clock import Clock
from hypervisor.core.ids import IdSource
from hypervisor.core.states import PlacementPolicy
from hypervisor.server.agents import Agents
from hypervisor.server.backups import Backups
from hypervisor.server.committer import GroupCommitter
from hypervisor.server.draining.keeper import DrainKeeper
from hypervisor.server.draining.service import MaintenanceService
from hypervisor.server.executor import ExecutorSettings, OperationExecutor
from hypervisor.server.explaining import Explainer
from hypervisor.server.images.contract import Images
from hypervisor.server.images.keeping import ImageKeeper
from hypervisor.server.images.naming import ImageSources
from hypervisor.server.images.service import ImageService
from hypervisor.server.images.store import ImageStore
from hypervisor.server.images.uploads import Uploads
from hypervisor.server.instances import InstanceService
from hypervisor.server.ledger import AllocationRules, Ledger
from hypervisor.server.live_moves import LiveMoves, NoLiveMoves
from hypervisor.server.membership import Membership
from hypervisor.server.moves import MoveService
from hypervisor.server.node_facts import ServerFacts
from hypervisor.server.nodes import NodeService
from hypervisor.server.old_copies import OldCopies
from hypervisor.server.operations import OperationService, Waiters
from hypervisor.server.placement import Placer
from hypervisor.server.placement_health import PlacementHealth
from hypervisor.server.reconcile.loop import Reconciler, ReconcilerSettings
from hypervisor.server.reconcile.loss_keeper import LossKeeper
from hypervisor.server.reconcile.losses import LossLimits
from hypervisor.server.reconcile.node_loop import NodeReconciler
from hypervisor.server.replacing import Replacer
from hypervisor.server.scheduler.contract import Scheduler
from hypervisor.server.services import HeartbeatTimes, Instances, Nodes, Operations
from hypervisor.server.store.storage import Storage
from hypervisor.server.view import StoreView, ViewSettings

__all__ = ["ControlPlane", "ControlPlaneSettings", "ImageSettings"]


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """Where and how images are kept; times in seconds."""

    directory: Path
    max_bytes: int = 1 << 40
    reserve_bytes: int = 0
    upload_idle_s: float = 60.0
    upload_retention_s: float = 86_400.0


@dataclass(frozen=True, slots=True)
class ControlPlaneSettings:
    """This server's identity and the settings of its parts."""

    server_id: str
    address: str
    version: str
    images: ImageSettings
    heartbeat: HeartbeatTimes = field(default_factory=lambda: HeartbeatTimes(10.0, 30.0))
    policy: PlacementPolicy = PlacementPolicy.SPREAD
    scheduler_seed: int = 0
    allocation: AllocationRules = field(default_factory=AllocationRules)
    penalty_half_life_s: float = 600.0
    server_ttl_s: float = 15.0
    view: ViewSettings = field(default_factory=ViewSettings)
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)
    reconciler: ReconcilerSettings = field(default_factory=ReconcilerSettings)
    losses: LossLimits = field(default_factory=LossLimits)


class ControlPlane:
    """``run`` runs all parts; ``ready`` returns when calls may be served."""

    def __init__(
        self,
        storage: Storage,
        agents: Agents,
        scheduler: Scheduler,
        clock: Clock,
        *,
        new_id: IdSource,
        rng: random.Random,
        settings: ControlPlaneSettings,
        live: LiveMoves | None = None,
    ) -> None:
        server_id = settings.server_id
        live = live or NoLiveMoves()
        self.view = StoreView(storage, clock, settings=settings.view)
        self.committer = GroupCommitter(storage, self.view, clock, rng=rng)
        images = settings.images
        self.image_store = ImageStore(
            images.directory, max_bytes=images.max_bytes, reserve_bytes=images.reserve_bytes, new_id=new_id
        )
        waiters = Waiters()
        self.executor = OperationExecutor(
            self.view,
            self.committer,
            agents,
            waiters,
            clock,
            server_id=server_id,
            rng=rng,
            images=ImageSources(self.view, self.committer).of,
            settings=settings.executor,
            live=live,
        )
        operations = OperationService(
            self.view,
            self.committer,
            clock,
            new_id=new_id,
            server_id=server_id,
            waiters=waiters,
            wake=self.executor.wake,
        )
        facts = ServerFacts(
            clock,
            PlacementHealth(clock, half_life_s=settings.penalty_half_life_s),
            use_valid_s=settings.heartbeat.timeout_s,
            names_of=self.view.image_names,
        )
        ledger = Ledger(settings.allocation, facts)
        facts.listen(ledger.node_changed)
        self.view.add_record_listener(ledger.seen)
        self.view.add_listener(facts.learn)
        nodes = NodeService(
            storage,
            self.view,
            self.committer,
            operations,
            clock,
            times=settings.heartbeat,
            facts=facts,
            rules=settings.allocation,
        )
        self.operations: Operations = operations
        self.nodes: Nodes = nodes
        placer = self.placer = Placer(
            scheduler, ledger, default_policy=settings.policy, seed=settings.scheduler_seed
        )
        self.explainer = Explainer(
            placer, self.committer.known, clock, resolve_node=lambda name: nodes.resolve(name).value.id
        )
        self.instances: Instances = InstanceService(
            self.view,
            self.committer,
            self.executor,
            operations,
            placer,
            agents,
            clock,
            allocation=settings.allocation,
            new_id=new_id,
            last_stats=nodes.last_stats,
        )
        self.moves = MoveService(
            self.view,
            self.committer,
            self.executor,
            operations,
            placer,
            clock,
            live=live,
            resolve_node=lambda name: nodes.resolve(name).value.id,
        )
        drains = DrainKeeper(
            self.view,
            self.committer,
            self.executor,
            operations,
            self.moves,
            clock,
            interval_s=settings.reconciler.interval_s,
        )
        self.maintenance = MaintenanceService(
            self.view,
            self.committer,
            operations,
            drains,
            placer,
            clock,
            resolve_node=lambda name: nodes.resolve(name).value.id,
        )
        uploads = Uploads(self.image_store, idle_s=images.upload_idle_s)
        self.image_keeper = ImageKeeper(
            self.image_store,
            uploads,
            self.view,
            self.committer,
            clock,
            upload_retention_s=images.upload_retention_s,
        )
        self.images: Images = ImageService(
            self.image_store,
            uploads,
            self.image_keeper,
            self.view,
            self.committer,
            operations,
            clock,
            new_id=new_id,
        )
        self.backups = Backups(storage, self.view, clock, version=settings.version)
        self.membership = Membership(
            storage,
            self.committer,
            clock,
            server_id=server_id,
            address=settings.address,
            version=settings.version,
            new_id=new_id,
            ttl_s=settings.server_ttl_s,
        )
        self.node_reconciler = NodeReconciler(
            storage,
            self.view,
            self.committer,
            self.executor,
            operations,
            agents,
            clock,
            rules=settings.allocation,
            settings=settings.reconciler.nodes,
        )
        replacer = Replacer(
            placer, self.view, self.committer, self.executor, clock, new_id=new_id, server_id=server_id
        )
        nodes.preview = replacer.preview
        self.old_copies = OldCopies(self.committer, agents, clock, rng=rng)
        nodes.on_unexpected = self.old_copies.found
        self.reconciler = Reconciler(
            storage,
            self.view,
            self.committer,
            self.executor,
            self.node_reconciler,
            clock,
            server_id=server_id,
            settings=settings.reconciler,
            duties=(drains.run,),
            losses=LossKeeper(self.view, self.committer, replacer, clock, limits=settings.losses),
        )

    async def ready(self) -> None:
        """Return once the cluster is in memory and the others can see this server."""
        await self.view.loaded()
        await self.membership.joined()

    async def run(self) -> None:
        """Run all parts until cancelled."""
        try:
            await self._run()
        finally:
            self.image_store.close()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.image_keeper.run(), name="images")
            group.create_task(self.view.run(), name="view")
            group.create_task(self.committer.run(), name="committer")
            group.create_task(self.executor.run(), name="executor")
            group.create_task(self.membership.run(), name="membership")
            group.create_task(self.reconciler.run(), name="reconciler")
            group.create_task(self.old_copies.run(), name="old-copies")
