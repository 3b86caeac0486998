"""One server and one agent, whole, for each test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hvtest_whole_cluster import WholeAgent, WholeServer, whole_agent, whole_server


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[WholeServer]:
    async with whole_server(tmp_path) as running:
        yield running


@pytest.fixture
async def agent(server: WholeServer, tmp_path: Path) -> AsyncIterator[WholeAgent]:
    async with whole_agent(server, tmp_path) as running:
        yield running
