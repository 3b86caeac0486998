"""What the default scheduler is made with, as the configuration has it; apart, so that reading it loads no table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = ["DEFAULT_WEIGHTS", "SchedulerOptions"]

DEFAULT_WEIGHTS: Mapping[str, int] = MappingProxyType(
    {
        "utilisation": 100,
        "spread": 200,
        "affinity": 200,
        "load": 5,
        "image": 2,
        "penalty": 200,
        "taints": 300,
    }
)
"""Weights of the built-in scores, unless ``scheduler.weights`` says otherwise."""


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """For the default scheduler: weights of scores by name, and names of the plug-ins to use."""

    weights: Mapping[str, int] = field(default_factory=lambda: DEFAULT_WEIGHTS)
    plugins: Sequence[str] = ()
