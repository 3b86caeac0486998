"""What the driver records with a container in containerd, as labels: whose it is and how its last run went. Pure.

Labels are all that is needed to find and describe an instance after the agent's restart.
"""

from collections.abc import Mapping
from datetime import datetime

import msgspec

__all__ = ["INSTANCE_ID", "Record", "RunEnd"]

INSTANCE_ID = "hypervisor/instance-id"
_GENERATION = "hypervisor/generation"
_EPOCH = "hypervisor/epoch"
_NAME = "hypervisor/name"
_PROJECT = "hypervisor/project"
_STOP_SIGNAL = "hypervisor/stop-signal"
_CPU_MILLIS = "hypervisor/cpu-millis"
_STARTED_AT = "hypervisor/started-at"
_FINISHED_AT = "hypervisor/finished-at"
_EXIT_CODE = "hypervisor/exit-code"
_END_REASON = "hypervisor/end-reason"
_REQUESTED = "hypervisor/end-requested"
_STOP_ASKED = "hypervisor/stop-asked"


class RunEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended."""

    exit_code: int
    """128 + signal when it was killed."""
    finished_at: datetime
    reason: str
    """EXITED, KILLED or OOM_KILLED."""
    requested: bool
    """Whether the driver was asked to stop it."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A container's labels, as values."""

    instance_id: str
    generation: int
    epoch: int
    name: str
    project: str
    stop_signal: int
    cpu_millis: int
    """What a start limits it to."""
    started_at: datetime | None = None
    stop_asked: bool = False
    """Whether this run was told to end: recorded before it is, so that whoever sees the end knows it was asked for."""
    end: RunEnd | None = None

    def to_labels(self) -> dict[str, str]:
        """The labels to store."""
        labels = {
            INSTANCE_ID: self.instance_id,
            _GENERATION: str(self.generation),
            _EPOCH: str(self.epoch),
            _NAME: self.name,
            _PROJECT: self.project,
            _STOP_SIGNAL: str(self.stop_signal),
            _CPU_MILLIS: str(self.cpu_millis),
        }
        if self.started_at is not None:
            labels[_STARTED_AT] = self.started_at.isoformat()
        if self.stop_asked:
            labels[_STOP_ASKED] = "true"
        if self.end is not None:
            labels[_FINISHED_AT] = self.end.finished_at.isoformat()
            labels[_EXIT_CODE] = str(self.end.exit_code)
            labels[_END_REASON] = self.end.reason
            labels[_REQUESTED] = "true" if self.end.requested else "false"
        return labels

    @classmethod
    def from_labels(cls, labels: Mapping[str, str]) -> "Record":
        """The record in a container's labels. Raises ValueError for labels somebody has damaged."""
        try:
            end = None
            if _FINISHED_AT in labels:
                end = RunEnd(
                    exit_code=int(labels[_EXIT_CODE]),
                    finished_at=datetime.fromisoformat(labels[_FINISHED_AT]),
                    reason=labels[_END_REASON],
                    requested=labels.get(_REQUESTED) == "true",
                )
            started = labels.get(_STARTED_AT)
            return cls(
                instance_id=labels[INSTANCE_ID],
                generation=int(labels[_GENERATION]),
                epoch=int(labels[_EPOCH]),
                name=labels[_NAME],
                project=labels[_PROJECT],
                stop_signal=int(labels[_STOP_SIGNAL]),
                cpu_millis=int(labels[_CPU_MILLIS]),
                started_at=None if started is None else datetime.fromisoformat(started),
                stop_asked=labels.get(_STOP_ASKED) == "true",
                end=end,
            )
        except KeyError as exc:
            raise ValueError(f"label {exc.args[0]} is missing") from exc
