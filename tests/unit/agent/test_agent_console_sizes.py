"""Which viewer's size a shared terminal gets."""

from hypervisor.agent.console_sizes import ConsoleSizes
from hypervisor.core.model import ConsoleSize

SMALL, MIDDLE, LARGE = ConsoleSize(40, 10), ConsoleSize(80, 24), ConsoleSize(200, 60)


def test_the_last_size_wins() -> None:
    sizes = ConsoleSizes()

    assert sizes.resize("a", SMALL) == SMALL
    assert sizes.resize("b", LARGE) == LARGE
    assert sizes.leave("b") is None


def test_the_same_size_again_is_set_again() -> None:
    sizes = ConsoleSizes()
    sizes.resize("a", SMALL)

    assert sizes.resize("a", SMALL) == SMALL


def test_a_fixed_size_stays_until_its_viewer_leaves_and_then_the_last_of_the_others_comes_back() -> None:
    sizes = ConsoleSizes()
    sizes.resize("a", SMALL)

    assert sizes.fix("f", LARGE) == LARGE
    assert sizes.resize("a", MIDDLE) is None
    assert sizes.current == LARGE
    assert sizes.leave("f") == MIDDLE


def test_a_fixed_viewer_may_change_its_own_size() -> None:
    sizes = ConsoleSizes()
    sizes.fix("f", LARGE)

    assert sizes.resize("f", SMALL) == SMALL


def test_of_several_fixed_sizes_the_last_counts() -> None:
    sizes = ConsoleSizes()
    sizes.fix("f", LARGE)

    assert sizes.fix("g", SMALL) == SMALL
    assert sizes.resize("f", MIDDLE) is None
    assert sizes.leave("g") == MIDDLE


def test_a_fixed_size_that_was_the_only_one_leaves_nothing_to_set() -> None:
    sizes = ConsoleSizes()
    sizes.fix("f", LARGE)

    assert sizes.leave("f") is None
    assert sizes.current is None
