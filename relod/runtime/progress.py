"""Where a run stands: counts, episodes, what the processes report; feeds the view, the run folder and the summary."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from ..types import EpisodeEnd, Frame, Step
from .clock import NS_PER_MS, NS_PER_S, monotonic_ns
from .device import MAY_BE_MOVING
from .plan import Plan
from .profile import Profile
from .rundir import EpisodeLine, RunFolder, disk_errors
from .spans import Histogram, SpanWriter, Stage
from .viewstate import RunState, save_state

__all__ = ["Progress"]

RATE_WINDOW_S = 10.0


class Progress:
    """One run's bookkeeping, in the parent (wall clock) or in the one process (virtual time)."""

    def __init__(self, plan: Plan, folder: RunFolder, spans: SpanWriter | None = None) -> None:
        spec = plan.task.spec
        self._spans = spans
        self.frames_lost = 0  # overwritten before this process took them
        self.restarts: dict[str, int] = {}
        self.reports: dict[str, dict[str, float | str]] = {}
        self.steps = 0
        self.lengths: list[int] = []
        self.realtime: dict[str, Any] = {"asked": plan.settings.run.realtime, "processes": {}}
        self.cpu_cores: dict[str, float] = {}  # share of one core of each child, from ready to the end
        self._processor: tuple[int, dict[str, float]] | None = None
        self._plan, self._folder = plan, folder
        self._started_ns = monotonic_ns()
        self._policy_seen_ns = self._started_ns
        self._policy_age = Histogram()  # at each step, since its policy was first seen here
        self._updates: deque[tuple[int, int]] = deque()  # (ns, updates), for the rate
        self.state = RunState(
            task=plan.task_name,
            mode=plan.mode,
            simulated=plan.simulated,
            robot=plan.robot or "",
            camera=plan.camera or "",
            folder=str(folder.path),
            max_steps=plan.max_steps,
            episode_steps=spec.max_steps,
            cycle_ms=plan.cycle_s * 1000,
            replay_capacity=plan.settings.replay.capacity if plan.remote is None else 0,
        )

    def restore(self, lines: Sequence[EpisodeLine], steps: int, wall_s: float) -> None:
        """Go on from the episodes and steps of the run so far; `wall_s` is the time that it has taken."""
        state = self.state
        self.steps = state.steps = steps
        self.lengths = [line.length for line in lines]
        state.episodes = len(lines)
        state.returns.extend(line.return_ for line in lines)
        state.successes.extend(line.success for line in lines)
        state.experience_s = self.experience_s
        self._started_ns -= int(wall_s * NS_PER_S)

    # -- what happens --------------------------------------------------------------------------------------------------

    def add(self, message: Step | EpisodeEnd) -> None:
        """A step or an end of an episode, in order."""
        state = self.state
        if isinstance(message, Step):
            self.steps += 1
            state.steps = self.steps
            state.experience_s = self.experience_s
            state.index = message.index + 1
            state.episode_return = message.reward + (state.episode_return if message.index else 0.0)
            self._see_policy(message.policy_version, message.acted_ns)
            return
        state.episodes += 1
        state.returns.append(message.return_)
        state.successes.append(message.success)
        self.lengths.append(message.length)
        self._folder.episode(message, experience_s=self.experience_s, wall_s=self.wall_s, steps=self.steps)

    def frame(self, frame: Frame) -> None:
        """A new camera frame."""
        self.state.image = frame.image

    def event(self, name: str, text: str) -> None:
        """Something a person should read."""
        self.state.warnings.append(f"{name}: {text}" if name not in ("", "relod") else text)
        if name == "device":  # what it says next ends the alarm: the wire is back and the robot stopped
            self.state.alarm = text if MAY_BE_MOVING in text else ""
        self._folder.metrics(
            experience_s=self.experience_s, wall_s=self.wall_s, steps=self.steps, values={"event": f"{name}: {text}"}
        )

    def report(self, name: str, values: dict[str, float | str]) -> None:
        """Figures of a child process."""
        self.reports.setdefault(name, {}).update(values)
        state = self.state
        if name == "control":
            state.phase = str(values.get("phase", state.phase))
            state.overruns = int(values.get("overruns", state.overruns))
            state.sensor_age_ms = float(values.get("sensor_age_ms", state.sensor_age_ms))
            state.frame_age_ms = float(values.get("frame_age_ms", state.frame_age_ms))
            status = {key[7:]: value for key, value in values.items() if key.startswith("status.")}
            state.status = status or state.status
        if name == "worker":
            self.learned(values)
        if name == "link":
            state.link = values

    def learned(self, values: dict[str, float | str]) -> None:
        """Figures of the learner."""
        state = self.state
        state.updates = int(values.get("updates", state.updates))
        state.replay_steps = int(values.get("replay_steps", state.replay_steps))
        losses = {key[7:]: float(value) for key, value in values.items() if key.startswith("metric.")}
        state.losses = losses or state.losses
        now_ns = monotonic_ns()
        if self._updates and state.updates < self._updates[-1][1]:
            self._updates.clear()  # a new worker went back to its last checkpoint
        self._updates.append((now_ns, state.updates))
        while len(self._updates) > 2 and now_ns - self._updates[0][0] > RATE_WINDOW_S * NS_PER_S:
            self._updates.popleft()
        (first_ns, first), (last_ns, last) = self._updates[0], self._updates[-1]
        state.updates_per_s = (last - first) * NS_PER_S / (last_ns - first_ns) if last_ns > first_ns else 0.0

    def restarted(self, name: str) -> None:
        """A child process was started again."""
        self.restarts[name] = self.restarts.get(name, 0) + 1

    def held(self, reason: str) -> None:
        """No episode may begin for this reason; empty when one may again."""
        self.state.hold = reason
        self._folder.metrics(
            experience_s=self.experience_s, wall_s=self.wall_s, steps=self.steps, values={"hold": reason}
        )

    def phase(self, text: str) -> None:
        """What the run as a whole is about, while no cycle runs."""
        self.state.phase = text

    def profiled(self, profile: Profile) -> None:
        """Take over the newest percentiles."""
        state = self.state
        state.elapsed_s = self.wall_s
        state.lateness, state.act = profile.histograms[Stage.LATENESS], profile.histograms[Stage.ACT]
        state.policy_age_s = (monotonic_ns() - self._policy_seen_ns) / NS_PER_S

    def processor(self, used_s: dict[str, float]) -> None:
        """Processor time of the children so far; shares count from the first call, when all of them are ready."""
        now_ns = monotonic_ns()
        if self._processor is None:
            self._processor = now_ns, used_s
        began_ns, before_s = self._processor
        for name, seconds in used_s.items():
            if now_ns > began_ns and seconds >= before_s.get(name, seconds + 1):  # not one started again since
                self.cpu_cores[name] = round((seconds - before_s[name]) * NS_PER_S / (now_ns - began_ns), 4)

    def scheduled(self, processes: dict[str, dict[str, Any]]) -> None:
        """How the kernel schedules the children, as `scheduling.described` found it."""
        self.realtime["processes"] |= processes
        self.state.realtime = self.realtime["processes"].get("control", {}).get("policy") == "SCHED_FIFO"

    def _see_policy(self, version: tuple[int, int], acted_ns: int) -> None:
        if version == (0, 0):
            return
        now_ns = monotonic_ns()
        if version != self.state.policy_version:
            self.state.policy_version = version
            self._policy_seen_ns = now_ns
        self._policy_age.add_ms((now_ns - self._policy_seen_ns) / NS_PER_MS)
        if self._spans is not None:
            self._spans.add(Stage.POLICY_AGE, version[1], min(self._policy_seen_ns, acted_ns), acted_ns)

    # -- what is told --------------------------------------------------------------------------------------------------

    @property
    def experience_s(self) -> float:
        """Time spent in episodes: no resets, no charging."""
        return self.steps * self._plan.cycle_s

    @property
    def wall_s(self) -> float:
        """Time since the start."""
        return (monotonic_ns() - self._started_ns) / NS_PER_S

    def write_metrics(self, profile: Profile | None) -> None:
        """One line of metrics.jsonl, and what the view shows at this moment."""
        state = self.state
        values: dict[str, Any] = {
            "updates": state.updates,
            "updates_per_s": round(state.updates_per_s, 2),
            "policy_epoch": state.policy_version[0],
            "policy_updates": state.policy_version[1],
            "late_actions": int(self.reports.get("control", {}).get("late", 0)),
            "replay_steps": state.replay_steps,
            "overruns": state.overruns,
            **{f"metric.{name}": value for name, value in state.losses.items()},
            **{f"status.{name}": value for name, value in state.status.items()},
            **{f"link.{name}": value for name, value in state.link.items()},
        }
        if profile is not None:
            measured = {**profile.summary(), "policy_age_ms": self._policy_age.summary_ms()}
            values |= {name: summary for name, summary in measured.items() if summary["max"] > 0}
        self._folder.metrics(experience_s=self.experience_s, wall_s=self.wall_s, steps=self.steps, values=values)
        if not self._folder.failed:
            with disk_errors(self._folder.path / "view.npz"):
                save_state(state, self._folder.path / "view.npz")

    def summary(self, profile: Profile | None) -> dict[str, Any]:
        """The JSON document of the run; its keys are an interface."""
        state, plan = self.state, self._plan
        control, device = self.reports.get("control", {}), self.reports.get("device", {})
        document: dict[str, Any] = {
            "task": plan.task_name,
            "mode": plan.mode,
            "clock": plan.clock,
            "algorithm": plan.algorithm_name,
            "preset": plan.preset,
            "preset_reason": plan.preset_reason,
            "seed": plan.settings.run.seed,
            "simulated": plan.simulated,
            "device": plan.device_text,
            "steps": self.steps,
            "experience_s": round(self.experience_s, 3),
            "wall_s": round(self.wall_s, 3),
            "episodes": state.episodes,
            "returns": list(state.returns),
            "lengths": list(self.lengths),
            "successes": sum(state.successes),
            "updates": state.updates,
            "policy_version": list(state.policy_version),
            "replay_steps": state.replay_steps,
            "overruns": int(control.get("overruns", 0)),
            "restarts": self.restarts,
            "cpu_cores": self.cpu_cores,
            "realtime": self.realtime,
            "frames_lost": self.frames_lost,
            "steps_dropped": int(self.reports.get("worker", {}).get("dropped", 0)),
            "actions_rejected": int(control.get("rejected", 0)),
            "late_actions": int(control.get("late", 0)),
            "policy_age_ms": self._policy_age.summary_ms(),
            "run_dir": str(self._folder.path),
            "stopped_cleanly": bool(device.get("stopped_cleanly", 0.0)),
        }
        if profile is not None:
            document |= {
                **profile.summary(),
                "cycles": profile.cycles,
                "overruns_not_shared": profile.unshared_overruns,
            }
        return document
