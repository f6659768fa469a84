"""When simulated frames are taken and arrive."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relod.robots.simcamera import PRESETS, CameraTiming, SimCamera

MS = 1_000_000
S = 1_000_000_000


class Renderer:
    """An image that is the instant it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, captured_ns):
        self.asked.append(captured_ns)
        return np.full((1, 1, 3), len(self.asked) % 256, np.uint8)


def stamps(frames):
    return [(frame.captured_ns, frame.available_ns) for frame in frames]


def run(preset, seconds=200, seed=0):
    render = Renderer()
    camera = SimCamera(render, PRESETS[preset], seed, 5 * S)
    return camera.due((5 + seconds) * S), render


@settings(max_examples=25, deadline=None)
@given(
    preset=st.sampled_from(sorted(PRESETS)),
    seed=st.integers(0, 1000),
    polls=st.lists(st.integers(1, 3 * S), min_size=1, max_size=40),
)
def test_frames_do_not_depend_on_how_often_they_are_asked_for(preset, seed, polls):
    often, once = (SimCamera(Renderer(), PRESETS[preset], seed, S) for _ in range(2))
    now, got = S, []
    for step in polls:
        now += step
        new = often.due(now)
        assert all(frame.available_ns <= now for frame in new)
        got += new
    whole = once.due(now)
    assert stamps(got) == stamps(whole)
    assert [int(frame.image[0, 0, 0]) for frame in got] == [int(frame.image[0, 0, 0]) for frame in whole]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_frames_come_in_order_and_are_rendered_once(preset):
    frames, render = run(preset)
    captured, available = np.array(stamps(frames)).T
    assert (np.diff(captured) > 0).all()
    assert (np.diff(available) > 0).all()
    assert (available >= captured).all()
    assert (available - captured).max() <= PRESETS[preset].longest_latency_ns
    assert render.asked == captured.tolist()


def test_ideal_camera_is_never_late():
    frames, _ = run("ideal")
    assert len(frames) in (6000, 6001)
    assert all(frame.captured_ns == frame.available_ns for frame in frames)


def test_nominal_camera_has_its_statistics():
    frames, _ = run("nominal", seconds=2000)
    captured, available = np.array(stamps(frames)).T
    latency_ms = (available - captured) / MS
    assert len(frames) == pytest.approx(60_000 * 0.996, rel=0.002)
    assert np.median(latency_ms) == pytest.approx(45, abs=0.3)
    assert latency_ms[latency_ms < 70].std() == pytest.approx(4, rel=0.1)
    held = np.mean(latency_ms > 71)
    assert held == pytest.approx(0.002, rel=0.5)
    intervals_ms = np.diff(captured) / MS
    assert np.median(intervals_ms) == pytest.approx(33.33, abs=0.02)


def test_harsh_camera_delivers_bursts():
    frames, _ = run("harsh")
    captured, available = np.array(stamps(frames)).T
    assert np.median(available - captured) / MS == pytest.approx(100, abs=5)
    assert np.count_nonzero(np.diff(available) < MS) > 50


def test_phase_is_random_and_the_seeds():
    first = [SimCamera(Renderer(), CameraTiming(), seed, 0).due(S)[0].captured_ns for seed in range(50)]
    assert 0 <= min(first) < max(first) < 40 * MS
    assert len(set(first)) == 50


def test_one_frame_per_period():
    period = 45 * MS
    render = Renderer()
    camera = SimCamera.one_frame_per(period, render, PRESETS["nominal"], 3, S)
    counts = [len(camera.due(S + i * period)) for i in range(1, 400)]
    assert set(counts) == {1}
    assert render.asked[:3] == [S, S + period, S + 2 * period]


def test_one_frame_per_period_needs_a_period():
    with pytest.raises(ValueError, match="period must be positive"):
        SimCamera.one_frame_per(0, Renderer(), CameraTiming(), 0, 0)


def test_next_available_says_when_to_ask():
    camera = SimCamera(Renderer(), CameraTiming(), 0, 0)
    due_ns = camera.next_available_ns
    assert camera.due(due_ns - 1) == []
    assert [frame.available_ns for frame in camera.due(due_ns)] == [due_ns]
    assert camera.next_available_ns > due_ns


def test_a_camera_that_loses_everything_is_refused():
    with pytest.raises(msgspec.ValidationError, match="drop"):
        msgspec.convert({"drop": 1.0}, CameraTiming)
