"""A run in virtual time: plant, camera, task, agent and updates in one process, one after the other.

It is exact. A run that was interrupted, in whatever way, goes on from its last checkpoint and becomes bit for bit the
run that was not: networks, optimisers and random states come from the checkpoint, the replay from the log, and the
world from playing the tape of its actor's answers once more (see `tape.py`).
"""

from __future__ import annotations

import contextlib
import signal
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import msgspec

from ..errors import EXIT_OK, RelodError, StartError
from ..loading import load_attribute
from ..packages import calling, full_name
from ..seeds import random_stream
from ..types import Action, EpisodeEnd, Frame, Step
from .checkpoint import Checkpoint
from .clock import NS_PER_S, monotonic_ns
from .cycle import Cycle, Inputs, Phase, Tick
from .experience import BEGINNING
from .host import Result
from .learner import LearnerSide
from .log.codec import make_look
from .log.format import LogPosition
from .log.reader import LogReader
from .messages import encode
from .plan import Plan, Start
from .progress import Progress
from .rundir import RunFolder
from .screen import View
from .session import check_steps_left, finish, open_folder
from .tape import TapedActor, read_tape
from .view import open_view
from .viewstate import RunState
from .virtual import VirtualRun, World

__all__ = ["run_virtual"]

TAPE = "tape.bin"  # within the run's folder
SHOW_EVERY = 16  # cycles between two looks at the view: 10 ms at full speed


def run_virtual(plan: Plan, arguments: tuple[str, ...], checkpoint: Checkpoint | None) -> Result:
    """Run in virtual time; a resumed run goes on from `checkpoint`, and without one it is made again from its seed."""
    end, tape = None, []
    if checkpoint is not None and plan.resume is not None:
        saved = checkpoint.counters["extra"]
        check_steps_left(plan, saved["log"]["env_steps"])
        end, tape = LogPosition(**saved["log"]), read_tape(plan.resume.folder / TAPE, saved["tape_bytes"])
    elif plan.resume is not None:
        steps = _logged_steps(plan.resume.folder)
        check_steps_left(plan, steps)
        print(f"relod: no checkpoint: the run and its {steps} steps are made again from the seed", file=sys.stderr)
        end = BEGINNING
    with open_folder(plan, arguments) as folder, LearnerSide(plan.learner, folder.path, None, end=end) as learner:
        run = _VirtualSession(plan, folder, learner, checkpoint, tape)
        return finish(folder, run.run(), run.progress)


def _logged_steps(folder: Path) -> int:
    """Steps in the log of a run that is to be made again; 0 where there is none that can be read."""
    try:
        return max((record.env_steps for record in LogReader(folder / "log").iterate()), default=0)
    except StartError:
        return 0


