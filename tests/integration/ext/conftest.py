"""What the tests of the extensions share: both implementations of each, and no file left open by any."""

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hvtest_stats import SamplerType, open_descriptors
from hypervisor.ext.console_mux import _mux_c, _mux_py
from hypervisor.ext.stats_sampler import _sampler_c, _sampler_py

LIMIT_S = 20.0
_MULTIPLEXERS: dict[str, Any] = {"native": _mux_c.ConsoleMux, "python": _mux_py.ConsoleMux}


@pytest.fixture(autouse=True)
def no_file_is_left_open() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture(params=[_sampler_c.Sampler, _sampler_py.Sampler], ids=["native", "twin"])
def make(request: pytest.FixtureRequest) -> SamplerType:
    """Makes a sampler: the native one, or its twin."""
    made: SamplerType = request.param
    return made


