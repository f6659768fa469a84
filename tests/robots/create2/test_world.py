"""The simulated world of a Create 2 in virtual time: same seed, same world; and it answers commands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from relod.config import load
from relod.robots.create2.driver import Request
from relod.robots.create2.oi import Mode
from relod.robots.create2.reacher import CREATE_REACHER, CreateReacher, ReacherSettings
from relod.robots.create2.world import WORLDS, SimSettings, VirtualCreate
from relod.runtime.clock import NS_PER_MS, NS_PER_S
from relod.types import Command

SPEC = CreateReacher(ReacherSettings(camera_height=24, camera_width=32, image_height=24, image_width=32)).spec
NAMES = CREATE_REACHER.sensor_names
CYCLE_NS = SPEC.cycle_ns


def settings(name: str = "nominal", **values: object) -> SimSettings:
    assignments = [f"sim.{key}={value}" for key, value in values.items()]
    loaded = load(CREATE_REACHER.sections(), presets=[WORLDS[name]], assignments=assignments)
    assert isinstance(loaded.sim, SimSettings)
    return loaded.sim


class Run:
    """A world driven cycle by cycle, with all it gave."""

    def __init__(self, seed: int = 0, sim: SimSettings | None = None) -> None:
        self.now_ns = NS_PER_S
        self.world = VirtualCreate(sim or settings(), seed, SPEC, NS_PER_S)
        self.packets: list[tuple[int, np.ndarray]] = []
        self.frames: list = []

    def go(self, cycles: int, speed: tuple[float, float] = (0.0, 0.0), request: Request = Request.NONE) -> Run:
        for _ in range(cycles):
            self.now_ns += CYCLE_NS
            packets, frames = self.world.advance(self.now_ns)
            self.packets += packets
            self.frames += frames
            self.world.execute(Command(values=speed, request=int(request)), self.now_ns + 2 * NS_PER_MS)
            request = Request.NONE
        return self

    def newest(self, name: str) -> float:
        return float(self.packets[-1][1][NAMES.index(name)])

    def trace(self) -> list[object]:
        packets = [(arrived_ns, values.tobytes()) for arrived_ns, values in self.packets]
        return [packets, [(f.captured_ns, f.available_ns, f.image.tobytes()) for f in self.frames]]


def picture(run: Run) -> np.ndarray:
    """The newest frames' mean colours in blocks of 8x8 pixels, without the camera's noise."""
    mean = np.mean([frame.image for frame in run.frames[-10:]], axis=0)
    blocks: np.ndarray = mean.reshape(3, 8, 4, 8, 3).mean(axis=(1, 3))
    return blocks


def test_packets_and_frames_come_at_the_rates_of_the_real_robot():
    run = Run().go(100)  # 4.5 s
    assert len(run.packets) == pytest.approx(4.5 / 0.015, rel=0.05)
    assert len(run.frames) == pytest.approx(4.5 * 30, rel=0.05)
    assert all(values.shape == (len(NAMES),) for _, values in run.packets)
    assert {run.newest("connection_epoch")} == {1.0}
    assert run.newest("oi_mode") == Mode.SAFE
    for stamps in ([ns for ns, _ in run.packets], [f.available_ns for f in run.frames]):
        assert stamps == sorted(stamps)
        assert stamps[0] > NS_PER_S
        assert stamps[-1] <= run.now_ns
    for frame in run.frames:
        assert frame.captured_ns <= frame.available_ns
        assert (frame.image.shape, frame.image.dtype) == ((24, 32, 3), np.uint8)


@pytest.mark.parametrize("world", list(WORLDS))
def test_the_same_seed_gives_the_same_world_and_another_seed_another(world):
    def trace(seed: int) -> list[object]:
        return Run(seed, settings(world)).go(30, (120.0, 80.0)).trace()

    assert trace(3) == trace(3)
    assert trace(3) != trace(4)


def test_what_arrives_does_not_depend_on_how_often_it_is_asked_for():
    often, seldom = Run(), Run()
    for _ in range(20):
        often.now_ns += CYCLE_NS
        for at_ns in (often.now_ns - 30 * NS_PER_MS, often.now_ns - NS_PER_MS, often.now_ns):
            packets, frames = often.world.advance(at_ns)
            often.packets += packets
            often.frames += frames
        often.world.execute(Command(values=(0.0, 0.0)), often.now_ns + 2 * NS_PER_MS)
    assert often.trace() == seldom.go(20).trace()


def test_the_wheels_follow_commands():
    run = Run(sim=settings("ideal")).go(10)
    left, right = run.newest("encoder_left_counts"), run.newest("encoder_right_counts")
    run.go(20, (100.0, 50.0))
    forth = run.newest("encoder_left_counts") - left, run.newest("encoder_right_counts") - right
    assert forth[0] == pytest.approx(2 * forth[1], rel=0.1)
    assert forth[0] > 50
    run.go(10)
    at = run.newest("encoder_left_counts")
    run.go(10)
    assert run.newest("encoder_left_counts") == at


def test_requests_go_out_before_the_motion():
    run = Run().go(5)
    assert run.go(3, request=Request.PASSIVE).newest("oi_mode") == Mode.PASSIVE
    assert run.go(3, request=Request.SAFE).newest("oi_mode") == Mode.SAFE


def test_one_frame_per_step_when_asked_for():
    run = Run(sim=settings(frame_per_step="true"))
    counts = []
    for _ in range(40):
        before = len(run.frames)
        run.go(1)
        counts.append(len(run.frames) - before)
    assert set(counts[2:]) == {1}
    assert {b.captured_ns - a.captured_ns for a, b in zip(run.frames, run.frames[1:], strict=False)} == {CYCLE_NS}


@pytest.mark.parametrize(("look", "level", "changes"), [("run", 1, False), ("episode", 1, True), ("episode", 0, False)])
def test_the_arena_gets_a_new_look_per_episode_only_when_asked_for(look, level, changes):
    run = Run(sim=settings("ideal", look=look, look_level=level)).go(20)
    before = picture(run)
    run.world.begin_episode()
    assert (np.abs(picture(run.go(20)) - before).max() > 8.0) == changes


@pytest.mark.parametrize("world", list(WORLDS))
def test_every_named_world_makes_settings(world):
    assert settings(world).camera.fps == 30.0
    assert settings("ideal").camera.drop == 0.0
    assert settings("harsh").camera.latency_ms > settings("nominal").camera.latency_ms


def test_a_camera_of_another_size_is_rendered_at_that_size():
    world = VirtualCreate(settings(), 0, replace(SPEC, camera_hw=(30, 40)), NS_PER_S)
    _, frames = world.advance(NS_PER_S + 10 * CYCLE_NS)
    assert frames[-1].image.shape == (30, 40, 3)