class _Signals:
    """SIGINT and SIGTERM end the run between two cycles, never within one."""

    def __init__(self) -> None:
        self.number = 0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        def remember(number: int, frame: FrameType | None) -> None:
            self.number = self.number or number

        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _VirtualSession:
    """What the processes of a wall-clock run do, in the slack of the virtual driver."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        learner: LearnerSide,
        checkpoint: Checkpoint | None,
        tape: Sequence[Action],
    ) -> None:
        spec, settings = plan.task.spec, plan.settings
        saved = checkpoint.counters["extra"] if checkpoint is not None else {}
        self.progress = Progress(plan, folder)
        self._plan, self._folder, self._learner = plan, folder, learner
        self._host = learner.actor(Start())()
        self._actor = TapedActor(
            self._host.actor, folder.path / TAPE, played=tape, keep_bytes=saved.get("tape_bytes", 0)
        )
        self._crc = 0  # of all steps and ends of episodes
        self._ticks = 0
        self._playing = False
        make_world = load_attribute(plan.entry.world, "the simulated world")
        with calling(full_name(make_world), StartError):
            world: World = make_world(settings.sim, settings.run.seed, spec, NS_PER_S)
        self._cycle = Cycle(
            task=plan.task,
            actor=self._actor,
            safety=settings.safety,
            rng=random_stream(settings.run.seed, "reset"),
            shrink=make_look(settings.log.codec, settings.log.jpeg_quality, image_hw=spec.image_hw),
            max_steps=plan.max_steps,
        )
        self._driver = VirtualRun(
            cycle=self._cycle,
            world=world,
            spec=spec,
            sensor_names=plan.entry.sensor_names,
            on_frames=self._on_frames,
            on_tick=self._on_tick,
        )
        self._loop = learner.inline(self._driver.clock, lambda text: self.progress.event("worker", text))
        self._saved_ns = monotonic_ns()
        if checkpoint is not None:
            self._restore(checkpoint)
        elif plan.resume is not None:
            folder.go_on(settings, {"metrics.jsonl": 0, "episodes.jsonl": 0})
        self._loop.begin()
        self._host.poll()

    def run(self) -> Result:
        """All cycles; Ctrl-C ends the run in order."""
        code = EXIT_OK
        error: RelodError | None = None
        signals = _Signals()
        with open_view() as view, signals.caught():
            try:
                for tick in self._driver.ticks():
                    if self._ticks % SHOW_EVERY == 0:
                        self._show(view)
                    if signals.number and tick.phase is not Phase.OVER:
                        code = 128 + signals.number
                        self._save()
                        self._take(self._cycle.interrupt("interrupted"))
                        break
            except RelodError as caught:
                error = caught
                with contextlib.suppress(RelodError):  # the same once more
                    self._take(self._cycle.interrupt("safety stop"))
        self.progress.report("device", {"stopped_cleanly": 1.0})  # a plant that nobody advances stands
        try:
            self._learned()
            self.progress.write_metrics(None)
        except RelodError as caught:
            error = error or caught
        code = code if error is None else error.exit_code
        summary = self.progress.summary(None) | {"exit_code": code, "error": str(error) if error else ""}
        return Result(summary=summary, exit_code=code, error=error)

    # -- one cycle -----------------------------------------------------------------------------------------------------

    def _on_frames(self, frames: list[Frame]) -> None:
        for frame in frames:
            self._learner.add_frame(frame)
        self.progress.frame(frames[-1])

    def _on_tick(self, now_ns: int, inputs: Inputs, tick: Tick) -> None:
        self._ticks += 1
        if self._playing:
            self._count(tick)
            return
        self._take(tick)
        self._loop.run_updates()
        self._host.poll()
        # Before the last step, too: a run that is given more steps later goes on as if it had had them at once.
        last = self._plan.max_steps > 0 and self._cycle.steps == self._plan.max_steps - 1 and tick.step is not None
        due = monotonic_ns() - self._saved_ns > self._plan.settings.learner.checkpoint_every_s * NS_PER_S
        if last or (due and tick.phase is not Phase.OVER):  # the last step ends its episode only because it is the last
            self._save()

    def _take(self, tick: Tick) -> None:
        if tick.event:
            self.progress.event("control", tick.event)
        for message in self._count(tick):
            self._learner.add(message)
            self.progress.add(message)
        if tick.end is not None:
            self._learned()
            self.progress.write_metrics(None)

    def _count(self, tick: Tick) -> list[Step | EpisodeEnd]:
        messages = [message for message in (tick.step, tick.end) if message is not None]
        for message in messages:
            self._crc = zlib.crc32(encode(message), self._crc)
        return messages

    def _show(self, view: View[RunState]) -> None:
        state = self.progress.state
        state.phase = self._cycle.phase.value
        state.elapsed_s = self.progress.wall_s
        view.show(state, monotonic_ns())

    def _learned(self) -> None:
        loop = self._loop
        losses = loop.metrics()  # first: it may go back to an earlier update
        values: dict[str, float | str] = {
            "updates": float(loop.updates),
            "replay_steps": float(len(loop.memory)),
            **{f"metric.{name}": value for name, value in losses.items()},
        }
        self.progress.learned(values)
        self.progress.report("control", {"rejected": float(self._cycle.rejected)})

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a checkpoint of everything between two cycles."""
        self._saved_ns = monotonic_ns()
        experience = self._learner.experience
        experience.log.sync()
        experience.pin(experience.writer.first_step)
        self._learner.save(
            self._loop,
            {
                "log": msgspec.to_builtins(experience.log.position),
                "first_step": experience.writer.first_step,
                "actor": self._host.actor.state(),
                "tape_bytes": self._actor.flush(),
                "ticks": self._ticks,
                "crc": self._crc,
                "sizes": self._folder.sizes,
                "wall_s": self.progress.wall_s,
            },
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Become what the run was when `checkpoint` was written."""
        saved = checkpoint.counters["extra"]
        print(
            f"relod: going on with {self._folder.path} at step {saved['log']['env_steps']},"
            f" update {checkpoint.counters['updates']}; the world is played to there first",
            file=sys.stderr,
        )
        experience = self._learner.experience
        experience.refill(saved["first_step"])
        experience.pin(saved["first_step"])
        if experience.writer.first_step != saved["first_step"]:
            raise StartError(
                f"the log of {self._folder.path} begins at step {experience.writer.first_step}, and the checkpoint"
                f" needs it from step {saved['first_step']} on",
                "put back the segments that were removed",
            )
        self._loop.resume(checkpoint, same_clock=True)
        self._host.actor.load_state(saved["actor"])
        self._host.poll()
        self._playing = True
        ticks = self._driver.ticks()
        while self._ticks < saved["ticks"]:
            next(ticks)
        self._playing = False
        if self._crc != saved["crc"] or self._actor.playing:
            raise StartError(
                f"the world did not do again what it did in {self._folder.path}",
                "resume with the versions of relod, numpy and OpenCV that run.json names",
            )
        self._folder.go_on(self._plan.settings, saved["sizes"])
        lines = self._folder.episodes()
        self.progress.restore(lines, self._cycle.steps, saved["wall_s"])
