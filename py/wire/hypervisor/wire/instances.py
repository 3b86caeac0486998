"""Instances on the wire: spec, record, observation, assignment fields; what they use is in :mod:`.stats`."""

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.model import Instance, InstanceSpec, InstanceStats, Observation
from hypervisor.core.resources import cores, millicores
from hypervisor.v1 import cluster_pb2, instance_pb2
from hypervisor.wire.availability import availability_from_wire, availability_to_wire, loss_to_wire
from hypervisor.wire.constraints import (
    affinity_from_wire,
    affinity_to_wire,
    constraints_from_wire,
    constraints_to_wire,
    record_to_wire,
    spread_from_wire,
    spread_to_wire,
    toleration_from_wire,
    toleration_to_wire,
)
from hypervisor.wire.enums import DESIRED_STATE, INSTANCE_STATUS, INSTANCE_TYPE, PLACEMENT_POLICY
from hypervisor.wire.machines import (
    cloud_init_from_wire,
    cloud_init_to_wire,
    microvm_from_wire,
    microvm_to_wire,
    network_from_wire,
    network_to_wire,
    vm_from_wire,
    vm_to_wire,
)
from hypervisor.wire.moves import move_to_wire, policy_from_wire, policy_to_wire
from hypervisor.wire.restarts import (
    restart_policy_from_wire,
    restart_policy_to_wire,
    restarts_from_wire,
    restarts_to_wire,
)
from hypervisor.wire.stats import stats_to_wire
from hypervisor.wire.times import datetime_of, timestamp_of

__all__ = [
    "instance_to_wire",
    "observation_from_wire",
    "observation_to_wire",
    "spec_from_wire",
    "spec_to_wire",
]


def spec_to_wire(spec: InstanceSpec) -> instance_pb2.InstanceSpec:
    """The spec as it was asked for, defaults filled in."""
    return instance_pb2.InstanceSpec(
        image=spec.image,
        cpu_cores=cores(spec.cpu_millis),
        memory_mb=spec.memory_mb,
        disk_gb=spec.disk_gb,
        kernel_path=spec.kernel_path,
        initrd_path=spec.initrd_path,
        kernel_args=spec.kernel_args,
        command=spec.command,
        env=spec.env,
        working_dir=spec.working_dir,
        pids_limit=spec.pids_limit,
        node_selector=constraints_to_wire(spec.node_selector),
        placement_policy=PLACEMENT_POLICY.to_wire(spec.placement_policy),
        node=spec.node,
        tolerations=map(toleration_to_wire, spec.tolerations),
        affinity=map(affinity_to_wire, spec.affinity),
        anti_affinity=map(affinity_to_wire, spec.anti_affinity),
        spread=map(spread_to_wire, spec.spread),
        cloud_init=cloud_init_to_wire(spec.cloud_init),
        networks=map(network_to_wire, spec.networks),
        vm=vm_to_wire(spec.vm),
        microvm=microvm_to_wire(spec.microvm),
        restart=restart_policy_to_wire(spec.restart),
        move=policy_to_wire(spec.move),
        availability=availability_to_wire(spec.availability),
    )


def spec_from_wire(spec: instance_pb2.InstanceSpec) -> InstanceSpec:
    """The spec with the defaults of instance.proto where a number is 0. Limits are not checked here."""
    return InstanceSpec(
        image=spec.image,
        cpu_millis=millicores(spec.cpu_cores or 1.0),
        memory_mb=spec.memory_mb or 256,
        disk_gb=spec.disk_gb,
        kernel_path=spec.kernel_path,
        initrd_path=spec.initrd_path,
        kernel_args=spec.kernel_args,
        command=tuple(spec.command),
        env=dict(spec.env),
        working_dir=spec.working_dir,
        pids_limit=spec.pids_limit or 4096,
        node_selector=constraints_from_wire(spec.node_selector),
        placement_policy=PLACEMENT_POLICY.from_wire(spec.placement_policy),
        node=spec.node,
        tolerations=tuple(map(toleration_from_wire, spec.tolerations)),
        affinity=tuple(map(affinity_from_wire, spec.affinity)),
        anti_affinity=tuple(map(affinity_from_wire, spec.anti_affinity)),
        spread=tuple(map(spread_from_wire, spec.spread)),
        cloud_init=cloud_init_from_wire(spec),
        networks=tuple(map(network_from_wire, spec.networks)),
        vm=vm_from_wire(spec),
        microvm=microvm_from_wire(spec),
        restart=restart_policy_from_wire(spec),
        move=policy_from_wire(spec),
        availability=availability_from_wire(spec),
    )


