"""Commits to etcd whose outcome is always known, or known to be unknown.

The answer of a transaction can be lost: the connection breaks, the leader changes, the member is slow.
Sending it again is wrong (it may have been applied: the second one would look like a conflict with somebody
else), and reading the written keys back proves nothing (somebody may have changed them since, or the
transaction may still be on its way through the cluster and be applied after the read).

Therefore every commit goes through a *slot*: a small key of this client alone, used by one commit at a time,
whose ``mod_revision`` we know. The transaction carries a compare on it and writes a token of its own to it:

    if   <the caller's compares> and mod_revision(slot) == known
    then <the caller's operations>, put slot = token

When the answer is lost, a second transaction settles the matter:

    if   mod_revision(slot) == known
    then put slot = token + "!"
    else get slot

* The put was done: the transaction was not applied, and now it never will be, as its own compare is false.
* The slot holds the token: it was applied, at the slot's ``mod_revision``.
* The slot holds the token and "!": an earlier try to settle got through; as the first case.
* It holds anything else, or is gone: the outcome cannot be known.

(A full etcd refuses to write but has answered: then the slot is only read.)

Of the transaction and its settlement exactly one can find the slot as it was, so the verdict is final, and
settling can be repeated for as long as it takes. Slots are bound to a lease, which removes them when the
client is gone; the lease is part of their name, so a slot that went away never comes back under an old name,
and a delayed transaction that would write to it fails for want of the lease.

The cost is one key of a few bytes in a transaction that waits for the disk anyway.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import grpc
import grpc.aio
import structlog
from etcdserverpb import rpc_pb2 as pb

from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, Unavailable
from hypervisor.server.store.etcd_errors import is_lease_missing, may_have_been_applied, translate
from hypervisor.server.store.etcd_leases import (
    format_lease_id,
    grant_lease,
    renew_lease,
    revoke_lease,
)
from hypervisor.server.store.etcd_members import EtcdMembers, Member
from hypervisor.server.store.storage import OutcomeUnknown
from hypervisor.server.store.validation import lease_not_found

__all__ = ["COMMIT_PREFIX", "Applied", "EtcdCommitter", "Refused"]

COMMIT_PREFIX = "hypervisor-store/commits/"
"""Where slots live. Without a leading slash: outside everything that Storage can name."""

_SLOTS = 256
_LEASE_TTL_S = 120
_ATTEMPTS = 3
_MIN_TIMEOUT_S = 0.5

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Applied:
    """The compares held; the operations took effect at ``revision``."""

    revision: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A compare did not hold; ``responses`` are those of the caller's reads at ``revision``."""

    revision: int
    responses: Sequence[pb.ResponseOp]


class _Void(Exception):
    """The transaction was not applied and never will be; it may be sent again."""


@dataclass(slots=True)
class _Slots:
    """The slots of one lease; ``free`` holds those not in use."""

    lease: int
    made: int = 0
    free: list["_Slot"] = field(default_factory=list)


@dataclass(slots=True)
class _Slot:
    slots: _Slots
    key: bytes
    uses: int = 0
    revision: int | None = None
    """Its ``mod_revision``; None while it is not known, as after a commit whose outcome is not."""


