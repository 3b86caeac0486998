"""What it costs to sample instances, beside programs that show the same; and how far below them reading can get at all.

A thousand control groups (version 1) stand for a thousand instances. Figures are processor time for one sample of one
of them; ours reads four files of each (see stats_sampling.py).

- systemd-cgtop reads the same groups: what one more of its rounds costs.
- netdata reads the same groups once a second, with all of its collectors but that for control groups off, and of that
  what it has no equal of in ours: processor time, memory and block transfers of each group. Counted is all that the
  daemon uses, a search for new groups every ten seconds (its default) included; without groups it uses next to nothing.
- psutil and glances know no control groups: they read /proc of one process an instance. psutil is asked for cpu_times,
  memory_info, num_threads and io_counters in one oneshot; glances makes its list of processes once a second, all other
  plug-ins off, and its cost is spread over all processes that it looks at.

Beside those that work once a second, ours pauses between its samples too, so that it finds as little in the caches.

In each pair of runs the loop of preads in C that is the limit of ours (limits/cgroup_pread.c) is measured too, and held
against the same peer: a goal that even this loop does not reach is below what reading these files costs.
"""

import importlib
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from measure import Claim, Reference, claim, interleave_all, publish, unmeasured
from measure_cgroups import COUNT, Ours, ReadLoop, cgroups, cgroups_missing, end_tidily, inhabited

from hypervisor.ext.stats_sampler import implementation

PAIRS = 5
FIFTIETH = 0.02
TENTH = 0.1
GOALS = {"systemd-cgtop": FIFTIETH, "netdata": FIFTIETH, "glances": FIFTIETH, "psutil": TENTH}

PAUSE_S = 0.1
"""Samples after a second cost what they cost after a twentieth of one: the caches are as cold."""

NETDATA_WINDOW_S = 10.0
GLANCES_ROUNDS = 4

_NETDATA_CONFIG = """
[global]
    run as user = root
[directories]
    config = {directory}
    cache = {directory}/cache
    lib = {directory}/lib
    log = {directory}/log
[db]
    mode = ram
    retention = 60
    update every = 1
[logs]
    access = none
[web]
    bind to = 127.0.0.1:{port}
    web server threads = 1
[plugins]
    cgroups = yes
{plugins_off}
[health]
    enabled = no
[ml]
    enabled = no
[statsd]
    enabled = no
[plugin:cgroups]
    use unified cgroups = no
    max cgroups to allow = 100000
    check for new cgroups every = 10
    search for cgroups in subpaths matching = / /{name} !*
    enable by default cgroups matching = /{name}/* !*
    run script to rename cgroups matching = !*
    script to get cgroup network interfaces = /bin/true
    enable cpuacct stat (total CPU) = yes
    enable memory = yes
    enable blkio throttle bandwidth = yes
{kinds_off}
"""
_NETDATA_PLUGINS_OFF = (
    "timex",
    "idlejitter",
    "netdata monitoring",
    "netdata monitoring extended",
    "tc",
    "diskspace",
    "proc",
    "apps",
    "enable running new plugins",
    "charts.d",
    "slabinfo",
    "perf",
    "ioping",
    "fping",
    "nfacct",
    "cups",
    "statsd",
)
_NETDATA_KINDS_OFF = (
    "cpuacct usage (per core CPU)",
    "cpuacct cpu throttling",
    "cpuacct cpu shares",
    "detailed memory",
    "memory limits fail count",
    "swap memory",
    "blkio bandwidth",
    "blkio operations",
    "blkio throttle operations",
    "blkio queued operations",
    "blkio merged operations",
    "cpu pressure",
    "io some pressure",
    "io full pressure",
    "memory some pressure",
    "memory full pressure",
    "systemd services",
)
_NETDATA_CHARTS = ("cpu", "mem_usage", "throttle_io")


