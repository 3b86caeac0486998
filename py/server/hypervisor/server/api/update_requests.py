"""UpdateInstance's request, checked and turned into domain values. Pure; every wrong field is reported at once."""

from hypervisor.core.resources import millicores
from hypervisor.server.api.instance_requests import check_sizes
from hypervisor.server.api.violations import Violations
from hypervisor.server.services import InstanceRef
from hypervisor.v1 import compute_pb2

__all__ = ["update_of"]

_CHANGEABLE = ("spec.cpu_cores", "spec.memory_mb")
_NAMING = frozenset({"id", "name", "project", "resource_version", "spec"})


def update_of(request: compute_pb2.UpdateInstanceRequest) -> tuple[InstanceRef, int | None, int | None]:
    """Which instance, and its new thousandths of a core and MiB of memory (None: as it is).

    InvalidArgument with every wrong field.
    """
    wrong = Violations()
    wrong.request_id(request.request_id)
    instance = request.instance
    named = instance.id or instance.name
    field = "instance.id" if instance.id else "instance.name"
    ref = InstanceRef(
        instance=wrong.object_name(field, named, "id or name of an instance"),
        project=wrong.project("instance.project", instance.project),
        resource_version=wrong.resource_version(instance.resource_version),
    )
    paths = _paths(request, wrong)
    check_sizes(wrong, instance.spec, "instance.spec.")
    for path in paths:
        name = path.removeprefix("spec.")
        if path in _CHANGEABLE and not instance.spec.HasField(
            "cpu_cores" if name == "cpu_cores" else "memory_mb"
        ):
            wrong.add(f"instance.{path}", "is in update_mask and has no value: give one, or take it out")
    wrong.check()
    spec = instance.spec
    return (
        ref,
        millicores(spec.cpu_cores) if "spec.cpu_cores" in paths else None,
        spec.memory_mb if "spec.memory_mb" in paths else None,
    )


def _paths(request: compute_pb2.UpdateInstanceRequest, wrong: Violations) -> set[str]:
    """What is to be changed: the mask, or what is set."""
    if request.HasField("update_mask"):
        paths = set(request.update_mask.paths)
        for path in sorted(paths.difference(_CHANGEABLE)):
            wrong.add("update_mask", f"{path!r} cannot be changed in place: only {' and '.join(_CHANGEABLE)}")
        if not paths:
            wrong.add("update_mask", "names nothing: give what to change, or leave the mask out")
        return paths
    present = {f"spec.{field.name}" for field, _ in request.instance.spec.ListFields()}
    besides = {field.name for field, _ in request.instance.ListFields()} - _NAMING
    for path in sorted((present | besides).difference(_CHANGEABLE)):
        wrong.add(f"instance.{path}", f"cannot be changed in place: only {' and '.join(_CHANGEABLE)}")
    if not present and not besides:
        wrong.add("instance.spec", f"changes nothing: give {' or '.join(_CHANGEABLE)}")
    return present
