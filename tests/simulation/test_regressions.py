"""Seeds that found a defect, each with what it was. ``hvsim/planted.py`` puts several of them back in."""

import pytest

from hvsim.program import hvsim

FOUND = {
    2: "a server cut off from the store refused users for what it took for true: a name was taken that was free",
    30: "a candidate's watch lost the event it waited for: the cluster had no leader any more",
    51: "a delete that failed left FAILED on record while the guest ran on",
    64: "a create that the network had held back came after the delete, and the agent made the instance again",
    94: "a delete that a lost runtime refused, told of in one transaction with what the node saw",
    167: "a create was undone on record for a runtime that was away, although an attempt before had started the guest",
    170: "a registration under way overwrote what its agent had answered since: a running guest counted as failed",
    239: "a refusal was believed after a conflict, although the view had lost the event that the conflict was about",
    236: "a create that came half way and could not be undone was taken for one that had begun nothing",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", FOUND)
def test_a_seed_that_found_a_defect_passes(seed: int) -> None:
    done = hvsim("--first-seed", str(seed), "--seeds", "1")

    assert done.returncode == 0, f"{FOUND[seed]}\n{done.stdout}{done.stderr}"
