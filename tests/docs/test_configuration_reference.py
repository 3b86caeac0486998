"""The reference of the configuration says what the settings say, and every key is documented."""

import os
from pathlib import Path

import pytest

from hypervisor.agent.config import AgentSettings
from hypervisor.core.settings import Settings, known_keys
from hypervisor.core.settings_docs import reference
from hypervisor.server.config import ServerSettings

PAGE = Path(os.environ.get("CONFIGURATION_REFERENCE", "docs/guide/configuration.md"))
PROGRAMS = (ServerSettings, AgentSettings)


def test_the_page_is_what_the_settings_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(PROGRAMS), (
        "run: python -m hypervisor.core.settings_docs hypervisor.server.config:ServerSettings "
        "hypervisor.agent.config:AgentSettings > docs/guide/configuration.md"
    )


@pytest.mark.parametrize("model", PROGRAMS)
def test_every_key_has_a_description(model: type[Settings]) -> None:
    assert [key for key, field in known_keys(model).items() if not field.description] == []


def test_keys_that_the_architecture_names_are_there() -> None:
    server, agent = known_keys(ServerSettings), known_keys(AgentSettings)

    assert {
        "server.grpc_address",
        "server.http_address",
        "etcd.endpoints",
        "etcd.dial_timeout",
        "heartbeat.interval",
        "heartbeat.timeout",
        "tls.enabled",
        "tls.cert_file",
        "tls.key_file",
        "tls.ca_file",
        "tls.client_auth",
    } <= set(server)
    assert {
        "node.hostname",
        "node.region",
        "node.zone",
        "node.role",
        "agent.port",
        "agent.server_address",
        "drivers.enabled",
        "libvirt.uri",
        "containerd.address",
    } <= set(agent)
