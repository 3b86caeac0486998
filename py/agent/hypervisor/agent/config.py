"""Every key of ``agent.yaml``. The loader is ``hypervisor.core.settings``; the reference is made from this file."""

import ipaddress
import re
import socket
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import pydantic

from hypervisor.agent.config_machines import LibvirtSection, MachinesSection, MicrovmSection
from hypervisor.core.logging import LogFormat, LogLevel
from hypervisor.core.names import check_hostname, check_labels
from hypervisor.core.settings import Address, ByteSize, Duration, Section, Settings, split_address
from hypervisor.core.states import NodeRole
from hypervisor.core.taints import parse_taint
from hypervisor.core.tls import ClientAuth, ClientTls, ServerTls

__all__ = ["AgentSettings", "ContainerdSection", "GuardMode", "HolderMode", "MetricsSection"]

_NAMESPACE = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
"""What containerd takes (identifiers.Validate), checked before anything is begun."""
_PLACE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class NodeSection(Section):
    """What this node is."""

    hostname: str = pydantic.Field(
        default="", description="Its name, unique in the cluster. Empty: the machine's host name."
    )
    address: str = pydantic.Field(
        default="",
        description="Where servers reach this agent: IP address or name. Empty: `agent.bind`, or the host name where "
        "that is every address.",
    )
    region: str = pydantic.Field(default="default", description="Region, such as `eu-1`.")
    zone: str = pydantic.Field(default="default", description="Failure domain inside the region.")
    role: NodeRole = pydantic.Field(
        default=NodeRole.WORKER, description="`worker`, or `master` where a server runs as well."
    )
    labels: dict[str, str] = pydantic.Field(
        default={}, description="A map for placing instances, such as `disk: ssd`."
    )

    taints: tuple[str, ...] = pydantic.Field(
        default=(),
        description="Keep instances away that do not tolerate them: `key:effect` or `key=value:effect` each, the "
        "effect `no_schedule` or `prefer_no_schedule`, such as `gpu=yes:no_schedule`.",
    )

    @pydantic.field_validator("taints")
    @classmethod
    def _taints_are_legal(cls, taints: tuple[str, ...]) -> tuple[str, ...]:
        found = [parse_taint(text) for text in taints]
        if len({(t.key, t.effect) for t in found}) < len(found):
            raise ValueError("two taints have the same key and effect: leave one out")
        return taints

    @pydantic.field_validator("hostname")
    @classmethod
    def _hostname_is_legal(cls, hostname: str) -> str:
        wrong = check_hostname("hostname", hostname) if hostname else None
        if wrong is not None:
            raise ValueError(wrong.description)
        return hostname

    @pydantic.field_validator("region", "zone")
    @classmethod
    def _place_is_legal(cls, place: str) -> str:
        if not _PLACE.fullmatch(place):
            raise ValueError("use 1 to 63 letters, digits, '.', '_' and '-'")
        return place

    @pydantic.field_validator("labels")
    @classmethod
    def _labels_are_legal(cls, labels: dict[str, str]) -> dict[str, str]:
        wrong = check_labels("labels", labels)
        if wrong:
            raise ValueError("; ".join(v.description for v in wrong))
        return labels


