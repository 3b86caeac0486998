"""Restart policies of requests: each wrong field is named, each right one passes."""

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.model import InstanceSpec
from hypervisor.core.restarts import RestartCondition, RestartPolicy
from hypervisor.server.api.instance_requests import draft_of
from hypervisor.v1 import compute_pb2, instance_pb2


def spec_of(**restart: Any) -> InstanceSpec:
    wanted = instance_pb2.InstanceSpec(image="busybox", restart=instance_pb2.RestartPolicy(**restart))
    instance = instance_pb2.Instance(name="web", type="INSTANCE_TYPE_CONTAINER", spec=wanted)
    return draft_of(compute_pb2.CreateInstanceRequest(instance=instance)).spec


def wrong_fields(**restart: Any) -> list[str]:
    with pytest.raises(InvalidArgument) as refused:
        spec_of(**restart)
    return [v.field.removeprefix("instance.spec.restart.") for v in refused.value.violations]


def test_a_policy_is_kept_with_its_defaults() -> None:
    assert spec_of(condition="RESTART_CONDITION_ON_FAILURE").restart == RestartPolicy(
        condition=RestartCondition.ON_FAILURE
    )
    slow = spec_of(condition="RESTART_CONDITION_ALWAYS", max_restarts=3, initial_delay=Duration(seconds=90))
    assert slow.restart == RestartPolicy(
        condition=RestartCondition.ALWAYS, max_restarts=3, initial_delay_s=90.0, max_delay_s=90.0
    )


def test_never_is_no_policy() -> None:
    assert spec_of(condition="RESTART_CONDITION_NEVER").restart is None


def test_a_limit_without_a_condition_is_refused() -> None:
    assert wrong_fields(max_restarts=3, max_delay=Duration(seconds=1)) == ["max_delay", "max_restarts"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_restarts", 0),
        ("max_restarts", 1_000_001),
        ("initial_delay", Duration(nanos=99_000_000)),
        ("initial_delay", Duration(seconds=3601)),
        ("max_delay", Duration(nanos=999_000_000)),
        ("max_delay", Duration(seconds=86_401)),
        ("reset_after", Duration(nanos=1)),
        ("reset_after", Duration(seconds=7 * 86_400 + 1)),
    ],
)
def test_what_is_out_of_range_is_named(field: str, value: object) -> None:
    assert wrong_fields(condition="RESTART_CONDITION_ALWAYS", **{field: value}) == [field]


def test_an_unknown_condition_is_named() -> None:
    assert wrong_fields(condition=9) == ["condition"]
