"""What is on record of a running cluster: the supervisor's state file, written whole at each change."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from hypervisor.ctl.dev.processes import ProcessId

__all__ = ["ClusterState", "ProcessState", "read_state", "write_atomically", "write_state"]


@dataclass(frozen=True, slots=True)
class ProcessState:
    """One supervised process."""

    name: str
    process: ProcessId | None
    """None: not running now (waiting to be started again)."""
    restarts: int = 0
    last_exit: str = ""
    """How it ended last, in words; empty when it never did."""
    since_s: float = 0.0
    """Start of the present run, seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """The supervisor and what it runs."""

    supervisor: ProcessId
    processes: tuple[ProcessState, ...]

    def running(self) -> list[ProcessId]:
        """Processes on record that are alive, the supervisor first."""
        known = [self.supervisor, *(p.process for p in self.processes if p.process is not None)]
        return [process for process in known if process.alive()]


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def write_state(path: Path, state: ClusterState) -> None:
    """Put the state on record."""
    write_atomically(path, json.dumps(asdict(state), indent=2))


def _process(document: dict[str, int] | None) -> ProcessId | None:
    return None if document is None else ProcessId(document["pid"], document["started"])


def read_state(path: Path) -> ClusterState | None:
    """What is on record; None when nothing is."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    supervisor = _process(document["supervisor"])
    if supervisor is None:
        return None
    return ClusterState(
        supervisor,
        tuple(
            ProcessState(**{**item, "process": _process(item["process"])}) for item in document["processes"]
        ),
    )