def instance_to_wire(
    instance: Instance, *, resource_version: int, stats: InstanceStats | None = None
) -> instance_pb2.Instance:
    """The record as users see it."""
    message = instance_pb2.Instance(
        id=instance.id,
        name=instance.name,
        type=INSTANCE_TYPE.to_wire(instance.type),
        status=INSTANCE_STATUS.to_wire(instance.status),
        node_id=instance.node_id,
        spec=spec_to_wire(instance.spec),
        stats=None if stats is None else stats_to_wire(stats),
        labels=instance.labels,
        created_at=timestamp_of(instance.created_at),
        started_at=timestamp_of(instance.started_at),
        project=instance.project,
        desired_state=DESIRED_STATE.to_wire(instance.desired),
        status_reason=instance.status_reason,
        status_message=instance.status_message,
        finished_at=timestamp_of(instance.finished_at),
        generation=instance.generation,
        epoch=instance.epoch,
        resource_version=resource_version,
        operation_id=instance.operation_id,
        runtime=instance.runtime,
        runtime_reason=instance.runtime_reason,
        updated_at=timestamp_of(instance.updated_at),
        placement=None if instance.placement is None else record_to_wire(instance.placement),
        restarts=restarts_to_wire(instance.restarts),
        move=move_to_wire(instance),
        home_node_id=instance.home,
        lost=loss_to_wire(instance.lost),
    )
    if instance.exit_code is not None:
        message.exit_code = instance.exit_code
    return message


def observation_to_wire(seen: Observation) -> cluster_pb2.InstanceObservation:
    """An observation."""
    message = cluster_pb2.InstanceObservation(
        instance_id=seen.instance_id,
        generation=seen.generation,
        epoch=seen.epoch,
        status=INSTANCE_STATUS.to_wire(seen.status),
        reason=seen.reason,
        message=seen.message,
        started_at=timestamp_of(seen.started_at),
        finished_at=timestamp_of(seen.finished_at),
        observed_at=timestamp_of(seen.observed_at),
        sequence=seen.sequence,
        runtime=seen.runtime,
        runtime_reason=seen.runtime_reason,
        restarts=restarts_to_wire(seen.restarts),
    )
    if seen.exit_code is not None:
        message.exit_code = seen.exit_code
    return message


def observation_from_wire(seen: cluster_pb2.InstanceObservation) -> Observation:
    """An observation. InvalidArgument for a missing id, status or time."""
    observed_at = datetime_of(seen.observed_at)
    if not seen.instance_id or observed_at is None:
        raise InvalidArgument.of_field("instances", "each needs instance_id and observed_at")
    return Observation(
        instance_id=seen.instance_id,
        generation=seen.generation,
        epoch=seen.epoch,
        status=INSTANCE_STATUS.required(seen.status, "instances.status"),
        observed_at=observed_at,
        sequence=seen.sequence,
        reason=seen.reason,
        message=seen.message,
        exit_code=seen.exit_code if seen.HasField("exit_code") else None,
        started_at=datetime_of(seen.started_at),
        finished_at=datetime_of(seen.finished_at),
        runtime=seen.runtime,
        runtime_reason=seen.runtime_reason,
        restarts=restarts_from_wire(seen.restarts) if seen.HasField("restarts") else None,
    )
