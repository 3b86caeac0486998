"""Every key of ``server.yaml``. The loader is ``hypervisor.core.settings``; the reference is made from this file."""

import enum
import ipaddress
import socket
from pathlib import Path
from typing import ClassVar

import pydantic

from hypervisor.core.logging import LogFormat, LogLevel
from hypervisor.core.resources import Resources, millicores
from hypervisor.core.settings import Address, ByteSize, Duration, Section, Settings, split_address
from hypervisor.core.states import PlacementPolicy
from hypervisor.core.tls import ClientAuth, ClientTls, ServerTls
from hypervisor.server.ledger import AllocationRules
from hypervisor.server.reconcile.losses import LossLimits
from hypervisor.server.scheduler.options import DEFAULT_WEIGHTS, SchedulerOptions
from hypervisor.server.store.config import EtcdTls, StoreConfig

__all__ = ["AuthMode", "ServerSettings", "StoreBackend"]


class StoreBackend(enum.StrEnum):
    """Where the cluster's state is kept."""

    SQLITE = "sqlite"
    ETCD = "etcd"
    MEMORY = "memory"


class AuthMode(enum.StrEnum):
    """How callers prove who they are."""

    ANONYMOUS = "anonymous"
    TOKEN = "token"
    CERTIFICATE = "certificate"
    INSECURE = "insecure"


class ServerSection(Section):
    """Addresses and life of the process."""

    grpc_address: Address = pydantic.Field(
        default="127.0.0.1:50051",
        description="Where the gRPC API listens: `host:port`; port 0 takes any free one.",
    )
    http_address: Address = pydantic.Field(
        default="127.0.0.1:8080", description="Where the HTTP gateway (health, metrics) listens."
    )
    advertise_http_address: str = pydantic.Field(
        default="",
        description="Under which `host:port` nodes and other servers reach the HTTP gateway, for images. Empty: the "
        "host of `advertise_address`, or where it listens.",
    )
    advertise_address: str = pydantic.Field(
        default="", description="Under which `host:port` others reach this server. Empty: `grpc_address`."
    )
    shutdown_grace: Duration = pydantic.Field(
        default=10.0, gt=0, le=600, description="How long calls in progress may go on after SIGTERM."
    )


class StoreSection(Section):
    """The store: one file for one server, or etcd for several."""

    backend: StoreBackend = pydantic.Field(
        default=StoreBackend.SQLITE,
        description="`sqlite` (embedded, one server), `etcd` (several servers) or `memory` (forgotten at exit; tests).",
    )
    path: Path = pydantic.Field(
        default=Path("/var/lib/hypervisor-server/store.db"), description="sqlite: the database file."
    )
    max_size: ByteSize = pydantic.Field(
        default=0, description="sqlite: refuse writes that make the file larger. 0: the disk decides."
    )
    history_revisions: int = pydantic.Field(
        default=100_000, ge=100, description="sqlite: how many revisions back a watch can be resumed."
    )
    history_age: Duration = pydantic.Field(
        default=3600.0,
        gt=0,
        description="sqlite: how far back in time; the first of the two limits reached counts.",
    )
    request_timeout: Duration = pydantic.Field(
        default=10.0, gt=0, description="For one request to the store."
    )


class EtcdSection(Section):
    """etcd, where `store.backend` is `etcd`."""

    endpoints: tuple[str, ...] = pydantic.Field(
        default=("127.0.0.1:2379",),
        min_length=1,
        description="Its members: `host:port`, `http://host:port` or `https://host:port`.",
    )
    dial_timeout: Duration = pydantic.Field(
        default=5.0, gt=0, description="For one member to accept a connection."
    )
    ca_file: str = pydantic.Field(
        default="", description="Authority that signed etcd's certificates. Empty: the system's."
    )
    cert_file: str = pydantic.Field(default="", description="This server's certificate towards etcd.")
    key_file: str = pydantic.Field(default="", description="Its key.")
    server_name: str = pydantic.Field(
        default="", description="Name the certificate must carry, if not the endpoint's."
    )


