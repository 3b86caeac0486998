"""Bad creates: each with the field and the remedy. Messages are never longer than what a person reads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.ids import new_id
from hypervisor.core.states import DesiredState, InstanceType, PlacementPolicy
from hypervisor.server.api.instance_requests import draft_of, read_ref_of, ref_of, stop_options
from hypervisor.server.api.violations import Violations
from hypervisor.v1 import compute_pb2, instance_pb2

CONTAINER = instance_pb2.INSTANCE_TYPE_CONTAINER
VM = instance_pb2.INSTANCE_TYPE_VM
MICROVM = instance_pb2.INSTANCE_TYPE_MICROVM

Change = Callable[[compute_pb2.CreateInstanceRequest], object]


def good() -> compute_pb2.CreateInstanceRequest:
    return compute_pb2.CreateInstanceRequest(
        instance=instance_pb2.Instance(
            name="web", type=CONTAINER, spec=instance_pb2.InstanceSpec(image="docker.io/library/busybox:1.36")
        )
    )


def spec(**fields: object) -> Change:
    return lambda r: r.instance.spec.MergeFrom(instance_pb2.InstanceSpec(**fields))  # type: ignore[arg-type]


def field(**fields: object) -> Change:
    return lambda r: r.instance.MergeFrom(instance_pb2.Instance(**fields))  # type: ignore[arg-type]


def machine(kind: instance_pb2.InstanceType.ValueType, **fields: object) -> Change:
    def change(request: compute_pb2.CreateInstanceRequest) -> None:
        request.instance.type = kind
        request.instance.spec.CopyFrom(instance_pb2.InstanceSpec(**fields))  # type: ignore[arg-type]

    return change


def constraint(**fields: object) -> Change:
    return spec(node_selector=[instance_pb2.LabelConstraint(**fields)])  # type: ignore[arg-type]


def test_the_least_request_gets_the_documented_defaults() -> None:
    draft = draft_of(good())

    assert (draft.name, draft.project, draft.type) == ("web", "default", InstanceType.CONTAINER)
    assert (draft.spec.cpu_millis, draft.spec.memory_mb, draft.spec.disk_gb) == (1000, 256, 0)
    assert (draft.spec.pids_limit, draft.spec.placement_policy) == (4096, None)
    assert draft.desired is DesiredState.RUNNING


def test_everything_that_was_asked_for_arrives() -> None:
    request = good()
    field(project="shop", labels={"a/b": "c"}, desired_state=instance_pb2.DESIRED_STATE_STOPPED)(request)
    spec(
        cpu_cores=0.25,
        memory_mb=64,
        disk_gb=3,
        command=["sh", "-c", ""],
        env={"A": ""},
        working_dir="/srv",
        pids_limit=10,
        placement_policy=instance_pb2.PLACEMENT_POLICY_BINPACK,
        node="node-1",
    )(request)
    constraint(key="disk", values=["ssd", ""])(request)

    draft = draft_of(request)

    assert (draft.project, draft.labels, draft.desired) == ("shop", {"a/b": "c"}, DesiredState.STOPPED)
    made = draft.spec
    assert (made.cpu_millis, made.memory_mb, made.disk_gb, made.pids_limit) == (250, 64, 3, 10)
    assert (made.command, made.env, made.working_dir, made.node) == (
        ("sh", "-c", ""),
        {"A": ""},
        "/srv",
        "node-1",
    )
    assert made.placement_policy is PlacementPolicy.BINPACK
    assert (made.node_selector[0].key, made.node_selector[0].values) == ("disk", ("ssd", ""))


BAD: list[tuple[Change, str, str]] = [
    (
        lambda r: r.instance.ClearField("name"),
        "instance.name",
        "is required: give 1 to 63 of a-z, 0-9 and '-'",
    ),
    (field(name="x" * 10_000_000), "instance.name", "is 10000000 characters long: use at most 63"),
    (field(name="Web"), "instance.name", "'Web' is not a legal name"),
    (field(name="web\n"), "instance.name", "is not a legal name"),
    (field(name=new_id("i")), "instance.name", "looks like the id of an instance: choose another name"),
    (
        lambda r: r.instance.ClearField("type"),
        "instance.type",
        "is required: give one of vm, container, microvm",
    ),
    (field(type=77), "instance.type", "is required: give one of vm, container, microvm"),
    (field(project="No Project"), "instance.project", "is not a legal name"),
    (
        field(desired_state=instance_pb2.DESIRED_STATE_DELETED),
        "instance.desired_state",
        "must be RUNNING or STOPPED",
    ),
    (field(desired_state=9), "instance.desired_state", "must be RUNNING or STOPPED"),
    (field(labels={"-a": "b"}), "instance.labels", "key '-a' is not legal"),
    (field(labels={"a": "b c"}), "instance.labels.a", "value 'b c' is not legal"),
    (field(labels={f"k{n}": "" for n in range(65)}), "instance.labels", "has 65 labels: use at most 64"),
    (field(id="i-1"), "instance.id", "is set by the server: leave it empty"),
    (field(status=instance_pb2.INSTANCE_STATUS_RUNNING), "instance.status", "is set by the server"),
    (field(created_at=Timestamp(seconds=1)), "instance.created_at", "is set by the server"),
    (field(exit_code=0), "instance.exit_code", "is set by the server"),
    (field(stats=instance_pb2.InstanceStats()), "instance.stats", "is set by the server"),
    (
        lambda r: r.instance.ClearField("spec"),
        "instance.spec",
        "is required: say at least which image to run",
    ),
    (spec(cpu_cores=0.0), "instance.spec.cpu_cores", "is 0: use 0.001 to 1024, or leave it out for 1"),
    (spec(cpu_cores=-1.0), "instance.spec.cpu_cores", "is -1: use 0.001 to 1024"),
    (spec(cpu_cores=1e300), "instance.spec.cpu_cores", "is 1e+300: use 0.001 to 1024"),
    (spec(cpu_cores=float("nan")), "instance.spec.cpu_cores", "is nan: use 0.001 to 1024"),
    (spec(cpu_cores=float("inf")), "instance.spec.cpu_cores", "is inf: use 0.001 to 1024"),
    (spec(memory_mb=0), "instance.spec.memory_mb", "is 0: use 4 to 16777216"),
    (spec(memory_mb=-5), "instance.spec.memory_mb", "is -5: use 4 to 16777216"),
    (spec(memory_mb=1 << 62), "instance.spec.memory_mb", "use 4 to 16777216"),
    (spec(disk_gb=-1), "instance.spec.disk_gb", "is -1: use 0 to 1048576"),
    (spec(disk_gb=1 << 62), "instance.spec.disk_gb", "use 0 to 1048576"),
    (spec(pids_limit=0), "instance.spec.pids_limit", "is 0: use 1 to 4194304"),
    (
        lambda r: r.instance.spec.ClearField("image"),
        "instance.spec.image",
        "is required: give a reference such as",
    ),
    (spec(image="a" * 2000), "instance.spec.image", "is 2000 bytes long: use at most 1024"),
    (spec(image="a b"), "instance.spec.image", "has spaces"),
    (spec(image="a\0b"), "instance.spec.image", "cannot be printed"),
    (spec(kernel_path="/k"), "instance.spec.kernel_path", "is for vm and microvm only: remove it"),
    (machine(VM, image="x", command=["a"]), "instance.spec.command", "is for containers only: remove it"),
    (
        machine(MICROVM, image="x", pids_limit=1),
        "instance.spec.pids_limit",
        "is for containers only: remove it",
    ),
    (machine(VM), "instance.spec.image", "is required unless instance.spec.kernel_path is given"),
    (machine(VM, kernel_path="vmlinuz"), "instance.spec.kernel_path", "'vmlinuz' is not an absolute path"),
    (machine(VM, kernel_path="/a/../b"), "instance.spec.kernel_path", "has '..'"),
    (machine(VM, kernel_path="/" + "a" * 5000), "instance.spec.kernel_path", "is 5001 bytes long"),
    (
        machine(VM, image="x", initrd_path="/i"),
        "instance.spec.initrd_path",
        "needs instance.spec.kernel_path",
    ),
    (machine(VM, kernel_path="/k", kernel_args="a\nb"), "instance.spec.kernel_args", "cannot be printed"),
    (
        machine(VM, kernel_path="/k", kernel_args="a" * 3000),
        "instance.spec.kernel_args",
        "is 3000 bytes long",
    ),
    (spec(command=["x"] * 1025), "instance.spec.command", "has 1025 words: use at most 1024"),
    (spec(command=["x" * 200_000]), "instance.spec.command", "is 200000 bytes long: use at most 131072"),
    (spec(command=["a\0"]), "instance.spec.command", "has a NUL character: remove it"),
    (spec(command=["", "a"]), "instance.spec.command", "begins with an empty word: give the program to run"),
    (spec(env={"": "x"}), "instance.spec.env", "'' is not the name of a variable"),
    (spec(env={"a=b": "x"}), "instance.spec.env", "'a=b' is not the name of a variable"),
    (spec(env={"a": "\0"}), "instance.spec.env", "the value of 'a' has a NUL character"),
    (spec(env={"a": "x" * 200_000}), "instance.spec.env", "is 200001 bytes long"),
    (
        spec(env={f"k{n}": "" for n in range(2000)}),
        "instance.spec.env",
        "has 2000 variables: use at most 1024",
    ),
    (spec(working_dir="srv"), "instance.spec.working_dir", "'srv' is not an absolute path"),
    (spec(placement_policy=9), "instance.spec.placement_policy", "is not known: use SPREAD or BINPACK"),
    (spec(node="n" * 300), "instance.spec.node", "is 300 characters long"),
    (constraint(values=["a"]), "instance.spec.node_selector[0].key", "is required"),
    (constraint(key="a b", values=["a"]), "instance.spec.node_selector[0].key", "key 'a b' is not legal"),
    (
        constraint(key="a"),
        "instance.spec.node_selector[0].values",
        "has 0 values: give 1 to 64, or use EXISTS",
    ),
    (
        constraint(key="a", values=["b c"]),
        "instance.spec.node_selector[0].values",
        "value 'b c' is not legal",
    ),
    (
        constraint(key="a", operator=9, values=["b"]),
        "instance.spec.node_selector[0].operator",
        "is not known",
    ),
    (
        constraint(key="a", operator=instance_pb2.LabelConstraint.OPERATOR_EXISTS, values=["b"]),
        "instance.spec.node_selector[0].values",
        "must be empty for EXISTS",
    ),
    (
        lambda r: r.MergeFrom(compute_pb2.CreateInstanceRequest(request_id="x" * 65)),
        "request_id",
        "is 65 characters",
    ),
    (
        lambda r: r.MergeFrom(compute_pb2.CreateInstanceRequest(request_id="a b")),
        "request_id",
        "is not legal",
    ),
    (
        lambda r: r.MergeFrom(compute_pb2.CreateInstanceRequest(request_id=new_id("op"))),
        "request_id",
        "looks like the id of an operation",
    ),
]


@pytest.mark.parametrize(("change", "wrong", "sentence"), BAD, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_named_with_its_remedy(change: Change, wrong: str, sentence: str) -> None:
    request = good()
    change(request)

    with pytest.raises(InvalidArgument) as refused:
        draft_of(request)

    assert [v.field for v in refused.value.violations] == [wrong]
    assert sentence in refused.value.violations[0].description
    assert len(refused.value.message) < 400


def test_all_wrong_fields_are_told_at_once() -> None:
    request = compute_pb2.CreateInstanceRequest(
        request_id="x" * 100,
        instance=instance_pb2.Instance(id="i-1", spec=instance_pb2.InstanceSpec(memory_mb=-1, disk_gb=-1)),
    )

    with pytest.raises(InvalidArgument) as refused:
        draft_of(request)

    assert {v.field for v in refused.value.violations} == {
        "request_id",
        "instance.name",
        "instance.type",
        "instance.id",
        "instance.spec.memory_mb",
        "instance.spec.disk_gb",
    }


def test_an_empty_request_is_told_what_it_needs() -> None:
    with pytest.raises(InvalidArgument, match="instance: is required: give name, type and spec"):
        draft_of(compute_pb2.CreateInstanceRequest())


@given(st.binary(max_size=300))
def test_whatever_comes_is_a_draft_or_a_refusal(data: bytes) -> None:
    request = good()
    try:
        request.MergeFromString(data)
    except DecodeError:
        return
    with suppress(InvalidArgument):
        draft_of(request)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (compute_pb2.GetInstanceRequest(), "instance: is required"),
        (compute_pb2.GetInstanceRequest(instance="x" * 10_000_000), "is 10000000 characters long"),
        (compute_pb2.GetInstanceRequest(instance="x", project="-"), "project: '-' is not a legal name"),
    ],
)
def test_a_read_names_one_instance(request_: compute_pb2.GetInstanceRequest, sentence: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        read_ref_of(request_)

    assert sentence in refused.value.message
    assert len(refused.value.message) < 300


def test_quick_and_thorough_reading_agree() -> None:
    request = compute_pb2.GetInstanceRequest(instance="web")

    assert read_ref_of(request) == ref_of(request, wrong=Violations())


@pytest.mark.parametrize(
    ("options", "grace_s"),
    [
        (instance_pb2.StopOptions(), 10.0),
        (instance_pb2.StopOptions(grace_period=Duration(seconds=3, nanos=500_000_000)), 3.5),
        (instance_pb2.StopOptions(grace_period=Duration()), 0.0),
        (instance_pb2.StopOptions(grace_period=Duration(seconds=3), force=True), 0.0),
    ],
)
def test_the_grace_period_is_ten_seconds_unless_given(
    options: instance_pb2.StopOptions, grace_s: float
) -> None:
    assert stop_options(Violations(), options).grace_s == grace_s


@pytest.mark.parametrize("seconds", [-1, 3601, 10**11])
def test_a_grace_period_outside_its_limits_is_refused(seconds: int) -> None:
    wrong = Violations()
    stop_options(wrong, instance_pb2.StopOptions(grace_period=Duration(seconds=seconds)))

    with pytest.raises(InvalidArgument, match=r"stop\.grace_period: is .* s: use 0 to 3600 s"):
        wrong.check()
