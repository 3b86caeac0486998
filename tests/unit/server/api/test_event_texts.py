from datetime import UTC, datetime

import pytest
from msgspec import structs

from hvtest_seed import seeded_instance
from hypervisor.core.model import DriverInfo, ErrorRecord, Node, OperationRecord, Taint
from hypervisor.core.restarts import Restarts
from hypervisor.core.states import (
    DesiredState,
    InstanceStatus,
    InstanceType,
    NodeStatus,
    OperationState,
    TaintEffect,
)
from hypervisor.server.api.event_texts import describe_instance, describe_node, describe_operation

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RUNNING = structs.replace(seeded_instance(1), status=InstanceStatus.RUNNING, status_reason="")
NODE = Node(id="n-1", hostname="node-1", address="a", port=1, created_at=NOW, updated_at=NOW)
OPERATION = OperationRecord(
    id="op-1",
    verb="create",
    object_kind="instance",
    object_id="i-1",
    object_name="web",
    principal="ann",
    started_at=NOW,
)


def test_an_instance_is_followed_from_its_creation_to_its_end() -> None:
    stopped = structs.replace(RUNNING, status=InstanceStatus.STOPPED)
    killed = structs.replace(
        RUNNING,
        status=InstanceStatus.FAILED,
        status_reason="OOM_KILLED",
        status_message="it used up its memory",
    )

    assert describe_instance(None, RUNNING) == ("CREATED", "instance web-00001 was created")
    assert describe_instance(stopped, RUNNING) == ("RUNNING", "instance web-00001 is running")
    assert describe_instance(RUNNING, killed) == ("OOM_KILLED", "instance web-00001: it used up its memory")
    assert describe_instance(RUNNING, None) == ("DELETED", "instance web-00001 was deleted")


def test_a_restart_by_policy_is_told_with_its_cause_and_count() -> None:
    waiting = structs.replace(
        RUNNING, status=InstanceStatus.FAILED, status_reason="BACKOFF", restarts=Restarts(count=1, total=4)
    )
    again = structs.replace(
        RUNNING, restarts=Restarts(count=2, total=5, last_reason="EXITED", last_exit_code=3)
    )

    assert describe_instance(waiting, again) == (
        "RESTARTED",
        "instance web-00001 was started again by its policy (EXITED; 2 in a row)",
    )
    assert describe_instance(again, structs.replace(again, labels={"a": "b"}))[0] == "UPDATED"


@pytest.mark.parametrize("status", list(InstanceStatus))
def test_every_status_has_a_phrase(status: InstanceStatus) -> None:
    before = structs.replace(RUNNING, status_reason="before")

    reason, message = describe_instance(before, structs.replace(RUNNING, status=status))

    assert reason == status.name
    assert message.startswith("instance web-00001 ")


def test_what_else_changes_of_an_instance_is_named() -> None:
    wanted = structs.replace(RUNNING, desired=DesiredState.RUNNING)
    larger = structs.replace(RUNNING, spec=structs.replace(RUNNING.spec, memory_mb=512))

    assert describe_instance(RUNNING, wanted)[0] == "DESIRED_STATE_CHANGED"
    assert describe_instance(RUNNING, larger)[0] == "SPEC_CHANGED"
    assert describe_instance(RUNNING, structs.replace(RUNNING, node_id="n-2"))[0] == "PLACED"
    assert describe_instance(RUNNING, structs.replace(RUNNING, generation=2))[0] == "UPDATED"


def test_a_node_is_followed() -> None:
    lost = structs.replace(NODE, status=NodeStatus.OFFLINE, status_message="no heartbeat for 30 s")
    cordoned = structs.replace(NODE, schedulable=False, cordon_reason="disk swap")
    fake = DriverInfo(name="fake", types=(InstanceType.CONTAINER,), available=True)

    assert describe_node(None, NODE) == ("NODE_REGISTERED", "node node-1 joined the cluster")
    assert describe_node(NODE, lost)[0] == "NODE_OFFLINE"
    assert "no heartbeat for 30 s" in describe_node(NODE, lost)[1]
    assert describe_node(lost, NODE) == ("NODE_READY", "node node-1 is ready")
    assert describe_node(NODE, cordoned) == ("NODE_CORDONED", "node node-1 takes no new instances: disk swap")
    assert describe_node(cordoned, NODE)[0] == "NODE_UNCORDONED"
    assert describe_node(NODE, structs.replace(NODE, drivers=(fake,)))[1].endswith(": fake")
    assert describe_node(NODE, structs.replace(NODE, incarnation="2"))[0] == "NODE_AGENT_RESTARTED"
    assert describe_node(NODE, None)[0] == "NODE_DEREGISTERED"


def test_an_operation_is_followed() -> None:
    halfway = structs.replace(OPERATION, progress_percent=50, progress_message="importing the image")
    failed = structs.replace(
        OPERATION,
        state=OperationState.FAILED,
        error=ErrorRecord(kind="NotFound", reason="IMAGE_NOT_FOUND", message="no such image"),
    )
    done = structs.replace(OPERATION, state=OperationState.SUCCEEDED)

    assert describe_operation(None, OPERATION) == (
        "OPERATION_STARTED",
        "create of instance web: asked for by ann",
    )
    assert describe_operation(OPERATION, halfway)[1] == "create of instance web: importing the image (50 %)"
    assert describe_operation(OPERATION, failed) == (
        "OPERATION_FAILED",
        "create of instance web: no such image",
    )
    assert describe_operation(OPERATION, done)[0] == "OPERATION_SUCCEEDED"
    assert describe_operation(done, None)[0] == "OPERATION_FORGOTTEN"


def test_changed_taints_are_told() -> None:
    tainted = structs.replace(
        NODE, set_taints=(Taint(key="gpu", value="yes", effect=TaintEffect.NO_SCHEDULE),)
    )

    assert describe_node(NODE, tainted) == (
        "NODE_TAINTS_CHANGED",
        "taints of node node-1: gpu=yes:no_schedule",
    )
    assert describe_node(tainted, NODE)[1] == "taints of node node-1: none"
