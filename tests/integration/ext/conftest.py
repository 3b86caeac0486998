"""Fixtures of the sampler's tests: both implementations, control groups, and no file left open by any."""

import os
import resource
from collections.abc import Iterator

import pytest

from hvtest_control_groups import Groups
from hvtest_stats import SamplerType, open_descriptors
from hypervisor.ext.stats_sampler import _sampler_c, _sampler_py


@pytest.fixture(params=[_sampler_c.Sampler, _sampler_py.Sampler], ids=["native", "twin"])
def make(request: pytest.FixtureRequest) -> SamplerType:
    """Makes a sampler: the native one, or its twin."""
    made: SamplerType = request.param
    return made


@pytest.fixture(autouse=True)
def no_file_is_left_open() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """As the agent does at its start: as many open files as the system lets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def groups() -> Iterator[Groups]:
    try:
        made = Groups(f"hvtest-{os.getpid()}")
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    yield made
    made.close()
