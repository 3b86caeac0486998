"""The simulator finds bugs: each of these is put into the product, and some seed out of a few shows it."""

import pytest

from hvsim.planted import PLANTED
from hvsim.program import hvsim

_RARE = {"create-forgotten", "late-create-accepted", "stale-observations"}
"""These show in fewer than one of 250 seeds, which is more than a test may take:
``make simulate PLANT=... SEEDS=10000`` looks for them. What they stand for has tests of its own."""
_FIRST_SEED = {
    "skip-compares": 17,
    "answer-before-commit": 34,
    "request-id-ignored": 14,
    "election-trusts-watch": 28,
}
"""Where looking begins, to save time."""
_SEEDS = 250
"""Where it ends at the latest."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", sorted(PLANTED.keys() - _RARE))
def test_a_planted_bug_is_found(bug: str) -> None:
    done = hvsim(
        *("--plant", bug, "--first-failure", "--trace", "3"),
        *("--first-seed", str(_FIRST_SEED.get(bug, 1)), "--seeds", str(_SEEDS)),
    )

    assert done.returncode == 1, f"{bug} was not found: {done.stdout}{done.stderr}"
    assert "FAILED after" in done.stdout
    assert f"--plant {bug}" in done.stdout