class ImageStoreSection(Section):
    """Images that were imported, for nodes to fetch from `server.http_address`."""

    dir: Path | None = pydantic.Field(
        default=None,
        description="Directory for their content, this server's alone. Default: `images` beside `store.path`.",
    )
    max_bytes: ByteSize = pydantic.Field(
        default=256 << 30, gt=0, description="Largest image. Larger ones are refused."
    )
    reserve: ByteSize = pydantic.Field(
        default=1 << 30, ge=0, description="Kept free on the disk: no import may use it up."
    )
    upload_idle: Duration = pydantic.Field(
        default=60.0, gt=0, le=3600, description="An import of which nothing comes for so long is broken off."
    )
    upload_retention: Duration = pydantic.Field(
        default=86_400.0, ge=60, description="How long what came of a broken import is kept, to go on from."
    )
    replicate: bool = pydantic.Field(
        default=True,
        description="Fetch images that other servers have, so that each server has them all. With `auth.mode: token` "
        "the first of `auth.tokens` is shown to them; servers need the same tokens.",
    )


class HeartbeatSection(Section):
    """How nodes are watched over."""

    interval: Duration = pydantic.Field(default=10.0, gt=0, description="How often agents send a heartbeat.")
    timeout: Duration = pydantic.Field(
        default=30.0,
        ge=1,
        description="Without a heartbeat for this long a node is OFFLINE. At least twice the interval.",
    )

    @pydantic.model_validator(mode="after")
    def _timeout_covers_a_lost_heartbeat(self) -> "HeartbeatSection":
        if self.timeout < 2 * self.interval:
            raise ValueError("heartbeat.timeout must be at least twice heartbeat.interval")
        return self


class ReconcileSection(Section):
    """Comparing what nodes have with what the records want of them, and what is done about lost nodes."""

    interval: Duration = pydantic.Field(
        default=60.0,
        ge=1,
        description="How often each node is asked for all it has, besides when its agent registers.",
    )
    orphan_grace: Duration = pydantic.Field(
        default=600.0,
        ge=0,
        description="How long an instance on a node is left alone of which there is no record at all, before it is "
        "deleted.",
    )
    keep_older: bool = pydantic.Field(
        default=True,
        description="Never delete such an instance where it is older than the store, or than its last restore: its "
        "record was lost rather. False: once you know that all such instances can go.",
    )
    fence_margin: Duration = pydantic.Field(
        default=5.0,
        ge=2,
        le=600,
        description="After `heartbeat.timeout`, what a lost node is given to have stopped what it has to, before that "
        "is started elsewhere.",
    )
    max_moves: int = pydantic.Field(
        default=10,
        ge=1,
        le=10_000,
        description="How many instances of lost nodes are placed elsewhere at once.",
    )
    brake_share: float = pydantic.Field(
        default=0.5,
        ge=0,
        le=1,
        description="When more than this share of a zone's or the cluster's nodes, where it has at least 3, is lost "
        "within `brake_window`, nothing is moved off them by itself: it looks like a partition. 1: never.",
    )
    brake_window: Duration = pydantic.Field(
        default=600.0, gt=0, le=86_400, description="Losses this close to one another are counted together."
    )

    def limits(self) -> LossLimits:
        """For the reconciler."""
        return LossLimits(
            margin_s=self.fence_margin,
            brake_share=self.brake_share,
            brake_window_s=self.brake_window,
            max_moves=self.max_moves,
        )


class OvercommitSection(Section):
    """How much more may be reserved than there is."""

    cpu: float = pydantic.Field(
        default=1.0, ge=0.1, le=100, description="Processors that may be reserved for each that a node has."
    )
    memory: float = pydantic.Field(
        default=1.0,
        ge=0.1,
        le=100,
        description="Memory that may be reserved, as a multiple of what a node has.",
    )
    disk: float = pydantic.Field(
        default=1.0,
        ge=0.1,
        le=100,
        description="Disk that may be reserved, as a multiple of what a node has.",
    )


