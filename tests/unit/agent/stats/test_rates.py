"""Rates of counters."""

import pytest

from hypervisor.agent.stats.rates import Rate


def test_a_rate_needs_two_samples_a_second_apart() -> None:
    rate = Rate()

    assert rate.update(10.0, 0) is None
    assert rate.update(10.5, 100) is None
    assert rate.update(12.0, 300) == pytest.approx(150.0)


def test_samples_that_come_sooner_get_the_last_rate_and_do_not_disturb_the_next() -> None:
    rate = Rate()
    rate.update(0.0, 0)
    rate.update(1.0, 10)

    assert rate.update(1.2, 1000) == pytest.approx(10.0)
    assert rate.update(2.0, 1010) == pytest.approx(1000.0)


def test_a_counter_that_begins_again_gives_no_rate() -> None:
    rate = Rate()
    rate.update(0.0, 500)
    rate.update(1.0, 600)

    assert rate.update(2.0, 5) is None
    assert rate.update(3.0, 15) == pytest.approx(10.0)
