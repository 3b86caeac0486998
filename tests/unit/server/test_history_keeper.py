"""How far back history is kept."""

from hypervisor.server.reconcile.history import HistoryKeeper


def test_history_is_kept_for_its_time_and_then_forgotten_bit_by_bit() -> None:
    keeper = HistoryKeeper(keep_s=100, interval_s=10)

    told = {now: keeper.forget_up_to(float(now), now * 2) for now in range(0, 200, 5)}

    assert {now for now, revision in told.items() if revision is not None} == set(range(110, 200, 10))
    assert all(revision == (now - 110) * 2 for now, revision in told.items() if revision is not None)


def test_a_long_pause_forgets_only_what_is_older_than_the_time() -> None:
    keeper = HistoryKeeper(keep_s=100, interval_s=10)
    for now, revision in ((0, 1), (10, 5), (20, 9)):
        assert keeper.forget_up_to(float(now), revision) is None

    assert keeper.forget_up_to(115.0, 50) == 5