class HostReserveSection(Section):
    """What every node keeps for itself."""

    cpu: float = pydantic.Field(
        default=0.0, ge=0, le=1024, description="Cores of every node that are not given to instances."
    )
    memory: ByteSize = pydantic.Field(
        default=0, ge=0, description="Memory of every node that is not given to instances."
    )
    disk: ByteSize = pydantic.Field(
        default=0, ge=0, description="Disk of every node that is not given to instances."
    )


def _weight(score: str, meaning: str) -> int:
    weight: int = pydantic.Field(default=DEFAULT_WEIGHTS[score], ge=0, le=1000, description=meaning)
    return weight


class WeightsSection(Section):
    """What each score (0 to 1000 a node) is multiplied by; the largest sum wins."""

    utilisation: int = _weight("utilisation", "What is reserved after the placement: see `scheduler.policy`.")
    spread: int = _weight("spread", "Few instances in the same place, where `spec.spread` asks for it.")
    affinity: int = _weight("affinity", "Preferred terms of affinity and anti-affinity that hold.")
    load: int = _weight("load", "Processors and memory that are measured to be idle.")
    image: int = _weight(
        "image", "The image is on the node: it has fetched it, or an instance there was made from it."
    )
    penalty: int = _weight("penalty", "Placements on the node have not failed lately.")
    taints: int = _weight("taints", "No taint `prefer_no_schedule` that the instance does not tolerate.")


class SchedulerSection(Section):
    """Placement. All servers should have the same."""

    name: str = pydantic.Field(
        default="default", description="The scheduler: `default`, or a name some package adds."
    )
    policy: PlacementPolicy = pydantic.Field(
        default=PlacementPolicy.SPREAD,
        description="`spread` (least reserved node first) or `binpack` (most reserved that fits); "
        "an instance may choose its own.",
    )
    seed: int = pydantic.Field(
        default=0, ge=0, description="Breaks ties between equal nodes; the same on all servers."
    )
    penalty_half_life: Duration = pydantic.Field(
        default=600.0,
        ge=1,
        description="A node on which placements keep failing is ranked down; so long until that counts half.",
    )
    plugins: tuple[str, ...] = pydantic.Field(
        default=(),
        description="Filters and scores that packages add, by name, to be used by the default scheduler.",
    )
    plugin_weights: dict[str, int] = pydantic.Field(
        default={}, description="Weights of such scores, 0 to 1000, by name. Without one: 100."
    )
    overcommit: OvercommitSection = OvercommitSection()
    reserve: HostReserveSection = HostReserveSection()
    weights: WeightsSection = WeightsSection()

    @pydantic.field_validator("plugin_weights")
    @classmethod
    def _weights_are_legal(cls, weights: dict[str, int]) -> dict[str, int]:
        for name, weight in weights.items():
            if name in DEFAULT_WEIGHTS:
                raise ValueError(f"{name} is built in: set scheduler.weights.{name}")
            if not 0 <= weight <= 1000:
                raise ValueError(f"the weight of {name} is {weight}: use 0 to 1000")
        return weights

    def options(self) -> SchedulerOptions:
        """What the default scheduler is made with."""
        return SchedulerOptions(
            weights={**self.weights.model_dump(), **self.plugin_weights}, plugins=self.plugins
        )

    def allocation_rules(self) -> AllocationRules:
        """What of a node's capacity may be reserved."""
        return AllocationRules(
            overcommit_cpu=self.overcommit.cpu,
            overcommit_memory=self.overcommit.memory,
            overcommit_disk=self.overcommit.disk,
            reserve=Resources(
                cpu_millis=millicores(self.reserve.cpu),
                memory_bytes=self.reserve.memory,
                disk_bytes=self.reserve.disk,
            ),
        )


