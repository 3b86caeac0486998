"""Keys of agent.yaml: defaults, and mistakes that are told."""

from typing import Any

import pytest

from hypervisor.agent.config import AgentSettings
from hypervisor.agent.simulated import simulated_settings
from hypervisor.core.settings import SettingsError, load
from hypervisor.core.states import NodeRole


def _load(*overrides: str, environ: dict[str, str] | None = None) -> AgentSettings:
    return load(AgentSettings, path=None, environ=environ or {}, overrides=overrides).settings


def test_defaults_are_a_worker_on_loopback_that_runs_containers() -> None:
    settings = _load()

    assert (settings.agent.bind, settings.agent.port) == ("127.0.0.1", 50052)
    assert settings.agent.server_address == ("127.0.0.1:50051",)
    assert settings.node.role is NodeRole.WORKER
    assert settings.drivers.enabled == ("vm", "container", "microvm")
    assert settings.server_tls() is None
    assert settings.client_tls() is None


def test_keys_come_from_the_environment_too() -> None:
    settings = _load(
        environ={
            "HYPERVISOR_AGENT__SERVER_ADDRESS": "a:1,b:2",
            "HYPERVISOR_DRIVERS__ENABLED": "vm,container",
            "HYPERVISOR_NODE__LABELS": "disk=ssd,gpu=yes",
            "HYPERVISOR_SERVER__GRPC_ADDRESS": "is:1",
        }
    )

    assert settings.agent.server_address == ("a:1", "b:2")
    assert settings.drivers.enabled == ("vm", "container")
    assert settings.node.labels == {"disk": "ssd", "gpu": "yes"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("agent.prt=1", "agent.port"),
        ("agent.port=70000", "agent.port"),
        ("agent.bind=nowhere", "agent.bind"),
        ("agent.server_address=localhost", "host:port"),
        ("node.hostname=bad name", "node.hostname"),
        ("node.zone=", "node.zone"),
        ("node.role=king", "node.role"),
        ("node.labels=bad key=x", "node.labels"),
        ("tls.enabled=true", "tls.cert_file"),
        ("drivers.health_interval=5", "drivers.health_interval"),
        ("containerd.namespace=ends-badly_", "containerd.namespace"),
        ("stats.interval=50ms", "stats.interval"),
        ("stats.interval=61s", "stats.interval"),
        ("stats.slow_interval=500ms", "stats.slow_interval must not be shorter"),
        ("stats.history=0", "stats.history"),
        ("metrics.address=nowhere", "host:port"),
        ("metrics.max_instances=-1", "metrics.max_instances"),
    ],
)
def test_a_mistake_names_its_key(override: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        _load(override)

    assert words in caught.value.message


def test_a_reachable_address_needs_client_certificates() -> None:
    with pytest.raises(SettingsError) as caught:
        _load("agent.bind=0.0.0.0")
    assert "tls.client_auth: require" in caught.value.message

    tls = ("tls.enabled=true", "tls.cert_file=c", "tls.key_file=k", "tls.ca_file=a")
    assert _load("agent.bind=0.0.0.0", *tls).agent.bind == "0.0.0.0"
    with pytest.raises(SettingsError):
        _load("agent.bind=0.0.0.0", *tls, "tls.client_auth=none")
    assert _load("agent.bind=0.0.0.0", "agent.insecure=true").agent.insecure


def test_metrics_that_others_can_reach_need_client_certificates() -> None:
    with pytest.raises(SettingsError, match=r"metrics\.address 0\.0\.0\.0:9 can be reached"):
        _load("metrics.address=0.0.0.0:9")

    tls = ("tls.enabled=true", "tls.cert_file=c", "tls.key_file=k", "tls.ca_file=a")
    assert _load("metrics.address=0.0.0.0:9", *tls).metrics.address == "0.0.0.0:9"
    assert _load("metrics.address=[::1]:9").metrics.address == "[::1]:9"
    assert _load("metrics.address=").metrics.address == ""


@pytest.mark.parametrize(
    ("changes", "address"),
    [
        ({}, "127.0.0.1"),
        ({"bind": "10.0.0.5", "insecure": True}, "10.0.0.5"),
    ],
)
def test_servers_reach_the_agent_where_it_listens(changes: dict[str, Any], address: str) -> None:
    assert AgentSettings.model_validate({"agent": changes}).address() == address


def test_a_given_address_wins() -> None:
    assert _load("node.address=node-1.example").address() == "node-1.example"


def test_the_token_is_not_shown() -> None:
    assert "secret-token" not in repr(_load("agent.token=secret-token"))


def test_simulated_nodes_share_nothing() -> None:
    settings = _load("node.hostname=sim", "simulated.first_port=6000", "agent.data_dir=/data")

    nodes = [simulated_settings(settings, index) for index in range(3)]

    assert [n.node.hostname for n in nodes] == ["sim-0001", "sim-0002", "sim-0003"]
    assert [n.agent.port for n in nodes] == [6000, 6001, 6002]
    assert len({n.agent.data_dir for n in nodes}) == 3
    assert all(n.drivers.enabled == ("fake",) for n in nodes)
    assert [n.metrics.address for n in nodes] == [""] * 3
    assert {n.stats.interval for n in nodes} == {10.0}


def test_simulated_nodes_take_any_port_unless_told() -> None:
    assert simulated_settings(_load(), 7).agent.port == 0
