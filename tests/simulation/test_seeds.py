"""Seeds of the simulator: whole clusters under faults, in which the invariants hold and everything settles."""

import os

import pytest

from hvsim.program import hvsim

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "320"))
_AT_ONCE = 20


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(1, SEEDS + 1, _AT_ONCE))
def test_invariants_hold_whatever_fails(first: int) -> None:
    done = hvsim("--first-seed", str(first), "--seeds", str(_AT_ONCE))

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{_AT_ONCE} seeds from {first}: 0 failed" in done.stdout
