"""The control cycle as a pure function: (now, sensors and frames) -> (command, transition).

No I/O, no clock, no process. The wall driver (`control.py`) and the virtual driver (`virtual.py`) both call
`Cycle.tick` once a cycle; a recorded run replays through it bit for bit, because all it depends on is what it is
given: the stamps, the inputs, and an actor and a generator with states of their own.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..config import SafetySettings
from ..errors import PackageError, SafetyStop
from ..packages import Watch, calling, full_name, shown
from ..robots.checked import CheckedTask
from ..robots.limits import Limits, apply
from ..types import (
    Action,
    Actor,
    Command,
    EpisodeEnd,
    Frame,
    Image,
    Observation,
    Reset,
    SensorWindow,
    Step,
    Task,
)
from .clock import NS_PER_MS, NS_PER_S

__all__ = ["Cycle", "Inputs", "Phase", "Tick"]

MAX_REJECTED = 25  # commands that are not finite, in a row: a second in which the robot stood


class Phase(enum.Enum):
    """What the robot is about. HOLDING -> RESETTING -> WAITING -> RUNNING -> RESETTING ...; any -> HOLDING, OVER."""

    HOLDING = "holding"  # sensors or frames are too old: stand until they are fresh
    RESETTING = "resetting"  # on the way to the start of an episode
    WAITING = "waiting"  # the reset is over: stand until everything seen is younger than its end
    RUNNING = "running"  # an episode
    OVER = "over"  # the run has its steps, or was told to end: stand


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the robot's senses hold at a deadline."""

    window: SensorWindow  # newest packets, oldest first; may be short or empty at the start
    frames: tuple[Frame, ...]  # newest frames at full size, oldest first; may be fewer than the task's k
    hold: str = ""  # why no episode may begin now; empty when one may


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """What one cycle decided."""

    command: Command
    phase: Phase
    step: Step | None = None  # the transition that this cycle's senses completed
    end: EpisodeEnd | None = None  # follows the episode's last step
    event: str = ""  # something a person should read
    asked: Observation | None = None  # the action for this comes by `Cycle.answer`; `command` holds until then