class OperationsSection(Section):
    """The history of mutating calls."""

    retention: Duration = pydantic.Field(
        default=86_400.0,
        ge=60,
        description="How long finished operations, and so request ids, are remembered.",
    )


class AgentsSection(Section):
    """Calls from this server to the agents."""

    connect_timeout: Duration = pydantic.Field(
        default=5.0, gt=0, description="For an agent to accept a connection."
    )
    tls: bool = pydantic.Field(
        default=False,
        description="Reach agents by TLS: `tls.ca_file` signs theirs, `tls.cert_file` is shown to them.",
    )


class TlsSection(Section):
    """TLS of the gRPC API and of the HTTP gateway."""

    enabled: bool = pydantic.Field(default=False, description="Serve TLS only.")
    cert_file: Path | None = pydantic.Field(default=None, description="Certificate chain, PEM.")
    key_file: Path | None = pydantic.Field(default=None, description="Its key, PEM, not encrypted.")
    ca_file: Path | None = pydantic.Field(
        default=None, description="Authority of clients' and agents' certificates."
    )
    client_auth: ClientAuth = pydantic.Field(
        default=ClientAuth.NONE,
        description="`none` or `require`: a client must show a certificate of `ca_file`.",
    )

    @pydantic.model_validator(mode="after")
    def _complete(self) -> "TlsSection":
        if self.enabled and (self.cert_file is None or self.key_file is None):
            raise ValueError("tls.enabled needs tls.cert_file and tls.key_file")
        if self.enabled and self.client_auth is ClientAuth.REQUIRE and self.ca_file is None:
            raise ValueError("tls.client_auth: require needs tls.ca_file")
        return self


class AuthSection(Section):
    """Who may call."""

    mode: AuthMode = pydantic.Field(
        default=AuthMode.ANONYMOUS,
        description="`anonymous`: everybody, so loopback addresses only. `token`: a bearer token of `tokens`. "
        "`certificate`: the common name of the client's certificate (needs `tls.client_auth: require`). "
        "`insecure`: everybody, on any address; for isolated test networks.",
    )
    tokens: dict[str, pydantic.SecretStr] = pydantic.Field(
        default={},
        description="token: a map of names of callers to their tokens, each of at least 16 characters.",
    )

    @pydantic.field_validator("tokens")
    @classmethod
    def _tokens_are_long_and_distinct(
        cls, tokens: dict[str, pydantic.SecretStr]
    ) -> dict[str, pydantic.SecretStr]:
        short = sorted(name for name, token in tokens.items() if len(token.get_secret_value()) < 16)
        if short:
            raise ValueError(f"the token of {short[0]} is too short: use at least 16 characters")
        if len({token.get_secret_value() for token in tokens.values()}) < len(tokens):
            raise ValueError("two callers have the same token: give each its own")
        return tokens


class LimitsSection(Section):
    """What one server takes on."""

    max_message_size: ByteSize = pydantic.Field(
        default=16 << 20,
        ge=1 << 20,
        description="Largest request. Larger ones are refused with RESOURCE_EXHAUSTED.",
    )
    max_concurrent_calls: int = pydantic.Field(
        default=10_000,
        ge=10,
        description="Calls and streams at one time; more are refused with RESOURCE_EXHAUSTED.",
    )


class LogSection(Section):
    """The log, on standard error."""

    level: LogLevel = pydantic.Field(
        default=LogLevel.INFO, description="`debug`, `info`, `warning` or `error`."
    )
    format: LogFormat = pydantic.Field(
        default=LogFormat.AUTO, description="`json`, `console`, or `auto`: console on a terminal, else json."
    )


