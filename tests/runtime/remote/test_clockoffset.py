"""The offset of another host's clock, in simulated time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.runtime.clock import NS_PER_MS, NS_PER_S
from relod.runtime.remote.clockoffset import ClockOffset


class Hosts:
    """Two clocks, the other `offset_ns` ahead at time 0 and `drift_ppm` faster, and a network between them."""

    def __init__(self, offset_ns: int, drift_ppm: int) -> None:
        self.offset_ns, self.drift_ppm = offset_ns, drift_ppm

    def offset_at(self, now_ns: int) -> int:
        return self.offset_ns + now_ns * self.drift_ppm // 1_000_000

    def exchange(self, sent_ns: int, up_ns: int, held_ns: int, down_ns: int) -> tuple[int, int, int, int]:
        received_ns, replied_ns = sent_ns + up_ns, sent_ns + up_ns + held_ns
        return (
            sent_ns,
            received_ns + self.offset_at(received_ns),
            replied_ns + self.offset_at(replied_ns),
            replied_ns + down_ns,
        )


@given(
    offset_ms=st.integers(-3000, 3000),
    drift_ppm=st.integers(-50, 50),
    delays=st.lists(st.tuples(st.integers(1, 300_000), st.integers(1, 300_000)), min_size=1, max_size=60),
)
def test_the_true_offset_is_always_within_the_uncertainty(
    offset_ms: int, drift_ppm: int, delays: list[tuple[int, int]]
) -> None:
    hosts = Hosts(offset_ms * NS_PER_MS, drift_ppm)
    clock = ClockOffset()
    for number, (up_us, down_us) in enumerate(delays):
        stamps = hosts.exchange(number * NS_PER_S, up_us * 1000, 20_000, down_us * 1000)
        assert clock.add(*stamps)
        assert clock.offset_ns is not None
        assert abs(clock.offset_ns - hosts.offset_at(stamps[3])) <= clock.uncertainty_ns + 1
        best_ns = min(up_us + down_us for up_us, down_us in delays[max(0, number - 29) : number + 1]) * 1000
        # never worse than the quickest exchange of the window, were it the window's oldest
        assert clock.uncertainty_ns <= best_ns // 2 + 31 * 100_000


@pytest.mark.parametrize("offset_s", [-3, 0, 3])
@pytest.mark.parametrize("drift_ppm", [-50, 50])
def test_a_busy_link_is_measured_to_within_a_millisecond(offset_s: int, drift_ppm: int) -> None:
    rng = random.Random(offset_s * 100 + drift_ppm)
    hosts = Hosts(offset_s * NS_PER_S, drift_ppm)
    clock = ClockOffset()
    for number in range(240):  # one minute of pings
        up_ns = int(1e6 + rng.expovariate(1 / 5e6))
        down_ns = int(1e6 + rng.expovariate(1 / 2e6))
        stamps = hosts.exchange(number * NS_PER_S // 4, up_ns, 20_000, down_ns)
        clock.add(*stamps)
    assert clock.offset_ms is not None
    assert clock.uncertainty_ms is not None
    assert abs(clock.offset_ms - hosts.offset_at(stamps[3]) / NS_PER_MS) < 1.0
    assert clock.uncertainty_ms < 2.0
    assert clock.up_ms == pytest.approx(1 + 5 * 0.69, abs=3.5)
    assert clock.down_ms == pytest.approx(1 + 2 * 0.69, abs=2)


def test_one_quick_way_each_is_as_good_as_both_at_once() -> None:
    hosts = Hosts(NS_PER_S, 0)
    clock = ClockOffset(drift_ppm=0)
    clock.add(*hosts.exchange(0, NS_PER_MS, 0, 400 * NS_PER_MS))
    assert clock.uncertainty_ms == pytest.approx(200.5, abs=0.01)
    clock.add(*hosts.exchange(NS_PER_S, 400 * NS_PER_MS, 0, NS_PER_MS))
    assert clock.uncertainty_ms == pytest.approx(1.0, abs=0.01)
    assert clock.offset_ms == pytest.approx(1000, abs=0.01)


def test_a_stepped_clock_is_followed_at_once() -> None:
    clock = ClockOffset()
    for number in range(20):
        clock.add(*Hosts(0, 0).exchange(number * NS_PER_S, NS_PER_MS, 0, NS_PER_MS))
    stamps = Hosts(NS_PER_S, 0).exchange(20 * NS_PER_S, NS_PER_MS, 0, NS_PER_MS)
    clock.add(*stamps)
    assert clock.offset_ms == pytest.approx(1000, abs=0.01)
    assert clock.uncertainty_ms == pytest.approx(1, abs=0.01)


def test_a_window_forgets() -> None:
    hosts = Hosts(0, 0)
    clock = ClockOffset(window_ns=10 * NS_PER_S, drift_ppm=0)
    clock.add(*hosts.exchange(0, NS_PER_MS, 0, NS_PER_MS))
    clock.add(*hosts.exchange(9 * NS_PER_S, 50 * NS_PER_MS, 0, 50 * NS_PER_MS))
    assert clock.uncertainty_ms == pytest.approx(1, abs=0.01)
    clock.add(*hosts.exchange(11 * NS_PER_S, 50 * NS_PER_MS, 0, 50 * NS_PER_MS))
    assert clock.uncertainty_ms == pytest.approx(50, abs=0.01)


@pytest.mark.parametrize(
    "stamps",
    [
        (10, 5, 5, 9),  # arrived before it was sent
        (0, 6, 5, 10),  # replied before it was received
        (0, 0, 11, 10),  # held for longer than the exchange took
    ],
)
def test_stamps_that_contradict_themselves_are_not_taken(stamps: tuple[int, int, int, int]) -> None:
    clock = ClockOffset()
    assert not clock.add(*stamps)
    assert clock.offset_ms is None
    assert clock.uncertainty_ms is None
    assert clock.up_ms is None
    assert clock.down_ms is None
