"""The server's keys: what may stand together, and what is refused with which sentence."""

import socket
from pathlib import Path

import pytest

from hypervisor.core.settings import SettingsError, load
from hypervisor.core.tls import ClientAuth, ServerTls
from hypervisor.server import auth
from hypervisor.server.config import AuthMode, ServerSettings

TOKEN = "auth.tokens=ann=0123456789abcdef"
TLS = ["tls.enabled=true", "tls.cert_file=/c", "tls.key_file=/k"]
MUTUAL = [*TLS, "tls.ca_file=/ca", "tls.client_auth=require"]
OPEN = "server.grpc_address=0.0.0.0:50051"


def settings(*overrides: str) -> ServerSettings:
    return load(ServerSettings, path=None, environ={}, overrides=overrides).settings


def test_the_defaults_serve_one_machine_without_any_file() -> None:
    made = settings()

    assert made.server.grpc_address == "127.0.0.1:50051"
    assert made.server.http_address == "127.0.0.1:8080"
    assert (made.heartbeat.interval, made.heartbeat.timeout) == (10.0, 30.0)
    assert made.auth.mode is AuthMode.ANONYMOUS
    assert made.server_tls() is None
    assert made.store_config().backend == "sqlite"


@pytest.mark.parametrize(
    "overrides",
    [
        ["server.grpc_address=localhost:1"],
        ["server.grpc_address=[::1]:1"],
        ["server.grpc_address=127.8.8.8:1"],
        [OPEN, "auth.mode=insecure"],
        [OPEN, "auth.mode=token", TOKEN, *TLS],
        ["auth.mode=token", TOKEN],
        [OPEN, "auth.mode=certificate", *MUTUAL],
    ],
)
def test_addresses_and_authentication_that_go_together(overrides: list[str]) -> None:
    assert isinstance(settings(*overrides), ServerSettings)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([OPEN], "server.grpc_address 0.0.0.0:50051 can be reached from other machines"),
        (
            ["server.http_address=10.0.0.1:80"],
            "server.http_address 10.0.0.1:80 can be reached from other machines",
        ),
        (["server.grpc_address=node-1:50051"], "set auth.mode to token or certificate"),
        (
            [OPEN, "auth.mode=token", TOKEN],
            "tokens would cross the network in clear: set tls.enabled to true",
        ),
        (["auth.mode=token"], "auth.mode: token needs at least one caller in auth.tokens"),
        (["auth.mode=token", "auth.tokens=ann=short"], "the token of ann is too short"),
        (["auth.tokens=a=0123456789abcdef,b=0123456789abcdef"], "two callers have the same token"),
        (["auth.mode=certificate", *TLS], "needs tls.enabled: true and tls.client_auth: require"),
        (["tls.enabled=true"], "tls.enabled needs tls.cert_file and tls.key_file"),
        ([*TLS, "tls.client_auth=require"], "tls.client_auth: require needs tls.ca_file"),
        (["heartbeat.interval=20s"], "heartbeat.timeout must be at least twice heartbeat.interval"),
        (["server.grpc_adress=a:1"], "did you mean server.grpc_address?"),
        (["store.backend=mysql"], "input should be 'sqlite', 'etcd' or 'memory'"),
        (["operations.retention=1d12"], "give a duration with its unit"),
    ],
)
def test_what_cannot_stand_together_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings(*overrides)

    assert sentence in refused.value.message


def test_a_token_is_not_shown() -> None:
    made = settings("auth.mode=token", TOKEN)

    assert "0123456789abcdef" not in repr(made)
    assert "0123456789abcdef" not in str(made.model_dump(mode="json"))


def test_tls_and_store_settings_arrive_where_they_are_used() -> None:
    made = settings(
        *MUTUAL, "agents.tls=true", "store.backend=etcd", "etcd.endpoints=a:1,b:2", "store.max_size=1GiB"
    )

    tls = made.server_tls()
    assert isinstance(tls, ServerTls)
    assert tls.client_auth is ClientAuth.REQUIRE
    assert made.agent_tls() is not None
    store = made.store_config()
    assert (store.endpoints, store.tls, store.max_bytes) == (("a:1", "b:2"), None, 1 << 30)
    assert settings("etcd.ca_file=/ca").store_config().tls is not None
    assert settings("etcd.endpoints=https://a:1").store_config().tls is not None


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ([], auth.AnonymousAuthenticator),
        (["auth.mode=insecure"], auth.AnonymousAuthenticator),
        (["auth.mode=token", TOKEN], auth.TokenAuthenticator),
        (["auth.mode=certificate", *MUTUAL], auth.CertificateAuthenticator),
    ],
)
def test_the_mode_chooses_the_authenticator(overrides: list[str], kind: type) -> None:
    assert isinstance(auth.build(settings(*overrides)), kind)


@pytest.mark.parametrize(
    ("overrides", "url"),
    [
        ([], "http://127.0.0.1:8080"),
        (["server.http_address=[::1]:0"], "http://[::1]:8080"),
        (["server.advertise_address=server-1:50051"], "http://server-1:8080"),
        (["server.advertise_http_address=images.example:80"], "http://images.example:80"),
        (TLS, "https://127.0.0.1:8080"),
        (
            ["server.http_address=0.0.0.0:8080", "auth.mode=insecure"],
            f"http://{socket.gethostname()}:8080",
        ),
    ],
)
def test_nodes_are_told_an_address_that_they_can_reach(overrides: list[str], url: str) -> None:
    assert settings(*overrides).http_url(8080) == url


def test_images_are_kept_beside_the_store_unless_told_otherwise() -> None:
    assert settings("store.path=/data/store.db").image_dir() == Path("/data/images")
    assert settings("image_store.dir=/srv/x").image_dir() == Path("/srv/x")


def test_what_agents_say_of_images_may_stand_in_the_same_file() -> None:
    assert "images" in ServerSettings.foreign_sections
