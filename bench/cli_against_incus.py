"""Claim: create, delete and list on the command line are each faster than Incus', and 50 creates go at twice its rate:
as 50 commands, ten at once, and as one command with a file of 50 (Incus has nothing to set beside that but the former).

The peer is the `incus` on PATH (or the command in INCUS), connected to a running daemon, with an image of the same root
file system under the alias in INCUS_IMAGE (`bb`) and a default profile without network, as our containers have none in
this version. Each figure is a whole process, from start to exit, interleaved pair by pair. Without Incus nothing is
measured, and that is said.
"""

import concurrent.futures
import os
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from measure import Claim, Reference, claim, interleave, publish, unmeasured

from hvtest_programs import ProgramCluster

PAIRS = 10
MANY, AT_ONCE = 50, 10
RATE_PAIRS = 3
INCUS = shlex.split(os.environ.get("INCUS", "incus"))
INCUS_IMAGE = os.environ.get("INCUS_IMAGE", "bb")
IMAGE = "bench.local/busybox:1"
CLAIMS = (
    ("instance create", "incus launch", "less", 1.0),
    ("instance delete --force", "incus delete -f", "less", 1.0),
    ("instance list", "incus list", "less", 1.0),
    (f"{MANY} creates, {AT_ONCE} at once", f"{MANY} incus launch, {AT_ONCE} at once", "more", 2.0),
    (f"{MANY} in one create -f", f"{MANY} incus launch, {AT_ONCE} at once", "more", 2.0),
)


def timed(command: Callable[[], object]) -> float:
    """Seconds a call takes."""
    begin = time.perf_counter()
    command()
    return time.perf_counter() - begin


def incus(*arguments: str) -> str:
    """Run the peer."""
    done = subprocess.run(
        [*INCUS, *arguments],
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    return done.stdout


def fresh() -> str:
    """A new name."""
    return f"b-{uuid.uuid4().hex[:12]}"


def rate_of_one_command(cluster: ProgramCluster) -> float:
    """Creates a second of `instance create -f` with MANY documents."""
    names = [fresh() for _ in range(MANY)]
    spec = f"spec: {{image: '{IMAGE}', cpu_cores: 0.01, memory_mb: 16, command: [sleep, '3600']}}"
    document = "\n---\n".join(f"name: {name}\ntype: container\n{spec}" for name in names)
    took = timed(lambda: cluster.must("instance", "create", "-f", "-", stdin=document))
    cluster.must("instance", "delete", *names, "--force")
    return MANY / took


def measure(cluster: ProgramCluster) -> list[Claim]:
    """All claims, on a running cluster."""

    def create(name: str) -> None:
        cluster.must(
            "instance",
            "create",
            name,
            "--image",
            IMAGE,
            "--cpu",
            "0.01",
            "--memory",
            "16MiB",
            "--",
            "sleep",
            "3600",
        )

    def delete(name: str) -> None:
        cluster.must("instance", "delete", name, "--force")

    def launch(name: str) -> None:
        incus("launch", INCUS_IMAGE, name, "-q")

    def remove(name: str) -> None:
        incus("delete", "-f", name)

    def making(make: Callable[[str], None], drop: Callable[[str], None]) -> Callable[[], float]:
        def once() -> float:
            name = fresh()
            took = timed(lambda: make(name))
            drop(name)
            return took

        return once

    def dropping(make: Callable[[str], None], drop: Callable[[str], None]) -> Callable[[], float]:
        def once() -> float:
            name = fresh()
            make(name)
            return timed(lambda: drop(name))

        return once

    def rate(make: Callable[[str], None], drop: Callable[[str], None]) -> Callable[[], float]:
        def once() -> float:
            names = [fresh() for _ in range(MANY)]
            with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
                took = timed(lambda: list(pool.map(make, names)))
                list(pool.map(drop, names))
            return MANY / took

        return once

    results: list[Claim] = []

    def compare(
        index: int, ours: Callable[[], float], theirs: Callable[[], float], *, pairs: int, unit: str
    ) -> None:
        name, reference, better, goal = CLAIMS[index]
        a, b = interleave(ours, theirs, pairs=pairs)
        results.append(
            claim(
                name,
                a,
                b,
                unit=unit,
                reference_name=reference,
                better=better,
                goal=goal,
                against=Reference.PEER,
            )
        )

    compare(0, making(create, delete), making(launch, remove), pairs=PAIRS, unit="s")
    compare(1, dropping(create, delete), dropping(launch, remove), pairs=PAIRS, unit="s")
    kept = [fresh() for _ in range(3)]
    for name in kept:
        create(name)
        launch(name)
    assert all(name in cluster.must("instance", "list").out and name in incus("list") for name in kept)
    compare(
        2,
        lambda: timed(lambda: cluster.must("instance", "list")),
        lambda: timed(lambda: incus("list")),
        pairs=PAIRS,
        unit="s",
    )
    for name in kept:
        delete(name)
        remove(name)
    compare(3, rate(create, delete), rate(launch, remove), pairs=RATE_PAIRS, unit="creates/s")
    compare(4, lambda: rate_of_one_command(cluster), rate(launch, remove), pairs=RATE_PAIRS, unit="creates/s")
    return results


def main() -> None:
    """Measure and publish."""
    if shutil.which(INCUS[0]) is None:
        why = "incus is not installed"
        publish([unmeasured(n, reference_name=r, better=b, goal=g, why=why) for n, r, b, g in CLAIMS])
        return
    with ProgramCluster(Path(os.environ["HYPERVISOR_BIN"]).parent) as cluster:
        cluster.containerd.ctr("images", "import", str(cluster.make_image(name=IMAGE)))
        publish(measure(cluster))


if __name__ == "__main__":
    sys.exit(main())
