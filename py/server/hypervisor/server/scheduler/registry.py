"""Which scheduler: the built-in ones by this table, others by an entry point of the group ``hypervisor.schedulers``.

An entry point names a callable without arguments that returns a ``Scheduler``.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

from hypervisor.core.errors import InvalidArgument
from hypervisor.server.scheduler.contract import Scheduler
from hypervisor.server.scheduler.default import DefaultScheduler

__all__ = ["BUILT_IN", "ENTRY_POINT_GROUP", "load_scheduler"]

ENTRY_POINT_GROUP = "hypervisor.schedulers"
BUILT_IN: Mapping[str, Callable[[], Scheduler]] = MappingProxyType({"default": DefaultScheduler})


def load_scheduler(name: str, *, found: tuple[EntryPoint, ...] | None = None) -> Scheduler:
    """The scheduler of this name. ``found`` replaces the installed entry points.

    Raises InvalidArgument (``SCHEDULER_UNKNOWN``, ``SCHEDULER_BROKEN``) that names those there are.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    installed = tuple(entry_points(group=ENTRY_POINT_GROUP)) if found is None else found
    for entry in installed:
        if entry.name == name:
            return _load(entry)
    names = ", ".join(sorted({*BUILT_IN, *(e.name for e in installed)}))
    raise InvalidArgument.of_field(
        "scheduler.name", f"there is no scheduler {name!r}; there are: {names}", reason="SCHEDULER_UNKNOWN"
    )


def _load(entry: EntryPoint) -> Scheduler:
    try:
        made = entry.load()()
    except Exception as exc:  # foreign code: whatever it raises is told as what is wrong with it
        raise InvalidArgument.of_field(
            "scheduler.name",
            f"{entry.name!r} ({entry.value}) cannot be loaded: {exc}",
            reason="SCHEDULER_BROKEN",
        ) from exc
    if not callable(getattr(made, "schedule", None)):
        raise InvalidArgument.of_field(
            "scheduler.name",
            f"{entry.name!r} ({entry.value}) is not a scheduler: it has no method schedule(request, snapshot)",
            reason="SCHEDULER_BROKEN",
        )
    scheduler: Scheduler = made
    return scheduler
