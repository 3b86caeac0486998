"""Watching etcd without losing, repeating or reordering anything.

What makes this more than a loop over a stream:

* The header of a watch response carries the store's revision, not that of its events: resuming from it skips
  history. Here a watch resumes from the last revision *delivered*.
* It asks for that revision again (and drops it) instead of the one after: so etcd itself says when the
  history between the two is not complete. Asking for the one after would pass over a compaction exactly
  there, which can take a deletion with it (etcd issue 18089).
* A large response comes in fragments, which may split a revision; only whole responses are delivered.
* What a member sends again after a partition (etcd issue 15271) is dropped by its revision.
* A change whose previous version is compacted already would be told as if nothing had been there; that is
  ``Compacted`` as well. Previous versions are dear: with them etcd 3.4.23 took 2 to 3 times the processor time per
  key under many commits (measured with bench/durable_creates.py), so only who needs them asks for them.
* A connection can be silent because nothing happens or because it is dead. After a while of silence a sign
  of life is asked for, and without one the next member is tried. A member cut off from the others ends the
  stream itself (``hasleader``).
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, suppress

import grpc
import grpc.aio
import structlog
from etcdserverpb import rpc_pb2 as pb

from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, Unavailable
from hypervisor.core.retry import Backoff
from hypervisor.server.store.etcd_errors import translate
from hypervisor.server.store.etcd_leases import format_lease_id, stream_ended
from hypervisor.server.store.etcd_members import EtcdMembers, Member
from hypervisor.server.store.storage import Change, Compacted, Item, WatchBatch
from hypervisor.server.store.validation import prefix_end

__all__ = ["EtcdWatch", "to_item"]

_BACKOFF = Backoff(initial_s=0.05, maximum_s=2.0)

log = structlog.get_logger(__name__)


class _Silent(Exception):
    """The connection gave no sign of life in time."""


def to_item(kv: pb.KeyValue) -> Item:
    """A key of etcd as ours."""
    lease_id = format_lease_id(kv.lease) if kv.lease else ""
    return Item(kv.key.decode(), kv.value, kv.create_revision, kv.mod_revision, lease_id)


class EtcdWatch:
    """One watch; ``batches`` yields for ever, over as many connections as it takes."""

    def __init__(
        self,
        members: EtcdMembers,
        prefix: str,
        *,
        after_revision: int,
        with_previous: bool,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._members = members
        self._prefix = prefix
        self._position = after_revision
        self._with_previous = with_previous
        self._clock = clock
        self._rng = rng
        self._patience_s = members.request_timeout_s / 2

    async def batches(self) -> AsyncGenerator[WatchBatch, None]:
        """See ``Storage.watch``."""
        delays = _BACKOFF.delays(self._rng)
        while True:
            before = self._position
            try:
                async with self._members.connected() as member:
                    try:
                        async with aclosing(self._stream(member)) as stream:
                            async for batch in stream:
                                self._position = batch.revision
                                yield batch
                    except (grpc.aio.AioRpcError, _Silent) as exc:
                        self._judge(member, exc)
            except Unavailable as exc:
                if exc.reason == "STORE_CLOSED":
                    raise
                log.warning("store_watch_unreachable", prefix=self._prefix, error=str(exc))
            if self._position != before:
                delays = _BACKOFF.delays(self._rng)
            await self._clock.sleep(next(delays))

    def _judge(self, member: Member, exc: grpc.aio.AioRpcError | _Silent) -> None:
        """Note the end of a stream; raise where another one would end the same way."""
        self._members.check_open()
        if isinstance(exc, grpc.aio.AioRpcError):
            error = translate(exc, member.endpoint)
            if isinstance(error, FailedPrecondition):
                raise error from exc
        self._members.failed(member, silent=isinstance(exc, _Silent))
        log.warning(
            "store_watch_resumes",
            prefix=self._prefix,
            endpoint=member.endpoint,
            after_revision=self._position,
            error=str(exc.details() if isinstance(exc, grpc.aio.AioRpcError) else exc),
        )

    async def _stream(self, member: Member) -> AsyncGenerator[WatchBatch, None]:
        """What one stream has after the position. Raises ``Compacted``, ``AioRpcError``, ``_Silent``."""
        call = member.watch.Watch(None, metadata=(("hasleader", "true"),))
        stream = _Responses(call, patience_s=self._patience_s)
        fragments: list[pb.Event] = []
        try:
            await stream.send(pb.WatchRequest(create_request=self._create_request()))
            while True:
                response = await stream.next()
                if response.canceled:
                    raise self._canceled(response)
                if response.created:
                    await self._check_not_in_future(response.header.revision)
                    stream.watch_id = response.watch_id
                if response.events:
                    fragments.extend(response.events)
                    if not response.fragment:
                        for batch in _by_revision(
                            fragments, after=self._position, with_previous=self._with_previous
                        ):
                            yield batch
                        fragments = []
                elif stream.is_progress(response) and response.header.revision > self._position:
                    yield WatchBatch(response.header.revision, ())
        finally:
            stream.close()

    def _create_request(self) -> pb.WatchCreateRequest:
        return pb.WatchCreateRequest(
            key=(self._prefix or "/").encode(),
            range_end=prefix_end(self._prefix),
            start_revision=max(1, self._position),
            progress_notify=True,
            prev_kv=self._with_previous,
            fragment=True,
        )

    def _canceled(self, response: pb.WatchResponse) -> Exception:
        if response.compact_revision:
            return Compacted(
                f"revision {self._position} is compacted (history begins at {response.compact_revision}): list again",
                metadata={"revision": str(self._position), "oldest": str(response.compact_revision)},
            )
        if "permission denied" in response.cancel_reason:
            return FailedPrecondition(
                f"etcd does not let this server watch {self._prefix!r}: check the role of its certificate",
                reason="STORE_ACCESS_DENIED",
            )
        return stream_ended(f"watch cancelled: {response.cancel_reason or 'no reason given'}")

    async def _check_not_in_future(self, member_revision: int) -> None:
        """Refuse a position that the store has not reached: it was restored from a backup, or is another
        one."""
        if member_revision >= self._position:
            return
        # The member may only be behind the others; a linearizable read says what the cluster has.
        newest = await self._members.repeat(_newest_revision)
        if newest < self._position:
            raise Compacted(
                f"revision {self._position} is newer than the store ({newest}): it was restored from a backup or is "
                "another one; list again",
                metadata={"revision": str(self._position), "newest": str(newest)},
            )


class _Responses:
    """The responses of one stream, with a watch on silence. Not a task of its own: it reads when asked to,
    so a slow consumer holds the server back instead of filling memory."""

    def __init__(
        self, call: "grpc.aio.StreamStreamCall[pb.WatchRequest, pb.WatchResponse]", *, patience_s: float
    ):
        self._call = call
        self._patience_s = patience_s
        self._read: asyncio.Task[object] | None = None
        self.watch_id = 0

    async def send(self, request: pb.WatchRequest) -> None:
        """Send; a call that has failed is reported by the next read, which knows the cause."""
        with suppress(asyncio.InvalidStateError):
            try:
                async with asyncio.timeout(self._patience_s):
                    await self._call.write(request)
            except TimeoutError:
                raise _Silent(f"a request could not be sent for {self._patience_s:g} s") from None

    async def next(self) -> pb.WatchResponse:
        """The next response; asks for a sign of life after a while without."""
        # The read outlives a time-out: cancelling it would cancel the stream.
        if self._read is None:
            self._read = asyncio.ensure_future(self._call.read())
        read = self._read
        done, _ = await asyncio.wait({read}, timeout=self._patience_s)
        if not done:
            await self.send(pb.WatchRequest(progress_request=pb.WatchProgressRequest()))
            done, _ = await asyncio.wait({read}, timeout=self._patience_s)
            if not done:
                raise _Silent(f"no sign of life for {2 * self._patience_s:g} s")
        self._read = None
        response = read.result()
        if not isinstance(response, pb.WatchResponse):
            raise stream_ended("by the server")
        return response

    def is_progress(self, response: pb.WatchResponse) -> bool:
        """Whether it says that everything up to its revision was sent.

        Only notifications addressed to the watch do. The answer to a progress request (watch id -1) can
        overtake events in etcd before 3.4.25 and 3.5.8 (issue 15220): it is a sign of life and nothing more.
        """
        return response.watch_id == self.watch_id and not response.created and not response.canceled

    def close(self) -> None:
        """End the stream."""
        if self._read is not None:
            self._read.cancel()
            self._read = None
        self._call.cancel()


def _by_revision(events: Sequence[pb.Event], *, after: int, with_previous: bool) -> Iterator[WatchBatch]:
    """Events as batches of one revision each; those at or before ``after`` are dropped."""
    changes: list[Change] = []
    for event in events:
        if event.kv.mod_revision <= after:
            continue
        change = _change(event, with_previous=with_previous)
        if changes and changes[-1].revision != change.revision:
            yield WatchBatch(changes[-1].revision, tuple(changes))
            changes = []
        changes.append(change)
    if changes:
        yield WatchBatch(changes[-1].revision, tuple(changes))


def _change(event: pb.Event, *, with_previous: bool) -> Change:
    kv = event.kv
    deletion = event.type == pb.Event.DELETE
    previous = to_item(event.prev_kv) if event.HasField("prev_kv") else None
    if with_previous and previous is None and (deletion or kv.version > 1):
        raise Compacted(
            f"what revision {kv.mod_revision} replaced is compacted: list again",
            metadata={"revision": str(kv.mod_revision)},
        )
    return Change(kv.key.decode(), kv.mod_revision, None if deletion else to_item(kv), previous)


async def _newest_revision(member: Member, timeout_s: float) -> int:
    request = pb.RangeRequest(key=b"/", count_only=True)
    return (await member.kv.Range(request, timeout=timeout_s)).header.revision
