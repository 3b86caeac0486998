"""What is told of a run's end, by its VMM's exit and by what the driver did to it."""

from datetime import UTC, datetime

import pytest

from hypervisor.agent.drivers.microvm.observing import end_of_run
from hypervisor.agent.drivers.microvm.vmm import End

NOW = datetime(2026, 5, 6, 7, 8, 9, tzinfo=UTC)
BY_ITSELF = End(False, 0, "the guest ended")
KILLED = End(True, 137, "Firecracker was ended by SIGKILL")
UNSEEN = End(True, None, "Firecracker was killed, or ended without a word in its log")
FAULT = End(True, 1, "Firecracker ended with exit code 1")


@pytest.mark.parametrize(
    ("end", "forced", "oom_kills", "wanted"),
    [
        (BY_ITSELF, False, 0, ("EXITED", 0)),
        (KILLED, True, 0, ("KILLED", 137)),
        (UNSEEN, True, 0, ("KILLED", 137)),
        # The SIGKILL came too late.
        (BY_ITSELF, True, 0, ("EXITED", 0)),
        (KILLED, False, 0, ("KILLED", 137)),
        (UNSEEN, False, 0, ("KILLED", None)),
        (KILLED, False, 1, ("OOM_KILLED", 137)),
        (FAULT, False, 0, ("CRASHED", 1)),
    ],
)
def test_the_reason_says_who_ended_it(
    end: End, forced: bool, oom_kills: int, wanted: tuple[str, int | None]
) -> None:
    told = end_of_run(end, requested=True, forced=forced, suspended=False, oom_kills=oom_kills, now=NOW)

    assert (told.reason, told.exit_code) == wanted


def test_a_run_before_the_nodes_restart_is_told_as_that_only_where_nothing_else_is_known() -> None:
    def told(end: End) -> str:
        return end_of_run(
            end, requested=False, forced=False, suspended=False, oom_kills=0, now=NOW, earlier_boot=True
        ).reason

    assert (told(UNSEEN), told(BY_ITSELF)) == ("NODE_RESTARTED", "EXITED")
