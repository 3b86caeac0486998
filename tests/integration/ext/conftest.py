"""Fixtures of the sampler's tests: both implementations, and no file left open by any."""

from collections.abc import Iterator

import pytest

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
