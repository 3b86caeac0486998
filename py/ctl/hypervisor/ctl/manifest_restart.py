"""The restart policy of a manifest's ``spec``, and of the options of ``instance create``.

::

    restart: on-failure                 # or never, always; or as a mapping:
    restart: {condition: always, max_restarts: 5, initial_delay: 1s, max_delay: 1m, reset_after: 5m}
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import yaml

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.names import shorten
from hypervisor.ctl import quantities
from hypervisor.v1.instance_pb2 import InstanceSpec, RestartCondition

__all__ = ["CONDITIONS", "condition_of", "read_restart"]

V = TypeVar("V")

CONDITIONS = ("never", "on-failure", "always")
_SPANS = ("initial_delay", "max_delay", "reset_after")


class Reader(Protocol):
    """What is needed of a manifest's reader: each notes mistakes with their line and goes on."""

    def mapping(self, node: yaml.Node, path: str, known: tuple[str, ...]) -> dict[str, yaml.Node]: ...

    def integer(self, node: yaml.Node, path: str) -> int: ...

    def converted(self, node: yaml.Node, path: str, convert: Callable[[str, str], V], default: V) -> V: ...


def condition_of(field: str, text: str) -> Any:
    """The condition that a user wrote. InvalidArgument names the field."""
    plain = text.strip().lower().replace("_", "-").removeprefix("restart-condition-")
    if plain not in CONDITIONS:
        raise InvalidArgument.of_field(field, f"{shorten(text)} is not one of {', '.join(CONDITIONS)}")
    return RestartCondition.Value(f"RESTART_CONDITION_{plain.replace('-', '_').upper()}")


def read_restart(reader: Reader, node: yaml.Node, path: str, spec: InstanceSpec) -> None:
    """Read ``restart`` into the specification."""
    policy = spec.restart
    policy.SetInParent()
    if isinstance(node, yaml.ScalarNode):
        policy.condition = reader.converted(
            node, path, condition_of, RestartCondition.RESTART_CONDITION_UNSPECIFIED
        )
        return
    for name, child in reader.mapping(node, path, ("condition", "max_restarts", *_SPANS)).items():
        at = f"{path}.{name}"
        if name == "condition":
            policy.condition = reader.converted(
                child, at, condition_of, RestartCondition.RESTART_CONDITION_UNSPECIFIED
            )
        elif name == "max_restarts":
            policy.max_restarts = max(-1, min(reader.integer(child, at), (1 << 31) - 1))
        else:
            seconds = reader.converted(child, at, quantities.duration_s, 0.0)
            getattr(policy, name).FromNanoseconds(round(seconds * 1e9))