class Cycle:
    """One robot's control cycle.

    Args:
        task: what to do.
        actor: answers observations while an episode runs.
        safety: ages at which the robot stands still.
        rng: randomness of the resets.
        shrink: full-size image -> the image the agent sees.
        max_steps: environment steps after which the run is over; 0 for no limit.
        first_episode, first_step: counters to go on from.
        watch: told how long actor and task took.
    """

    def __init__(
        self,
        *,
        task: Task,
        actor: Actor,
        safety: SafetySettings,
        rng: np.random.Generator,
        shrink: Callable[[Image], Image],
        max_steps: int = 0,
        first_episode: int = 0,
        first_step: int = 0,
        watch: Watch | None = None,
    ) -> None:
        self.phase = Phase.HOLDING
        self.steps = first_step
        self.episode = first_episode
        self.index = 0  # of the step in flight
        self.return_ = 0.0
        self.rejected = 0  # actions with NaN or infinity; the robot stood instead
        self.late = 0  # steps whose own answer came after the next deadline, or never
        self._task, self._watch = CheckedTask(task, watch), watch
        self._actor, self._safety, self._rng, self._shrink = actor, safety, rng, shrink
        self._command_name = full_name(task, "command")
        self._rejected_commands = 0  # in a row
        self._told_rejected = False  # in this episode
        self._event = ""  # to be told with the next tick
        self._max_steps = max_steps
        self._limits: Limits = task.limits
        self._reset_limits: Limits = task.reset_limits
        self._previous = self._task.stop().values
        self._images: dict[int, Image] = {}
        self._observation: Observation | None = None
        self._action: Action | None = None
        self._acted_ns = 0
        self._answered_ns = 0  # stamp of the newest observation that was answered
        self._unanswered = 0  # cycles in a row in which no answer came
        self._at_tick = self._previous  # the command in force when the cycle began
        self._window: SensorWindow  # of the cycle that has begun last
        self._actions = np.zeros((task.action_history, task.spec.action_dim), np.float32)
        self._reset: Reset | None = None
        self._reset_end_ns = 0
        self._idle_since_ns: int | None = None
        self._epoch = 0.0

    def tick(self, now_ns: int, inputs: Inputs) -> Tick:
        """Decide. `SafetyStop` when the senses stay away too long, a reset cannot be done, or task or actor fail."""
        tick = self._tick(now_ns, inputs)
        if self._event and not tick.event:
            tick, self._event = replace(tick, event=self._event), ""
        return tick

    def _tick(self, now_ns: int, inputs: Inputs) -> Tick:
        self._at_tick, self._window = self._previous, inputs.window
        self._take_images(inputs.frames)
        trouble = self._trouble(now_ns, inputs)
        self._bound_idle_time(now_ns, trouble, waiting=self.phase is Phase.WAITING and not inputs.hold)
        match self.phase:
            case Phase.RUNNING:
                return self._interrupted(trouble) if trouble else self._run(now_ns, inputs)
            case Phase.HOLDING if not trouble and not inputs.hold:
                return self._begin_reset(now_ns)
            case Phase.RESETTING if not trouble:
                return self._go_on_resetting(now_ns, inputs.window)
            case Phase.WAITING if not trouble and not inputs.hold and self._all_fresh(inputs):
                return self._begin_episode(now_ns, inputs)
        return self._stand(self.phase)

    def answer(self, action: Action, asked_ns: int, now_ns: int) -> Command | None:
        """The answer to the observation of `asked_ns`, when the actor gives it later than `tick`: the command.

        The newest answer counts, also when its own cycle is over. None when it is of no use any more.
        """
        if self.phase is not Phase.RUNNING or asked_ns <= self._answered_ns:
            return None
        self._answered_ns, self._unanswered = asked_ns, 0
        return self._take(action, now_ns)

    def status(self, window: SensorWindow) -> Mapping[str, float | str]:
        """What the task shows of the robot."""
        return self._task.status(window)

    @property
    def actor_name(self) -> str:
        """By which `watch` knows the actor."""
        return getattr(self._actor, "name", "the actor")

    def cut(self, reason: str) -> Tick:
        """End the episode now, and go on with a reset; the step in flight has no outcome and is dropped."""
        end = self._close(self._observation, terminated=False, success=False, reason=reason)
        self.phase = Phase.HOLDING
        return self._stand(Phase.HOLDING, end=end)

    def interrupt(self, reason: str) -> Tick:
        """End the run now, whatever the task does. The step in flight has no outcome and is dropped; its observation
        closes the episode."""
        end = self._close(self._observation, terminated=False, success=False, reason=reason)
        self.phase = Phase.OVER
        command = self._task.stand()
        self._previous = command.values
        return Tick(command=command, phase=Phase.OVER, end=end)

    # -- episode ---------------------------------------------------------------------------------------------------

    def _begin_episode(self, now_ns: int, inputs: Inputs) -> Tick:
        self.phase = Phase.RUNNING
        self.index, self.return_ = 0, 0.0
        self._told_rejected = False
        self._actions[:] = 0
        self._epoch = _connection_epoch(inputs.window)
        self._answered_ns, self._unanswered = now_ns - 1, 0  # answers to what was asked before are of no use
        return self._act(self._observe(now_ns, inputs))

    def _run(self, now_ns: int, inputs: Inputs) -> Tick:
        observed, action = self._observation, self._action
        assert observed is not None
        if self._answered_ns < observed.now_ns:
            self._unanswered += 1
            held = self._unanswered if action is not None else self._unanswered - 1  # nothing was done yet
            if held >= self._safety.max_unanswered:
                return self._interrupted("no action from the learner")
        if action is None:  # nothing was done yet: the episode begins with what is seen now
            return self._act(self._observe(now_ns, inputs))
        outcome = self._task.judge(inputs.window, inputs.frames[-1].image, self.index)
        self.steps += 1
        self.late += self._answered_ns < observed.now_ns
        self.return_ += outcome.reward
        last_of_run = bool(self._max_steps) and self.steps >= self._max_steps
        over = outcome.terminated or outcome.truncated or last_of_run
        step = Step(
            episode=self.episode,
            index=self.index,
            frame_ids=observed.frame_ids,
            proprio=observed.proprio,
            action=action.values,
            reward=outcome.reward,
            terminated=outcome.terminated,
            truncated=over and not outcome.terminated,
            extras=action.extras,
            policy_version=action.policy_version,
            observed_ns=observed.now_ns,
            acted_ns=self._acted_ns,
        )
        self.index += 1
        self._actions = np.concatenate([self._actions, action.values[None]])[1:]
        observation = self._observe(now_ns, inputs)
        if not over:
            return self._act(observation, step)
        end = self._close(
            observation,
            terminated=outcome.terminated,
            success=outcome.success,
            reason=outcome.reason or "end of the run",
        )
        self.phase = Phase.OVER if last_of_run else Phase.HOLDING
        self._reset = None
        return self._stand(self.phase, step=step, end=end)

    def _act(self, observation: Observation, step: Step | None = None) -> Tick:
        """Ask the actor. Until a later answer comes the action stays as it is."""
        self._observation, self._acted_ns = observation, observation.now_ns
        with calling(self.actor_name, watch=self._watch):
            action = self._actor.act(observation)
        if action is None:
            return Tick(command=self._hold(), phase=Phase.RUNNING, step=step, asked=observation)
        self._answered_ns = observation.now_ns
        return Tick(command=self._take(action, observation.now_ns), phase=Phase.RUNNING, step=step)

    def _take(self, action: Action, now_ns: int) -> Command:
        """The command for an action, which is the step's from now on."""
        sane = bool(np.isfinite(action.values).all() and np.isfinite(action.extras).all())
        if not sane:
            self._note_rejected(f"the action {shown(action.values.tolist())} of step {self.index}")
            action = Action(
                values=np.zeros_like(action.values), policy_version=action.policy_version, extras=action.extras
            )
        self._action, self._acted_ns, self._previous = action, now_ns, self._at_tick
        if sane:
            return self._hold()
        self.rejected += 1
        stop = self._task.stop()  # at once, without slew: nothing is known about what was wanted
        self._previous = stop.values
        return stop

    def _hold(self) -> Command:
        """The command for the newest action, where the robot is now."""
        if self._action is None:
            return Command(values=self._previous)
        return self._limited(self._task.command(self._action.values, self._window), self._limits)

    def _interrupted(self, trouble: str) -> Tick:
        tick = self.cut(trouble)
        return replace(tick, event=f"{trouble}: the robot stands until it is well again")

    def _note_rejected(self, what: str) -> None:
        """Once in an episode; each is counted."""
        if not self._told_rejected:
            self._told_rejected = True
            self._event = f"{what} is not finite: the robot stands instead"

    def _close(self, last: Observation | None, *, terminated: bool, success: bool, reason: str) -> EpisodeEnd | None:
        """The episode's end, or None when no step of it was completed."""
        closed = None
        if last is not None and self.index > 0:
            closed = EpisodeEnd(
                episode=self.episode,
                length=self.index,
                frame_ids=last.frame_ids,
                proprio=last.proprio,
                return_=self.return_,
                terminated=terminated,
                success=success,
                reason=reason,
                observed_ns=last.now_ns,
            )
            self.episode += 1
        self._observation = self._action = None
        self.index = 0
        return closed

    # -- between episodes ------------------------------------------------------------------------------------------

    def _begin_reset(self, now_ns: int) -> Tick:
        self._reset = self._task.reset(self._rng)
        self.phase = Phase.RESETTING
        return self._advance_reset(now_ns, self._reset.__next__)

    def _go_on_resetting(self, now_ns: int, window: SensorWindow) -> Tick:
        assert self._reset is not None
        return self._advance_reset(now_ns, functools.partial(self._reset.send, (now_ns, window)))

    def _advance_reset(self, now_ns: int, proceed: Callable[[], Command]) -> Tick:
        try:
            command = proceed()
        except StopIteration:
            self._reset = None
            self._reset_end_ns = now_ns
            self.phase = Phase.WAITING
            return self._stand(Phase.WAITING)
        return Tick(command=self._limited(command, self._reset_limits), phase=Phase.RESETTING)

    def _all_fresh(self, inputs: Inputs) -> bool:
        """Whether everything the first observation shows happened after the reset's end."""
        spec = self._task.spec
        return (
            len(inputs.frames) >= spec.frames
            and len(inputs.window.seq) >= spec.sensor_window
            and inputs.frames[-spec.frames].captured_ns > self._reset_end_ns
            and int(inputs.window.arrived_ns[0]) > self._reset_end_ns
        )

    def _stand(self, phase: Phase, *, step: Step | None = None, end: EpisodeEnd | None = None, event: str = "") -> Tick:
        command = self._task.stop()
        self._previous = command.values
        return Tick(command=command, phase=phase, step=step, end=end, event=event)

    # -- senses ----------------------------------------------------------------------------------------------------

    def _take_images(self, frames: tuple[Frame, ...]) -> None:
        self._images = {
            frame.id: self._images[frame.id] if frame.id in self._images else self._shrink(frame.image)
            for frame in frames[-self._task.spec.frames :]
        }

    def _observe(self, now_ns: int, inputs: Inputs) -> Observation:
        ids = tuple(frame.id for frame in inputs.frames[-self._task.spec.frames :])
        return Observation(
            frame_ids=ids,
            images=tuple(self._images[i] for i in ids),
            proprio=self._task.proprioception(inputs.window, self._actions),
            now_ns=now_ns,
        )

    def _trouble(self, now_ns: int, inputs: Inputs) -> str:
        """Why the senses cannot be trusted now; empty when they can."""
        window, frames = inputs.window, inputs.frames
        if not len(window.seq) or now_ns - int(window.arrived_ns[-1]) > self._safety.max_sensor_age_ms * NS_PER_MS:
            return "no sensor data"
        if not frames or now_ns - frames[-1].captured_ns > self._safety.max_frame_age_ms * NS_PER_MS:
            return "no camera image"
        if self.phase is Phase.RUNNING and _connection_epoch(window) != self._epoch:
            return "the robot was connected again"
        return ""

    def _bound_idle_time(self, now_ns: int, trouble: str, *, waiting: bool) -> None:
        idle = self.phase is not Phase.OVER and (bool(trouble) or waiting)
        if not idle:
            self._idle_since_ns = None
            return
        if self._idle_since_ns is None:
            self._idle_since_ns = now_ns
        limit_s = self._safety.stall_limit_s
        if now_ns - self._idle_since_ns > limit_s * NS_PER_S:
            what = trouble or "no fresh sensor data and camera images after the reset"
            raise SafetyStop(
                f"{what} for {limit_s:g} s; the robot was stopped", "check the cable, the camera and the battery"
            )

    def _limited(self, command: Command, limits: Limits) -> Command:
        limited = apply(limits, self._previous, command.values)
        self.rejected += limited.rejected
        self._previous = limited.values
        self._rejected_commands = self._rejected_commands + 1 if limited.rejected else 0
        if limited.rejected:
            self._note_rejected(f"the command {shown(command.values)}")
        if self._rejected_commands >= MAX_REJECTED:
            raise PackageError(
                f"{self._command_name} or reset gave a command that is not finite {MAX_REJECTED} times in a row:"
                f" {shown(command.values)}; the robot stood",
                "mend the task, or see what its sensors say with `relod check`",
            )
        return Command(values=limited.values, request=command.request)


def _connection_epoch(window: SensorWindow) -> float:
    """How often the device was opened, for drivers that say so."""
    return window.newest("connection_epoch") if "connection_epoch" in window.names else 0.0
