"""``make simulate SEEDS=10000 FIRST_SEED=1``: run seeds on all cores; ``--seed N``: one, with the end of its trace.

Exit status 1 where a seed fails. A seed is replayed exactly by the same sources, Python and command.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from hvsim.cluster import Result, run_seed
from hvsim.planted import PLANTED, planted
from hvsim.pool import run_seeds

__all__ = ["main"]

_SHOWN_FAILURES = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(
        prog="hvsim", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=300, help="how many (default 300)")
    parser.add_argument("--first-seed", type=int, default=1, help="the first (default 1)")
    parser.add_argument("--seed", type=int, help="this one alone; its trace is shown")
    parser.add_argument("--trace", type=int, default=60, help="lines of the trace of a seed that fails")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument("--plant", choices=sorted(PLANTED), default="", help="with this bug put in")
    parser.add_argument("--first-failure", action="store_true", help="stop at the first seed that fails")
    parser.add_argument("--digests", action="store_true", help="print the digest of each run")
    options = parser.parse_args(arguments)
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of sets of strings is part of a run.
        os.environ["PYTHONHASHSEED"] = "0"
        given = sys.argv[1:] if arguments is None else list(arguments)
        os.execv(sys.executable, [sys.executable, "-m", "hvsim", *given])
    if options.seed is not None:
        return _one(options)
    if options.seeds < 1 or options.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    failed: list[Result] = []
    totals = [0, 0, 0.0]
    bar = _Bar(len(seeds))
    for done, result in enumerate(run_seeds(seeds, jobs=options.jobs, plant=options.plant), 1):
        totals[0] += result.faults
        totals[1] += result.operations
        totals[2] += result.virtual_s
        if options.digests:
            print(result.seed, result.digest)
        if result.violation:
            failed.append(result)
            if len(failed) <= _SHOWN_FAILURES:
                bar.clear()
                _report(result, lines=options.trace, plant=options.plant)
            if options.first_failure:
                return 1
        bar.show(done, len(failed))
    bar.clear()
    print(
        f"{len(seeds)} seeds from {options.first_seed}: {len(failed)} failed; {totals[0]} faults, {totals[1]} "
        f"operations, {totals[2] / 3600:.1f} hours of virtual time in {bar.elapsed_s:.0f} s"
    )
    if failed:
        print("failed:", " ".join(str(result.seed) for result in sorted(failed, key=lambda r: r.seed)))
    return 1 if failed else 0


def _one(options: argparse.Namespace) -> int:
    with planted(options.plant):
        result = run_seed(options.seed)
    for line in result.trace:
        print(line)
    print(f"seed {result.seed}: digest {result.digest}, {result.virtual_s:.0f} s, {result.faults} faults")
    if result.violation:
        print(f"VIOLATION: {result.violation}")
    return 1 if result.violation else 0


def _report(result: Result, *, lines: int, plant: str) -> None:
    print(f"seed {result.seed} FAILED after {result.virtual_s:.1f} s: {result.violation}")
    for line in result.trace[-lines:] if lines else ():
        print(f"    {line}")
    with_bug = f" --plant {plant}" if plant else ""
    print(f"replay: make simulate SEED={result.seed}   (python -m hvsim --seed {result.seed}{with_bug})\n")


class _Bar:
    """Progress on a terminal; nothing elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._started = time.monotonic()
        self._shown_at = 0.0
        self._is_terminal = sys.stderr.isatty()

    @property
    def elapsed_s(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def show(self, done: int, failed: int) -> None:
        """So many are done."""
        if not self._is_terminal or (done < self._total and time.monotonic() - self._shown_at < 0.1):
            return
        self._shown_at = time.monotonic()
        filled = 40 * done // self._total
        left_s = self.elapsed_s / done * (self._total - done)
        drawn = "#" * filled + "." * (40 - filled)
        sys.stderr.write(
            f"\r[{drawn}] {done}/{self._total} seeds, {failed} failed, {left_s:.0f} s left\x1b[K"
        )
        sys.stderr.flush()

    def clear(self) -> None:
        """Make room for a line."""
        if self._is_terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
