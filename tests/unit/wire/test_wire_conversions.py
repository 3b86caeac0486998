"""Domain values survive the wire, whatever they hold."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.model import (
    AffinityTerm,
    Allocation,
    Capability,
    DriverInfo,
    ErrorRecord,
    Instance,
    InstanceSpec,
    InstanceStats,
    InstancesUsage,
    LabelConstraint,
    Node,
    NodeResources,
    Observation,
    OperationRecord,
    PlacementRecord,
    Pressure,
    ScorePart,
    SpreadTerm,
    Taint,
    Toleration,
)
from hypervisor.core.resources import Resources
from hypervisor.core.restarts import RestartCondition, RestartPolicy, Restarts
from hypervisor.core.states import (
    DesiredState,
    InstanceStatus,
    InstanceType,
    LabelOperator,
    NodeRole,
    NodeStatus,
    OperationState,
    PlacementPolicy,
    TaintEffect,
    TolerationOperator,
)
from hypervisor.v1 import cluster_pb2, instance_pb2, node_pb2, operation_pb2
from hypervisor.wire import enums, instances, nodes, operations, times
from hypervisor.wire.consoles import console_data_from_wire, console_data_to_wire
from hypervisor.wire.stats import stats_from_wire, stats_to_wire, usage_from_wire, usage_to_wire

_TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=20)
_COUNT = st.integers(min_value=0, max_value=2**62)
_TIMES = st.datetimes(min_value=datetime(1970, 1, 2), max_value=datetime(9000, 1, 1)).map(  # noqa: DTZ001
    lambda t: t.replace(tzinfo=UTC)
)
_LABELS = st.dictionaries(_TEXT, _TEXT, max_size=4)

_SELECTORS = st.lists(
    st.builds(
        LabelConstraint,
        key=_TEXT,
        operator=st.sampled_from(LabelOperator),
        values=st.lists(_TEXT, max_size=3).map(tuple),
    ),
    max_size=3,
).map(tuple)
# The weight of a required term means nothing and is not sent.
_TERMS = st.builds(AffinityTerm, selector=_SELECTORS, topology=_TEXT.filter(bool)) | st.builds(
    AffinityTerm,
    selector=_SELECTORS,
    topology=_TEXT.filter(bool),
    preferred=st.just(True),
    weight=st.integers(1, 100),
)

_SPECS = st.builds(
    InstanceSpec,
    image=_TEXT,
    cpu_millis=st.integers(min_value=1, max_value=1_024_000),
    memory_mb=st.integers(min_value=1, max_value=2**24),
    disk_gb=st.integers(min_value=0, max_value=2**20),
    kernel_path=_TEXT,
    initrd_path=_TEXT,
    kernel_args=_TEXT,
    command=st.lists(_TEXT, max_size=4).map(tuple),
    env=_LABELS,
    working_dir=_TEXT,
    pids_limit=st.integers(min_value=1, max_value=2**22),
    node_selector=_SELECTORS,
    placement_policy=st.none() | st.sampled_from(PlacementPolicy),
    node=_TEXT,
    tolerations=st.lists(
        st.builds(
            Toleration,
            key=_TEXT,
            operator=st.sampled_from(TolerationOperator),
            value=_TEXT,
            effect=st.none() | st.sampled_from(TaintEffect),
        ),
        max_size=3,
    ).map(tuple),
    affinity=st.lists(_TERMS, max_size=3).map(tuple),
    anti_affinity=st.lists(_TERMS, max_size=3).map(tuple),
    spread=st.lists(
        st.builds(SpreadTerm, selector=_SELECTORS, topology=_TEXT.filter(bool), weight=st.integers(1, 100)),
        max_size=3,
    ).map(tuple),
    restart=st.none()
    | st.builds(
        RestartPolicy,
        condition=st.sampled_from((RestartCondition.ON_FAILURE, RestartCondition.ALWAYS)),
        max_restarts=st.none() | st.integers(1, 1_000_000),
        initial_delay_s=st.integers(1, 36_000).map(lambda tenths: tenths / 10),
        max_delay_s=st.integers(1, 864_000).map(lambda tenths: tenths / 10),
        reset_after_s=st.integers(1, 604_800).map(float),
    ),
)

_RESTARTS = st.builds(
    Restarts,
    count=st.integers(0, 2**31 - 1),
    total=_COUNT,
    next_at=st.none() | _TIMES,
    exhausted=st.booleans(),
    last_at=st.none() | _TIMES,
    last_reason=_TEXT,
    last_exit_code=st.none() | st.integers(0, 255),
)

_RATE = st.floats(min_value=0, max_value=1e12, allow_nan=False)

_PRESSURES = st.builds(
    Pressure,
    some_total_ns=_COUNT,
    full_total_ns=st.none() | _COUNT,
    some_share=st.none() | st.floats(min_value=0, max_value=1, allow_nan=False),
    full_share=st.none() | st.floats(min_value=0, max_value=1, allow_nan=False),
)

_STATS = st.builds(
    InstanceStats,
    sampled_at=_TIMES,
    cpu_usage_ns=st.none() | _COUNT,
    cpu_used_cores=st.none() | st.floats(min_value=0, max_value=4096, allow_nan=False),
    memory_used_bytes=st.none() | _COUNT,
    oom_kills=st.none() | _COUNT,
    network_transmit_bytes=st.none() | _COUNT,
    network_transmit_bytes_per_second=st.none() | _RATE,
    cpu_pressure=st.none() | _PRESSURES,
    io_pressure=st.none() | _PRESSURES,
)

_USAGES = st.builds(
    InstancesUsage,
    running=_COUNT,
    sampled=_COUNT,
    cpu_used_cores=_RATE,
    memory_used_bytes=_COUNT,
    network_receive_bytes_per_second=_RATE,
)

_OBSERVATIONS = st.builds(
    Observation,
    instance_id=_TEXT.filter(bool),
    generation=_COUNT,
    epoch=_COUNT,
    status=st.sampled_from(InstanceStatus),
    observed_at=_TIMES,
    sequence=_COUNT,
    reason=_TEXT,
    message=_TEXT,
    exit_code=st.none() | st.integers(min_value=0, max_value=255),
    started_at=st.none() | _TIMES,
    finished_at=st.none() | _TIMES,
    runtime=_TEXT,
    restarts=st.none() | _RESTARTS,
)


@given(_SPECS)
def test_spec_survives_the_wire(spec: InstanceSpec) -> None:
    wire = instance_pb2.InstanceSpec.FromString(instances.spec_to_wire(spec).SerializeToString())

    assert instances.spec_from_wire(wire) == spec


@given(_STATS)
def test_stats_survive_the_wire_and_keep_what_is_unknown_apart_from_zero(stats: InstanceStats) -> None:
    wire = instance_pb2.InstanceStats.FromString(stats_to_wire(stats).SerializeToString())

    assert stats_from_wire(wire) == stats


@given(_USAGES)
def test_usage_of_a_nodes_instances_survives_the_wire(usage: InstancesUsage) -> None:
    wire = node_pb2.InstancesUsage.FromString(usage_to_wire(usage).SerializeToString())

    assert usage_from_wire(wire) == usage


@given(_OBSERVATIONS)
def test_observation_survives_the_wire(seen: Observation) -> None:
    data = instances.observation_to_wire(seen).SerializeToString()

    assert instances.observation_from_wire(cluster_pb2.InstanceObservation.FromString(data)) == seen


@given(_TIMES)
def test_time_survives_the_wire_to_the_microsecond(moment: datetime) -> None:
    wire = times.timestamp_of(moment)

    assert wire is not None
    assert times.datetime_of(wire) == moment


@given(st.integers(min_value=0, max_value=10**9))
def test_span_survives_the_wire_to_the_microsecond(micros: int) -> None:
    seconds = micros / 1e6

    assert abs(times.seconds_of(times.duration_of(seconds)) - seconds) < 1e-6


def test_absent_time_is_none_both_ways() -> None:
    assert times.timestamp_of(None) is None
    assert times.datetime_of(instance_pb2.Instance().started_at) is None


def test_defaults_of_the_api_are_filled_in() -> None:
    spec = instances.spec_from_wire(instance_pb2.InstanceSpec(image="x"))

    assert spec == InstanceSpec(image="x", cpu_millis=1000, memory_mb=256, disk_gb=0, pids_limit=4096)


@pytest.mark.parametrize(
    "broken",
    [
        {"instance_id": ""},
        {"status": 0},
        {"status": 999},
    ],
)
def test_observation_without_what_it_needs_is_refused(broken: dict[str, object]) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    seen = Observation(
        instance_id="i-1", generation=1, epoch=1, status=InstanceStatus.RUNNING, observed_at=moment
    )
    wire = instances.observation_to_wire(seen)
    for name, value in broken.items():
        setattr(wire, name, value)

    with pytest.raises(InvalidArgument):
        instances.observation_from_wire(wire)


def test_every_enum_maps_both_ways_and_names_the_known_values_when_it_cannot() -> None:
    for member in InstanceType:
        assert enums.INSTANCE_TYPE.required(enums.INSTANCE_TYPE.to_wire(member), "type") is member
    assert enums.INSTANCE_TYPE.from_wire(0) is None
    assert enums.NODE_ROLE.to_wire(None) == node_pb2.NODE_ROLE_UNSPECIFIED

    with pytest.raises(InvalidArgument, match="type: must be one of: container, microvm, vm"):
        enums.INSTANCE_TYPE.required(77, "type")


def test_instance_record_shows_its_version_and_only_known_exit_codes() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    record = Instance(
        id="i-1",
        name="web",
        project="default",
        type=InstanceType.CONTAINER,
        spec=InstanceSpec(image="x"),
        status=InstanceStatus.RUNNING,
        desired=DesiredState.RUNNING,
        created_at=moment,
        updated_at=moment,
    )

    running = instances.instance_to_wire(record, resource_version=7)
    ended = instances.instance_to_wire(msgspec.structs.replace(record, exit_code=0), resource_version=8)

    assert running.resource_version == 7
    assert not running.HasField("exit_code")
    assert ended.HasField("exit_code")
    assert running.created_at.ToDatetime(tzinfo=UTC) == moment


def test_node_record_shows_capacity_until_use_is_known() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    driver = DriverInfo(
        name="fake",
        types=(InstanceType.VM,),
        available=True,
        capabilities=(Capability(verb="stop", supported=False, reason="it never stops"),),
    )
    record = Node(
        id="n-1",
        hostname="a",
        address="127.0.0.1",
        port=1,
        created_at=moment,
        updated_at=moment,
        role=NodeRole.MASTER,
        status=NodeStatus.OFFLINE,
        capacity=Resources(cpu_millis=2500, memory_bytes=10, disk_bytes=20),
        drivers=(driver,),
    )
    allocation = Allocation(node_id="n-1", reserved=Resources(cpu_millis=500), instances=1)

    wire = nodes.node_to_wire(record, resource_version=3, allocation=allocation)

    assert wire.resources.cpu_cores == 2.5
    assert wire.resources.memory_used == 0
    assert wire.reservation.cpu_cores == 0.5
    assert nodes.driver_from_wire(wire.drivers[0]) == driver
    measured = NodeResources(cpu_millis=1000, cpu_used_millis=250, memory_bytes=5, memory_used_bytes=4)
    assert nodes.resources_from_wire(nodes.resources_to_wire(measured)) == measured


def test_failed_operation_carries_the_error_it_recorded() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    record = OperationRecord(
        id="op-1",
        verb="create",
        object_kind="instance",
        object_id="i-1",
        object_name="web",
        principal="me",
        started_at=moment,
        finished_at=moment + timedelta(seconds=1),
        state=OperationState.FAILED,
        error=ErrorRecord(kind="NotFound", reason="IMAGE_NOT_FOUND", message="no image x"),
    )

    wire = operations.operation_to_wire(record, resource_version=9)

    assert wire.done
    assert wire.state == operation_pb2.OPERATION_STATE_FAILED
    assert wire.error.code == 5
    assert wire.error.message == "no image x"


@given(st.builds(Taint, key=_TEXT, value=_TEXT, effect=st.sampled_from(TaintEffect)), st.booleans())
def test_taint_survives_the_wire(taint: Taint, configured: bool) -> None:
    wire = nodes.taint_to_wire(taint, configured=configured)

    assert (nodes.taint_from_wire(wire, "taint"), wire.configured) == (taint, configured)


def test_a_node_shows_whose_taints_are_whose_and_what_may_be_reserved() -> None:
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    own = Taint(key="a", effect=TaintEffect.NO_SCHEDULE)
    node = Node(
        id="n-1",
        hostname="h",
        address="a",
        port=1,
        created_at=moment,
        updated_at=moment,
        own_taints=(own, Taint(key="b", effect=TaintEffect.NO_SCHEDULE)),
        set_taints=(Taint(key="b", value="mine", effect=TaintEffect.NO_SCHEDULE),),
    )

    shown = nodes.node_to_wire(
        node,
        resource_version=1,
        allocation=Allocation(node_id="n-1"),
        allocatable=Resources(cpu_millis=1500, memory_bytes=7, disk_bytes=9),
    )

    assert [(t.key, t.value, t.configured) for t in shown.taints] == [("a", "", True), ("b", "mine", False)]
    may = shown.allocatable
    assert (may.cpu_cores, may.memory_bytes, may.disk_bytes) == (1.5, 7, 9)


def test_the_record_of_a_placement_is_shown() -> None:
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    record = PlacementRecord(
        placed_at=moment, scheduler="default", score=70, parts=(ScorePart("load", 14, 5),)
    )
    instance = msgspec.structs.replace(_INSTANCE, placement=record)

    shown = instances.instance_to_wire(instance, resource_version=1).placement

    assert (shown.scheduler, shown.score, shown.placed_at.seconds) == ("default", 70, 1893456000)
    assert [(p.name, p.value, p.weight) for p in shown.parts] == [("load", 14, 5)]


_INSTANCE = Instance(
    id="i-1",
    name="web",
    project="default",
    type=InstanceType.CONTAINER,
    spec=InstanceSpec(image="x"),
    status=InstanceStatus.RUNNING,
    desired=DesiredState.RUNNING,
    created_at=datetime(2030, 1, 1, tzinfo=UTC),
    updated_at=datetime(2030, 1, 1, tzinfo=UTC),
)


@pytest.mark.parametrize("size", [1, 127, 128, 16383, 16384, 65536])
def test_encoded_console_data_is_what_the_message_encodes_to(size):
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert console_data_to_wire(data) == instance_pb2.ConsoleOutput(data=data).SerializeToString()
    assert console_data_from_wire(console_data_to_wire(data)) == data


@given(st.binary(max_size=40))
def test_only_a_message_of_nothing_but_data_is_taken_for_one(encoded):
    data = console_data_from_wire(encoded)

    if data is not None:
        decoded = instance_pb2.ConsoleOutput.FromString(encoded)
        assert decoded.WhichOneof("output") == "data"
        assert decoded.data == data


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\x12",
        b"\x12\x03ab",
        b"\x12\x02abc",
        b"\x12\x80\x80\x80\x80\x80\x01",
        instance_pb2.ConsoleOutput(data=b"x").SerializeToString()
        + instance_pb2.ConsoleOutput(skipped=instance_pb2.ConsoleOutput.Skipped(bytes=1)).SerializeToString(),
    ],
    ids=["nothing", "no length", "cut off", "more behind", "no end of the length", "another kind behind"],
)
def test_anything_else_is_left_to_the_decoder(encoded):
    assert console_data_from_wire(encoded) is None
