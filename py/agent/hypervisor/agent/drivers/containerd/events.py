"""Exits and OOM kills out of containerd's event stream, without a gap.

The stream has no history, so each connection begins with a complete listing. That the subscription is live before the
listing is taken is proven by an event of our own: it is published until it comes back.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn

import grpc.aio
import structlog
from containerd_api.events import task_pb2
from containerd_api.services.events.v1 import events_pb2
from google.protobuf import any_pb2

from hypervisor.agent.drivers.containerd.client import Client
from hypervisor.agent.drivers.containerd.runtime import moment
from hypervisor.agent.drivers.pumped_feed import PumpedFeed, first_leaf
from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, Unavailable
from hypervisor.core.model import Observation
from hypervisor.core.retry import Backoff

__all__ = ["EventFeed", "EventHandlers", "TaskExit"]

_EXIT = "/tasks/exit"
_OOM = "/tasks/oom"
_SYNC = "/hypervisor/sync"
_SYNC_INTERVAL_S = 0.2
_SYNC_ATTEMPTS = 50
_QUEUE = 1024
_PARALLEL = 16
_BACKOFF = Backoff(initial_s=0.1, maximum_s=2.0)

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskExit:
    """A process of containerd's ended."""

    instance_id: str
    exit_code: int
    exited_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventHandlers:
    """What the driver does with events; each returns what the platform shall hear of, or None."""

    on_exit: Callable[[TaskExit], Awaitable[Observation | None]]
    on_oom: Callable[[str], Awaitable[Observation | None]]
    resync: Callable[[], Awaitable[tuple[Observation, ...]]]


class EventFeed(PumpedFeed):
    """Observations for ever; one consumer. Its task runs from the first ``anext`` to :meth:`aclose`.

    Should it end by a defect, ``anext`` raises that once, and the next one begins anew with a listing. On a full
    queue (1,024) events wait in containerd's stream.
    """

    def __init__(
        self, client: Client, handlers: EventHandlers, *, namespace: str, clock: Clock, rng: random.Random
    ) -> None:
        super().__init__("containerd-events")
        self._client = client
        self._handlers = handlers
        self._namespace = namespace
        self._clock = clock
        self._rng = rng

    async def _run(self) -> None:
        delays = _BACKOFF.delays(self._rng)
        told = ""
        while True:
            synced = asyncio.Event()
            try:
                await self._follow(synced)
            except* HypervisorError as failures:
                error = str(first_leaf(failures))
            if synced.is_set():
                delays, told = _BACKOFF.delays(self._rng), ""
            if error != told:
                # Once, and not at every attempt of an outage.
                _log.warning("containerd_events_interrupted", error=error)
                told = error
            await self._clock.sleep(next(delays))

    async def _follow(self, synced: asyncio.Event) -> NoReturn:
        """One connection: subscribe, prove it, list, then handle events until the stream breaks (and raise)."""
        call = self._client.events.Subscribe(
            events_pb2.SubscribeRequest(
                filters=[f'namespace=={self._namespace},topic=="{topic}"' for topic in (_EXIT, _OOM, _SYNC)]
            )
        )
        try:
            live = asyncio.Event()
            envelopes: asyncio.Queue[events_pb2.Envelope] = asyncio.Queue(_QUEUE)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(call, live, envelopes))
                await self._await_live(live)
                for observation in await self._handlers.resync():
                    await self._tell(observation)
                synced.set()
                for _ in range(_PARALLEL):
                    group.create_task(self._work(envelopes))
            raise AssertionError("the reader ends with an error only")
        finally:
            call.cancel()

    async def _read(
        self,
        call: "grpc.aio.UnaryStreamCall[events_pb2.SubscribeRequest, events_pb2.Envelope]",
        live: asyncio.Event,
        envelopes: "asyncio.Queue[events_pb2.Envelope]",
    ) -> None:
        async with self._client.errors("follow events"):
            async for envelope in call:
                if envelope.topic == _SYNC:
                    live.set()
                else:
                    await envelopes.put(envelope)
        raise Unavailable("containerd ended the stream of events", reason="DRIVER_UNAVAILABLE")

    async def _await_live(self, live: asyncio.Event) -> None:
        """Publish until an event comes back: containerd does not say when a subscription has begun."""
        for _ in range(_SYNC_ATTEMPTS):
            await self._client.call(
                self._client.events.Publish,
                events_pb2.PublishRequest(topic=_SYNC, event=any_pb2.Any(type_url="hypervisor.Sync")),
                what="prove the subscription to events",
            )
            try:
                async with asyncio.timeout(_SYNC_INTERVAL_S):
                    await live.wait()
                    return
            except TimeoutError:
                continue
        raise Unavailable("containerd delivers no events", reason="DRIVER_UNAVAILABLE")

    async def _work(self, envelopes: "asyncio.Queue[events_pb2.Envelope]") -> None:
        while True:
            observation = await self._handle(await envelopes.get())
            if observation is not None:
                await self._tell(observation)

    async def _handle(self, envelope: events_pb2.Envelope) -> Observation | None:
        if envelope.topic == _OOM:
            return await self._handlers.on_oom(task_pb2.TaskOOM.FromString(envelope.event.value).container_id)
        event = task_pb2.TaskExit.FromString(envelope.event.value)
        # An exit of a process that was executed inside the container has an id of its own.
        if event.id != event.container_id:
            return None
        return await self._handlers.on_exit(
            TaskExit(
                instance_id=event.container_id, exit_code=event.exit_status, exited_at=moment(event.exited_at)
            )
        )
