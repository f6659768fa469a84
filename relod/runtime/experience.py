"""Where experience goes: into the log first, which is the record, then into the replay, from which updates are drawn.

Both hold the same pixels. A run that goes on fills its replay from the log again. Experience comes from a robot on
this host (stream 0, frames as they are), or over links from many robots (a stream each, frames encoded by the robot).
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from ..algos.agent import Rollouts
from ..errors import SettingsError
from ..robots.vision import make_shrink
from ..types import EpisodeEnd, Frame, Image, Step
from .checkpoint import KEPT
from .log.codec import make_codec
from .log.format import EncodedFrame, LogPosition, LogSpec
from .log.reader import LogReader, LogRecord
from .log.writer import LogWriter
from .memory import check_log, check_replay
from .messages import Position, position
from .plan import LearnerPlan
from .replay import ReplayLayout, ReplayTable, ReplayWriter

__all__ = ["BEGINNING", "Experience", "check_room"]

FRAMES_KEPT = 256  # 8.5 s of camera: far more than the episode stream can be behind
MIB = 1 << 20
BEGINNING = LogPosition(segment=0, offset=0, env_steps=0)  # where a log is cut that begins anew


class Experience:
    """Log and replay of a run. `send` gets the news for whoever samples the replay.

    Args:
        folder: the run's folder.
        end: where to cut the log of a run that goes on; None keeps all its whole records.

    Raises:
        StartError: the log is not that of this task, or damaged where the run goes on.
    """

    def __init__(self, plan: LearnerPlan, folder: Path, *, end: LogPosition | None = None) -> None:
        spec, settings = plan.spec, plan.settings
        self.table = ReplayTable(_layout(plan))
        self.writer = ReplayWriter(self.table)
        self.send: Callable[[bytes], object] = lambda news: None
        self.dropped = 0  # steps and ends of episodes without their frames
        self.positions: dict[int, Position] = {}  # of the newest record in the log, by stream
        self.open: set[int] = set()  # streams with an open episode in the log
        # Of what was read from the log: the policies' epoch, the episode and the camera frame.
        self.newest_epoch, self.newest_episode, self.newest_frame_id = 0, -1, 0
        self._shrink = make_shrink(spec.image_hw)
        self._codec = make_codec(settings.log.codec, settings.log.jpeg_quality, image_hw=spec.image_hw)
        self._images: dict[int, Image] = {}
        self._encoded: dict[int, EncodedFrame] = {}
        self._named: dict[int, dict[int, Image]] = {}  # what a stream's newest record from a link named
        self._in_replay: dict[int, None] = {}  # streams with an open chunk there, longest silent first
        self._pinned: deque[int] = deque(maxlen=KEPT)  # first steps of what the checkpoints need
        self._folder = folder / "log"
        self.log = _open_log(plan, self._folder, end)

    # -- from this host ------------------------------------------------------------------------------------------------

    def add_frame(self, frame: Frame) -> None:
        """Keep a camera frame, at the agent's size, for the steps that will name it."""
        data = self._codec.encode(self._shrink(frame.image))
        self._encoded[frame.id] = EncodedFrame(captured_ns=frame.captured_ns, data=data)
        self._images[frame.id] = self._codec.decode(data)
        while len(self._images) > FRAMES_KEPT:
            oldest = next(iter(self._images))
            del self._images[oldest], self._encoded[oldest]

    def add(self, message: Step | EpisodeEnd) -> None:
        """The next step or end of an episode; one whose frames were lost is left out, and the episode cut there."""
        if any(frame_id not in self._images for frame_id in message.frame_ids):
            self.dropped += 1
            self.cut()
        else:
            self._log(0, message, self._encoded)
            self._remember(0, message, self._images)

    # -- over links ----------------------------------------------------------------------------------------------------

    def add_record(self, stream: int, message: Step | EpisodeEnd, frames: Mapping[int, EncodedFrame]) -> None:
        """The next record of a robot, which is in the log when this returns. `frames` holds all those it names.

        Where it does not go on from the stream's last record, the episode that was open is cut: what it came to is
        not known.

        Raises:
            SafetyStop: the log cannot be written.
            ValueError: a frame is no image of the agent's size; nothing was taken in.
        """
        before = self._named.get(stream, {})
        images = {
            frame_id: before[frame_id] if frame_id in before else self._codec.decode(frames[frame_id].data)
            for frame_id in message.frame_ids
        }
        if stream in self.open and not _follows(message, self.positions[stream]):
            self.cut(stream)
        self._log(stream, message, frames)
        self._named[stream] = images
        self._remember(stream, message, images)

    def release(self, stream: int) -> None:
        """Let the replay evict what it holds of a stream; one that comes back all the same begins a new chunk."""
        self._named.pop(stream, None)
        if stream in self._in_replay:
            del self._in_replay[stream]
            self.send(self.writer.release(stream))

    # -- both ----------------------------------------------------------------------------------------------------------

    def cut(self, stream: int = 0) -> None:
        """The open episode's outcome is not known."""
        self.log.cut(stream)
        self.open.discard(stream)
        self.send(self.writer.abandon(stream))

    def pin(self, first_step: int) -> None:
        """Keep the log from that step on, for a checkpoint that goes on from there."""
        self._pinned.append(first_step)

    def refill(
        self, first_step: int, *, read_from: int | None = None, see: Callable[[LogRecord], None] | None = None
    ) -> list[EpisodeEnd]:
        """Fill the replay from the log, from environment step `first_step` on; returns the episodes that ended.

        From a `writer.first_step` on, the replay becomes what it was, down to the order in which samples are drawn.
        Where the log begins later, so does the replay, and `writer.first_step` says so. Open episodes stay open.

        Args:
            read_from: an earlier step from which on the log is read, for the streams' positions.
            see: called with each record that is read.
        """
        reader = LogReader(self._folder)
        ends: list[EpisodeEnd] = []
        self.writer.env_steps = first_step
        for record in reader.iterate(from_env_steps=first_step if read_from is None else min(first_step, read_from)):
            message = record.message
            self._note(record.stream, message)
            if see is not None:
                see(record)
            if record.env_steps <= first_step:
                continue
            if message is None:
                self.send(self.writer.abandon(record.stream))
                continue
            self.newest_episode = max(self.newest_episode, message.episode)
            self.newest_frame_id = max(self.newest_frame_id, *message.frame_ids)
            if isinstance(message, Step):
                self.newest_epoch = max(self.newest_epoch, message.policy_version[0])
                self.writer.env_steps = record.env_steps - 1  # more than were read where the log has a gap
            else:
                ends.append(message)
            self._remember(record.stream, message, record.frames)
        return ends

    def _log(self, stream: int, message: Step | EpisodeEnd, frames: Mapping[int, EncodedFrame]) -> None:
        if isinstance(message, Step):
            self.log.append(message, frames, stream)
        else:
            self.log.close_episode(message, frames, stream)
            self.log.keep_from(min([self._first_step, *self._pinned]))
        self._note(stream, message)

    def _note(self, stream: int, message: Step | EpisodeEnd | None) -> None:
        """Keep track of what is in the log."""
        if message is not None:
            self.positions[stream] = position(message)
        if isinstance(message, Step):
            self.open.add(stream)
        else:
            self.open.discard(stream)

    def _remember(self, stream: int, message: Step | EpisodeEnd, images: Mapping[int, Image]) -> None:
        """Into the replay, which has room for a limited number of open chunks."""
        if stream not in self._in_replay and len(self._in_replay) == self.table.layout.streams:
            self.release(next(iter(self._in_replay)))
        self._in_replay.pop(stream, None)
        self._in_replay[stream] = None
        if isinstance(message, Step):
            self.send(self.writer.append(message, images, stream))
        else:
            self.send(self.writer.close_episode(message, images, stream))

    @property
    def _first_step(self) -> int:
        """A step before which the log is not needed: the replay's oldest, but for a chunk that a silent stream keeps.

        A table that is fed by one stream alone never holds older steps than the second bound.
        """
        layout = self.table.layout
        return max(self.writer.first_step, self.writer.env_steps - layout.chunks * layout.rows)


