"""``dev``: a simulated cluster of real server and agent processes, supervised."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest


class Dev:
    """Runs the command line in processes of its own, since ``dev up`` forks."""

    def __init__(self, root):
        self.root = root
        self.environ = {
            **os.environ,
            "HOME": str(root.parent),
            "HYPERVISOR_CTL_CONFIG": str(root.parent / "ctl.yaml"),
            "HYPERVISOR_SERVER_PROGRAM": f"{sys.executable} -m hypervisor.server",
            "HYPERVISOR_AGENT_PROGRAM": f"{sys.executable} -m hypervisor.agent",
        }
        self.environ.pop("HYPERVISOR_SERVER", None)

    def __call__(self, *arguments):
        return subprocess.run(
            [sys.executable, "-m", "hypervisor.ctl", *arguments],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )

    def dev(self, verb, *arguments):
        return self("dev", verb, "--dir", str(self.root), *arguments)

    def up(self, *arguments):
        ports = ("--grpc-port", "0", "--http-port", "0", "--agent-port", "0")
        return self.dev("up", "--simulated", "2", *ports, "--timeout", "90s", *arguments)

    def state(self):
        return json.loads((self.root / "state.json").read_text())

    def process(self, name):
        return next(item for item in self.state()["processes"] if item["name"] == name)


def wait_until(condition, timeout_s=60.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.05)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.fixture
def dev(tmp_path):
    made = Dev(tmp_path / "cluster")
    yield made
    made.dev("down")


def test_up_makes_a_cluster_that_works_and_down_leaves_nothing(dev):
    done = dev.up()
    assert done.returncode == 0, done.stderr
    assert dev("node", "list", "-q").stdout.count("\n") == 2
    created = dev("instance", "create", "web", "--image", "any")
    assert created.returncode == 0, created.stderr
    assert json.loads(dev.dev("status", "-o", "json").stdout)["running"] is True
    pids = [item["process"]["pid"] for item in dev.state()["processes"]]

    again = dev.up()
    assert (again.returncode, "DEV_CLUSTER_EXISTS" in again.stderr) == (4, True)

    down = dev.dev("down")
    assert (down.returncode, "Deleted 1 instance." in down.stderr) == (0, True)
    assert not any(alive(pid) for pid in pids)
    assert dev.dev("status").returncode == 3
    assert dev("context", "list", "-q").stdout == ""
    assert dev.dev("down", "--purge").returncode == 0
    assert not dev.root.exists()


def test_what_dies_is_started_again_and_a_killed_supervisor_is_cleaned_up_after(dev):
    assert dev.up().returncode == 0
    before = dev.process("agent")["process"]["pid"]

    os.kill(before, signal.SIGKILL)
    wait_until(lambda: (now := dev.process("agent")["process"]) is not None and now["pid"] != before)
    agent = dev.process("agent")
    assert (agent["restarts"], agent["last_exit"]) == (1, "killed by SIGKILL")

    pids = [item["process"]["pid"] for item in dev.state()["processes"]]
    os.kill(dev.state()["supervisor"]["pid"], signal.SIGKILL)
    assert dev.dev("down").returncode == 0
    assert not any(alive(pid) for pid in pids)


def test_a_port_that_is_taken_is_named_and_nothing_is_started(dev):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        done = dev.dev("up", "--simulated", "1", "--grpc-port", str(port))

    assert done.returncode == 4
    assert f"port {port} on 127.0.0.1 cannot be used" in done.stderr
    assert "--grpc-port 0" in done.stderr
    assert not (dev.root / "state.json").exists()


def test_a_program_that_does_not_start_is_told_with_its_log_and_stopped(dev):
    failing = "print('cannot possibly work'); raise SystemExit(7)"
    dev.environ["HYPERVISOR_SERVER_PROGRAM"] = shlex.join([sys.executable, "-c", failing])

    done = dev.up()

    assert done.returncode == 1
    assert "hypervisor-server does not start (exit code 7)" in done.stderr
    assert "cannot possibly work" in done.stderr
    assert dev.dev("status").returncode == 3


def test_a_program_that_is_missing_is_named(dev):
    dev.environ["HYPERVISOR_AGENT_PROGRAM"] = "/no/such/agent"

    done = dev.up()

    assert (done.returncode, "'/no/such/agent' is no program that can be run" in done.stderr) == (2, True)


def test_a_directory_that_is_no_cluster_is_not_deleted(dev):
    dev.root.mkdir()
    (dev.root / "precious").write_text("x")

    done = dev.dev("down", "--purge")

    assert done.returncode == 4
    assert (dev.root / "precious").exists()


def test_image_packs_a_program(dev, tmp_path):
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF not really")

    done = dev.dev("image", "--binary", str(program))

    assert done.stdout == f"oci-archive:{dev.root}/images/program.tar\n"
    assert (dev.root / "images" / "program.tar").is_file()
