"""Requests of ComputeService, checked and turned into domain values. Pure; every wrong field is reported at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.ids import is_id
from hypervisor.core.images import IMAGE_PREFIX, image_name_of
from hypervisor.core.names import check_dns_label, check_labels, shorten
from hypervisor.core.states import DesiredState, InstanceType
from hypervisor.server.api.availability_requests import check_availability
from hypervisor.server.api.machine_requests import check_machine
from hypervisor.server.api.move_requests import check_move_policy
from hypervisor.server.api.placement_requests import check_placement
from hypervisor.server.api.restart_requests import check_restart
from hypervisor.server.api.violations import MAX_OBJECT_NAME, Violations
from hypervisor.server.services import InstanceDraft, InstanceRef, StopOptions
from hypervisor.v1 import compute_pb2, instance_pb2
from hypervisor.wire.enums import DESIRED_STATE, INSTANCE_TYPE, PLACEMENT_POLICY
from hypervisor.wire.instances import spec_from_wire

__all__ = [
    "InstanceRequest",
    "VersionedRequest",
    "check_sizes",
    "draft_of",
    "draft_of_instance",
    "read_ref_of",
    "ref_of",
    "stats_spans",
    "stop_options",
    "versioned_ref_of",
]

MAX_GRACE_S = 3600.0
DEFAULT_GRACE_S = 10.0
DEFAULT_INTERVAL_S = 1.0
MAX_INTERVAL_S = 60.0
MAX_HISTORY_S = 3600.0

_MAX_CPU_CORES = 1024
_MEMORY_MB = (4, 16_777_216)
_DISK_GB = (0, 1_048_576)
_PIDS = (1, 4_194_304)
_MAX_WORDS = 1024
_MAX_TEXT_BYTES = 128 << 10
_MAX_IMAGE_BYTES = 1024
_MAX_PATH_BYTES = 4095
_MAX_KERNEL_ARGS_BYTES = 2048

_OUTPUT_ONLY = (
    "id",
    "status",
    "node_id",
    "stats",
    "created_at",
    "started_at",
    "status_reason",
    "status_message",
    "exit_code",
    "finished_at",
    "generation",
    "epoch",
    "resource_version",
    "operation_id",
    "runtime",
    "runtime_reason",
    "updated_at",
    "placement",
    "restarts",
    "move",
    "home_node_id",
    "lost",
)
_MACHINE_FIELDS = ("kernel_path", "initrd_path", "kernel_args")
_CONTAINER_FIELDS = ("command", "env", "working_dir", "pids_limit")

VersionedRequest = (
    compute_pb2.StartInstanceRequest
    | compute_pb2.StopInstanceRequest
    | compute_pb2.DeleteInstanceRequest
    | compute_pb2.RestartInstanceRequest
    | compute_pb2.PauseInstanceRequest
    | compute_pb2.ResumeInstanceRequest
    | compute_pb2.SuspendInstanceRequest
    | compute_pb2.CreateSnapshotRequest
    | compute_pb2.RestoreSnapshotRequest
    | compute_pb2.DeleteSnapshotRequest
    | compute_pb2.MoveInstanceRequest
)
"""Requests that change one instance that exists."""

InstanceRequest = (
    VersionedRequest
    | compute_pb2.ExplainPlacementRequest
    | compute_pb2.GetInstanceRequest
    | compute_pb2.GetInstanceStatsRequest
    | compute_pb2.WatchInstanceStatsRequest
    | compute_pb2.ListSnapshotsRequest
    | instance_pb2.ConsoleInput.Open
    | instance_pb2.GetInstanceLogsRequest
)
"""Requests that name one instance that exists."""


def draft_of(request: compute_pb2.CreateInstanceRequest) -> InstanceDraft:
    """The instance asked for. InvalidArgument with every wrong field."""
    wrong = Violations()
    wrong.request_id(request.request_id)
    if not request.HasField("instance"):
        wrong.add("instance", "is required: give name, type and spec")
        wrong.check()
    return draft_of_instance(request.instance, "instance", wrong=wrong)


def draft_of_instance(
    instance: instance_pb2.Instance, field: str, *, wrong: Violations, unnamed: str = ""
) -> InstanceDraft:
    """The instance described in ``field``. With ``unnamed`` it may lack a name, and then has this one.

    InvalidArgument with every wrong field, those found before included.
    """
    at = f"{field}."
    name = instance.name or unnamed
    wrong.extend(check_dns_label(f"{at}name", name))
    if is_id(name, "i"):
        wrong.add(f"{at}name", "looks like the id of an instance: choose another name")
    kind = INSTANCE_TYPE.from_wire(instance.type)
    if kind is None:
        known = ", ".join(member.value for member in InstanceType)
        wrong.add(f"{at}type", f"is required: give one of {known}")
    project = wrong.project(f"{at}project", instance.project)
    desired = DESIRED_STATE.from_wire(instance.desired_state)
    if desired is DesiredState.DELETED or (desired is None and instance.desired_state != 0):
        wrong.add(f"{at}desired_state", "must be RUNNING or STOPPED")
    wrong.extend(*check_labels(f"{at}labels", instance.labels))
    wrong.output_only(instance, _OUTPUT_ONLY, at)
    if instance.HasField("spec"):
        _check_spec(wrong, instance.spec, kind, f"{at}spec.")
    else:
        wrong.add(f"{at}spec", "is required: say at least which image to run")
    wrong.check()
    assert kind is not None
    return InstanceDraft(
        name=name,
        project=project,
        type=kind,
        spec=spec_from_wire(instance.spec),
        labels=dict(instance.labels),
        desired=desired or DesiredState.RUNNING,
    )


def _check_spec(
    wrong: Violations, spec: instance_pb2.InstanceSpec, kind: InstanceType | None, at: str
) -> None:
    check_sizes(wrong, spec, at)
    _check_image(wrong, spec, kind, at)
    if kind is InstanceType.CONTAINER:
        _refuse_fields(wrong, spec, _MACHINE_FIELDS, at, "is for vm and microvm only: remove it")
    elif kind is not None:
        _refuse_fields(wrong, spec, _CONTAINER_FIELDS, at, "is for containers only: remove it")
    _check_file(wrong, f"{at}kernel_path", spec.kernel_path)
    _check_file(wrong, f"{at}initrd_path", spec.initrd_path)
    _check_path(wrong, f"{at}working_dir", spec.working_dir)
    wrong.text(f"{at}kernel_args", spec.kernel_args, max_bytes=_MAX_KERNEL_ARGS_BYTES)
    if not spec.kernel_path and kind is not InstanceType.CONTAINER:
        for name in ("initrd_path", "kernel_args"):
            if getattr(spec, name):
                wrong.add(f"{at}{name}", f"needs {at}kernel_path: give it, or remove {name}")
    check_machine(wrong, spec, kind, at)
    _check_command(wrong, spec.command, at)
    _check_env(wrong, spec.env, at)
    check_placement(wrong, spec, at)
    check_restart(wrong, spec, at)
    check_move_policy(wrong, spec, at)
    check_availability(wrong, spec, at)
    if spec.placement_policy != 0 and PLACEMENT_POLICY.from_wire(spec.placement_policy) is None:
        wrong.add(f"{at}placement_policy", "is not known: use SPREAD or BINPACK, or leave it empty")
    if len(spec.node) > MAX_OBJECT_NAME:
        wrong.add(f"{at}node", f"is {len(spec.node)} characters long: give a node's id or host name")


def check_sizes(wrong: Violations, spec: instance_pb2.InstanceSpec, at: str) -> None:
    """Note amounts of processor, memory, disk and processes that are out of range."""
    cores = spec.cpu_cores
    if spec.HasField("cpu_cores") and not (math.isfinite(cores) and 0.001 <= cores <= _MAX_CPU_CORES):
        wrong.add(f"{at}cpu_cores", f"is {cores:g}: use 0.001 to {_MAX_CPU_CORES}, or leave it out for 1")
    if spec.HasField("memory_mb"):
        wrong.whole(f"{at}memory_mb", spec.memory_mb, low=_MEMORY_MB[0], high=_MEMORY_MB[1])
    wrong.whole(f"{at}disk_gb", spec.disk_gb, low=_DISK_GB[0], high=_DISK_GB[1])
    if spec.HasField("pids_limit"):
        wrong.whole(f"{at}pids_limit", spec.pids_limit, low=_PIDS[0], high=_PIDS[1])


def _check_image(
    wrong: Violations, spec: instance_pb2.InstanceSpec, kind: InstanceType | None, at: str
) -> None:
    size = len(spec.image.encode())
    if size > _MAX_IMAGE_BYTES:
        wrong.add(f"{at}image", f"is {size} bytes long: use at most {_MAX_IMAGE_BYTES}")
    elif not spec.image.isprintable() or " " in spec.image:
        wrong.add(f"{at}image", f"{shorten(spec.image)} has spaces or characters that cannot be printed")
    elif spec.image.startswith(IMAGE_PREFIX):
        _check_image_name(wrong, f"{at}image", spec.image)
    elif not spec.image and kind is InstanceType.CONTAINER:
        wrong.add(
            f"{at}image",
            "is required: give a reference such as docker.io/library/busybox:1.36, image:NAME for an image of the "
            "cluster, or oci-archive:/path/on/the/node",
        )
    elif not spec.image and not spec.kernel_path and kind is not None:
        wrong.add(f"{at}image", f"is required unless {at}kernel_path is given: say what to boot")


def _refuse_fields(
    wrong: Violations, spec: instance_pb2.InstanceSpec, names: tuple[str, ...], at: str, why: str
) -> None:
    present = {field.name for field, _ in spec.ListFields()}
    for name in names:
        if name in present:
            wrong.add(f"{at}{name}", why)


def _check_image_name(wrong: Violations, field: str, value: str) -> None:
    try:
        image_name_of(value, field)
    except InvalidArgument as exc:
        wrong.extend(*exc.violations)


def _check_file(wrong: Violations, field: str, value: str) -> None:
    """A file on the node, or an image."""
    if value.startswith(IMAGE_PREFIX):
        _check_image_name(wrong, field, value)
    else:
        _check_path(wrong, field, value)


def _check_path(wrong: Violations, field: str, path: str) -> None:
    if not path:
        return
    if len(path.encode()) > _MAX_PATH_BYTES:
        wrong.add(field, f"is {len(path.encode())} bytes long: use at most {_MAX_PATH_BYTES}")
    elif not path.startswith("/"):
        wrong.add(field, f"{shorten(path)} is not an absolute path: begin with '/'")
    elif not path.isprintable() or ".." in path.split("/"):
        wrong.add(field, f"{shorten(path)} has '..' or characters that cannot be printed: write it plainly")


def _check_command(wrong: Violations, command: Sequence[str], at: str) -> None:
    size = sum(len(word.encode()) for word in command)
    if len(command) > _MAX_WORDS:
        wrong.add(f"{at}command", f"has {len(command)} words: use at most {_MAX_WORDS}")
    elif size > _MAX_TEXT_BYTES:
        wrong.add(f"{at}command", f"is {size} bytes long: use at most {_MAX_TEXT_BYTES}")
    elif any("\0" in word for word in command):
        wrong.add(f"{at}command", "has a NUL character: remove it")
    elif command and not command[0]:
        wrong.add(f"{at}command", "begins with an empty word: give the program to run")


def _check_env(wrong: Violations, env: Mapping[str, str], at: str) -> None:
    size = sum(len(key.encode()) + len(value.encode()) for key, value in env.items())
    if len(env) > _MAX_WORDS:
        wrong.add(f"{at}env", f"has {len(env)} variables: use at most {_MAX_WORDS}")
        return
    if size > _MAX_TEXT_BYTES:
        wrong.add(f"{at}env", f"is {size} bytes long: use at most {_MAX_TEXT_BYTES}")
        return
    for key, value in env.items():
        if not key or "=" in key or "\0" in key:
            wrong.add(
                f"{at}env", f"{shorten(key)} is not the name of a variable: it must not be empty or have '='"
            )
        elif "\0" in value:
            wrong.add(f"{at}env", f"the value of {shorten(key)} has a NUL character: remove it")


def ref_of(request: InstanceRequest, *, wrong: Violations, prefix: str = "") -> InstanceRef:
    """The instance named. ``wrong`` collects what is not legal."""
    return InstanceRef(
        instance=wrong.object_name(f"{prefix}instance", request.instance, "id or name of an instance"),
        project=wrong.project(f"{prefix}project", request.project),
    )


def versioned_ref_of(request: VersionedRequest, *, wrong: Violations) -> InstanceRef:
    """The instance named, and the version of it that the caller has seen."""
    ref = ref_of(request, wrong=wrong)
    return replace(ref, resource_version=wrong.resource_version(request.resource_version))


def read_ref_of(
    request: compute_pb2.GetInstanceRequest
    | compute_pb2.GetInstanceStatsRequest
    | compute_pb2.ExplainPlacementRequest,
) -> InstanceRef:
    """The instance named. InvalidArgument with every wrong field. Quick for what is nearly always sent: an id."""
    instance = request.instance
    if 0 < len(instance) <= MAX_OBJECT_NAME and not request.project:
        return InstanceRef(instance)
    wrong = Violations()
    ref = ref_of(request, wrong=wrong)
    wrong.check()
    return ref


def stop_options(
    wrong: Violations, options: instance_pb2.StopOptions, *, default_s: float = DEFAULT_GRACE_S
) -> StopOptions:
    """How to stop; ``default_s`` where no grace period is given."""
    grace_s = default_s
    if options.HasField("grace_period"):
        grace_s = wrong.seconds("stop.grace_period", options.grace_period, at_least=0.0, at_most=MAX_GRACE_S)
    return StopOptions(grace_s=0.0 if options.force else grace_s)


def stats_spans(request: compute_pb2.WatchInstanceStatsRequest, wrong: Violations) -> tuple[float, float]:
    """Seconds between samples, and seconds of the past to begin with."""
    interval_s = DEFAULT_INTERVAL_S
    if request.HasField("interval"):
        interval_s = wrong.seconds("interval", request.interval, at_least=0.1, at_most=MAX_INTERVAL_S)
    return interval_s, wrong.seconds("history", request.history, at_least=0.0, at_most=MAX_HISTORY_S)
