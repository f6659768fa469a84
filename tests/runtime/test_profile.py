"""The profiler: percentiles by stage, overruns, and which of them the machine itself caused."""

from __future__ import annotations

from relod.runtime.clock import NS_PER_MS
from relod.runtime.profile import Profile
from relod.runtime.spans import SpanRing, Stage

CYCLE_NS = 40 * NS_PER_MS
T0_NS = 10**9


class Run:
    """A profile and the writers of the spans it drains."""

    def __init__(self) -> None:
        self.ring = SpanRing(("control", "sentinel"), capacity=64)
        self.kept: list[tuple[str, int]] = []
        self.profile = Profile(self.ring, CYCLE_NS, lambda name, rows: self.kept.append((name, len(rows))))
        self.control, self.sentinel = self.ring.writer("control"), self.ring.writer("sentinel")

    def cycle(self, index: int, *, late_ms: float = 0.1, took_ms: float = 5.0) -> None:
        deadline_ns = T0_NS + index * CYCLE_NS
        start_ns = deadline_ns + int(late_ms * NS_PER_MS)
        end_ns = start_ns + int(took_ms * NS_PER_MS)
        self.control.add(Stage.LATENESS, index, deadline_ns, start_ns)
        self.control.add(Stage.DECIDE, index, start_ns, end_ns)

    def tick(self, at_ms: float, late_ms: float = 0.1) -> None:
        """The sentinel's wake-up that was due at a time after the start."""
        due_ns = T0_NS + int(at_ms * NS_PER_MS)
        self.sentinel.add(Stage.SENTINEL, 0, due_ns, due_ns + int(late_ms * NS_PER_MS))


def test_cycles_in_time_are_no_overruns():
    run = Run()
    for index in range(5):
        run.cycle(index)
    run.profile.drain()
    assert (run.profile.cycles, run.profile.overruns, run.profile.unshared_overruns) == (5, 0, 0)
    assert run.kept == [("control", 10)]


def test_latency_counts_from_the_deadline():
    run = Run()
    run.cycle(0, late_ms=30.0, took_ms=5.0)
    run.cycle(1, late_ms=30.0, took_ms=15.0)
    run.profile.drain(final=True)
    assert (run.profile.cycles, run.profile.overruns) == (2, 1)


def test_an_overrun_is_ours_when_the_sentinel_was_on_time():
    run = Run()
    run.cycle(0, took_ms=60.0)
    run.tick(50)
    run.profile.drain()
    assert (run.profile.overruns, run.profile.unshared_overruns) == (1, 0)  # the sentinel has not reached its end yet
    run.tick(100)
    run.profile.drain()
    assert run.profile.unshared_overruns == 1


def test_an_overrun_is_shared_when_the_sentinel_was_held_up_in_the_same_moment():
    run = Run()
    run.cycle(0, took_ms=60.0)
    run.tick(20, late_ms=25.0)
    run.tick(100)
    run.profile.drain()
    assert (run.profile.overruns, run.profile.unshared_overruns) == (1, 0)


def test_a_small_or_a_distant_stall_excuses_nothing():
    run = Run()
    run.cycle(0, took_ms=60.0)
    run.tick(20, late_ms=9.0)  # less than a quarter of a cycle
    run.tick(80, late_ms=30.0)  # after the overrun was over
    run.profile.drain()
    assert (run.profile.overruns, run.profile.unshared_overruns) == (1, 1)


def test_at_the_end_overruns_are_judged_by_what_is_known():
    run = Run()
    run.cycle(0, took_ms=60.0)
    run.profile.drain(final=True)
    assert (run.profile.overruns, run.profile.unshared_overruns) == (1, 1)


def test_a_cycle_whose_spans_come_in_two_blocks_is_found():
    run = Run()
    run.control.add(Stage.LATENESS, 3, T0_NS, T0_NS + NS_PER_MS)
    run.profile.drain()
    run.control.add(Stage.DECIDE, 3, T0_NS + NS_PER_MS, T0_NS + 50 * NS_PER_MS)
    run.profile.drain(final=True)
    assert (run.profile.cycles, run.profile.overruns) == (1, 1)


def test_the_summary_names_stages_and_percentiles():
    run = Run()
    run.cycle(0, late_ms=2.0)
    run.profile.drain()
    summary = run.profile.summary()
    assert summary["cycle_lateness_ms"]["max"] == 2.0
    assert summary["act_ms"]["max"] == 0.0
    assert {*summary["decide_ms"]} == {"p50", "p90", "p99", "p999", "max"}
