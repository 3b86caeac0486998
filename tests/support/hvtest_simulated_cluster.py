"""The built programs as processes without root: one server on SQLite and simulated nodes, each an agent of its own."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import grpc

from hvtest_containerd import eventually
from hvtest_programs import Program, Result, free_port
from hypervisor.agent.v1 import agent_pb2, agent_pb2_grpc

__all__ = ["SimulatedCluster", "running_on"]

_START_S = 30.0


class SimulatedCluster:
    """``with`` starts and ends it. ``nodes``: host names, in order."""

    def __init__(self, root: Path, *names: str) -> None:
        self.bin = root / "bin"
        self.directory = Path(tempfile.mkdtemp(prefix="hv-", dir="/tmp"))
        self.address = f"127.0.0.1:{free_port()}"
        self.nodes = [f"{name}-0001" for name in names]
        self.env = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "HOME": str(self.directory),
            "HYPERVISOR_CTL_CONFIG": str(self.directory / "ctl.yaml"),
            "LANG": "C.UTF-8",
        }
        settings = {"contexts": {"e2e": {"server": self.address}}, "current": "e2e"}
        (self.directory / "ctl.yaml").write_text(json.dumps(settings))  # JSON is YAML, too
        self.server = self._program(
            "server",
            "server",
            {
                "server.grpc_address": self.address,
                "server.http_address": "127.0.0.1:0",
                "store.path": str(self.directory / "store.db"),
                "heartbeat.interval": "1s",
                "heartbeat.timeout": "10s",
            },
        )
        self.agents = [self._agent(name) for name in names]

    def _agent(self, name: str) -> Program:
        keys = {
            "node.hostname": name,
            "agent.bind": "127.0.0.1",
            "agent.server_address": self.address,
            "agent.data_dir": str(self.directory / name),
            "metrics.address": "127.0.0.1:0",
            "simulated.first_port": str(free_port()),
        }
        return self._program("agent", name, keys, "--simulated", "1")

    def _program(self, kind: str, name: str, keys: dict[str, str], *more: str) -> Program:
        flags = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        command = [str(self.bin / f"hypervisor-{kind}"), *flags, *more]
        return Program(command, log=self.directory / f"{name}.log", env=self.env)

    def __enter__(self) -> "SimulatedCluster":
        try:
            self.server.start()
            for agent in self.agents:
                agent.start()
            self.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for program in (*self.agents, self.server):
            if program.running:
                program.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def wait_ready(self) -> None:
        """Return once all nodes are there."""

        def ready() -> bool:
            for program in (self.server, *self.agents):
                assert program.running, f"{program.log} ended:\n{program.text()[-4000:]}"
            answer = self.ctl("node", "list", "-o", "json")
            if answer.code:
                return False
            found = {n["hostname"] for n in answer.json() if n["status"] != "NODE_STATUS_OFFLINE"}
            return found >= set(self.nodes)

        eventually(ready, what="all nodes are there", timeout_s=_START_S)

    def ctl(self, *arguments: str, timeout_s: float = 120.0) -> Result:
        """Run the command line."""
        done = subprocess.run(
            [str(self.bin / "hypervisor-ctl"), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.env,
            check=False,
        )
        return Result(done)

    def must(self, *arguments: str, timeout_s: float = 120.0) -> Result:
        """Run the command line and insist on success."""
        result = self.ctl(*arguments, timeout_s=timeout_s)
        logs = f"--- server\n{self.server.text()[-4000:]}" if result.code else ""
        assert result.code == 0, f"{' '.join(arguments)}: {result!r}\n{logs}"
        return result

    def instances(self) -> dict[str, dict[str, Any]]:
        """All instances by name."""
        return {i["name"]: i for i in self.must("instance", "list", "-o", "json").json()}

    def node(self, hostname: str) -> dict[str, Any]:
        """A node as JSON."""
        found: dict[str, Any] = self.must("node", "get", hostname, "-o", "json").json()
        return found

    def agent_channel(self, hostname: str) -> grpc.Channel:
        """A channel to the agent of a node itself."""
        node = self.node(hostname)
        return grpc.insecure_channel(f"{node['address']}:{node['port']}")


def running_on(channel: grpc.Channel) -> set[str]:
    """Ids of the instances that run on the agent of this channel."""
    from hypervisor.v1.instance_pb2 import INSTANCE_STATUS_RUNNING

    stub = agent_pb2_grpc.AgentServiceStub(channel)
    answer = stub.ListLocalInstances(agent_pb2.ListLocalInstancesRequest(), timeout=10)
    return {i.instance_id for i in answer.instances if i.status == INSTANCE_STATUS_RUNNING}
