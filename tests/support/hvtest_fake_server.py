"""A strict in-process server for tests of the command line: real gRPC on loopback, everything else in memory.

It answers as the .proto files say and refuses what they forbid: unknown filter fields, a mutating call without a
request id, a request id with another payload, a console that does not begin with ``open``. Faults are asked for by
name: ``lose_reply``, ``refuse``, ``hold``, ``cut_watches``, ``compact``.
"""

# ruff: noqa: N802  # methods are named as their RPCs
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

from hvtest_fake_maintenance import FakeMaintenance
from hvtest_fake_placement import FakePlacement, explained
from hvtest_fake_state import RUNNING, STOPPED, FakeState, Stop, refuse
from hypervisor.core import errors
from hypervisor.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    compute_pb2,
    compute_pb2_grpc,
    instance_pb2,
    maintenance_pb2_grpc,
    node_pb2,
    operation_pb2,
    operation_pb2_grpc,
)

__all__ = ["FakeServer"]

_CONSOLE_BANNER = b"Welcome to the console\r\n$ "


class FakeServer(
    FakePlacement,
    FakeMaintenance,
    FakeState,
    cluster_pb2_grpc.ClusterServiceServicer,
    compute_pb2_grpc.ComputeServiceServicer,
    operation_pb2_grpc.OperationServiceServicer,
):
    """Start it with ``with``; ``address`` says where it is."""

    def __init__(self, *, now_s: int = 1_700_000_000) -> None:
        FakeState.__init__(self, now_s=now_s)
        FakeMaintenance.__init__(self)
        self.address = ""
        self._server: grpc.Server | None = None

    def __enter__(self) -> "FakeServer":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self, address: str = "127.0.0.1:0") -> None:
        """Serve; on the same address again after :meth:`stop`, too."""
        server = grpc.server(futures.ThreadPoolExecutor(max_workers=32), options=[("grpc.so_reuseport", 0)])
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(self, server)
        compute_pb2_grpc.add_ComputeServiceServicer_to_server(self, server)
        operation_pb2_grpc.add_OperationServiceServicer_to_server(self, server)
        maintenance_pb2_grpc.add_MaintenanceServiceServicer_to_server(self, server)
        port = server.add_insecure_port(address)
        server.start()
        self._server, self.address = server, f"127.0.0.1:{port}"

    def stop(self) -> None:
        """Stop at once, cutting what is open."""
        self.cut_watches()
        for held in self._held.values():
            held.set()
        if self._server is not None:
            self._server.stop(None).wait(5)
            self._server = None

    # ClusterService.

    def ListNodes(self, request: Any, context: Any) -> cluster_pb2.ListNodesResponse:
        self._enter("ListNodes", request, context)
        fields: dict[str, Callable[[Any], str]] = {
            "id": lambda n: n.id,
            "hostname": lambda n: n.hostname,
            "status": lambda n: node_pb2.NodeStatus.Name(n.status).removeprefix("NODE_STATUS_").lower(),
            "zone": lambda n: n.zone,
        }
        ordered = sorted(self.nodes.values(), key=lambda n: n.hostname)
        nodes, token = self._page(request, ordered, fields, context)
        return cluster_pb2.ListNodesResponse(nodes=nodes, next_page_token=token, revision=self.revision)

    def GetNode(self, request: Any, context: Any) -> node_pb2.Node:
        self._enter("GetNode", request, context)
        return self._node(request.node, context)

    def GetClusterInfo(self, request: Any, context: Any) -> cluster_pb2.ClusterInfo:
        self._enter("GetClusterInfo", request, context)
        info = cluster_pb2.ClusterInfo(
            cluster_id="c-1",
            version="0.1.0",
            store_backend="sqlite",
            store_available=True,
            revision=self.revision,
            nodes={"ready": len(self.nodes)},
            instances={"running": len(self.instances)},
        )
        info.started_at.seconds = self.now_s - 60
        return info

    def CordonNode(self, request: Any, context: Any) -> operation_pb2.Operation:
        return self._node_verb("CordonNode", "cordon", request, context, schedulable=False)

    def UncordonNode(self, request: Any, context: Any) -> operation_pb2.Operation:
        return self._node_verb("UncordonNode", "uncordon", request, context, schedulable=True)

    def _node_verb(
        self, method: str, verb: str, request: Any, context: Any, *, schedulable: bool
    ) -> operation_pb2.Operation:
        node = self._node(request.node, context)

        def act(operation: operation_pb2.Operation) -> None:
            node.schedulable = schedulable
            operation.object_id, operation.object_name = node.id, node.hostname
            self._record("node", node, cluster_pb2.Event.TYPE_UPDATED, verb.upper())

        return self._operate(method, verb, "node", request, context, act)

    def EvacuateNode(self, request: Any, context: Any) -> cluster_pb2.EvacuateNodeResponse:
        node = self._node(request.node, context)
        moves = [
            cluster_pb2.PlannedMove(instance_id="i-1", instance_name="web", node_id=node.id),
            cluster_pb2.PlannedMove(instance_id="i-2", instance_name="db", reason="no node fits"),
        ]
        if request.dry_run:
            self._enter("EvacuateNode", request, context)
            return cluster_pb2.EvacuateNodeResponse(moves=moves)

        def act(operation: operation_pb2.Operation) -> None:
            operation.object_id, operation.object_name = node.id, node.hostname

        done = self._operate("EvacuateNode", "evacuate", "node", request, context, act)
        return cluster_pb2.EvacuateNodeResponse(operation=done, moves=moves)

    def SetNodeFencing(self, request: Any, context: Any) -> operation_pb2.Operation:
        node = self._node(request.node, context)

        def act(operation: operation_pb2.Operation) -> None:
            node.fencing.disarm_requested = not request.armed
            operation.object_id, operation.object_name = node.id, node.hostname

        return self._operate("SetNodeFencing", "fencing", "node", request, context, act)

    def DeregisterNode(self, request: Any, context: Any) -> operation_pb2.Operation:
        node = self._node(request.node, context)

        def act(operation: operation_pb2.Operation) -> None:
            operation.object_id, operation.object_name = node.id, node.hostname
            del self.nodes[node.id]
            self._record("node", node, cluster_pb2.Event.TYPE_DELETED, "DEREGISTERED")

        return self._operate("DeregisterNode", "deregister", "node", request, context, act)

    def WatchEvents(self, request: Any, context: Any) -> Iterator[cluster_pb2.Event]:
        self._enter("WatchEvents", request, context)
        mailbox: queue.Queue[cluster_pb2.Event | None] = queue.Queue()
        with self._lock:
            muted = self.mute_watches > 0
            self.mute_watches -= muted
            backlog: list[cluster_pb2.Event] = []
            if request.send_initial:
                backlog = [self._snapshot("node", node) for node in self.nodes.values()]
                backlog += [self._snapshot("instance", instance) for instance in self.instances.values()]
                backlog.append(
                    cluster_pb2.Event(
                        type=cluster_pb2.Event.TYPE_SYNCED, revision=self.revision, last_of_revision=True
                    )
                )
            elif request.after_revision:
                if request.after_revision < self.compacted_below:
                    refuse(
                        context,
                        errors.OutOfRange(f"revision {request.after_revision} is gone", reason="COMPACTED"),
                    )
                backlog = [event for event in self.log if event.revision > request.after_revision]
            self._watchers.append(mailbox)
        context.add_callback(lambda: mailbox.put(None))
        try:
            yield from (event for event in backlog if not muted and self._wanted(request, event))
            while (event := mailbox.get()) is not None:
                if not muted and self._wanted(request, event):
                    yield event
        finally:
            with self._lock:
                self._watchers.remove(mailbox)

    def _snapshot(self, kind: str, item: Any) -> cluster_pb2.Event:
        fields: dict[str, Any] = {kind: item}
        return cluster_pb2.Event(
            type=cluster_pb2.Event.TYPE_SNAPSHOT,
            revision=self.revision,
            kind=kind,
            object_id=item.id,
            object_name=getattr(item, "name", "") or getattr(item, "hostname", ""),
            **fields,
        )

    @staticmethod
    def _wanted(request: Any, event: cluster_pb2.Event) -> bool:
        if not event.object_id:
            return True
        return (not request.kinds or event.kind in request.kinds) and request.object_id in (
            "",
            event.object_id,
        )

    # ComputeService.

    def CreateInstance(self, request: Any, context: Any) -> operation_pb2.Operation:
        wanted = request.instance

        def act(operation: operation_pb2.Operation) -> None:
            operation.object_name = wanted.name
            if not wanted.spec.image:
                raise errors.InvalidArgument.of_field("spec.image", "is required for containers")
            if wanted.spec.memory_mb > 1 << 20:
                raise errors.ResourceExhausted(
                    f"no node fits {wanted.name}",
                    reason="NO_NODE_FITS",
                    violations=(errors.FieldViolation("node-1", "16GiB of memory, 2TiB asked for"),),
                )
            if any(item.name == wanted.name for item in self.instances.values()):
                raise errors.AlreadyExists(f"the name {wanted.name} is taken", reason="INSTANCE_NAME_TAKEN")
            if request.validate_only:
                operation.instance.CopyFrom(wanted)
                operation.instance.node_id = next(iter(self.nodes), "")
                operation.explanation.CopyFrom(explained(self.nodes.values(), operation.instance.node_id))
                return
            stopped = wanted.desired_state == instance_pb2.DESIRED_STATE_STOPPED
            made = self.add_instance(wanted.name, status=STOPPED if stopped else RUNNING, type=wanted.type)
            made.spec.CopyFrom(wanted.spec)
            made.labels.update(wanted.labels)
            operation.object_id = made.id
            operation.instance.CopyFrom(made)

        return self._operate("CreateInstance", "create", "instance", request, context, act)

    def GetInstance(self, request: Any, context: Any) -> instance_pb2.Instance:
        self._enter("GetInstance", request, context)
        return self._instance(request, context)

    def ListInstances(self, request: Any, context: Any) -> compute_pb2.ListInstancesResponse:
        self._enter("ListInstances", request, context)
        fields: dict[str, Callable[[Any], str]] = {
            "id": lambda i: i.id,
            "name": lambda i: i.name,
            "node_id": lambda i: i.node_id,
            "type": lambda i: instance_pb2.InstanceType.Name(i.type).removeprefix("INSTANCE_TYPE_").lower(),
            "status": lambda i: (
                instance_pb2.InstanceStatus.Name(i.status).removeprefix("INSTANCE_STATUS_").lower()
            ),
        }
        ordered = sorted(self.instances.values(), key=lambda i: i.name)
        items = [item for item in ordered if request.project in ("", item.project)]
        instances, token = self._page(request, items, fields, context)
        return compute_pb2.ListInstancesResponse(
            instances=instances, next_page_token=token, revision=self.revision
        )

    def _instance_verb(
        self,
        method: str,
        verb: str,
        request: Any,
        context: Any,
        change: Callable[[instance_pb2.Instance], None],
    ) -> operation_pb2.Operation:
        instance = None
        if request.request_id not in self._payloads:
            instance = self._instance(request, context)

        def act(operation: operation_pb2.Operation) -> None:
            assert instance is not None
            operation.object_id, operation.object_name = instance.id, instance.name
            change(instance)
            if instance.id in self.instances:
                operation.instance.CopyFrom(instance)

        return self._operate(method, verb, "instance", request, context, act)

    def StartInstance(self, request: Any, context: Any) -> operation_pb2.Operation:
        def change(instance: instance_pb2.Instance) -> None:
            if instance.status == RUNNING:
                raise errors.FailedPrecondition(f"{instance.name} runs already", reason="ALREADY_RUNNING")
            self.change_instance(instance, RUNNING, "STARTED")

        return self._instance_verb("StartInstance", "start", request, context, change)

    def StopInstance(self, request: Any, context: Any) -> operation_pb2.Operation:
        def change(instance: instance_pb2.Instance) -> None:
            if instance.status != RUNNING:
                raise errors.FailedPrecondition(f"{instance.name} does not run", reason="NOT_RUNNING")
            self.change_instance(instance, STOPPED, "STOPPED")

        return self._instance_verb("StopInstance", "stop", request, context, change)

    def RestartInstance(self, request: Any, context: Any) -> operation_pb2.Operation:
        return self._instance_verb(
            "RestartInstance",
            "restart",
            request,
            context,
            lambda i: self.change_instance(i, RUNNING, "RESTARTED"),
        )

    def DeleteInstance(self, request: Any, context: Any) -> operation_pb2.Operation:
        def change(instance: instance_pb2.Instance) -> None:
            if instance.status == RUNNING and not request.force:
                raise errors.FailedPrecondition(f"{instance.name} is running", reason="INSTANCE_RUNNING")
            self.remove_instance(instance)

        return self._instance_verb("DeleteInstance", "delete", request, context, change)

    def GetInstanceStats(self, request: Any, context: Any) -> instance_pb2.InstanceStats:
        self._enter("GetInstanceStats", request, context)
        if self._instance(request, context).status != RUNNING:
            refuse(
                context, errors.FailedPrecondition(f"{request.instance} does not run", reason="NOT_RUNNING")
            )
        return self._sample(0)

    def _sample(self, number: int) -> instance_pb2.InstanceStats:
        sample = instance_pb2.InstanceStats(
            cpu_usage_ns=1_500_000_000 + number, cpu_used_cores=0.25, memory_used_bytes=3 << 20, pids=2
        )
        sample.sampled_at.seconds = self.now_s + number
        return sample

    def WatchInstanceStats(self, request: Any, context: Any) -> Iterator[instance_pb2.InstanceStats]:
        self._enter("WatchInstanceStats", request, context)
        self._instance(request, context)
        for number in range(3):
            yield self._sample(number)

    def AttachConsole(
        self, request_iterator: Iterator[instance_pb2.ConsoleInput], context: Any
    ) -> Iterator[instance_pb2.ConsoleOutput]:
        """Echoes; the line ``exit`` ends the instance with code 3, ``stty size`` shows the size."""
        first = next(request_iterator)
        if first.WhichOneof("input") != "open":
            refuse(context, errors.InvalidArgument("send open first", reason="CONSOLE_NOT_OPENED"))
        self._enter("AttachConsole", first, context)
        instance = self._instance(first.open, context)
        if instance.status != RUNNING:
            refuse(context, errors.FailedPrecondition(f"{instance.name} does not run", reason="NOT_RUNNING"))
        outgoing: queue.Queue[instance_pb2.ConsoleOutput | errors.HypervisorError | None] = queue.Queue()
        self._note_size(first.open.size)
        replay = b"" if first.open.replay_bytes == 0 else _CONSOLE_BANNER
        outgoing.put(
            instance_pb2.ConsoleOutput(
                opened=instance_pb2.ConsoleOutput.Opened(
                    instance_id=instance.id, replay_bytes=len(replay), resizable=True
                )
            )
        )
        if replay:
            outgoing.put(instance_pb2.ConsoleOutput(data=replay))
        context.add_callback(lambda: outgoing.put(None))
        threading.Thread(
            target=self._console_reader, args=(request_iterator, outgoing, first.open.read_only), daemon=True
        ).start()
        if self.console_script is not None:
            self.console_script(outgoing)
        while (message := outgoing.get()) is not None:
            if isinstance(message, errors.HypervisorError):
                refuse(context, message)
                return
            yield message

    def _note_size(self, size: instance_pb2.ConsoleInput.Resize) -> None:
        if size.width:
            self.console_sizes.append((size.width, size.height))

    def _console_reader(
        self,
        incoming: Iterator[instance_pb2.ConsoleInput],
        outgoing: "queue.Queue[instance_pb2.ConsoleOutput | errors.HypervisorError | None]",
        read_only: bool,
    ) -> None:
        line = b""
        try:
            for message in incoming:
                if message.WhichOneof("input") == "resize":
                    self._note_size(message.resize)
                    continue
                if message.WhichOneof("input") == "credit":
                    if not self.console_knows_credit:
                        outgoing.put(_no_credit())
                        return
                    self.console_credit += message.credit
                    continue
                if read_only:
                    raise AssertionError("input on a read-only console")
                self.console_input += message.data
                outgoing.put(instance_pb2.ConsoleOutput(data=message.data))
                line += message.data
                while b"\r" in line or b"\n" in line:
                    end = min(i for i in (line.find(b"\r"), line.find(b"\n")) if i >= 0)
                    word, line = line[:end], line[end + 1 :]
                    if word == b"stty size":
                        width, height = self.console_sizes[-1]
                        outgoing.put(instance_pb2.ConsoleOutput(data=f"\r\n{height} {width}\r\n$ ".encode()))
                    elif word == b"exit":
                        closed = instance_pb2.ConsoleOutput.Closed(reason="EXITED", exit_code=3)
                        outgoing.put(instance_pb2.ConsoleOutput(closed=closed))
                        outgoing.put(None)
        except grpc.RpcError:
            return  # the client left

    def GetInstanceLogs(self, request: Any, context: Any) -> Iterator[instance_pb2.InstanceLogChunk]:
        """``logged`` from ``request``'s beginning on; followed by one more line with ``follow``."""
        self._enter("GetInstanceLogs", request, context)
        self._instance(request, context)
        position, skipped = self.logged_from, 0
        kind = request.WhichOneof("start")
        data = self.logged
        if kind == "from_position":
            position = max(request.from_position, self.logged_from)
            skipped = position - request.from_position
            data = data[position - self.logged_from :]
        elif kind == "tail_bytes":
            data = data[len(data) - request.tail_bytes :]
        elif kind == "tail_lines":
            data = b"".join(data.splitlines(keepends=True)[-request.tail_lines :])
        yield instance_pb2.InstanceLogChunk(position=position, data=data, skipped_bytes=skipped)
        if request.follow:
            yield instance_pb2.InstanceLogChunk(position=position + len(data), data=b"one more\r\n")

    # OperationService.

    def _operation(self, name: str, context: Any) -> operation_pb2.Operation:
        for item in self.operations.values():
            if name in (item.id, item.request_id):
                return item
        refuse(context, errors.NotFound(f"there is no operation {name}", reason="OPERATION_NOT_FOUND"))
        raise Stop

    def GetOperation(self, request: Any, context: Any) -> operation_pb2.Operation:
        self._enter("GetOperation", request, context)
        return self._operation(request.operation, context)

    def ListOperations(self, request: Any, context: Any) -> operation_pb2.ListOperationsResponse:
        self._enter("ListOperations", request, context)
        fields: dict[str, Callable[[Any], str]] = {
            "id": lambda o: o.id,
            "verb": lambda o: o.verb,
            "done": lambda o: str(o.done).lower(),
        }
        found, token = self._page(request, list(self.operations.values())[::-1], fields, context)
        return operation_pb2.ListOperationsResponse(
            operations=found, next_page_token=token, revision=self.revision
        )

    def WaitOperation(self, request: Any, context: Any) -> operation_pb2.Operation:
        self._enter("WaitOperation", request, context)
        operation = self._operation(request.operation, context)
        end = time.monotonic() + request.timeout.ToNanoseconds() / 1e9
        while not operation.done and time.monotonic() < end and context.is_active():
            time.sleep(0.01)
        return operation

    def CancelOperation(self, request: Any, context: Any) -> operation_pb2.Operation:
        self._enter("CancelOperation", request, context)
        operation = self._operation(request.operation, context)
        if operation.done:
            refuse(context, errors.FailedPrecondition(f"{operation.id} has ended", reason="OPERATION_DONE"))
        operation.state = operation_pb2.OPERATION_STATE_CANCELLED
        operation.done = True
        return operation


def _no_credit() -> errors.Unimplemented:
    return errors.Unimplemented(
        "the agent of this node is of an older version that knows no credit: upgrade it",
        reason="CAPABILITY_MISSING",
        metadata={"verb": "credit"},
    )