def _follows(message: Step | EpisodeEnd, newest: Position) -> bool:
    """Whether a record is the next one of the episode whose newest step is at `newest`."""
    return position(message) == (newest[0], newest[1] + 1)


def check_room(plan: LearnerPlan) -> None:
    """Refuse a run that has no room for its replay, before anything is written or moves.

    Raises:
        SettingsError: the replay does not fit into the memory, a rollout not into the replay, or a new run's log could
            not hold it.
    """
    settings, layout = plan.settings, _layout(plan)
    memory = plan.algorithm.needs(plan.spec, settings.agent).memory
    if isinstance(memory, Rollouts):
        steps = memory.steps + memory.earlier_steps
        if layout.capacity < (least := steps + plan.spec.max_steps):
            raise SettingsError(
                f"replay.capacity = {layout.capacity} has no room for the {steps} steps of an update and the episode in"
                " which a rollout becomes full",
                f"set it to {least} at least",
            )
    try:
        check_replay(layout.nbytes, layout.capacity, settings.replay)
    except SettingsError as error:
        if plan.resume is None:
            raise
        raise SettingsError(error.message, "free some memory: a resumed run keeps its replay's capacity") from None
    if plan.resume is None:
        check_log(layout.step_bytes, layout.capacity, settings.log)


def _layout(plan: LearnerPlan) -> ReplayLayout:
    spec, settings = plan.spec, plan.settings
    needs = plan.algorithm.needs(spec, settings.agent)
    return ReplayLayout.for_task(
        spec,
        capacity=settings.replay.capacity,
        lookahead=needs.lookahead,
        streams=plan.robots,
        extras_dim=needs.extras,
    )


def _open_log(plan: LearnerPlan, folder: Path, end: LogPosition | None) -> LogWriter:
    settings = plan.settings.log
    spec = LogSpec.for_task(plan.spec, settings.codec)
    sizes = {"segment_bytes": int(settings.segment_mib * MIB), "limit_bytes": int(settings.limit_gib * 1024 * MIB)}
    if plan.resume is not None and end != BEGINNING:
        return LogWriter.resume(folder, spec, position=end, **sizes)
    if end == BEGINNING:
        shutil.rmtree(folder, ignore_errors=True)
    return LogWriter.create(folder, spec, **sizes)
