"""What every robot and its task must do, in both simulated worlds and through its driver.

from relod.testing import RobotContract

class TestMyArm(RobotContract):
    task = "mylab.arm:REACH"
    nowhere = "192.0.2.1"
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import math
import pickle
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ..config import Settings, load
from ..errors import StartError
from ..robots import registry
from ..robots.limits import apply
from ..robots.vision import make_shrink
from ..runtime.check import run_check
from ..runtime.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from ..runtime.cycle import Cycle, Phase
from ..runtime.trial import TrialPlan
from ..runtime.virtual import VirtualRun, World
from ..seeds import random_stream
from ..types import Action, Command, Limits, Observation, SensorWindow, Task

__all__ = ["RobotContract"]

START_NS = NS_PER_S
STAND_LIMIT_S = 2.0  # from the fastest motion
EPISODES = 3
CYCLE_LIMIT = 5000  # in which so many episodes must have ended
DRIVE_CYCLES = 15
CYCLE_S = 0.04
ANSWER_LIMIT_S = 10.0


class RobotContract:
    """Inherit it and name the task; every method is a test."""

    task: str  # a registered name, or "module:attribute" of a TaskEntry
    nowhere: str = "/dev/relod-no-such-robot"  # an address at which there is no robot

    # What it says of itself.

    def test_its_parts_can_be_imported_and_agree(self) -> None:
        entry, settings, task = self._parts()
        driver = registry.load_attribute(entry.driver, "the driver")
        commissioning = registry.load_attribute(entry.commissioning, "what commissioning knows")()
        for part in (driver, commissioning):
            assert part.sensor_names == entry.sensor_names
            assert part.command_names == entry.command_names
        for limits in (task.limits, task.reset_limits):
            assert len(limits.low) == len(limits.high) == len(entry.command_names)
            assert all(low <= 0.0 <= high for low, high in zip(limits.low, limits.high, strict=True)), "zero must stand"
        assert len(task.stop().values) == len(entry.command_names)
        assert len(set(entry.sensor_names)) == len(entry.sensor_names)
        assert commissioning.question
        assert len(commissioning.cruise) == len(entry.command_names)
        assert pickle.loads(pickle.dumps(task.spec)) == task.spec  # noqa: S301 - our own
        assert settings.task == type(settings.task)(), "the world `nominal` must not change the task"

    def test_its_worlds_have_the_usual_names_and_valid_settings(self) -> None:
        entry, _, _ = self._parts()
        worlds = registry.load_attribute(entry.worlds, "the worlds")
        assert {"ideal", "nominal", "harsh"} <= worlds.keys()
        for tree in worlds.values():
            load(entry.sections(), presets=[tree])

    def test_its_specification_makes_sense(self) -> None:
        _, _, task = self._parts()
        spec = task.spec
        assert spec.cycle_ns >= 10 * NS_PER_MS
        assert min(*spec.camera_hw, *spec.image_hw, spec.frames, spec.max_steps, spec.sensor_window) >= 1
        assert spec.image_hw <= spec.camera_hw
        assert len(set(spec.proprio_names)) == spec.proprio_dim
        assert len(set(spec.action_names)) == spec.action_dim >= 1
        assert task.action_history >= 1

    # The task, in virtual time.

    @pytest.mark.parametrize("world", ["ideal", "nominal", "harsh"])
    def test_episodes_begin_and_end_as_they_should(self, world: str) -> None:
        run = _Virtual(self, world, seed=1)
        ends = 0
        for tick in itertools.islice(run.ticks(), CYCLE_LIMIT):
            limits = run.task.limits if tick.phase is Phase.RUNNING else run.task.reset_limits
            assert _within(tick.command, limits), (tick.phase, tick.command)
            if tick.step is not None:
                step = tick.step
                assert step.proprio.shape == (run.task.spec.proprio_dim,)
                assert step.proprio.dtype == np.float32
                assert np.isfinite(step.proprio).all()
                assert math.isfinite(step.reward)
                assert not (step.terminated and step.truncated)
                assert step.index < run.task.spec.max_steps
            if tick.end is not None:
                ends += 1
                assert tick.end.reason
                if ends == EPISODES:
                    return
        raise AssertionError(f"{ends} episodes ended in {CYCLE_LIMIT} cycles, {EPISODES} were expected")

    def test_a_seed_repeats_a_run_bit_by_bit_and_another_one_does_not(self) -> None:
        digests = [_Virtual(self, "nominal", seed).digest(300) for seed in (1, 1, 2)]
        assert digests[0] == digests[1], "the same seed gave another run"
        assert digests[0] != digests[2], "another seed gave the same run"

    def test_actions_are_bounded_and_one_that_is_no_number_stands(self) -> None:
        run = _Virtual(self, "ideal", seed=1)
        window = run.window(100)
        count = run.task.spec.action_dim
        for value in (0.0, 1.0, -1.0):
            assert _within(run.task.command(np.full(count, value, np.float32), window), run.task.limits)
        for far, near in ((3.0, 1.0), (-3.0, -1.0)):
            assert run.task.command(np.full(count, far, np.float32), window) == run.task.command(
                np.full(count, near, np.float32), window
            )
        for number in (math.nan, math.inf):
            assert run.task.command(np.full(count, number, np.float32), window).values == run.task.stop().values

    def test_what_it_sees_is_a_function_of_what_it_is_given(self) -> None:
        run = _Virtual(self, "ideal", seed=1)
        window = run.window(100)
        actions = np.full((run.task.action_history, run.task.spec.action_dim), 0.5, np.float32)
        first, second = (run.task.proprioception(window, actions) for _ in range(2))
        assert first.tolist() == second.tolist()
        assert all(isinstance(value, int | float | str) for value in run.task.status(window).values())

    def test_a_stop_stops_it_in_virtual_time(self) -> None:
        run = _Virtual(self, "nominal", seed=1)
        for _ in itertools.islice(run.ticks(), 150):
            pass
        still = run.stop(STAND_LIMIT_S)
        moved = [run.commissioning.moved(before, after) for before, after in itertools.pairwise(still[-10:])]
        assert not any(moved), "it does not stand after the stop"

    # The driver, in real time.

    def test_its_driver_moves_and_stops_it_and_lets_it_go(self) -> None:
        asyncio.run(self._drive())

    def test_where_there_is_no_robot_it_says_so(self) -> None:
        entry, settings, _ = self._parts()

        async def body() -> None:
            driver = registry.load_attribute(entry.driver, "the driver")(
                self.nowhere, settings.robot, lambda arrived_ns, values: None, lambda text: None
            )
            async with asyncio.timeout(ANSWER_LIMIT_S):
                with pytest.raises(StartError):
                    await driver.open()
            await driver.close()

        asyncio.run(body())

    @pytest.mark.slow
    @pytest.mark.timeout(240)
    def test_it_passes_commissioning_with_every_death(self, tmp_path: Path) -> None:
        entry, settings, _ = self._parts()
        text = io.StringIO()
        with self._served_in_thread() as address:
            plan = TrialPlan(
                driver=entry.driver,
                address=address,
                settings=settings.robot,
                safety=settings.safety,
                robot=registry.load_attribute(entry.commissioning, "what commissioning knows")(),
                log_path=tmp_path / "log",
            )
            result = run_check(plan, None, console=Console(file=text), confirm=lambda question: True)
        assert result.passed, text.getvalue()

    # How.

    def _parts(self, world: str = "nominal") -> tuple[registry.TaskEntry, Settings, Task]:
        entry = registry.task(self.task)
        worlds = registry.load_attribute(entry.worlds, "the worlds")
        settings = load(entry.sections(), presets=[worlds[world]])
        return entry, settings, entry.make_task(settings.task)

    @contextlib.asynccontextmanager
    async def _served(self) -> AsyncIterator[str]:
        """The simulated robot in real time; its address."""
        entry, settings, task = self._parts()
        ready: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        serving = asyncio.create_task(
            registry.load_attribute(entry.emulator, "the simulated world")(
                settings.sim, 0, task.spec, on_ready=ready.set_result, stop=stop, new_episode=asyncio.Event()
            )
        )
        await asyncio.wait([serving, ready], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        try:
            yield ready.result()["port"]
        finally:
            stop.set()
            await serving

    @contextlib.contextmanager
    def _served_in_thread(self) -> Iterator[str]:
        found: list[str] = []
        up = threading.Event()
        loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

        async def body() -> None:
            async with self._served() as address:
                down = asyncio.Event()
                loops.append((asyncio.get_running_loop(), down))
                found.append(address)
                up.set()
                await down.wait()

        thread = threading.Thread(target=asyncio.run, args=(body(),))
        thread.start()
        assert up.wait(ANSWER_LIMIT_S), "the simulated robot did not start"
        try:
            yield found[0]
        finally:
            loop, down = loops[0]
            loop.call_soon_threadsafe(down.set)
            thread.join()

    async def _drive(self) -> None:
        entry, settings, _ = self._parts()
        commissioning = registry.load_attribute(entry.commissioning, "what commissioning knows")()
        packets: list[tuple[int, tuple[float, ...]]] = []
        async with self._served() as address:
            make = registry.load_attribute(entry.driver, "the driver")
            for attempt in range(2):  # the second finds what the first left
                driver = make(
                    address, settings.robot, lambda at_ns, values: packets.append((at_ns, tuple(values))), print
                )
                packets.clear()
                async with asyncio.timeout(ANSWER_LIMIT_S):
                    await driver.open()
                serving = asyncio.create_task(driver.run())
                await asyncio.sleep(0.3)
                assert packets, "no packets come"
                assert {len(values) for _, values in packets} == {len(entry.sensor_names)}
                assert all(before <= after for (before, _), (after, _) in itertools.pairwise(packets))
                if commissioning.take_control:
                    driver.request(commissioning.take_control)
                # Never long in one direction: a robot may have little room.
                for cycle in range(2 * DRIVE_CYCLES):
                    sign = 1.0 if (cycle < DRIVE_CYCLES) == (attempt == 0) else -1.0
                    driver.command(tuple(sign * value for value in commissioning.cruise))
                    await asyncio.sleep(CYCLE_S)
                assert self._moved(commissioning, packets[-10:]), "it does not move"
                driver.command((math.nan,) * len(entry.command_names))
                await self._expect_standing(driver)
                driver.stop()
                driver.stop()
                await self._expect_standing(driver)
                assert not self._moved(commissioning, packets[-3:])
                assert not serving.done()
                serving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await serving
                await driver.close()
                count = len(packets)
                await asyncio.sleep(0.1)
                assert len(packets) == count, "packets come from a driver that was closed"
                assert driver.counters()["packets"] >= count

    @staticmethod
    def _moved(commissioning: Any, packets: Sequence[tuple[int, tuple[float, ...]]]) -> bool:
        return any(commissioning.moved(before, after) for (_, before), (_, after) in itertools.pairwise(packets))

    @staticmethod
    async def _expect_standing(driver: Any) -> None:
        asked_ns = monotonic_ns()
        async with asyncio.timeout(STAND_LIMIT_S):
            while not driver.stands(asked_ns):  # noqa: ASYNC110 - a driver has no event for it
                await asyncio.sleep(0.005)


class _Wanderer:
    """Acts at random, each action for a while."""

    def __init__(self, count: int, seed: int) -> None:
        self._rng, self._count, self._left = random_stream(seed, "contract"), count, 0
        self._action = np.zeros(count, np.float32)

    def act(self, observation: Observation) -> Action:
        if not self._left:
            self._action, self._left = self._rng.uniform(-1.0, 1.0, self._count).astype(np.float32), 10
        self._left -= 1
        return Action(values=self._action)


class _Watched:
    """A world whose packets and frames are checked and counted in a digest."""

    def __init__(self, world: World, sensors: int, hw: tuple[int, int]) -> None:
        self._world, self._sensors, self._hw = world, sensors, hw
        self.digest = sha256()
        self.packets: list[tuple[int, np.ndarray[Any, Any]]] = []

    def advance(self, now_ns: int) -> Any:
        packets, frames = self._world.advance(now_ns)
        for arrived_ns, values in packets:
            assert arrived_ns <= now_ns, "a packet from the future"
            assert not self.packets or arrived_ns >= self.packets[-1][0], "packets out of order"
            assert values.shape == (self._sensors,)
            self.packets.append((arrived_ns, values.copy()))
            self.digest.update(values.tobytes() + arrived_ns.to_bytes(8, "little"))
        for frame in frames:
            assert frame.captured_ns <= frame.available_ns <= now_ns, "a frame from the future"
            assert frame.image.shape == (*self._hw, 3)
            assert frame.image.dtype == np.uint8
            self.digest.update(frame.image.tobytes() + frame.captured_ns.to_bytes(8, "little"))
        return packets, frames

    def execute(self, command: Command, now_ns: int) -> None:
        self._world.execute(command, now_ns)

    def begin_episode(self) -> None:
        self._world.begin_episode()


class _Virtual:
    """A run in virtual time by a wanderer."""

    def __init__(self, contract: RobotContract, world: str, seed: int) -> None:
        entry, settings, self.task = contract._parts(world)
        self.commissioning = registry.load_attribute(entry.commissioning, "what commissioning knows")()
        made = registry.load_attribute(entry.world, "the simulated world")(settings.sim, seed, self.task.spec, START_NS)
        self.world = _Watched(made, len(entry.sensor_names), self.task.spec.camera_hw)
        self._names = entry.sensor_names
        self._now_ns = START_NS
        cycle = Cycle(
            task=self.task,
            actor=_Wanderer(self.task.spec.action_dim, seed),
            safety=settings.safety,
            rng=random_stream(seed, "reset"),
            shrink=make_shrink(self.task.spec.image_hw),
        )
        self._run = VirtualRun(
            cycle=cycle,
            world=self.world,
            spec=self.task.spec,
            sensor_names=entry.sensor_names,
            on_frames=lambda frames: None,
            on_tick=self._on_tick,
        )

    def _on_tick(self, now_ns: int, inputs: Any, tick: Any) -> None:
        self._now_ns = now_ns

    def ticks(self) -> Iterator[Any]:
        return self._run.ticks()

    def digest(self, cycles: int) -> str:
        """Of everything that was sensed and commanded."""
        for tick in itertools.islice(self.ticks(), cycles):
            self.world.digest.update(np.array(tick.command.values).tobytes())
        return self.world.digest.hexdigest()

    def window(self, cycles: int) -> SensorWindow:
        """The newest packets after so many cycles."""
        for _ in itertools.islice(self.ticks(), cycles):
            pass
        newest = self.world.packets[-self.task.spec.sensor_window :]
        return SensorWindow(
            names=self._names,
            seq=np.arange(1, len(newest) + 1, dtype=np.int64),
            arrived_ns=np.array([arrived_ns for arrived_ns, _ in newest], np.int64),
            values=np.array([values for _, values in newest], np.float64),
        )

    def stop(self, duration_s: float) -> list[list[float]]:
        """Packets while it is told to stand, cycle after cycle."""
        first = len(self.world.packets)
        for _ in range(round(duration_s * NS_PER_S / self.task.spec.cycle_ns)):
            self.world.execute(self.task.stop(), self._now_ns)
            self._now_ns += self.task.spec.cycle_ns
            self.world.advance(self._now_ns)
        return [values.tolist() for _, values in self.world.packets[first:]]


def _within(command: Command, limits: Limits) -> bool:
    """Whether a command is one that the limits leave as it is."""
    return apply(Limits(low=limits.low, high=limits.high), command.values, command.values).values == command.values
