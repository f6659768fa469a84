"""Tasks, drivers and simulated worlds behind their own interfaces: every call named, and what comes back looked at.

Relod's own go through the same adapters: a comparison of shapes takes microseconds, and a camera or a wire can make
any of them fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import PackageError, RelodError, SettingsError, StartError
from ..packages import Watch, calling, check_methods, full_name, shown
from ..types import Command, FloatArray, Image, Limits, Outcome, Reset, SensorWindow, Task, TaskSpec

__all__ = ["CheckedDriver", "CheckedTask", "CheckedWorld", "check_task"]

HINT = "docs/robots/add-your-own.md and relod.types say what a robot's package offers"
TASK_METHODS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "proprioception": (2, ()),
    "judge": (3, ()),
    "command": (2, ()),
    "stop": (0, ()),
    "reset": (1, ()),
    "status": (1, ()),
}
DRIVER_METHODS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "open": (0, ()),
    "run": (0, ()),
    "command": (1, ()),
    "request": (1, ()),
    "stop": (0, ()),
    "close": (0, ()),
    "guarded_wire": (0, ()),
    "stands": (1, ()),
    "counters": (0, ()),
}
WORLD_METHODS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "advance": (1, ()),
    "execute": (2, ()),
    "begin_episode": (0, ()),
}


def check_task(task: Any, command_names: Sequence[str]) -> Task:
    """The task, which has all that is asked of one; `SettingsError` says what it lacks."""
    for name, kind in (("spec", TaskSpec), ("action_history", int), ("limits", Limits), ("reset_limits", Limits)):
        value = getattr(task, name, None)
        if not isinstance(value, kind):
            told = f"is {shown(value)}" if hasattr(task, name) else "is missing"
            raise SettingsError(f"{full_name(task)}.{name} {told}, not a {full_name(kind)}", HINT)
    check_methods(task, TASK_METHODS, SettingsError, HINT)
    spec, count = task.spec, len(command_names)
    for name, number in (
        ("spec.cycle_ns", spec.cycle_ns),
        ("spec.frames", spec.frames),
        ("spec.max_steps", spec.max_steps),
        ("spec.sensor_window", spec.sensor_window),
        ("spec.action_dim", spec.action_dim),
        ("action_history", task.action_history),
    ):
        if number < 1:
            raise SettingsError(f"{full_name(task)}.{name} is {number}, and must be 1 at least", HINT)
    for name in ("limits", "reset_limits"):
        limits: Limits = getattr(task, name)
        if len(limits.low) != count or len(limits.high) != count or len(limits.max_slew or limits.low) != count:
            raise SettingsError(f"{full_name(task)}.{name} must hold {count} values each, as {command_names}", HINT)
        if not all(low <= 0.0 <= high for low, high in zip(limits.low, limits.high, strict=True)):
            raise SettingsError(f"{full_name(task)}.{name}: {shown(limits)} leave out zero, which stands", HINT)
    try:
        CheckedTask(task).stop()
    except PackageError as error:
        raise SettingsError(error.message, error.hint) from error
    found: Task = task
    return found


class CheckedTask:
    """See `types.Task`. `PackageError` for what is raised there, or is not what the interface says."""

    def __init__(self, task: Task, watch: Watch | None = None) -> None:
        self._watch = watch
        self._task = task
        self.spec, self.action_history = task.spec, task.action_history
        self.limits, self.reset_limits = task.limits, task.reset_limits
        self._count = len(task.limits.low)
        self._still = Command(values=(0.0,) * self._count)
        self._names = {name: full_name(task, name) for name in TASK_METHODS}

    def proprioception(self, window: SensorWindow, previous_actions: FloatArray) -> FloatArray:
        who = self._names["proprioception"]
        with calling(who, watch=self._watch):
            vector = self._task.proprioception(window, previous_actions)
        wanted = (self.spec.proprio_dim,)
        if not isinstance(vector, np.ndarray) or vector.shape != wanted or vector.dtype != np.float32:
            told = f"{vector.shape} {vector.dtype}" if isinstance(vector, np.ndarray) else shown(vector)
            raise PackageError(f"{who} returned {told}, not an array {wanted} float32", HINT)
        if not np.isfinite(vector).all():
            index = int(np.flatnonzero(~np.isfinite(vector))[0])
            raise PackageError(
                f"{who} says that {self.spec.proprio_names[index]!r} is {vector[index]}",
                "which sensor gave that? `relod check` shows all of them",
            )
        return vector

    def judge(self, window: SensorWindow, image: Image, index: int) -> Outcome:
        who = self._names["judge"]
        with calling(who, watch=self._watch):
            outcome = self._task.judge(window, image, index)
        if not isinstance(outcome, Outcome):
            raise PackageError(f"{who} returned {shown(outcome)}, not a relod.types.Outcome", HINT)
        try:
            finite = math.isfinite(outcome.reward)
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise PackageError(f"{who} gave a reward of {shown(outcome.reward)} in step {index}", HINT)
        return Outcome(  # a NumPy scalar is as good as a number here, but not in a message
            reward=float(outcome.reward),
            terminated=bool(outcome.terminated),
            truncated=bool(outcome.truncated),
            success=bool(outcome.success),
            reason=str(outcome.reason),
        )

    def command(self, action: FloatArray, window: SensorWindow) -> Command:
        """The command; values that are not finite pass, for the limits make a stop of them."""
        who = self._names["command"]
        with calling(who, watch=self._watch):
            return self._sound(self._task.command(action, window), who)

    def stop(self) -> Command:
        """The command to stand; zeros, which stand, when the task fails to say."""
        who = self._names["stop"]
        with calling(who, watch=self._watch):
            command = self._sound(self._task.stop(), who)
        if not all(map(math.isfinite, command.values)):
            raise PackageError(f"{who} returned {shown(command)}, which is not finite", HINT)
        return command

    def stand(self) -> Command:
        """`stop`, or zeros where that fails: never raises."""
        try:
            return self.stop()
        except PackageError:
            return self._still

    def reset(self, rng: np.random.Generator) -> Reset:
        who = self._names["reset"]
        with calling(who, watch=self._watch):
            reset = self._task.reset(rng)
        if not (hasattr(reset, "send") and hasattr(reset, "__next__")):
            raise PackageError(f"{who} returned {shown(reset)}, not a generator of commands", HINT)
        return self._resetting(reset, who)

    def _resetting(self, reset: Reset, who: str) -> Reset:
        seen: tuple[int, SensorWindow] | None = None
        while True:
            with calling(who, watch=self._watch):
                try:
                    command = next(reset) if seen is None else reset.send(seen)
                except StopIteration:
                    return
            seen = yield self._sound(command, who)

    def status(self, window: SensorWindow) -> Mapping[str, float | str]:
        who = self._names["status"]
        with calling(who, watch=self._watch):
            found = {
                name: value if isinstance(value, str) else float(value)
                for name, value in self._task.status(window).items()
            }
        return found

    def _sound(self, command: Any, who: str) -> Command:
        if not isinstance(command, Command):
            raise PackageError(f"{who} gave {shown(command)}, not a relod.types.Command", HINT)
        if not isinstance(command.values, tuple) or len(command.values) != self._count:
            raise PackageError(f"{who} gave {shown(command.values)}, not a tuple of {self._count} values", HINT)
        if all(type(value) is float for value in command.values):
            return command
        if not all(isinstance(value, float | int | np.number) for value in command.values):
            raise PackageError(f"{who} gave {shown(command.values)}, which are not all numbers", HINT)
        return Command(values=tuple(map(float, command.values)), request=command.request)


class CheckedDriver:
    """See `runtime.device.DeviceDriver`. An error in `open` becomes a `StartError`.

    `OSError` of `command` and `request` passes: it is their word for a wire that is gone, as are all `RelodError`s.
    `stop` never raises: it is called where a robot may be moving, and whoever calls it tries again. What went wrong in
    it, or where nobody waits for an answer, is told to `on_failure`, as is a packet of the wrong size.
    """

    def __init__(self, factory: Any, sensor_names: tuple[str, ...], on_failure: Callable[[RelodError], object]) -> None:
        self._factory, self._sensor_names, self._on_failure = factory, sensor_names, on_failure
        self._published = 0

    def make(
        self,
        address: str,
        settings: Any,
        publish: Callable[[int, Sequence[float]], object],
        on_event: Callable[[str], object],
    ) -> CheckedDriver:
        """Build the driver."""

        def checked(arrived_ns: int, values: Sequence[float]) -> None:
            if len(values) != len(self._sensor_names):
                error = PackageError(
                    f"{full_name(self._driver)} published a packet of {len(values)} values, and its task names"
                    f" {len(self._sensor_names)}",
                    HINT,
                )
                self._on_failure(error)
                raise error
            self._published += 1
            publish(arrived_ns, values)

        with calling(full_name(self._factory), StartError):
            self._driver = self._factory(address, settings, checked, on_event)
        check_methods(self._driver, DRIVER_METHODS, SettingsError, HINT)
        for name in ("sensor_names", "reopen_limit_s", "connection_epoch"):
            if not hasattr(self._driver, name):
                raise SettingsError(f"{full_name(self._driver)} has no attribute {name!r}", HINT)
        theirs = tuple(self._driver.sensor_names)
        if theirs != self._sensor_names:
            odd = sorted({*theirs} ^ {*self._sensor_names}) or "their order"
            raise SettingsError(f"{full_name(self._driver)} and its task differ in sensor_names: {shown(odd)}", HINT)
        return self

    @property
    def reopen_limit_s(self) -> float:
        return float(self._driver.reopen_limit_s)

    def resume_epoch(self, epoch: int) -> None:
        """Count connections on from there."""
        self._driver.connection_epoch = epoch

    @property
    def published(self) -> int:
        """Packets so far."""
        return self._published

    @property
    def name(self) -> str:
        return full_name(self._driver)

    async def open(self) -> None:
        with calling(self._name("open"), StartError):
            await self._driver.open()

    async def run(self) -> None:
        with calling(self._name("run")):
            await self._driver.run()
        raise PackageError(f"{self._name('run')} returned, and must serve until the device is lost", HINT)

    def command(self, values: tuple[float, ...]) -> None:
        with calling(self._name("command"), passing=OSError):
            self._driver.command(values)

    def request(self, request: int) -> None:
        with calling(self._name("request"), passing=OSError):
            self._driver.request(request)

    def stop(self) -> None:
        try:
            with calling(self._name("stop")):
                self._driver.stop()
        except RelodError as error:
            self._on_failure(error)

    async def close(self) -> None:
        with calling(self._name("close")):
            await self._driver.close()

    def guarded_wire(self) -> tuple[int, bytes] | None:
        with calling(self._name("guarded_wire"), StartError):
            found: tuple[int, bytes] | None = self._driver.guarded_wire()
        return found

    def stands(self, after_ns: int) -> bool:
        """Whether the driver says so; False, and told, where it fails to say."""
        try:
            with calling(self._name("stands")):
                return bool(self._driver.stands(after_ns))
        except RelodError as error:
            self._on_failure(error)
            return False

    def counters(self) -> dict[str, float | str]:
        with calling(self._name("counters")):
            found = {n: v if isinstance(v, str) else float(v) for n, v in self._driver.counters().items()}
        return {"packets": float(self._published), **found}

    def _name(self, method: str) -> str:
        return full_name(self._driver, method)


class CheckedWorld:
    """See `runtime.virtual.World`: the simulated world in virtual time."""

    def __init__(self, world: Any, sensor_count: int) -> None:
        check_methods(world, WORLD_METHODS, SettingsError, HINT)
        self._world, self._sensor_count = world, sensor_count

    def advance(self, now_ns: int) -> Any:
        who = full_name(self._world, "advance")
        with calling(who):
            packets, frames = self._world.advance(now_ns)
            for _, values in packets:
                if len(values) != self._sensor_count:
                    raise PackageError(
                        f"{who} gave a packet of {len(values)} values, and its task names {self._sensor_count}", HINT
                    )
        return packets, frames

    def execute(self, command: Command, now_ns: int) -> None:
        with calling(full_name(self._world, "execute")):
            self._world.execute(command, now_ns)

    def begin_episode(self) -> None:
        with calling(full_name(self._world, "begin_episode")):
            self._world.begin_episode()
