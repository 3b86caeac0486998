"""The example configuration files are legal, and say what the programs do without them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hypervisor.agent.config import AgentSettings
from hypervisor.core.logging import LogFormat
from hypervisor.core.settings import Settings, load
from hypervisor.server.config import ServerSettings

EXAMPLES = {
    "server": (ServerSettings, Path(os.environ["EXAMPLE_SERVER_CONFIG"])),
    "agent": (AgentSettings, Path(os.environ["EXAMPLE_AGENT_CONFIG"])),
}


@pytest.mark.parametrize("program", EXAMPLES)
def test_an_example_holds_the_defaults_and_logs_for_a_service(program: str) -> None:
    model: type[Settings]
    model, path = EXAMPLES[program]

    loaded = load(model, path=path, environ={}).settings

    expected = load(model, path=None, environ={}, overrides=["log.format=json"]).settings
    assert loaded == expected
    assert loaded.model_dump()["log"]["format"] is LogFormat.JSON
