"""WatchEvents over real gRPC: order, resuming, snapshots without a gap, filters, compaction."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from hvtest_agent_waiting import within
from hvtest_whole_cluster import WholeAgent, WholeServer, container, failure_of, whole_server
from hypervisor.core.clock import SystemClock
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.open import open_storage
from hypervisor.v1 import cluster_pb2, compute_pb2

Event = cluster_pb2.Event


class Watcher:
    """One stream and all it has brought."""

    def __init__(self, server: WholeServer, **request: Any) -> None:
        self._call: Any = server.cluster.WatchEvents(cluster_pb2.WatchEventsRequest(**request))
        self.events: list[cluster_pb2.Event] = []

    async def until(self, reason: str, *, name: str = "") -> cluster_pb2.Event:
        """Read on to the first event of this reason (and object)."""
        return await within(self._find(reason, name), what=f"event {reason} of {name or 'anything'}")

    async def _find(self, reason: str, name: str) -> cluster_pb2.Event:
        while True:
            event = await self.next()
            if event.reason == reason and name in ("", event.object_name):
                return event

    async def next(self) -> cluster_pb2.Event:
        read = await within(self._call.read(), what="an event")
        assert read is not grpc.aio.EOF, "the stream ended"
        event: cluster_pb2.Event = read
        self.events.append(event)
        return event

    def end(self) -> None:
        self._call.cancel()


async def some_changes(server: WholeServer, name: str) -> None:
    await server.compute.CreateInstance(container(name))
    await server.compute.StopInstance(compute_pb2.StopInstanceRequest(instance=name))
    await server.compute.DeleteInstance(compute_pb2.DeleteInstanceRequest(instance=name))


def content(events: list[cluster_pb2.Event]) -> list[tuple[int, str, str, str]]:
    return [(e.revision, e.kind, e.object_id, e.reason) for e in events if e.kind]


async def test_a_life_is_told_in_order_with_reasons_and_sentences(
    server: WholeServer, agent: WholeAgent
) -> None:
    watcher = Watcher(server, kinds=["instance"])
    first = await watcher.next()
    assert (first.type, first.kind) == (Event.TYPE_PROGRESS, "")

    await some_changes(server, "web")
    gone = await watcher.until("DELETED", name="web")

    told = watcher.events[1:]
    assert told[0].type == Event.TYPE_CREATED
    assert gone.type == Event.TYPE_DELETED
    assert gone.message == "instance web was deleted"
    assert gone.instance.name == "web"
    reasons = [e.reason for e in told]
    assert reasons.index("CREATED") < reasons.index("RUNNING") < reasons.index("DELETED")
    assert [e.revision for e in told] == sorted(e.revision for e in told)
    assert all(e.message and e.kind == "instance" and e.last_of_revision for e in told)
    watcher.end()


async def test_a_stream_resumed_anywhere_brings_exactly_the_rest(
    server: WholeServer, agent: WholeAgent
) -> None:
    whole = Watcher(server)
    begin = (await whole.next()).revision
    await some_changes(server, "web")
    await whole.until("DELETED", name="web")
    told = content(whole.events)

    places = [e.revision for e in whole.events if e.last_of_revision]
    for place in places[:: max(1, len(places) // 6)]:
        rest = Watcher(server, after_revision=place)
        expected = [item for item in told if item[0] > place]
        while len(content(rest.events)) < len(expected):
            await rest.next()
        assert content(rest.events) == expected
        rest.end()
    assert all(revision > begin for revision, *_ in told)
    whole.end()


async def test_a_snapshot_joins_the_changes_without_a_gap(server: WholeServer, agent: WholeAgent) -> None:
    async def keep_changing() -> None:
        for number in range(15):
            await server.compute.CreateInstance(container(f"i{number}"))

    begun = Watcher(server, kinds=["instance"])
    await begun.next()
    changing = asyncio.ensure_future(keep_changing())
    await begun.until("CREATED")
    watcher = Watcher(server, kinds=["instance"], send_initial=True)
    await watcher.until("RUNNING", name="i14")
    await changing

    types = [e.type for e in watcher.events]
    synced = types.index(Event.TYPE_SYNCED)
    assert set(types[:synced]) == {Event.TYPE_SNAPSHOT}
    assert Event.TYPE_SNAPSHOT not in types[synced:]
    assert all(e.revision <= watcher.events[synced].revision for e in watcher.events[:synced])
    known = {e.object_name: e.instance.status for e in watcher.events if e.kind}
    assert set(known) == {f"i{n}" for n in range(15)}
    created = [e.object_name for e in watcher.events if e.type == Event.TYPE_CREATED]
    snapshot = [e.object_name for e in watcher.events[:synced]]
    assert sorted(created + snapshot) == sorted(known)
    assert snapshot
    begun.end()
    watcher.end()


async def test_filters_leave_the_rest_out(server: WholeServer, agent: WholeAgent) -> None:
    made = await server.compute.CreateInstance(container("web"))
    one = Watcher(server, object_id=made.object_id, send_initial=True)
    nodes = Watcher(server, kinds=["node"], send_initial=True)
    other = Watcher(server, project="elsewhere", send_initial=True)

    await server.compute.CreateInstance(container("db"))
    await server.compute.DeleteInstance(compute_pb2.DeleteInstanceRequest(instance="web", force=True))
    await server.cluster.CordonNode(cluster_pb2.CordonNodeRequest(node="node-1"))

    await one.until("DELETED")
    await nodes.until("NODE_CORDONED")
    assert {e.object_id for e in one.events if e.kind} == {made.object_id}
    assert {e.kind for e in nodes.events if e.kind} == {"node"}
    assert (await other.next()).type == Event.TYPE_SYNCED
    for watcher in (one, nodes, other):
        watcher.end()


async def test_a_revision_whose_history_is_gone_is_told_to_relist(tmp_path: Path) -> None:
    async with whole_server(tmp_path) as first:
        await first.compute.ListInstances(compute_pb2.ListInstancesRequest())
    storage = await open_storage(StoreConfig(path=str(tmp_path / "store.db")), SystemClock())
    await storage.compact(await storage.current_revision())
    await storage.aclose()

    async with whole_server(tmp_path) as server:
        call = server.cluster.WatchEvents(cluster_pb2.WatchEventsRequest(after_revision=1))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await within(call.read(), what="the refusal")

    error = failure_of(failed.value)
    assert (failed.value.code(), error.reason) == (grpc.StatusCode.OUT_OF_RANGE, "COMPACTED")
    assert "list again" in error.message


async def test_a_revision_of_the_future_is_out_of_range(server: WholeServer) -> None:
    call = server.cluster.WatchEvents(cluster_pb2.WatchEventsRequest(after_revision=1 << 50))
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await within(call.read(), what="the refusal")

    assert failed.value.code() is grpc.StatusCode.OUT_OF_RANGE


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"after_revision": -1}, "after_revision: is -1"),
        ({"kinds": ["pod"]}, "kinds[0]: is not known: use node, instance, operation"),
        ({"project": "No"}, "project: 'No' is not a legal name"),
    ],
)
async def test_a_wrong_filter_is_refused(
    server: WholeServer, request_: dict[str, Any], sentence: str
) -> None:
    call = server.cluster.WatchEvents(cluster_pb2.WatchEventsRequest(**request_))
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await within(call.read(), what="the refusal")

    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in (failed.value.details() or "")
