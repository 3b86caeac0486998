"""State, faults and bookkeeping of the double in hvtest_fake_server: what tests arrange, and what it remembers."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from hypervisor.core import errors
from hypervisor.core.grpc_errors import code_of, to_status, trailing_metadata
from hypervisor.core.ids import derived_id, new_id
from hypervisor.v1 import cluster_pb2, instance_pb2, node_pb2, operation_pb2

__all__ = ["RUNNING", "STOPPED", "FakeState", "Stop", "refuse"]

RUNNING = instance_pb2.INSTANCE_STATUS_RUNNING
STOPPED = instance_pb2.INSTANCE_STATUS_STOPPED


class Stop(Exception):
    """Ends a handler after the RPC was aborted."""


def refuse(context: grpc.ServicerContext, error: errors.HypervisorError) -> None:
    """End the RPC as a server does, details included."""
    status = to_status(error)
    context.set_trailing_metadata(trailing_metadata(status))
    context.abort(code_of(error), status.message)


class FakeState:
    """Objects, events and calls so far; faults to come. All times are fixed, so that output is comparable."""

    def __init__(self, *, now_s: int = 1_700_000_000) -> None:
        self.now_s = now_s
        self.nodes: dict[str, node_pb2.Node] = {}
        self.instances: dict[str, instance_pb2.Instance] = {}
        self.operations: dict[str, operation_pb2.Operation] = {}
        self.log: list[cluster_pb2.Event] = []
        self.calls: list[tuple[str, Message]] = []
        self.metadata: list[tuple[str, str]] = []
        self.console_sizes: list[tuple[int, int]] = []
        self.console_input = bytearray()
        self.console_credit = 0
        self.console_knows_credit = True
        """False: as where an agent of an older version has the console."""
        self.logged = b"first\r\nsecond\r\nthird\r\n"
        self.logged_from = 0
        """Position of the first byte of ``logged``."""
        self.console_script: (
            Callable[[queue.Queue[instance_pb2.ConsoleOutput | errors.HypervisorError | None]], None] | None
        ) = None
        self.revision = 100
        self.compacted_below = 0
        self.mute_watches = 0
        """So many of the next event streams say nothing."""
        self._payloads: dict[str, bytes] = {}
        self._lost: dict[str, int] = {}
        self._refused: dict[str, list[errors.HypervisorError]] = {}
        self._held: dict[str, threading.Event] = {}
        self._watchers: list[queue.Queue[cluster_pb2.Event | None]] = []
        self._lock = threading.RLock()

    # What tests arrange.

    def add_node(self, hostname: str = "node-1", **fields: Any) -> node_pb2.Node:
        """A node that is ready, with two drivers."""
        node = node_pb2.Node(
            id=new_id("n"),
            hostname=hostname,
            address="127.0.0.1",
            port=50052,
            region="eu-1",
            zone="a",
            role=node_pb2.NODE_ROLE_WORKER,
            status=node_pb2.NODE_STATUS_READY,
            schedulable=True,
            agent_version="0.1.0",
            resources=node_pb2.NodeResources(
                cpu_cores=8,
                cpu_used_cores=0.5,
                memory_bytes=16 << 30,
                memory_used=2 << 30,
                disk_bytes=100 << 30,
            ),
            drivers=[
                node_pb2.DriverInfo(
                    name="containerd",
                    types=[instance_pb2.INSTANCE_TYPE_CONTAINER],
                    available=True,
                    version="containerd 1.6.20",
                    capabilities=[
                        node_pb2.Capability(verb="start", supported=True),
                        node_pb2.Capability(
                            verb="migrate", supported=False, reason="containers stay where they are"
                        ),
                    ],
                ),
                node_pb2.DriverInfo(
                    name="libvirt",
                    types=[instance_pb2.INSTANCE_TYPE_VM],
                    available=False,
                    reason="no libvirtd here",
                ),
            ],
        )
        node.created_at.seconds = self.now_s - 7200
        node.last_heartbeat_at.seconds = self.now_s - 3
        for key, value in fields.items():
            setattr(node, key, value)
        with self._lock:
            self.nodes[node.id] = node
            self._record("node", node, cluster_pb2.Event.TYPE_CREATED, "CREATED")
        return node

    def add_instance(self, name: str, **fields: Any) -> instance_pb2.Instance:
        """A running container on the first node there is."""
        instance = instance_pb2.Instance(
            id=new_id("i"),
            name=name,
            type=instance_pb2.INSTANCE_TYPE_CONTAINER,
            status=RUNNING,
            node_id=next(iter(self.nodes), ""),
            project="default",
            desired_state=instance_pb2.DESIRED_STATE_RUNNING,
            generation=1,
            epoch=1,
            spec=instance_pb2.InstanceSpec(image="busybox", cpu_cores=0.5, memory_mb=256),
        )
        instance.created_at.seconds = self.now_s - 90
        for key, value in fields.items():
            setattr(instance, key, value)
        with self._lock:
            self.instances[instance.id] = instance
            self._record("instance", instance, cluster_pb2.Event.TYPE_CREATED, "CREATED")
        return instance

    def change_instance(self, instance: instance_pb2.Instance, status: int, reason: str) -> None:
        """Set the status, with its event."""
        with self._lock:
            instance.status = status  # type: ignore[assignment]  # the enum's numbers
            instance.status_reason = reason
            self._record("instance", instance, cluster_pb2.Event.TYPE_UPDATED, reason)

    def remove_instance(self, instance: instance_pb2.Instance) -> None:
        """Delete it, with its event."""
        with self._lock:
            del self.instances[instance.id]
            self._record("instance", instance, cluster_pb2.Event.TYPE_DELETED, "DELETED")

    def lose_reply(self, method: str, *, times: int = 1) -> None:
        """The next calls of the method are carried out, and then the connection seems to break."""
        self._lost[method] = times

    def refuse(self, method: str, *answers: errors.HypervisorError) -> None:
        """The next calls of the method end so, one each, and do nothing."""
        self._refused[method] = list(answers)

    def hold(self, method: str) -> threading.Event:
        """Calls of the method wait, after their operation was recorded, until the event is set."""
        return self._held.setdefault(method, threading.Event())

    def cut_watches(self) -> None:
        """End all event streams, as a server that stops does."""
        with self._lock:
            for watcher in self._watchers:
                watcher.put(None)

    def compact(self) -> None:
        """Forget the history so far."""
        with self._lock:
            self.compacted_below = self.revision
            self.log.clear()

    def wait_for_call(self, method: str, *, count: int = 1, timeout_s: float = 20.0) -> None:
        """Return once the method was called so often."""
        end = time.monotonic() + timeout_s
        while len(self.called(method)) < count:
            if time.monotonic() > end:
                raise AssertionError(f"{method} was called {len(self.called(method))} times, not {count}")
            time.sleep(0.01)

    def called(self, method: str) -> list[Message]:
        """The requests of that method so far."""
        with self._lock:
            return [request for name, request in self.calls if name == method]

    # Bookkeeping.

    def _record(self, kind: str, item: Any, event_type: int, reason: str) -> None:
        self.revision += 1
        item.resource_version = self.revision
        event = cluster_pb2.Event(
            revision=self.revision,
            type=event_type,  # type: ignore[arg-type]  # the enum's numbers
            kind=kind,
            object_id=item.id,
            object_name=getattr(item, "name", "")
            or getattr(item, "hostname", "")
            or getattr(item, "object_name", ""),
            reason=reason,
            message=f"{kind} {reason.lower()}",
            last_of_revision=True,
            **{kind: item},
        )
        event.time.seconds = self.now_s
        self.log.append(event)
        for watcher in self._watchers:
            watcher.put(event)

    def _enter(self, method: str, request: Message, context: grpc.ServicerContext) -> None:
        with self._lock:
            copy = type(request)()
            copy.CopyFrom(request)
            self.calls.append((method, copy))
            self.metadata = [(key, str(value)) for key, value in context.invocation_metadata()]
            answers = self._refused.get(method)
            if answers:
                refuse(context, answers.pop(0))

    def _instance(self, request: Any, context: grpc.ServicerContext) -> instance_pb2.Instance:
        found = self.instances.get(request.instance)
        project = request.project or "default"
        for item in self.instances.values():
            if found is None and item.name == request.instance and item.project == project:
                found = item
        if found is None:
            refuse(
                context,
                errors.NotFound(
                    f"there is no instance {request.instance!r} in project {project}",
                    reason="INSTANCE_NOT_FOUND",
                    metadata={"instance": request.instance, "project": project},
                ),
            )
            raise Stop
        return found

    def _node(self, name: str, context: grpc.ServicerContext) -> node_pb2.Node:
        for item in self.nodes.values():
            if name in (item.id, item.hostname):
                return item
        refuse(
            context,
            errors.NotFound(f"there is no node {name!r}", reason="NODE_NOT_FOUND", metadata={"node": name}),
        )
        raise Stop

    def _operate(
        self,
        method: str,
        verb: str,
        kind: str,
        request: Any,
        context: grpc.ServicerContext,
        act: Callable[[operation_pb2.Operation], Any],
    ) -> operation_pb2.Operation:
        """A mutating call: recorded once for each request id, then carried out."""
        self._enter(method, request, context)
        with self._lock:
            if not request.request_id:
                refuse(context, errors.InvalidArgument.of_field("request_id", "is required by this double"))
            payload = request.SerializeToString(deterministic=True)
            known = self._payloads.setdefault(request.request_id, payload)
            if known != payload:
                refuse(
                    context,
                    errors.InvalidArgument.of_field(
                        "request_id", "was used with another payload", reason="REQUEST_ID_REUSED"
                    ),
                )
            operation_id = derived_id("op", "tester", request.request_id)
            operation = self.operations.get(operation_id)
            if operation is None:
                operation = operation_pb2.Operation(
                    id=operation_id,
                    verb=verb,
                    object_kind=kind,
                    request_id=request.request_id,
                    principal="tester",
                    state=operation_pb2.OPERATION_STATE_RUNNING,
                    progress_percent=40,
                    progress_message="preparing the image",
                )
                operation.started_at.seconds = self.now_s - 2
                self.operations[operation_id] = operation
                held = self._held.get(method)
                if held is None:
                    self._finish(operation, act)
                else:
                    threading.Thread(
                        target=self._finish_later, args=(held, operation, act), daemon=True
                    ).start()
        if not getattr(request, "no_wait", False):
            self._await(operation, context)
        if self._lost.get(method, 0) > 0:
            self._lost[method] -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")
        if operation.error.code and not getattr(request, "no_wait", False):
            status = operation.error
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            context.abort(_code(status.code), status.message)
        return operation

    def _finish_later(
        self,
        held: threading.Event,
        operation: operation_pb2.Operation,
        act: Callable[[operation_pb2.Operation], Any],
    ) -> None:
        held.wait(30)
        with self._lock:
            self._finish(operation, act)

    def _finish(
        self, operation: operation_pb2.Operation, act: Callable[[operation_pb2.Operation], Any]
    ) -> None:
        try:
            act(operation)
            operation.state = operation_pb2.OPERATION_STATE_SUCCEEDED
            operation.progress_percent = 100
        except errors.HypervisorError as exc:
            noted = type(exc)(
                exc.message,
                reason=exc.reason,
                metadata={**exc.metadata, "operation_id": operation.id},
                violations=exc.violations,
            )
            operation.error.CopyFrom(to_status(noted))
            operation.state = operation_pb2.OPERATION_STATE_FAILED
        operation.finished_at.seconds = self.now_s
        operation.done = True

    @staticmethod
    def _await(operation: operation_pb2.Operation, context: grpc.ServicerContext) -> None:
        while not operation.done and context.is_active():
            time.sleep(0.01)

    @staticmethod
    def _page(
        request: Any,
        items: Sequence[Any],
        fields: dict[str, Callable[[Any], str]],
        context: grpc.ServicerContext,
    ) -> tuple[list[Any], str]:
        kept = list(items)
        for condition in filter(None, request.filter.split(",")):
            key, equals, value = condition.partition("!=" if "!=" in condition else "=")
            negated = "!=" in condition
            if not equals or (key not in fields and not key.startswith("labels.")):
                refuse(
                    context,
                    errors.InvalidArgument.of_field(
                        "filter", f"{condition!r}: known are {', '.join(fields)}"
                    ),
                )

            def text(item: Any, key: str = key) -> str:
                if key.startswith("labels."):
                    return str(item.labels.get(key.removeprefix("labels."), ""))
                return fields[key](item)

            def matches(item: Any, value: str = value, negated: bool = negated, text: Any = text) -> bool:
                found = str(text(item))
                same = found.startswith(value[:-1]) if value.endswith("*") else found == value
                return same != negated

            kept = [item for item in kept if matches(item)]
        key, _, direction = request.order_by.partition(" ")
        if key:
            if key not in fields or direction not in ("", "desc"):
                refuse(
                    context, errors.InvalidArgument.of_field("order_by", f"{request.order_by!r} is not known")
                )
            kept.sort(key=fields[key], reverse=direction == "desc")
        start = int(request.page_token or 0)
        end = start + min(request.page_size or 100, 1000)
        return kept[start:end], str(end) if end < len(kept) else ""


def _code(number: int) -> grpc.StatusCode:
    return next(code for code in grpc.StatusCode if code.value[0] == number)
