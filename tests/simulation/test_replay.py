"""A seed is one run: it can be replayed, and nothing of the machine gets into it."""

import os
import subprocess
import sys
import threading
import time

import pytest

from hvsim.cluster import run_seed

SEEDS = range(1, 5)


def _digests(hash_seed: str) -> list[str]:
    program = f"from hvsim.cluster import run_seed\nfor seed in {list(SEEDS)}: print(run_seed(seed).digest)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.timeout(300)
def test_the_same_seed_gives_the_same_trace_in_another_process() -> None:
    first, second = _digests("0"), _digests("0")

    assert first == second
    assert len(set(first)) == len(SEEDS)


@pytest.mark.timeout(300)
def test_the_same_seed_gives_the_same_trace_twice_in_one_process() -> None:
    assert [run_seed(seed).digest for seed in SEEDS] == [run_seed(seed).digest for seed in SEEDS]


def test_real_threads_and_time_are_refused_inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvsim import cluster

    met: list[str] = []

    async def run(_: cluster.Cluster) -> None:
        for forbidden in (time.time, time.monotonic, threading.Thread(target=print).start):
            try:
                forbidden()
            except AssertionError as exc:
                met.append(str(exc))

    monkeypatch.setattr(cluster.Cluster, "run", run)
    run_seed(1)

    assert met == ["simulated code uses real time or threads"] * 3
    assert time.time() > 0