def _is_loopback(address: str) -> bool:
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ServerSettings(Settings):
    """Configuration of hypervisor-server."""

    foreign_sections: ClassVar[frozenset[str]] = frozenset(
        {
            "agent",
            "node",
            "console",
            "drivers",
            "fencing",
            "containerd",
            "images",
            "libvirt",
            "machines",
            "microvm",
        }
    )

    server: ServerSection = ServerSection()
    store: StoreSection = StoreSection()
    etcd: EtcdSection = EtcdSection()
    image_store: ImageStoreSection = ImageStoreSection()
    heartbeat: HeartbeatSection = HeartbeatSection()
    scheduler: SchedulerSection = SchedulerSection()
    operations: OperationsSection = OperationsSection()
    reconcile: ReconcileSection = ReconcileSection()
    agents: AgentsSection = AgentsSection()
    tls: TlsSection = TlsSection()
    auth: AuthSection = AuthSection()
    limits: LimitsSection = LimitsSection()
    log: LogSection = LogSection()

    @pydantic.model_validator(mode="after")
    def _callers_are_known_where_others_can_reach_us(self) -> "ServerSettings":
        mode = self.auth.mode
        addresses = {
            "server.grpc_address": self.server.grpc_address,
            "server.http_address": self.server.http_address,
        }
        open_keys = [key for key, address in addresses.items() if not _is_loopback(address)]
        if mode is AuthMode.CERTIFICATE and not (
            self.tls.enabled and self.tls.client_auth is ClientAuth.REQUIRE
        ):
            raise ValueError("auth.mode: certificate needs tls.enabled: true and tls.client_auth: require")
        if mode is AuthMode.TOKEN and not self.auth.tokens:
            raise ValueError("auth.mode: token needs at least one caller in auth.tokens")
        if open_keys and mode is AuthMode.ANONYMOUS:
            raise ValueError(
                f"{open_keys[0]} {addresses[open_keys[0]]} can be reached from other machines, but auth.mode: "
                "anonymous lets everybody in: set auth.mode to token or certificate and tls.enabled to true, or use "
                "a loopback address (auth.mode: insecure lifts this check on isolated test networks)"
            )
        if open_keys and mode is AuthMode.TOKEN and not self.tls.enabled:
            raise ValueError(
                f"{open_keys[0]} {addresses[open_keys[0]]} can be reached from other machines, so tokens would "
                "cross the network in clear: set tls.enabled to true, or use a loopback address"
            )
        return self

    def http_url(self, port: int) -> str:
        """Where nodes and other servers reach the gateway, which listens on ``port``."""
        address = self.server.advertise_http_address
        if not address:
            host, _ = split_address(self.server.advertise_address or self.server.http_address)
            if host in ("0.0.0.0", "::"):
                host = socket.gethostname()
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return f"{'https' if self.tls.enabled else 'http'}://{address}"

    def image_dir(self) -> Path:
        """Where the content of images is kept."""
        return self.image_store.dir or self.store.path.parent / "images"

    def server_tls(self) -> ServerTls | None:
        """What the API and the gateway serve with; None for plain text."""
        if not self.tls.enabled or self.tls.cert_file is None or self.tls.key_file is None:
            return None
        return ServerTls(self.tls.cert_file, self.tls.key_file, self.tls.ca_file, self.tls.client_auth)

    def agent_tls(self) -> ClientTls | None:
        """How agents are reached; None for plain text."""
        if not self.agents.tls:
            return None
        return ClientTls(self.tls.ca_file, self.tls.cert_file, self.tls.key_file)

    def store_config(self) -> StoreConfig:
        """What ``store.open`` needs."""
        etcd = self.etcd
        secure = any((etcd.ca_file, etcd.cert_file, etcd.key_file, etcd.server_name)) or any(
            endpoint.startswith("https://") for endpoint in etcd.endpoints
        )
        return StoreConfig(
            backend=self.store.backend.value,
            path=str(self.store.path),
            max_bytes=self.store.max_size,
            history_revisions=self.store.history_revisions,
            history_age_s=self.store.history_age,
            endpoints=etcd.endpoints,
            tls=EtcdTls(etcd.ca_file, etcd.cert_file, etcd.key_file, etcd.server_name) if secure else None,
            dial_timeout_s=etcd.dial_timeout,
            request_timeout_s=self.store.request_timeout,
        )