def _process_cpu_s(pid: int) -> float:
    """Processor seconds that a process and those of its children that it has waited for have used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _running(
    command: Sequence[str], directory: Path, *, stdout: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    """A program that runs until we leave, its files in ``directory``."""
    environment = os.environ | {"TMPDIR": str(directory), "HOME": str(directory), "DO_NOT_TRACK": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=directory,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# -- systemd-cgtop ---------------------------------------------------------------------------------------------------


def _cgtop_cpu_s(rounds: int, shown: str) -> float:
    before = os.times()
    command = ["systemd-cgtop", "-b", "-P", f"-n{rounds}", "-d100ms"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    after = os.times()
    assert shown in out, f"systemd-cgtop did not show {shown}: {out}"
    return after.children_user + after.children_system - before.children_user - before.children_system


def _cgtop(name: str) -> float:
    """What a round of systemd-cgtop costs for each group, in microseconds."""
    few, many = (_cgtop_cpu_s(rounds, f"{name}/i0") for rounds in (2, 7))
    return (many - few) * 1e6 / 5 / COUNT


# -- netdata ---------------------------------------------------------------------------------------------------------


def _netdata_charts(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/charts", timeout=30) as answer:
        return dict(json.load(answer)["charts"])


def _netdata_keeps_up(port: int, name: str) -> bool:
    """Whether it has every chart of every group, each with a value of the last few seconds."""
    charts = _netdata_charts(port)
    wanted = [f"cgroup_{name}_i{number}.{kind}" for number in range(COUNT) for kind in _NETDATA_CHARTS]
    return all(
        chart in charts and charts[chart]["last_entry"] > time.time() - 5.0 and charts[chart]["duration"] > 5
        for chart in wanted
    )


@contextmanager
def _netdata(name: str, scratch: Path) -> Iterator[Callable[[], float]]:
    """A netdata of our own on the groups; what a second of it costs for each of them, in microseconds."""
    directory = scratch / "netdata"
    for part in ("cache", "lib", "log"):
        (directory / part).mkdir(parents=True)
    (directory / ".opt-out-from-anonymous-statistics").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (directory / "netdata.conf").write_text(
        _NETDATA_CONFIG.format(
            directory=directory,
            port=port,
            name=name,
            plugins_off="\n".join(f"    {plugin} = no" for plugin in _NETDATA_PLUGINS_OFF),
            kinds_off="\n".join(f"    enable {kind} = no" for kind in _NETDATA_KINDS_OFF),
        )
    )
    command = ["netdata", "-D", "-c", str(directory / "netdata.conf"), "-P", str(directory / "pid")]
    with _running(command, directory) as process:
        deadline = time.monotonic() + 120.0
        while True:
            time.sleep(5.0)
            assert process.poll() is None, f"netdata ended with {process.returncode}"
            if _netdata_keeps_up(port, name):
                break
            assert time.monotonic() < deadline, "netdata does not show all of the groups"

        def window() -> float:
            begin, before = time.monotonic(), _process_cpu_s(process.pid)
            time.sleep(NETDATA_WINDOW_S)
            spent, passed = _process_cpu_s(process.pid) - before, time.monotonic() - begin
            assert _netdata_keeps_up(port, name), "netdata lags behind"
            return spent * 1e6 / passed / COUNT

        yield window


# -- psutil and glances ----------------------------------------------------------------------------------------------


def _psutil(processes: Sequence[Any]) -> float:
    begin = time.thread_time_ns()
    for process in processes:
        with process.oneshot():
            assert process.memory_info().rss > 0
            assert process.cpu_times().user >= 0
            assert process.num_threads() == 1
            assert process.io_counters().read_bytes >= 0
    return (time.thread_time_ns() - begin) / 1000 / len(processes)


@contextmanager
def _glances(scratch: Path) -> Iterator[Callable[[], float]]:
    """Glances on all processes; what a round of it costs for each of them, in microseconds."""
    directory = scratch / "glances"
    directory.mkdir()
    # By default it looks anew a second after it has finished looking: in every second round.
    (directory / "glances.conf").write_text("[processcount]\nrefresh=0.5\n")
    command = [
        *("glances", "-C", str(directory / "glances.conf"), "-t", "1", "--disable-check-update"),
        *("--disable-plugin", "all", "--enable-plugin", "processcount", "--stdout", "processcount.total"),
    ]
    rounds: queue.Queue[tuple[int, float]] = queue.Queue()
    """How many processes each round showed, and how much processor time glances had used by then."""

    def follow(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with suppress(FileNotFoundError, ProcessLookupError):
                rounds.put((int(line.removeprefix("processcount.total: ")), _process_cpu_s(process.pid)))

    def window() -> float:
        while not rounds.empty():  # those that came while others were measured
            rounds.get()
        seen = [rounds.get(timeout=60.0) for _ in range(GLANCES_ROUNDS + 1)]
        assert min(count for count, _ in seen) >= COUNT
        return (seen[-1][1] - seen[0][1]) * 1e6 / sum(count for count, _ in seen[1:])

    with _running(command, directory, stdout=subprocess.PIPE) as process:
        threading.Thread(target=follow, args=(process,), daemon=True).start()
        yield window


# -- what is published -----------------------------------------------------------------------------------------------


def _name(peer: str) -> str:
    return f"a sample of an instance, of {peer}'s"


def _missing(peer: str, why: str) -> Claim:
    return unmeasured(_name(peer), reference_name=peer, better="less", goal=GOALS[peer], why=why)


def _claims(
    peer: str, ours: Callable[[], float], limit: ReadLoop, theirs: Callable[[], float], note: str
) -> Iterator[Claim]:
    """Ours of the peer's, and the loop in C of the peer's."""
    mine, bare, other = interleave_all((ours, limit.run, theirs), pairs=PAIRS)
    for name, figures, said in (
        (_name(peer), mine, note),
        (f"the four reads of it alone, in C, of {peer}'s", bare, "what ours cannot be below"),
    ):
        yield claim(
            name,
            figures,
            other,
            unit="us CPU",
            reference_name=peer,
            better="less",
            goal=GOALS[peer],
            against=Reference.PEER,
            note=said,
        )


def _of_groups(name: str, scratch: Path, ours: Ours, limit: ReadLoop) -> Iterator[Claim]:
    """Beside those that read control groups; one of the groups is inhabited."""
    paced = partial(ours.run, pause_s=PAUSE_S)
    if shutil.which("systemd-cgtop"):
        note = "both read the same groups; it shows the one with a process in it"
        yield from _claims("systemd-cgtop", ours.run, limit, partial(_cgtop, name), note)
    else:
        yield _missing("systemd-cgtop", "not installed")
    if shutil.which("netdata"):
        with _netdata(name, scratch) as window:
            note = "it reads cpuacct, memory and blkio of the same groups once a second, all else off"
            yield from _claims("netdata", paced, limit, window, note)
    else:
        yield _missing("netdata", "not installed")


def _of_processes(scratch: Path, pids: Sequence[int], ours: Ours, limit: ReadLoop) -> Iterator[Claim]:
    """Beside those that read processes; every group is inhabited."""
    paced = partial(ours.run, pause_s=PAUSE_S)
    try:
        psutil = importlib.import_module("psutil")
    except ImportError:
        yield _missing(
            "psutil",
            "psutil is not installed for the Python that runs the benchmarks: `make bench` brings it",
        )
    else:
        note = "it reads /proc of the process in each of the groups"
        processes = [psutil.Process(pid) for pid in pids]
        yield from _claims("psutil", ours.run, limit, partial(_psutil, processes), note)
    if shutil.which("glances"):
        with _glances(scratch) as window:
            note = "it reads /proc of all processes, those in the groups among them; it knows no plain groups"
            yield from _claims("glances", paced, limit, window, note)
    else:
        yield _missing("glances", "not installed")


def main() -> None:
    """Measure and publish."""
    assert implementation == "native"
    end_tidily()
    missing = cgroups_missing()
    if missing:
        publish([_missing(peer, missing) for peer in GOALS])
        return
    name = f"hvbench-{os.getpid()}"
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory() as directory, cgroups(name) as groups:
        scratch = Path(directory)
        limit = ReadLoop(scratch, name)
        ours = Ours(groups)
        with inhabited(groups[:1]):
            claims += _of_groups(name, scratch, ours, limit)
        with inhabited(groups) as pids:
            claims += _of_processes(scratch, pids, ours, limit)
        ours.sampler.close()
    publish(claims)


if __name__ == "__main__":
    sys.exit(main())
