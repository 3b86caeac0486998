"""What a development cluster consists of: decided here, as values, and acted on elsewhere."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hypervisor.ctl.dev.libvirtd import PrivateLibvirtd

__all__ = ["CONTEXT", "Layout", "Plan", "ProcessSpec", "state_directory"]

CONTEXT = "dev"
"""The context that ``dev up`` makes and uses."""


def state_directory(environ: Mapping[str, str]) -> Path:
    """Where a development cluster is kept unless told otherwise: below XDG_STATE_HOME."""
    base = environ.get("XDG_STATE_HOME")
    root = Path(base) if base else Path(environ.get("HOME", "/")) / ".local" / "state"
    return root / "hypervisor" / "dev"


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a cluster below its directory."""

    root: Path

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def state(self) -> Path:
        return self.root / "state.json"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def containerd(self) -> Path:
        return self.root / "containerd"

    @property
    def containerd_socket(self) -> Path:
        return self.containerd / "containerd.sock"

    @property
    def console_holder_socket(self) -> Path:
        """Where the agent's console holder listens: it is a process of its own, which the agent starts."""
        return self.data("agent") / "console-holder.sock"

    def config(self, program: str) -> Path:
        """Configuration file of a program."""
        return self.root / "etc" / f"{program}.{'toml' if program == 'containerd' else 'yaml'}"

    def log(self, program: str) -> Path:
        """Log file of a program."""
        return self.root / "log" / f"{program}.log"

    def data(self, program: str) -> Path:
        """Data directory of a program."""
        return self.root / program


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to supervise."""

    name: str
    command: tuple[str, ...]
    log: Path
    wait_for: Path | None = None
    """A socket that must be there before what comes after this process is started."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One cluster. Ports are real ones (0 has been resolved)."""

    root: Path
    grpc_port: int
    http_port: int
    agent_port: int
    server_program: tuple[str, ...]
    agent_program: tuple[str, ...]
    simulated: int = 0
    """Number of simulated nodes; 0: one real node."""
    containerd: str = ""
    """Socket of the containerd in use; empty with simulated nodes."""
    private_containerd: bool = False
    """Whether that containerd is ours to start and to stop."""
    snapshotter: str = "overlayfs"
    types: tuple[str, ...] = ("container",)
    """Instance types that the real node runs."""
    libvirt_uri: str = ""
    """libvirt in use; empty where the node runs no virtual machines."""
    private_libvirt: bool = False
    """Whether that libvirtd is ours to start and to stop."""
    hostname: str = ""
    image_roots: tuple[Path, ...] = ()
    previous_context: str = ""
    """The context that was in use before, for ``dev down`` to return to."""

    @property
    def layout(self) -> Layout:
        return Layout(self.root)

    @property
    def namespace(self) -> str:
        """containerd namespace, also the first part of cgroup paths: this directory's own, so that several
        development clusters, and a real one, can share a machine and even a containerd."""
        return f"hypervisor-dev-{hashlib.sha256(bytes(self.root)).hexdigest()[:8]}"

    @property
    def run(self) -> Path:
        """Directory for sockets: a short path, since the kernel limits those of sockets."""
        return Path("/run") / self.namespace

    @property
    def libvirtd(self) -> PrivateLibvirtd:
        """The private libvirtd, should there be one."""
        return PrivateLibvirtd(self.layout.data("libvirt"), self.run / "libvirt")

    @property
    def server_address(self) -> str:
        """gRPC address of the server."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_address(self) -> str:
        """HTTP address of the server."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def nodes(self) -> int:
        """How many nodes there will be."""
        return self.simulated or 1

    def server_config(self) -> dict[str, Any]:
        """server.yaml."""
        return {
            "server": {"grpc_address": self.server_address, "http_address": self.http_address},
            "store": {"backend": "sqlite", "path": str(self.layout.data("server") / "store.db")},
            "log": {"format": "json"},
        }

    def agent_config(self) -> dict[str, Any]:
        """agent.yaml."""
        document: dict[str, Any] = {
            "node": {"hostname": self.hostname, "address": "127.0.0.1", "role": "master"},
            "agent": {
                "bind": "127.0.0.1",
                "port": self.agent_port,
                "server_address": [self.server_address],
                "data_dir": str(self.layout.data("agent")),
            },
            # Any free port, which the agent's log names: several clusters can share a machine.
            "metrics": {"address": "127.0.0.1:0"},
            "log": {"format": "json"},
        }
        if not self.simulated:
            roots = [self.layout.images, *self.image_roots]
            document |= {
                "drivers": {"enabled": list(self.types)},
                "containerd": {
                    "address": self.containerd,
                    "namespace": self.namespace,
                    "snapshotter": self.snapshotter,
                    "console_root": str(self.root / "consoles"),
                },
                "images": {"archive_roots": [str(root) for root in roots]},
                "machines": {"roots": [str(root) for root in roots]},
                "microvm": {
                    "run_dir": str(self.run / "microvms"),
                    "data_dir": str(self.layout.data("microvms")),
                },
            }
            if self.libvirt_uri:
                document["libvirt"] = {"uri": self.libvirt_uri, "data_dir": str(self.layout.data("vms"))}
                if self.private_libvirt:
                    document["libvirt"]["qemu_logs"] = str(self.libvirtd.qemu_logs)
        return document

    def containerd_config(self) -> str:
        """containerd.toml of the private containerd: nothing of the machine's own is touched."""
        base = self.layout.containerd
        # JSON strings are TOML basic strings, escapes included.
        return "\n".join(
            [
                "version = 2",
                f"root = {json.dumps(str(base / 'root'))}",
                f"state = {json.dumps(str(base / 'state'))}",
                'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]',
                "[grpc]",
                f"  address = {json.dumps(str(self.layout.containerd_socket))}",
                "[ttrpc]",
                f"  address = {json.dumps(str(self.layout.containerd_socket) + '.ttrpc')}",
                "",
            ]
        )

    def processes(self) -> tuple[ProcessSpec, ...]:
        """What is started, in this order, and stopped in the other."""
        layout = self.layout
        specs = []
        if self.private_containerd:
            command = ("containerd", "--config", str(layout.config("containerd")))
            specs.append(
                ProcessSpec(
                    "containerd", command, layout.log("containerd"), wait_for=layout.containerd_socket
                )
            )
        if self.private_libvirt:
            libvirtd = self.libvirtd
            specs.append(
                ProcessSpec(
                    "libvirtd",
                    ("sh", str(libvirtd.script)),
                    layout.log("libvirtd"),
                    wait_for=libvirtd.socket,
                )
            )
        server = (*self.server_program, "--config", str(layout.config("server")))
        specs.append(ProcessSpec("server", server, layout.log("server")))
        agent = (*self.agent_program, "--config", str(layout.config("agent")))
        if self.simulated:
            agent = (*agent, "--simulated", str(self.simulated))
        specs.append(ProcessSpec("agent", agent, layout.log("agent")))
        return tuple(specs)

    def to_json(self) -> str:
        """For the file that ``dev down`` and ``dev status`` read."""
        return json.dumps(asdict(self), default=str, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read back what :meth:`to_json` wrote."""
        document = json.loads(text)
        for key in ("server_program", "agent_program"):
            document[key] = tuple(document[key])
        document["root"] = Path(document["root"])
        document["types"] = tuple(document["types"])
        document["image_roots"] = tuple(Path(root) for root in document["image_roots"])
        return cls(**document)
