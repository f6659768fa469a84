"""Where a learner stands: figures of robots and worker, for the view, the run folder, the robots and the summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..clock import NS_PER_S, monotonic_ns
from .hall import LearnerRun
from .learnerview import LearnerState, RobotRow
from .wire import LearnerNews

__all__ = ["LearnerBooks"]

RATE_PERIOD_NS = NS_PER_S  # over which bytes per second are told


class LearnerBooks:
    """One session's bookkeeping; `begin` when there is a run."""

    def __init__(self, address: str) -> None:
        self.state = LearnerState(address=address)
        self._learning: LearnerRun | None = None
        self._figures: dict[str, dict[str, Any]] = {}  # of the server, by robot
        self._worker: dict[str, float | str] = {}
        self._restarts = 0
        self._began_ns = monotonic_ns()
        self._traffic: dict[str, tuple[int, int, int]] = {}  # by robot: when, bytes in and out
        self._rates: dict[str, tuple[float, float]] = {}  # bytes per second in and out

    def begin(self, learning: LearnerRun, max_steps: int) -> None:
        """There is a run now."""
        plan, state = learning.plan, self.state
        self._learning = learning
        state.task, state.algorithm, state.preset = plan.task_name, plan.algorithm_name, plan.preset
        state.folder, state.max_steps = str(learning.folder.path), max_steps
        state.replay_capacity = plan.settings.replay.capacity
        state.returns = learning.returns

    def event(self, text: str) -> None:
        """Something a person should read; `SafetyStop` when the run folder cannot be written."""
        self.state.warnings.append(text)
        self._write({"event": text})

    def restarted(self) -> None:
        """The worker was started again."""
        self._restarts += 1

    def take(self, figures: Mapping[str, dict[str, Any]], now_ns: int) -> None:
        """The newest of everything: `figures` are the server's."""
        self._figures |= figures
        learning, state = self._learning, self.state
        state.elapsed_s = (now_ns - self._began_ns) / NS_PER_S
        if learning is None:
            return
        self._worker |= learning.learner.poll()
        for writer in learning.spans.writers:
            learning.folder.spans(learning.spans.drain(writer))
        state.elapsed_s, state.experience_s = learning.wall_s, learning.experience_s
        state.steps, state.episodes = learning.env_steps, learning.episodes
        state.ingest_steps_per_s = learning.ingest_steps_per_s
        state.updates = int(self._worker.get("updates", 0))
        state.updates_per_s = float(self._worker.get("updates_per_s", 0.0))
        state.replay_steps = int(self._worker.get("replay_steps", 0))
        state.losses = self._losses
        state.robots = [self._row(name, now_ns) for name in learning.robots]

    def news(self) -> LearnerNews:
        """What the robots are told."""
        state = self.state
        return LearnerNews(
            updates=state.updates,
            updates_per_s=state.updates_per_s,
            replay_steps=state.replay_steps,
            env_steps=state.steps,
            metrics=dict(state.losses),
        )

    def write_metrics(self) -> None:
        """One line of metrics.jsonl; `SafetyStop` when it cannot be written."""
        state = self.state
        self._write(
            {
                "updates": state.updates,
                "updates_per_s": round(state.updates_per_s, 2),
                "policy_epoch": state.policy_version[0],
                "policy_updates": state.policy_version[1],
                "replay_steps": state.replay_steps,
                "robots_connected": sum(row.state == "up" for row in state.robots),
                **{f"metric.{name}": value for name, value in state.losses.items()},
                "robots": {
                    row.name: {
                        "steps": row.steps,
                        "steps_per_s": round(row.steps_per_s, 2),
                        "backlog": row.backlog,
                        "in_bytes_per_s": round(row.in_bytes_per_s),
                        "out_bytes_per_s": round(row.out_bytes_per_s),
                    }
                    for row in state.robots
                },
            }
        )

    def summary(self) -> dict[str, Any]:
        """The JSON document of the session, but for how it ended; its keys are an interface."""
        learning, state = self._learning, self.state
        document: dict[str, Any] = {
            "mode": "learner",
            "listen": state.address,
            "task": state.task,
            "algorithm": state.algorithm,
            "preset": state.preset,
            "robots": {},
            "steps": state.steps,
            "episodes": state.episodes,
            "updates": state.updates,
            "policy_version": list(state.policy_version),
            "replay_steps": state.replay_steps,
            "ingest_steps_per_s": round(state.ingest_steps_per_s, 3),
            "restarts": self._restarts,
            "run_dir": state.folder,
            "wall_s": round(state.elapsed_s, 3),
        }
        if learning is not None:
            document |= {
                "seed": learning.plan.settings.run.seed,
                "experience_s": round(learning.experience_s, 3),
                "successes": learning.successes,
                "returns": list(learning.returns),
                "robots": {name: self._robot(name) for name in learning.robots},
            }
        return document

    def _robot(self, name: str) -> dict[str, Any]:
        """A robot's counts of this session."""
        assert self._learning is not None
        book, figures = self._learning.robots[name], self._figures.get(name, {})
        return {
            "run": book.run,
            "acts": book.acts,
            "records": book.steps + book.ends,
            "steps": book.steps,
            "episodes": book.ends,
            "reconnects": book.joins - 1,
            "policy_version": list(book.policy_version),
            **{key: figures.get(key, 0) for key in ("duplicates", "rejected", "frames", "asked", "answered")},
            "uplink_bytes": figures.get("bytes_in", 0),
            "downlink_bytes": figures.get("bytes_out", 0),
        }

    def _row(self, name: str, now_ns: int) -> RobotRow:
        assert self._learning is not None
        book, figures = self._learning.robots[name], self._figures.get(name, {})
        bytes_in, bytes_out = self._rates_of(name, figures, now_ns)
        age_s = (now_ns - book.policy_seen_ns) / NS_PER_S if book.policy_version != (0, 0) else None
        return RobotRow(
            name=name,
            state="up" if figures.get("state") == "connected" else "away",
            acts=book.acts,
            steps=book.steps,
            steps_per_s=figures.get("steps_per_s", 0.0),
            episodes=book.ends,
            mean_return=sum(book.returns) / len(book.returns) if book.returns else None,
            backlog=figures.get("backlog", 0),
            rtt_ms=figures.get("rtt_ms"),
            in_bytes_per_s=bytes_in,
            out_bytes_per_s=bytes_out,
            policy_age_s=age_s,
        )

    def _rates_of(self, name: str, figures: Mapping[str, Any], now_ns: int) -> tuple[float, float]:
        now = (now_ns, figures.get("bytes_in", 0), figures.get("bytes_out", 0))
        before = self._traffic.setdefault(name, now)
        if (elapsed_ns := now_ns - before[0]) >= RATE_PERIOD_NS:
            self._traffic[name] = now
            bytes_in, bytes_out = (
                (new - old) * NS_PER_S / elapsed_ns for old, new in zip(before[1:], now[1:], strict=True)
            )
            self._rates[name] = bytes_in, bytes_out
        return self._rates.get(name, (0.0, 0.0))

    @property
    def _losses(self) -> dict[str, float]:
        return {key[7:]: float(value) for key, value in self._worker.items() if key.startswith("metric.")}

    def _write(self, values: Mapping[str, Any]) -> None:
        if (learning := self._learning) is None:
            return
        learning.folder.metrics(
            experience_s=learning.experience_s, wall_s=learning.wall_s, steps=learning.env_steps, values=values
        )
