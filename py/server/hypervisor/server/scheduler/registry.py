"""Which scheduler: the built-in ones by this table, others by an entry point of the group ``hypervisor.schedulers``;
the plug-ins of the default one by those of ``hypervisor.scheduler.filters`` and ``hypervisor.scheduler.scores``.

An entry point names a callable without arguments that returns a ``Scheduler``, a ``Filter`` or a ``Score``. Filters and
scores are used where ``scheduler.plugins`` names them: what is installed for something else changes no placement.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from hypervisor.core.errors import InvalidArgument
from hypervisor.server.scheduler.contract import Scheduler
from hypervisor.server.scheduler.default import DefaultScheduler
from hypervisor.server.scheduler.options import SchedulerOptions
from hypervisor.server.scheduler.plugins import FILTERS, SCORES

__all__ = [
    "BUILT_IN",
    "ENTRY_POINT_GROUP",
    "FILTER_GROUP",
    "SCORE_GROUP",
    "load_scheduler",
]

ENTRY_POINT_GROUP = "hypervisor.schedulers"
FILTER_GROUP = "hypervisor.scheduler.filters"
SCORE_GROUP = "hypervisor.scheduler.scores"


def _default(options: SchedulerOptions, found: tuple[EntryPoint, ...] | None) -> Scheduler:
    filters = _plugins(FILTER_GROUP, "reason_against", options.plugins, found)
    scores = _plugins(SCORE_GROUP, "score", options.plugins, found)
    unknown = [name for name in options.plugins if name not in filters and name not in scores]
    if unknown:
        installed = (*_installed(FILTER_GROUP, found), *_installed(SCORE_GROUP, found))
        names = ", ".join(sorted({e.name for e in installed})) or "none"
        raise InvalidArgument.of_field(
            "scheduler.plugins",
            f"there is no filter or score {unknown[0]!r}; installed are: {names}",
            reason="SCHEDULER_PLUGIN_UNKNOWN",
        )
    for made in (filters, scores):
        _check_names(made)
    return DefaultScheduler(
        weights=options.weights, extra_filters=filters.values(), extra_scores=scores.values()
    )


BUILT_IN: Mapping[str, Callable[[SchedulerOptions, tuple[EntryPoint, ...] | None], Scheduler]] = (
    MappingProxyType({"default": _default})
)


def load_scheduler(
    name: str, options: SchedulerOptions | None = None, *, found: tuple[EntryPoint, ...] | None = None
) -> Scheduler:
    """The scheduler of this name. ``found`` replaces the installed entry points.

    Raises InvalidArgument (``SCHEDULER_UNKNOWN``, ``SCHEDULER_BROKEN``, ``SCHEDULER_PLUGIN_UNKNOWN``) that names those
    there are, or that names the two that have one name (``SCHEDULER_PLUGIN_NAME_TAKEN``).
    """
    if name in BUILT_IN:
        return BUILT_IN[name](options or SchedulerOptions(), found)
    installed = _installed(ENTRY_POINT_GROUP, found)
    for entry in installed:
        if entry.name == name:
            scheduler: Scheduler = _load(entry, "scheduler.name", "schedule")
            return scheduler
    names = ", ".join(sorted({*BUILT_IN, *(e.name for e in installed)}))
    raise InvalidArgument.of_field(
        "scheduler.name", f"there is no scheduler {name!r}; there are: {names}", reason="SCHEDULER_UNKNOWN"
    )


def _installed(group: str, found: tuple[EntryPoint, ...] | None) -> tuple[EntryPoint, ...]:
    if found is None:
        return tuple(entry_points(group=group))
    return tuple(entry for entry in found if entry.group == group)


def _plugins(
    group: str, method: str, names: Sequence[str], found: tuple[EntryPoint, ...] | None
) -> dict[str, Any]:
    wanted = set(names)
    made: dict[str, Any] = {}
    for entry in _installed(group, found):
        if entry.name not in wanted:
            continue
        if entry.name in made:
            raise InvalidArgument.of_field(
                "scheduler.plugins",
                f"{entry.name!r} is installed more than once in {group} (again by {entry.value}): uninstall one of "
                "the packages",
                reason="SCHEDULER_PLUGIN_NAME_TAKEN",
            )
        made[entry.name] = _load(entry, "scheduler.plugins", method)
    return made


def _check_names(plugins: Mapping[str, Any]) -> None:
    """Weights, reasons and the parts of a score go by name: each filter and each score needs one of its own."""
    taken = {one.name: f"the built-in {one.name!r}" for one in (*FILTERS, *SCORES)}
    for entry, made in plugins.items():
        holder = taken.get(made.name)
        if holder is not None:
            raise InvalidArgument.of_field(
                "scheduler.plugins",
                f"the plug-in {entry!r} calls itself {made.name!r}, which is the name of {holder}: take it out of "
                "scheduler.plugins, or have its package give it another name",
                reason="SCHEDULER_PLUGIN_NAME_TAKEN",
            )
        taken[made.name] = f"the plug-in {entry!r}"


def _load(entry: EntryPoint, key: str, method: str) -> Any:
    try:
        made = entry.load()()
    except Exception as exc:  # foreign code: whatever it raises is told as what is wrong with it
        raise InvalidArgument.of_field(
            key, f"{entry.name!r} ({entry.value}) cannot be loaded: {exc}", reason="SCHEDULER_BROKEN"
        ) from exc
    wanted = {"schedule": "scheduler", "reason_against": "filter", "score": "score"}[method]
    if not callable(getattr(made, method, None)):
        raise InvalidArgument.of_field(
            key,
            f"{entry.name!r} ({entry.value}) is not a {wanted}: it has no method {method}",
            reason="SCHEDULER_BROKEN",
        )
    if method != "schedule" and not isinstance(getattr(made, "name", None), str):
        raise InvalidArgument.of_field(
            key,
            f"{entry.name!r} ({entry.value}) is not a {wanted}: it has no name",
            reason="SCHEDULER_BROKEN",
        )
    return made