class AgentSection(Section):
    """The agent's process: where it listens, whom it tells."""

    bind: str = pydantic.Field(
        default="127.0.0.1",
        description="IP address the agent's gRPC API listens on; `0.0.0.0` or `::` for all.",
    )
    port: int = pydantic.Field(
        default=50052, ge=0, le=65535, description="Port of the agent's gRPC API; 0 takes any free one."
    )
    server_address: tuple[Address, ...] = pydantic.Field(
        default=("127.0.0.1:50051",),
        min_length=1,
        description="The control plane's servers, `host:port` each; the next one is used when one cannot be reached.",
    )
    token: pydantic.SecretStr = pydantic.Field(
        default=pydantic.SecretStr(""),
        description="Bearer token to show to the servers, if they ask for one.",
    )
    data_dir: Path = pydantic.Field(
        default=Path("/var/lib/hypervisor-agent"),
        description="Node id, journal and lock; must survive restarts, on a local disk, for this agent alone.",
    )
    shutdown_grace: Duration = pydantic.Field(
        default=10.0, ge=0, le=600, description="How long calls in progress may go on after SIGTERM."
    )
    insecure: bool = pydantic.Field(
        default=False,
        description="Listen on a reachable address without client certificates: whoever reaches it owns this node. "
        "For isolated test networks.",
    )
    console_scrollback: ByteSize = pydantic.Field(
        default=256 << 10,
        ge=4096,
        le=64 << 20,
        description="Output kept in memory of each console, for viewers that come later.",
    )

    @pydantic.field_validator("server_address", mode="before")
    @classmethod
    def _one_is_enough(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    @pydantic.field_validator("bind")
    @classmethod
    def _bind_is_an_address(cls, bind: str) -> str:
        ipaddress.ip_address(bind)
        return bind


class ConsoleLogSection(Section):
    """Output of consoles on disk, in `agent.data_dir`."""

    max_bytes: ByteSize = pydantic.Field(
        default=1 << 20, ge=4096, le=1 << 30, description="Size of a file, at which the next one is begun."
    )
    files: int = pydantic.Field(
        default=4,
        ge=0,
        le=1000,
        description="Files kept of each instance. 0: no log; what is printed is then kept in memory alone.",
    )


class HolderMode(StrEnum):
    """Where consoles are held."""

    PROCESS = "process"
    EMBEDDED = "embedded"


class ConsoleSection(Section):
    """What is kept of consoles, and by whom. The size of the scrollback is `agent.console_scrollback`."""

    holder: HolderMode = pydantic.Field(
        default=HolderMode.PROCESS,
        description="`process`: a small process of its own, which goes on reading while the agent is away; "
        "`embedded`: the agent, for simulated nodes, which always have that.",
    )
    log: ConsoleLogSection = ConsoleLogSection()


class DriversSection(Section):
    """What runs instances here."""

    enabled: tuple[str, ...] = pydantic.Field(
        default=("vm", "container", "microvm"),
        description="Instance types (`vm`, `container`, `microvm`) or names of drivers (`fake`, a third party's).",
    )
    health_interval: Duration = pydantic.Field(
        default=5.0, ge=0.1, description="How often each driver is asked whether it can work."
    )
    create_timeout: Duration = pydantic.Field(
        default=300.0,
        gt=0,
        description="How long a driver may take to make an instance, image import included.",
    )
    action_timeout: Duration = pydantic.Field(
        default=60.0,
        gt=0,
        description="How long a driver may take for any other change, on top of a grace period.",
    )
    query_timeout: Duration = pydantic.Field(
        default=10.0, gt=0, description="How long a driver may take to answer a question."
    )
    options: dict[str, str] = pydantic.Field(
        default={}, description="A map handed to drivers of third parties."
    )


class StatsSection(Section):
    """How often what instances use is measured, and how much of the past is kept."""

    interval: Duration = pydantic.Field(
        default=1.0,
        ge=0.1,
        le=60,
        description="Time between samples of all running instances, `100ms` to `60s`. One that is watched more "
        "often is sampled more often meanwhile.",
    )
    slow_interval: Duration = pydantic.Field(
        default=10.0,
        ge=0.1,
        le=600,
        description="Time between looks at what is dear to read: `memory.stat`, limits, OOM kills and pressure.",
    )
    history: int = pydantic.Field(
        default=300,
        ge=1,
        le=100_000,
        description="Samples kept of each instance, some 350 bytes each: 300 of them at 1 s are 5 minutes and 100 KB.",
    )

    @pydantic.model_validator(mode="after")
    def _slow_is_slower(self) -> "StatsSection":
        if self.slow_interval < self.interval:
            raise ValueError("stats.slow_interval must not be shorter than stats.interval")
        return self


class MetricsSection(Section):
    """Metrics of the node and its instances for Prometheus, at `/metrics`; see docs/guide/metrics.md."""

    address: str = pydantic.Field(
        default="127.0.0.1:50053",
        description="Where they are served, `host:port`; empty: nowhere. Over TLS where `tls.enabled`, and then for "
        "those whom the agent's API knows.",
    )
    max_instances: int = pydantic.Field(
        default=1000,
        ge=0,
        le=100_000,
        description="Instances that have series of their own, those sampled longest first; how many are left out is "
        "`hypervisor_agent_instances_without_series`.",
    )

    @pydantic.field_validator("address")
    @classmethod
    def _address_is_legal(cls, address: str) -> str:
        if address:
            split_address(address)
        return address


class ContainerdSection(Section):
    """The container driver."""

    address: Path = pydantic.Field(
        default=Path("/run/containerd/containerd.sock"), description="containerd's unix socket."
    )
    namespace: str = pydantic.Field(
        default="hypervisor", description="containerd namespace that holds our images and containers."
    )
    snapshotter: str = pydantic.Field(
        default="overlayfs", description="Which snapshotter holds file systems."
    )
    runtime: str = pydantic.Field(default="io.containerd.runc.v2", description="Which shim runs containers.")
    console_root: Path = pydantic.Field(
        default=Path("/run/hypervisor/consoles"),
        description="Private directory for the FIFOs of consoles; has to survive the agent, not the machine.",
    )

    @pydantic.field_validator("namespace")
    @classmethod
    def _namespace_is_legal(cls, namespace: str) -> str:
        if len(namespace) > 76 or not _NAMESPACE.fullmatch(namespace):
            raise ValueError("use at most 76 letters and digits, joined by single '.', '_' or '-'")
        return namespace


class ImagesSection(Section):
    """Where images come from."""

    archive_roots: tuple[Path, ...] = pydantic.Field(
        default=(),
        description="Directories from which `oci-archive:` images may be imported. None: importing is refused.",
    )
    cache_dir: Path | None = pydantic.Field(
        default=None,
        description="Directory for images fetched from the servers, this agent's alone. Default: `images` in "
        "`agent.data_dir`.",
    )
    cache_bytes: ByteSize = pydantic.Field(
        default=64 << 30,
        ge=0,
        description="Most that they take together; those that no instance uses go first, the longest unused first. "
        "0: as much as the disk holds.",
    )


class SimulatedSection(Section):
    """What each node of `--simulated` pretends to have."""

    cpu_cores: int = pydantic.Field(default=8, ge=1, le=1024, description="Processors.")
    memory: ByteSize = pydantic.Field(default=32 << 30, gt=0, description="Memory.")
    disk: ByteSize = pydantic.Field(default=512 << 30, gt=0, description="Disk.")
    first_port: int = pydantic.Field(
        default=0, ge=0, le=65535, description="Port of the first node, the others follow; 0: any free ones."
    )


class TlsSection(Section):
    """TLS of the agent's API and of its connection to the servers."""

    enabled: bool = pydantic.Field(default=False, description="Serve TLS only, and reach servers by TLS.")
    cert_file: Path | None = pydantic.Field(
        default=None, description="Certificate chain, PEM; also shown to the servers."
    )
    key_file: Path | None = pydantic.Field(default=None, description="Its key, PEM, not encrypted.")
    ca_file: Path | None = pydantic.Field(default=None, description="Authority of the servers' certificates.")
    client_auth: ClientAuth = pydantic.Field(
        default=ClientAuth.REQUIRE,
        description="`require`: a caller must show a certificate of `ca_file`; or `none`.",
    )

    @pydantic.model_validator(mode="after")
    def _complete(self) -> "TlsSection":
        if self.enabled and (self.cert_file is None or self.key_file is None):
            raise ValueError("tls.enabled needs tls.cert_file and tls.key_file")
        if self.enabled and self.client_auth is ClientAuth.REQUIRE and self.ca_file is None:
            raise ValueError("tls.client_auth: require needs tls.ca_file")
        return self


class GuardMode(StrEnum):
    """Who fences the node when its agent cannot."""

    PROCESS = "process"
    NONE = "none"


class FencingSection(Section):
    """Stopping what could be started elsewhere, when no server hears from this node."""

    enabled: bool = pydantic.Field(
        default=True,
        description="Off: nothing is stopped by the node, and so nothing is moved off it by itself when it is lost.",
    )
    guard: GuardMode = pydantic.Field(
        default=GuardMode.PROCESS,
        description="`process`: a process beside the agent kills what has to be stopped while the agent is dead or "
        "hangs. `none`: nobody does; only where the guests end with the agent, or a watchdog resets the machine.",
    )


class LogSection(Section):
    """The log, on standard error."""

    level: LogLevel = pydantic.Field(
        default=LogLevel.INFO, description="`debug`, `info`, `warning` or `error`."
    )
    format: LogFormat = pydantic.Field(
        default=LogFormat.AUTO, description="`json`, `console`, or `auto`: console on a terminal, else json."
    )


class AgentSettings(Settings):
    """Configuration of hypervisor-agent."""

    foreign_sections: ClassVar[frozenset[str]] = frozenset(
        {
            "server",
            "store",
            "etcd",
            "heartbeat",
            "reconcile",
            "image_store",
            "scheduler",
            "operations",
            "agents",
            "auth",
            "limits",
            "libvirt",
        }
    )

    node: NodeSection = NodeSection()
    agent: AgentSection = AgentSection()
    console: ConsoleSection = ConsoleSection()
    drivers: DriversSection = DriversSection()
    machines: MachinesSection = MachinesSection()
    libvirt: LibvirtSection = LibvirtSection()
    microvm: MicrovmSection = MicrovmSection()
    containerd: ContainerdSection = ContainerdSection()
    images: ImagesSection = ImagesSection()
    simulated: SimulatedSection = SimulatedSection()
    stats: StatsSection = StatsSection()
    metrics: MetricsSection = MetricsSection()
    fencing: FencingSection = FencingSection()
    tls: TlsSection = TlsSection()
    log: LogSection = LogSection()

    @pydantic.model_validator(mode="after")
    def _only_servers_may_call(self) -> "AgentSettings":
        guarded = self.tls.enabled and self.tls.client_auth is ClientAuth.REQUIRE
        if not guarded and not self.agent.insecure and not ipaddress.ip_address(self.agent.bind).is_loopback:
            raise ValueError(
                f"agent.bind {self.agent.bind} can be reached from other machines, so tls.enabled: true and "
                "tls.client_auth: require are needed, or a loopback address (agent.insecure: true lifts this check "
                "on isolated test networks)"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _metrics_are_not_for_everybody(self) -> "AgentSettings":
        if not self.metrics.address:
            return self
        host, _ = split_address(self.metrics.address)
        guarded = self.tls.enabled and self.tls.client_auth is ClientAuth.REQUIRE
        if not guarded and not self.agent.insecure and not _is_loopback(host):
            raise ValueError(
                f"metrics.address {self.metrics.address} can be reached from other machines, so tls.enabled: true and "
                "tls.client_auth: require are needed, or a loopback address (agent.insecure: true lifts this check "
                "on isolated test networks)"
            )
        return self

    def hostname(self) -> str:
        """The node's name."""
        return self.node.hostname or socket.gethostname()

    def address(self) -> str:
        """Where servers reach this agent."""
        if self.node.address:
            return self.node.address
        everywhere = ipaddress.ip_address(self.agent.bind).is_unspecified
        return socket.gethostname() if everywhere else self.agent.bind

    def server_tls(self) -> ServerTls | None:
        """What the agent serves with; None for plain text."""
        if not self.tls.enabled or self.tls.cert_file is None or self.tls.key_file is None:
            return None
        return ServerTls(self.tls.cert_file, self.tls.key_file, self.tls.ca_file, self.tls.client_auth)

    def client_tls(self) -> ClientTls | None:
        """How servers are reached; None for plain text."""
        if not self.tls.enabled:
            return None
        return ClientTls(self.tls.ca_file, self.tls.cert_file, self.tls.key_file)