class EtcdCommitter:
    """Sends transactions and settles lost answers. ``run`` keeps the slots' lease alive; its owner runs
    it."""

    def __init__(self, members: EtcdMembers, *, clock: Clock) -> None:
        self._members = members
        self._clock = clock
        self._slots: _Slots | None = None
        self._renewing = asyncio.Lock()
        self._admission = asyncio.Semaphore(_SLOTS)

    async def commit(
        self,
        compares: Sequence[pb.Compare],
        operations: Sequence[pb.RequestOp],
        reads: Sequence[pb.RequestOp],
    ) -> Applied | Refused:
        """Apply ``operations`` if all ``compares`` hold, else answer ``reads``.

        Raises ``Unavailable`` when it was certainly not applied, ``OutcomeUnknown`` when that cannot be
        known, ``NotFound`` when a lease of the operations has ended.
        """
        async with self._admission:
            deadline = self._clock.monotonic() + self._members.request_timeout_s
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    async with self._slot() as slot:
                        # Half of what is left, so that one silent member leaves time for another.
                        timeout_s = max((deadline - self._clock.monotonic()) / 2, _MIN_TIMEOUT_S)
                        return await self._commit_through(
                            slot, compares, operations, reads, timeout_s=timeout_s
                        )
                except _Void as exc:
                    if attempt == _ATTEMPTS or self._clock.monotonic() >= deadline:
                        raise Unavailable(
                            f"a commit to etcd failed {attempt} times ({exc}); nothing was written",
                            reason="STORE_UNAVAILABLE",
                            retry_after_s=1.0,
                        ) from exc
                    log.info("store_commit_repeated", attempt=attempt, why=str(exc))
        raise AssertionError("the last attempt returns or raises")

    async def run(self) -> None:
        """Keep the lease of the slots alive until cancelled."""
        while True:
            await self._clock.sleep(_LEASE_TTL_S / 4)
            slots = self._slots
            if slots is not None:
                try:
                    if await renew_lease(self._members, slots.lease) <= 0:
                        self._drop(slots)
                except HypervisorError as exc:
                    log.warning("store_commit_lease_not_renewed", reason=exc.reason, error=str(exc))

    async def aclose(self) -> None:
        """Remove the slots. Raises like any request; they go by themselves when their lease ends."""
        slots, self._slots = self._slots, None
        if slots is not None:
            await revoke_lease(self._members, slots.lease)

    async def _commit_through(
        self,
        slot: _Slot,
        compares: Sequence[pb.Compare],
        operations: Sequence[pb.RequestOp],
        reads: Sequence[pb.RequestOp],
        *,
        timeout_s: float,
    ) -> Applied | Refused:
        known = slot.revision
        slot.uses += 1
        token = b"%d" % slot.uses
        request = pb.TxnRequest(
            compare=[*compares, _unchanged(slot.key, known)],
            success=[*operations, _put(slot, token)],
            failure=[*reads, _get(slot.key)],
        )
        async with self._members.connected() as member:
            # From here on the slot is in doubt, until one of the ways out says otherwise.
            slot.revision = None
            try:
                response = await member.kv.Txn(request, timeout=timeout_s)
            except grpc.aio.AioRpcError as exc:
                lost = exc
                endpoint = member.endpoint
                self._note_failure(member, exc)
            else:
                return self._read_answer(slot, known, response)
        if not may_have_been_applied(lost):
            slot.revision = known
            if is_lease_missing(lost):
                raise await self._blame_lease(slot, operations) from lost
            raise translate(lost, endpoint) from lost
        applied = await self._settle(slot, known, token, lost)
        if applied is not None:
            log.info("store_commit_settled", applied=True, revision=applied)
            return Applied(applied)
        log.info("store_commit_settled", applied=False)
        error = translate(lost, endpoint)
        if isinstance(error, Unavailable):
            raise _Void(str(error)) from lost
        raise error from lost

    def _note_failure(self, member: Member, exc: grpc.aio.AioRpcError) -> None:
        if may_have_been_applied(exc):
            self._members.failed(member, silent=exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED)

    def _read_answer(self, slot: _Slot, known: int | None, response: pb.TxnResponse) -> Applied | Refused:
        revision = response.header.revision
        if response.succeeded:
            slot.revision = revision
            return Applied(revision)
        found = response.responses[-1].response_range.kvs
        if not found or found[0].mod_revision != known:
            # The lease ended (this process was stopped for minutes), or somebody meddled with our key.
            self._drop(slot.slots)
            raise _Void("the commit slot has changed")
        slot.revision = known
        return Refused(revision, response.responses[:-1])

    async def _settle(
        self, slot: _Slot, known: int | None, token: bytes, lost: grpc.aio.AioRpcError
    ) -> int | None:
        """The revision at which the transaction was applied, or None when it never will be."""
        void = token + b"!"
        request = pb.TxnRequest(
            compare=[_unchanged(slot.key, known)], success=[_put(slot, void)], failure=[_get(slot.key)]
        )
        if lost.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            # etcd has answered, so nothing is on its way any more; and being full it would refuse to write.
            request = pb.TxnRequest(success=[_get(slot.key)])
        try:
            response = await self._members.repeat(partial(_txn, request))
        except HypervisorError as exc:
            raise OutcomeUnknown(
                f"the answer of a commit was lost ({lost.code().name}) and etcd could not be asked about it "
                f"({exc}): it may or may not be applied; read back before a retry",
            ) from lost
        answer = response.responses[0]
        if answer.HasField("response_put"):
            slot.revision = response.header.revision
            return None
        found = answer.response_range.kvs
        if found and found[0].mod_revision == known:
            slot.revision = known
            return None
        if found and found[0].value in (token, void):
            slot.revision = found[0].mod_revision
            return slot.revision if found[0].value == token else None
        raise OutcomeUnknown(
            f"the answer of a commit was lost ({lost.code().name}) and its commit slot is gone: it may or may not "
            "be applied; read back before a retry",
        ) from lost

    async def _blame_lease(self, slot: _Slot, operations: Sequence[pb.RequestOp]) -> Exception:
        """Which lease is missing: one of the caller's (``NotFound``), or that of the slots (``_Void``)."""
        for lease in sorted({op.request_put.lease for op in operations if op.request_put.lease}):
            request = pb.LeaseTimeToLiveRequest(id=lease)
            answer = await self._members.repeat(partial(_time_to_live, request))
            if answer.ttl <= 0:
                return lease_not_found(format_lease_id(lease))
        self._drop(slot.slots)
        return _Void("the lease of the commit slots has ended")

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[_Slot]:
        """A slot for one commit, its revision known."""
        slots = await self._current_slots()
        if slots.free:
            slot = slots.free.pop()
        else:
            slots.made += 1
            slot = _Slot(slots, f"{COMMIT_PREFIX}{slots.lease:016x}/{slots.made}".encode())
        try:
            if slot.revision is None:
                slot.revision = await self._write_slot(slot)
            yield slot
        finally:
            slots.free.append(slot)

    async def _write_slot(self, slot: _Slot) -> int:
        # Unconditional: whatever was on its way to this slot finds it changed and fails.
        put = pb.PutRequest(key=slot.key, value=b"", lease=slot.slots.lease)

        async def request(member: Member, timeout_s: float) -> int:
            try:
                return (await member.kv.Put(put, timeout=timeout_s)).header.revision
            except grpc.aio.AioRpcError as exc:
                if is_lease_missing(exc):
                    self._drop(slot.slots)
                    raise _Void("the lease of the commit slots has ended") from exc
                raise

        return await self._members.repeat(request)

    async def _current_slots(self) -> _Slots:
        if self._slots is None:
            async with self._renewing:
                if self._slots is None:
                    self._slots = _Slots((await grant_lease(self._members, _LEASE_TTL_S)).id)
        return self._slots

    def _drop(self, slots: _Slots) -> None:
        if self._slots is slots:
            self._slots = None


def _unchanged(key: bytes, revision: int | None) -> pb.Compare:
    if revision is None:
        raise AssertionError("a slot is used whose revision is not known")
    return pb.Compare(result=pb.Compare.EQUAL, target=pb.Compare.MOD, key=key, mod_revision=revision)


def _put(slot: _Slot, value: bytes) -> pb.RequestOp:
    return pb.RequestOp(request_put=pb.PutRequest(key=slot.key, value=value, lease=slot.slots.lease))


def _get(key: bytes) -> pb.RequestOp:
    return pb.RequestOp(request_range=pb.RangeRequest(key=key))


async def _time_to_live(
    request: pb.LeaseTimeToLiveRequest, member: Member, timeout_s: float
) -> pb.LeaseTimeToLiveResponse:
    return await member.lease.LeaseTimeToLive(request, timeout=timeout_s)


async def _txn(request: pb.TxnRequest, member: Member, timeout_s: float) -> pb.TxnResponse:
    return await member.kv.Txn(request, timeout=timeout_s)
