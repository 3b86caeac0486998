"""What goes wrong, drawn from the seed: one fault after another, several at a time, until the faults stop."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvsim.storage import STORE_HOST
from hypervisor.core.errors import HypervisorError, Internal

if TYPE_CHECKING:
    from hvsim.cluster import Cluster

__all__ = ["FaultPlan", "Faults"]


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """``every_s``: time between faults on average. ``weights``: how likely each kind is; the others do not happen."""

    every_s: float
    weights: dict[str, float]
    loss: float = 0.0
    duplicates: float = 0.0


class Faults:
    """Breaks the cluster, and mends what it broke."""

    def __init__(self, cluster: "Cluster", rng: random.Random, plan: FaultPlan) -> None:
        self._cluster = cluster
        self._rng = rng
        self._plan = plan
        self._stop = asyncio.Event()
        self._at_work: set[asyncio.Task[None]] = set()
        self.count = 0
        self._kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "server-crash": self._server_crash,
            "server-pause": self._server_pause,
            "agent-crash": self._agent_crash,
            "agent-pause": self._agent_pause,
            "power-loss": self._power_loss,
            "partition": self._partition,
            "isolation": self._isolation,
            "store-outage": self._store_outage,
            "store-slow": self._store_slow,
            "lease-loss": self._lease_loss,
            "lost-events": self._lost_events,
            "clock-jump": self._clock_jump,
            "slow-disk": self._slow_disk,
            "full-disk": self._full_disk,
            "driver-fails": self._driver_fails,
            "driver-slow": self._driver_slow,
            "runtime-down": self._runtime_down,
            "guest-ends": self._guest_ends,
            "compaction": self._compaction,
        }

    @staticmethod
    def kinds() -> tuple[str, ...]:
        """All there are."""
        return (
            "server-crash",
            "server-pause",
            "agent-crash",
            "agent-pause",
            "power-loss",
            "partition",
            "isolation",
            "store-outage",
            "store-slow",
            "lease-loss",
            "lost-events",
            "clock-jump",
            "slow-disk",
            "full-disk",
            "driver-fails",
            "driver-slow",
            "runtime-down",
            "guest-ends",
            "compaction",
        )

    async def run(self) -> None:
        """Break things until :meth:`stop`; returns when everything is mended."""
        weather = self._cluster.network.weather
        weather.loss, weather.duplicates = self._plan.loss, self._plan.duplicates
        kinds = sorted(self._plan.weights)
        weights = [self._plan.weights[kind] for kind in kinds]
        while not self._stop.is_set():
            await self._for(self._rng.expovariate(1 / self._plan.every_s))
            if self._stop.is_set():
                break
            (kind,) = self._rng.choices(kinds, weights)
            self._cluster.trace.add(f"fault {kind}")
            self.count += 1
            task = asyncio.get_running_loop().create_task(self._one(kind), name=f"fault-{kind}")
            self._at_work.add(task)
            task.add_done_callback(self._at_work.discard)
        weather.loss = weather.duplicates = 0.0
        for task in sorted(self._at_work, key=lambda task: task.get_name()):
            await task

    async def _one(self, kind: str) -> None:
        await self._kinds[kind]()

    def stop(self) -> None:
        """No new faults; those in force are mended now."""
        self._stop.set()

    async def _for(self, seconds: float) -> None:
        """So long, or until the faults stop."""
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return

    def _pick_server(self) -> int:
        return self._rng.randrange(len(self._cluster.addresses))

    async def _server_crash(self) -> None:
        index = self._pick_server()
        self._cluster.crash_server(index)
        await self._for(self._rng.choice((0.1, 1.0, 5.0, 25.0)) * self._rng.uniform(0.5, 1.5))
        self._cluster.start_server(index)

    async def _server_pause(self) -> None:
        server = self._cluster.servers[self._pick_server()]
        if server is None or server.process.paused:
            return
        server.process.pause()
        await self._for(self._rng.choice((1.0, 12.0, 40.0)) * self._rng.uniform(0.5, 1.5))
        if server.process.alive:
            server.process.resume()

    async def _agent_crash(self) -> None:
        machine = self._rng.choice(self._cluster.machines)
        if not machine.up:
            return
        machine.crash()
        await self._for(self._rng.choice((0.1, 2.0, 15.0, 50.0)) * self._rng.uniform(0.5, 1.5))
        machine.boot()

    async def _agent_pause(self) -> None:
        process = self._rng.choice(self._cluster.machines).process
        if process is None or process.paused or not process.alive:
            return
        process.pause()
        await self._for(self._rng.choice((1.0, 12.0, 50.0)) * self._rng.uniform(0.5, 1.5))
        if process.alive:
            process.resume()

    async def _power_loss(self) -> None:
        machine = self._rng.choice(self._cluster.machines)
        if not machine.up:
            return
        machine.crash()
        machine.runtime.lose_power()
        await self._for(self._rng.choice((5.0, 30.0, 80.0)) * self._rng.uniform(0.5, 1.5))
        machine.boot()

    async def _cut(self, pairs: list[tuple[str, str]]) -> None:
        network = self._cluster.network
        for source, target in pairs:
            network.block(source, target)
        await self._for(self._rng.choice((1.0, 8.0, 35.0, 60.0)) * self._rng.uniform(0.5, 1.5))
        for source, target in pairs:
            network.unblock(source, target)

    async def _partition(self) -> None:
        """Between two hosts, in one direction or both."""
        hosts = self._cluster.hosts
        one = self._rng.choice(hosts)
        other = self._rng.choice([host for host in hosts if host != one])
        pairs = [(one, other)]
        if self._rng.random() < 0.6:
            pairs.append((other, one))
        await self._cut(pairs)

    async def _isolation(self) -> None:
        """One host from some or all others, in one direction or both."""
        hosts = [host for host in self._cluster.hosts if host != STORE_HOST]
        one = self._rng.choice(hosts)
        others = [host for host in self._cluster.hosts if host != one and self._rng.random() < 0.8]
        both, outward = self._rng.random() < 0.6, self._rng.random() < 0.5
        pairs = [(one, other) for other in others if both or outward]
        pairs += [(other, one) for other in others if both or not outward]
        await self._cut(pairs)

    async def _store_outage(self) -> None:
        store = self._cluster.store
        if store.down:
            return
        store.take_down()
        await self._for(self._rng.choice((1.5, 3.0, 12.0, 40.0)) * self._rng.uniform(0.5, 1.5))
        store.bring_up()

    async def _store_slow(self) -> None:
        self._cluster.store.slow_s = self._rng.choice((0.05, 0.5, 3.0))
        await self._for(self._rng.uniform(2.0, 20.0))
        self._cluster.store.slow_s = 0.0

    async def _lease_loss(self) -> None:
        leases = self._cluster.store.lease_ids()
        if leases and not self._cluster.store.down:
            await self._cluster.store.end_lease_early(self._rng.choice(leases))

    async def _lost_events(self) -> None:
        server = self._cluster.servers[self._pick_server()]
        if server is not None:
            server.store.forget_events += self._rng.choice((1, 1, 2, 5))

    async def _clock_jump(self) -> None:
        clocks = self._cluster.clocks
        clock = clocks[self._rng.choice(sorted(clocks))]
        clock.jump(self._rng.choice((-1, 1)) * self._rng.choice((0.5, 5.0, 70.0, 4000.0)))

    async def _slow_disk(self) -> None:
        machine = self._rng.choice(self._cluster.machines)
        thread = machine.thread
        if thread is not None:
            thread.slow_s = self._rng.choice((0.1, 1.0, 5.0))
            await self._for(self._rng.uniform(5.0, 30.0))
            thread.slow_s = 0.0

    async def _full_disk(self) -> None:
        machine = self._rng.choice(self._cluster.machines)
        machine.disk.full = True
        await self._for(self._rng.uniform(5.0, 30.0))
        machine.disk.full = False

    async def _driver_fails(self) -> None:
        faults = self._rng.choice(self._cluster.machines).runtime.faults
        verb = self._rng.choice(("create", "start", "stop", "delete", "get", "list", "recover"))
        error: HypervisorError = Internal("the runtime was told to fail", reason="RUNTIME_FAILED")
        faults.fail(verb, error, times=self._rng.choice((1, 1, 3)))

    async def _driver_slow(self) -> None:
        faults = self._rng.choice(self._cluster.machines).runtime.faults
        verb = self._rng.choice(("create", "start", "stop", "delete", "get", "list", "recover"))
        faults.delay(verb, self._rng.choice((0.3, 3.0, 20.0)))
        await self._for(self._rng.uniform(5.0, 30.0))
        faults.delay(verb, 0.0)

    async def _runtime_down(self) -> None:
        faults = self._rng.choice(self._cluster.machines).runtime.faults
        if faults.down is None:
            faults.lose_runtime()
            await self._for(self._rng.uniform(2.0, 40.0))
            faults.restore_runtime()

    async def _guest_ends(self) -> None:
        runtime = self._rng.choice(self._cluster.machines).runtime
        running = sorted(runtime.running())
        if running:
            await runtime.exit(self._rng.choice(running), self._rng.choice((0, 1, 137)))

    async def _compaction(self) -> None:
        store = self._cluster.store
        if not store.down:
            await store.compact(max(await store.current_revision() - self._rng.choice((0, 3, 50)), 0))
