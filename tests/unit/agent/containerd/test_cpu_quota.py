"""How thousandths of a core become a limit of the kernel."""

import pytest

from hypervisor.agent.drivers.cpu_quota import cpu_limit


@pytest.mark.parametrize(
    ("millis", "quota", "period", "shares"),
    [
        (1000, 100_000, 100_000, 1024),
        (250, 25_000, 100_000, 256),
        (64_000, 6_400_000, 100_000, 65_536),
        (10, 1_000, 100_000, 10),
        (5, 1_000, 200_000, 5),
        (1, 1_000, 1_000_000, 2),
        (1_024_000, 102_400_000, 100_000, 262_144),
    ],
)
def test_processor_limits_keep_to_what_the_kernel_accepts(
    millis: int, quota: int, period: int, shares: int
) -> None:
    limit = cpu_limit(millis)

    assert (limit.quota_us, limit.period_us, limit.shares) == (quota, period, shares)
    assert limit.quota_us / limit.period_us == pytest.approx(millis / 1000)
