"""Summaries of samples anywhere, and the timer itself where there is a GPU."""

import time

import pytest
import torch

from etap_integration.timing import Budget, Sample, Timer, captured, quantile

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels on a GPU")]


def test_quantiles():
    assert quantile([1.0], 0.2) == 1.0
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)


def test_samples_are_summarised():
    assert Sample.of([3.0, 1.0, 2.0]) == Sample(2.0, pytest.approx(1.4), pytest.approx(2.6), 3)
    assert Sample.of([3.0, 1.0, 2.0], [9.0]) == Sample(2.0, pytest.approx(1.4), pytest.approx(2.6), 3, 0.25)
    assert Sample.of([1.0], [2.0, 3.0]) == Sample(2.0, pytest.approx(1.4), pytest.approx(2.6), 3, pytest.approx(2 / 3))


@pytest.mark.parametrize(("cost_us", "samples"), [(1.0, 50), (100.0, 50), (400.0, 12), (1e5, 2)])
def test_budget_bounds_the_samples(cost_us, samples):
    assert Budget(span_ms=40, rounds=8, min_samples=16, max_samples=400).samples_per_round(cost_us) == samples


class TestTimer:
    """A kernel that waits a given number of clock cycles is the yardstick."""

    pytestmark = needs_gpu

    def test_calls_are_timed_alone(self):
        calls = {cycles: lambda cycles=cycles: torch.cuda._sleep(cycles) for cycles in (200_000, 400_000)}
        samples = Timer(Budget(span_ms=10)).interleaved(calls)
        assert samples[400_000].median_us / samples[200_000].median_us == pytest.approx(2, rel=0.1)
        assert all(sample.p20_us <= sample.median_us <= sample.p80_us for sample in samples.values())

    def test_a_host_that_is_slower_than_the_device_gets_ahead_again(self):
        def slow() -> None:
            until = time.perf_counter() + 300e-6
            while time.perf_counter() < until:
                pass
            torch.cuda._sleep(100_000)

        sample = Timer(Budget(span_ms=20)).interleaved({"slow": slow, "fast": lambda: torch.cuda._sleep(100_000)})
        assert sample["slow"].late < 0.5
        assert sample["slow"].median_us == pytest.approx(sample["fast"].median_us, rel=0.1)

    def test_a_captured_call_replays(self):
        count = torch.zeros(1, device="cuda")
        replay = captured(lambda: count.add_(1))
        before = count.item()
        for _ in range(3):
            replay()
        assert count.item() == before + 3
