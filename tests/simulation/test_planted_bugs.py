"""The simulator finds bugs: each of these is put into the product, and some seed out of a few shows it."""

import pytest

from hvsim.planted import PLANTED
from hvsim.program import hvsim

_FIRST_SEED = {
    "skip-compares": 17,
    "answer-before-commit": 34,
    "request-id-ignored": 14,
    "late-create-accepted": 60,
    "election-trusts-watch": 28,
    "create-forgotten": 165,
    "stale-observations": 168,
}
"""Where looking begins, to save time."""
_SEEDS = 250
"""Where it ends at the latest."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", sorted(PLANTED))
def test_a_planted_bug_is_found(bug: str) -> None:
    done = hvsim(
        *("--plant", bug, "--first-failure", "--trace", "3"),
        *("--first-seed", str(_FIRST_SEED.get(bug, 1)), "--seeds", str(_SEEDS)),
    )

    assert done.returncode == 1, f"{bug} was not found: {done.stdout}{done.stderr}"
    assert "FAILED after" in done.stdout
    assert f"--plant {bug}" in done.stdout
