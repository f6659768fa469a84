"""Where experience goes: into the log first, which is the record, then into the replay, from which updates are drawn.

Both hold the same pixels. A run that goes on fills its replay from the log again.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ..errors import SettingsError
from ..robots.vision import make_shrink
from ..types import EpisodeEnd, Frame, Image, Step
from .checkpoint import KEPT
from .log.codec import make_codec
from .log.format import EncodedFrame, LogPosition, LogSpec
from .log.reader import LogReader
from .log.writer import LogWriter
from .memory import check_log, check_replay
from .plan import Plan
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

    def __init__(self, plan: Plan, folder: Path, *, end: LogPosition | None = None) -> None:
        spec, settings = plan.task.spec, plan.settings
        self.table = ReplayTable(_layout(plan))
        self.writer = ReplayWriter(self.table)
        self.send: Callable[[bytes], object] = lambda news: None
        self.dropped = 0  # steps and ends of episodes without their frames
        # Of what was read from the log: the policies' epoch, the episode and the camera frame.
        self.newest_epoch, self.newest_episode, self.newest_frame_id = 0, -1, 0
        self._shrink = make_shrink(spec.image_hw)
        self._codec = make_codec(settings.log.codec, settings.log.jpeg_quality, image_hw=spec.image_hw)
        self._images: dict[int, Image] = {}
        self._encoded: dict[int, EncodedFrame] = {}
        self._pinned: deque[int] = deque(maxlen=KEPT)  # first steps of what the checkpoints need
        self._folder = folder / "log"
        self.log = _open_log(plan, self._folder, end)

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
        elif isinstance(message, Step):
            self.log.append(message, self._encoded)
            self.send(self.writer.append(message, self._images))
        else:
            self.log.close_episode(message, self._encoded)
            self.log.keep_from(min([self.writer.first_step, *self._pinned]))
            self.send(self.writer.close_episode(message, self._images))

    def pin(self, first_step: int) -> None:
        """Keep the log from that step on, for a checkpoint that goes on from there."""
        self._pinned.append(first_step)

    def cut(self) -> None:
        """The open episode's outcome is not known."""
        self.log.cut()
        self.send(self.writer.abandon())

    def refill(self, first_step: int) -> list[EpisodeEnd]:
        """Fill the replay from the log, from environment step `first_step` on; returns the episodes that ended.

        From a `writer.first_step` on, the replay becomes what it was, down to the order in which samples are drawn.
        Where the log begins later, so does the replay, and `writer.first_step` says so.
        """
        reader = LogReader(self._folder)
        ends: list[EpisodeEnd] = []
        self.writer.env_steps = first_step
        for record in reader.iterate(from_env_steps=first_step):
            if record.env_steps <= first_step:
                continue
            message = record.message
            if message is not None:
                self.newest_episode = max(self.newest_episode, message.episode)
                self.newest_frame_id = max(self.newest_frame_id, *message.frame_ids)
            if isinstance(message, Step):
                self.newest_epoch = max(self.newest_epoch, message.policy_version[0])
                self.writer.env_steps = record.env_steps - 1  # more than were read where the log has a gap
                self.send(self.writer.append(message, record.frames))
            elif isinstance(message, EpisodeEnd):
                ends.append(message)
                self.send(self.writer.close_episode(message, record.frames))
            else:
                self.send(self.writer.abandon())
        return ends


def check_room(plan: Plan) -> None:
    """Refuse a run that has no room for its replay, before anything is written or moves.

    Raises:
        SettingsError: the replay does not fit into the memory, or a new run's log could not hold it.
    """
    settings, layout = plan.settings, _layout(plan)
    try:
        check_replay(layout.nbytes, layout.capacity, settings.replay)
    except SettingsError as error:
        if plan.resume is None:
            raise
        raise SettingsError(error.message, "free some memory: a resumed run keeps its replay's capacity") from None
    if plan.resume is None:
        check_log(layout.step_bytes, layout.capacity, settings.log)


def _layout(plan: Plan) -> ReplayLayout:
    spec, settings = plan.task.spec, plan.settings
    lookahead = plan.algorithm.needs(spec, settings.agent).n_step
    return ReplayLayout.for_task(spec, capacity=settings.replay.capacity, lookahead=lookahead)


def _open_log(plan: Plan, folder: Path, end: LogPosition | None) -> LogWriter:
    settings = plan.settings.log
    spec = LogSpec.for_task(plan.task.spec, settings.codec)
    sizes = {"segment_bytes": int(settings.segment_mib * MIB), "limit_bytes": int(settings.limit_gib * 1024 * MIB)}
    if plan.resume is not None and end != BEGINNING:
        return LogWriter.resume(folder, spec, position=end, **sizes)
    if end == BEGINNING:
        shutil.rmtree(folder, ignore_errors=True)
    return LogWriter.create(folder, spec, **sizes)
