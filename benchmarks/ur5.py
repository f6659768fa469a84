"""What UR5-VisualReacher is worth without learning: a scripted visual servo, random actions, and standing still.

These are the lines a learning curve is read against. The servo is given what an agent is given: it finds the target in
the newest picture, and knows the arm's geometry and its joint angles. Runs whole episodes in virtual time with the
task's default settings, resets included; a new world for each seed, the same ones for every behaviour. Also measures
how fast the simulated world is. Writes JSON with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from virtual_episodes import virtual_episodes

from relod.config import Settings, load
from relod.robots.registry import TaskEntry
from relod.robots.ur5.kinematics import tool_pose, tool_position, tool_rows
from relod.robots.ur5.monitor import SCREEN_HW_M, WristOptics
from relod.robots.ur5.reward import target_fraction, target_mask
from relod.robots.ur5.target import RADIUS, WIDTH
from relod.robots.ur5.visual_reacher import UR5_MIN_TIME, UR5_VISUAL_REACHER, ReacherSettings, VisualReacherSettings
from relod.robots.ur5.world import WORLDS, SimSettings, VirtualUR5, serve_world
from relod.robots.vision import cv2
from relod.runtime.clock import NS_PER_S, cpu_seconds, monotonic_ns
from relod.runtime.curve import bootstrap_interval
from relod.runtime.provenance import describe
from relod.seeds import random_stream
from relod.types import Action, Actor, FloatArray, Observation, SensorWindow

TASKS = {"ur5": UR5_VISUAL_REACHER, "ur5-min-time": UR5_MIN_TIME}

DISC_M = RADIUS / WIDTH * SCREEN_HW_M[1]
LEAST_PIXELS = 4
# The servo's wishes as speed by what is left, and what an error in the picture weighs beside one of place, in m.
MOVE_PER_S, CENTRE_PER_S, CENTRE_WEIGHT = 3.0, 4.0, 0.3
MOST_M_S = 0.5
CLOSE_FRACTION = 0.024  # of the picture that the target fills from the wanted place; it is worth no more from nearer
INSIDE_M = 0.02  # the wanted place keeps this off the faces of the tool's box
EFFORT_WEIGHT = 0.02
TRUST = 0.3  # of the newest sight of the target, beside those before


class Servo:
    """Brings the camera before the target, level, and turns it so that the target is in the picture's middle.

    Knows of the target what its pictures show; of the arm its geometry, its box and its joint angles.
    """

    def __init__(self, settings: ReacherSettings) -> None:
        self._max_speed, self._wrist_3 = settings.max_speed_rad_s, settings.home_rad[5]
        self._low = np.add(settings.box_low_m, INSIDE_M)
        self._high = np.subtract(settings.box_high_m, INSIDE_M)
        optics = WristOptics()
        self._ahead_m = optics.ahead_m
        self._tangent_px = 2 * math.tan(math.radians(optics.hfov_deg) / 2) / settings.image_width
        pixels = CLOSE_FRACTION * settings.image_width * settings.image_height
        self._distance_m = DISC_M / (math.sqrt(pixels / math.pi) * self._tangent_px)
        self._target: np.ndarray[Any, Any] | None = None

    def act(self, observation: Observation) -> Action:
        if not observation.proprio[-5:].any():
            self._target = None  # an episode begins
        q = [*observation.proprio[:5].tolist(), self._wrist_3]
        self._look(observation.images[-1], q)
        if self._target is None:
            return Action(values=np.zeros(5, np.float32))
        speeds = self._speeds(q, self._target)
        return Action(values=(speeds / max(self._max_speed, np.abs(speeds).max())).astype(np.float32))

    def _look(self, image: np.ndarray[Any, Any], q: list[float]) -> None:
        """Where the target is, by its place and size in the picture; where it was, when it is not in it."""
        mask = target_mask(image)
        moments = cv2.moments(mask, True)
        if moments["m00"] < LEAST_PIXELS:
            return
        height, width = mask.shape
        right = (moments["m10"] / moments["m00"] - (width - 1) / 2) * self._tangent_px
        down = (moments["m01"] / moments["m00"] - (height - 1) / 2) * self._tangent_px
        depth_m = DISC_M / (math.sqrt(moments["m00"] / math.pi) * self._tangent_px)
        camera = np.array(tool_pose(q))
        seen = camera[0] + self._ahead_m * camera[1] + depth_m * (camera[1] + right * camera[2] + down * camera[3])
        self._target = seen if self._target is None else self._target + TRUST * (seen - self._target)

    def _speeds(self, q: list[float], target: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Joint speeds that fulfil the wishes best, in the sense of least squares."""
        wanted = np.clip(target - [0.0, self._distance_m + self._ahead_m, 0.0], self._low, self._high)
        way = MOVE_PER_S * (wanted - tool_position(q))
        way *= min(1.0, MOST_M_S / max(np.linalg.norm(way), 1e-9))
        now, step = self._view(q, target), 1e-4
        change = np.array(
            [(self._view([a + step * (i == j) for i, a in enumerate(q)], target) - now) / step for j in range(5)]
        ).T
        rows = np.vstack([np.array(tool_rows(q))[:, :5], CENTRE_WEIGHT * change, EFFORT_WEIGHT * np.eye(5)])
        wishes = np.concatenate([way, -CENTRE_WEIGHT * CENTRE_PER_S * now, np.zeros(5)])
        return np.linalg.lstsq(rows, wishes, rcond=None)[0]

    def _view(self, q: list[float], target: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Where the camera sees a point: tangents to the right and down."""
        camera = np.array(tool_pose(q))
        ahead, right, down = camera[1:] @ (target - camera[0] - self._ahead_m * camera[1])
        return np.array([right / ahead, down / ahead])


class Uniform:
    """Actions uniform in [-1, 1], each held for `hold` cycles."""

    def __init__(self, rng: np.random.Generator, hold: int) -> None:
        self._rng, self._hold, self._left = rng, hold, 0
        self._values: FloatArray = np.zeros(5, np.float32)

    def act(self, observation: Observation) -> Action:
        if self._left == 0:
            self._left = self._hold
            self._values = self._rng.uniform(-1.0, 1.0, 5).astype(np.float32)
        self._left -= 1
        return Action(values=self._values.copy())


class Stand:
    """Does nothing."""

    def act(self, observation: Observation) -> Action:
        return Action(values=np.zeros(5, np.float32))


HOLDS = (15, 60)  # cycles
BEHAVIOURS = ("servo", "stand", "uniform", *(f"held for {hold} cycles" for hold in HOLDS))
SOLVED_FRACTION = 0.015  # of the picture; what the minimum-time task asks for


def build(name: str, settings: ReacherSettings, seed: int) -> Actor:
    """A behaviour by name."""
    if name == "servo":
        return Servo(settings)
    hold = {"uniform": 1, **{f"held for {hold} cycles": hold for hold in HOLDS}}.get(name)
    return Uniform(random_stream(seed, "actor"), hold) if hold else Stand()


class Watched:
    """An actor whose last picture's target is measured; after the first cycle, the largest one, too."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self.largest = 0.0

    def act(self, observation: Observation) -> Action | None:
        self.largest = max(self.largest, target_fraction(observation.images[-1]))
        return self._actor.act(observation)


def sample(entry: TaskEntry, settings: Settings, name: str, seed: int, count: int) -> list[dict[str, Any]]:
    """The first `count` episodes of a run, as plain values."""
    actor = Watched(build(name, settings.task, seed))
    ends = []
    for end in itertools.islice(virtual_episodes(entry, settings, seed, lambda world: actor), count):
        solved = end.success or actor.largest >= SOLVED_FRACTION
        ends.append({"seed": seed, "return": end.return_, "length": end.length, "solved": solved, "reason": end.reason})
        actor.largest = 0.0
    return ends


def measure(ends: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one behaviour."""
    returns = np.array([end["return"] for end in ends])
    low, high = bootstrap_interval(returns[:, None])
    return {
        "episodes": len(ends),
        "solved": sum(end["solved"] for end in ends),
        "mean_return": round(float(returns.mean()), 1),
        "mean_return_95": [round(float(low[0]), 1), round(float(high[0]), 1)],
        "least_return": round(float(returns.min()), 1),
        "largest_return": round(float(returns.max()), 1),
        "mean_length": statistics.mean(end["length"] for end in ends),
        "samples": ends,
    }


def behaviours(entry: TaskEntry, world: str, episodes: int, seeds: list[int]) -> dict[str, Any]:
    """Every behaviour in the same worlds."""
    settings = load(entry.sections(), presets=[WORLDS[world]])
    found = {}
    for name in BEHAVIOURS:
        ends: list[dict[str, Any]] = []
        for index, seed in enumerate(seeds):
            count = episodes * (index + 1) // len(seeds) - episodes * index // len(seeds)
            ends += sample(entry, settings, name, seed, count)
        found[name] = measure(ends)
        print(name, json.dumps({key: value for key, value in found[name].items() if key != "samples"}), flush=True)
    return found


def virtual_steps(count: int) -> float:
    """Steps per second of arm, controller, camera at 30 frames/s, the fence and the task's judgement."""
    task = UR5_VISUAL_REACHER.build(VisualReacherSettings())
    world = VirtualUR5(SimSettings(), 1, task.spec, NS_PER_S)
    actions = np.random.default_rng(0).uniform(-1, 1, (count, 5)).astype(np.float32)
    now_ns = NS_PER_S
    image = None
    started_ns = monotonic_ns()
    for index, action in enumerate(actions):
        now_ns += task.spec.cycle_ns
        packets, frames = world.advance(now_ns)
        arrived_ns, values = packets[-1]
        window = SensorWindow(
            names=UR5_VISUAL_REACHER.sensor_names,
            seq=np.array([index]),
            arrived_ns=np.array([arrived_ns]),
            values=values[None],
        )
        image = frames[-1].image if frames else image
        if image is not None:
            task.judge(window, image, 1)
        task.proprioception(window, action[None])
        world.execute(task.command(action, window), now_ns)
    return count * NS_PER_S / (monotonic_ns() - started_ns)


async def realtime_share(seconds: float) -> float:
    """CPU share of one core of the world process's work in real time, nobody connected but a camera's reader."""
    task, stop = UR5_VISUAL_REACHER.build(VisualReacherSettings()), asyncio.Event()
    share = 0.0

    async def measure_share() -> None:
        nonlocal share
        await asyncio.sleep(1.0)
        before_s, started_ns = cpu_seconds(), monotonic_ns()
        await asyncio.sleep(seconds)
        share = (cpu_seconds() - before_s) * NS_PER_S / (monotonic_ns() - started_ns)
        stop.set()

    with tempfile.TemporaryDirectory() as folder:
        serving = serve_world(
            SimSettings(),
            1,
            task.spec,
            on_ready=lambda where: None,
            stop=stop,
            new_episode=asyncio.Event(),
            frames=Path(folder) / "frames.sock",
        )
        await asyncio.gather(serving, measure_share())
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=list(TASKS), default="ur5")
    parser.add_argument("--episodes", type=int, default=40, help="of each behaviour, shared among the seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)), help="of the worlds")
    parser.add_argument("--world", default="nominal", help="ideal, nominal or harsh")
    parser.add_argument("--rounds", type=int, default=9, help="of the speed of virtual time")
    parser.add_argument("--steps", type=int, default=400, help="a round")
    parser.add_argument("--seconds", type=float, default=10.0, help="of real time")
    parser.add_argument("--out", type=Path, default=Path("out/ur5.json"))
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    found = behaviours(TASKS[arguments.task], arguments.world, arguments.episodes, arguments.seeds)
    speeds = [virtual_steps(arguments.steps) for _ in range(arguments.rounds)]
    document = {
        "benchmark": "ur5",
        **describe(sys.argv),
        "task": arguments.task,
        "world": arguments.world,
        "virtual_steps_per_s": statistics.median(speeds),
        "realtime_core_share": asyncio.run(realtime_share(arguments.seconds)),
        "behaviours": found,
        "virtual_samples": speeds,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2))
    print({key: document[key] for key in ("virtual_steps_per_s", "realtime_core_share")})


if __name__ == "__main__":
    main()
