"""Agents in memory, strict about the contract: they refuse what the server must not do, and fail on demand."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from hypervisor.core.consoles import ConsoleOptions, LogOptions, LogPiece
from hypervisor.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    HypervisorError,
    NotFound,
    Unavailable,
)
from hypervisor.core.images import ImageSource
from hypervisor.core.model import Instance, InstanceStats, Node, Observation
from hypervisor.core.states import InstanceStatus
from hypervisor.server.agents import CallContext
from hypervisor.server.services import ConsoleSession

__all__ = ["MemoryAgent", "MemoryAgents"]


@dataclass
class _Held:
    instance: Instance
    status: InstanceStatus
    sequence: int
    exit_code: int | None = None
    reason: str = ""


@dataclass
class MemoryAgent:
    """One node's agent. Calls for one instance are served one after another, as the contract says.

    ``unreachable``  every call fails as if the network were cut
    ``failures``     error of the next call of a verb (once)
    ``gates``        calls of a verb wait for this event first
    ``calls``        (verb, instance id) in the order they arrived, but for the reconciler's looks
    ``looks``        how often the reconciler asked for all it has
    ``images``       what each create was told of images, by instance id
    """

    hostname: str
    unreachable: bool = False
    failures: dict[str, HypervisorError] = field(default_factory=dict)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    looks: int = 0
    held: dict[str, _Held] = field(default_factory=dict)
    exits_at_once: int | None = None
    images: dict[str, tuple[ImageSource, ...]] = field(default_factory=dict)
    _locks: dict[str, asyncio.Lock] = field(default_factory=dict)
    _sequences: dict[str, int] = field(default_factory=dict)

    def holds(self) -> set[str]:
        """Ids of the instances on the node."""
        return set(self.held)

    def observe(self, instance_id: str) -> Observation:
        """The instance as it is, under a new sequence number."""
        held = self.held[instance_id]
        held.sequence = self._next(instance_id)
        ended = held.status in (InstanceStatus.STOPPED, InstanceStatus.FAILED)
        now = datetime.now(UTC)
        return Observation(
            instance_id=instance_id,
            generation=held.instance.generation,
            epoch=held.instance.epoch,
            status=held.status,
            observed_at=now,
            sequence=held.sequence,
            reason=held.reason if ended else "",
            exit_code=held.exit_code if ended else None,
            finished_at=now if ended and held.exit_code is not None else None,
            started_at=None if ended else now,
            runtime="memory 1",
        )

    def end(self, instance_id: str, *, exit_code: int, reason: str = "") -> Observation:
        """The instance exits by itself; returns what the agent tells the server."""
        held = self.held[instance_id]
        held.status, held.exit_code, held.reason = InstanceStatus.STOPPED, exit_code, reason
        return self.observe(instance_id)

    async def create(
        self, instance: Instance, context: CallContext, *, start: bool, images: tuple[ImageSource, ...] = ()
    ) -> Observation:
        self.images[instance.id] = images
        async with self._serve("create", instance.id, context):
            known = self.held.get(instance.id)
            if known is not None and known.instance.epoch > instance.epoch:
                raise FailedPrecondition("older epoch", reason="STALE_EPOCH")
            if known is None or known.instance.epoch < instance.epoch:
                status = InstanceStatus.RUNNING if start else InstanceStatus.STOPPED
                self.held[instance.id] = _Held(instance, status, 0)
                if start and self.exits_at_once is not None:
                    self.held[instance.id].status = InstanceStatus.STOPPED
                    self.held[instance.id].exit_code = self.exits_at_once
            return self.observe(instance.id)

    async def start(self, instance: Instance, context: CallContext) -> Observation:
        async with self._serve("start", instance.id, context):
            self._known(instance.id).status = InstanceStatus.RUNNING
            return self.observe(instance.id)

    async def stop(self, instance: Instance, context: CallContext, *, grace_s: float) -> Observation:
        assert grace_s >= 0
        async with self._serve("stop", instance.id, context):
            held = self._known(instance.id)
            if held.status is not InstanceStatus.STOPPED:
                held.status, held.exit_code = InstanceStatus.STOPPED, 143
            return self.observe(instance.id)

    async def restart(self, instance: Instance, context: CallContext, *, grace_s: float) -> Observation:
        assert grace_s >= 0
        async with self._serve("restart", instance.id, context):
            self._known(instance.id).status = InstanceStatus.RUNNING
            return self.observe(instance.id)

    async def delete(self, instance: Instance, context: CallContext, *, grace_s: float) -> bool:
        async with self._serve("delete", instance.id, context):
            known = self.held.get(instance.id)
            if known is not None and known.instance.epoch > instance.epoch:
                raise FailedPrecondition("older epoch", reason="STALE_EPOCH")
            return self.held.pop(instance.id, None) is not None

    async def delete_copy(self, seen: Observation, context: CallContext) -> bool:
        async with self._serve("delete_copy", seen.instance_id, context):
            known = self.held.get(seen.instance_id)
            if known is not None and known.instance.epoch > seen.epoch:
                raise FailedPrecondition("older epoch", reason="STALE_EPOCH")
            return self.held.pop(seen.instance_id, None) is not None

    async def list(self, context: CallContext) -> tuple[Observation, ...]:
        async with self._serve("list", "", context):
            return tuple(self.observe(instance_id) for instance_id in self.held)

    async def stats(self, instance_id: str, context: CallContext) -> InstanceStats:
        async with self._serve("stats", instance_id, context):
            if self._known(instance_id).status is not InstanceStatus.RUNNING:
                raise FailedPrecondition("it does not run", reason="NOT_RUNNING")
            return InstanceStats(sampled_at=datetime.now(UTC), cpu_usage_ns=1)

    async def watch_stats(
        self, instance_id: str, context: CallContext, *, interval_s: float, history_s: float
    ) -> AsyncGenerator[InstanceStats, None]:
        while self._known(instance_id).status is InstanceStatus.RUNNING:
            yield await self.stats(instance_id, context)
            await asyncio.sleep(interval_s)

    async def attach_console(
        self,
        instance_id: str,
        context: CallContext,
        options: ConsoleOptions,
    ) -> ConsoleSession:
        raise AssertionError("consoles are tested over gRPC")

    async def logs(
        self, instance_id: str, context: CallContext, options: LogOptions
    ) -> AsyncGenerator[LogPiece, None]:
        raise AssertionError("logs are tested over gRPC")
        yield

    def _known(self, instance_id: str) -> _Held:
        if instance_id not in self.held:
            raise NotFound(f"no instance {instance_id}", reason="INSTANCE_NOT_FOUND")
        return self.held[instance_id]

    def _next(self, instance_id: str) -> int:
        self._sequences[instance_id] = self._sequences.get(instance_id, 0) + 1
        return self._sequences[instance_id]

    def _serve(self, verb: str, instance_id: str, context: CallContext) -> "_Serving":
        assert context.timeout_s > 0, "every call has a deadline"
        assert context.request_id, "every call has a request id"
        return _Serving(self, verb, instance_id, context)


class _Serving:
    """One call: waits for its turn and its gate, fails if it shall."""

    def __init__(self, agent: MemoryAgent, verb: str, instance_id: str, context: CallContext) -> None:
        self._agent = agent
        self._verb = verb
        self._context = context
        self._instance_id = instance_id
        self._lock = agent._locks.setdefault(instance_id, asyncio.Lock())

    async def __aenter__(self) -> None:
        agent = self._agent
        if self._verb == "list" and self._context.request_id.startswith("reconcile-"):
            agent.looks += 1
        else:
            agent.calls.append((self._verb, self._instance_id))
        if agent.unreachable:
            raise _cut_off(agent.hostname)
        try:
            async with asyncio.timeout(self._context.timeout_s):
                await self._lock.acquire()
                try:
                    gate = agent.gates.get(self._verb)
                    if gate is not None:
                        await gate.wait()
                    failure = agent.failures.pop(self._verb, None)
                    if failure is not None:
                        raise failure
                except BaseException:
                    self._lock.release()
                    raise
        except TimeoutError:
            raise DeadlineExceeded("the agent took too long") from None

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()
        if self._agent.unreachable:  # the work was done, and its answer is lost
            raise _cut_off(self._agent.hostname)


def _cut_off(hostname: str) -> Unavailable:
    return Unavailable(f"node {hostname} cannot be reached", reason="NODE_UNREACHABLE", retry_after_s=0.01)


class MemoryAgents:
    """Agents by node id."""

    def __init__(self) -> None:
        self.by_node: dict[str, MemoryAgent] = {}

    def agent(self, node: Node) -> MemoryAgent:
        return self.by_node.setdefault(node.id, MemoryAgent(node.hostname))
