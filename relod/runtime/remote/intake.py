"""What a learner takes in from one robot's connection, checked; pure.

Frames, records and questions are held against the robot's task before anyone else sees them. Nothing here grows with
what a robot sends.
"""

from __future__ import annotations

import math
import re

import msgspec
import numpy as np

from ...types import EpisodeEnd, FloatArray, Step, TaskSpec
from ..log.format import EncodedFrame
from ..messages import MAX_MESSAGE_BYTES, Position, decode_record, position
from .wire import ACTION_SLACK, MAX_HEADER_BYTES, FrameHead, Observe, RecordHead, WireError

__all__ = ["Intake", "check_spec"]

# Frames are dropped as soon as a record names later ones; this bounds those that no record has named. A robot counts
# on the 256 that it sent last, as far as they are within these bytes.
FRAMES_KEPT = 512
FRAMES_KEPT_BYTES = 1 << 26
MAX_IMAGE_BYTES = 1 << 24
MAX_FRAMES, MAX_ACTIONS, MAX_PROPRIO = 64, 1024, 4096
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
LARGEST = float(np.finfo(np.float32).max)  # a replay's numbers
MAX_COUNT = 2**53
MAX_STAMP = 2**63 - 1


class Intake:
    """The state of one connection: frames that records may name, and where its records are.

    Every method raises `WireError` for a message that does not belong to the task or does not come next; the
    connection is of no use afterwards.

    Args:
        in_log: position of the newest record of the robot's run that is in the log; None when there is none.
    """

    def __init__(self, spec: TaskSpec, codec: str, in_log: tuple[int, int] | None) -> None:
        self._spec, self._codec = spec, codec
        self._image_bytes = math.prod(spec.image_hw) * 3
        self._frames: dict[int, EncodedFrame] = {}
        self._frames_bytes = 0
        self.seq = 0  # of the connection's newest record; 0 before the first
        self._in_log = self._previous = in_log
        self._previous_ended = False  # the record before was the end of its episode, as far as this connection knows
        self._ask = -1

    @property
    def max_message_bytes(self) -> int:
        """Room for a record, or a question with its frames. A JPEG may be larger than its pixels, not twice."""
        return max(2 * self._image_bytes * self._spec.frames, MAX_MESSAGE_BYTES) + MAX_HEADER_BYTES

    def frame(self, head: FrameHead, payload: memoryview) -> None:
        """Keep a frame; `payload` is kept, not copied. Whether a JPEG can be decoded is not looked at.

        An id that comes again takes the place of the former: the robot may not know what is still kept here.
        """
        if self._codec == "raw" and len(payload) != self._image_bytes:
            raise WireError(f"frame {head.id} has {len(payload)} bytes, not {self._image_bytes}")
        if head.id in self._frames:
            self._drop_frame(head.id)
        self._frames[head.id] = EncodedFrame(captured_ns=head.captured_ns, data=payload)
        self._frames_bytes += len(payload)
        while len(self._frames) > FRAMES_KEPT or self._frames_bytes > FRAMES_KEPT_BYTES:
            self._drop_frame(next(iter(self._frames)))

    def record(self, head: RecordHead, payload: memoryview) -> tuple[Step | EpisodeEnd, dict[int, EncodedFrame]] | None:
        """The next record and the frames it names; None when it is in the log already."""
        if head.seq == 0 or (self.seq and head.seq != self.seq + 1):
            raise WireError(f"record {head.seq} after record {self.seq}")
        message = _decode(payload)
        _check_message(message, self._spec)
        named = self._named(message.frame_ids)
        ended = isinstance(message, EpisodeEnd)
        place = position(message)
        known = self._in_log is not None and place <= self._in_log
        # The first record of a connection may be any that is in the log already.
        if not (known and self.seq == 0) and not _follows(place, ended, self._previous, self._previous_ended):
            raise WireError(f"{'an end' if ended else 'a step'} at {place} after {self._previous}")
        self.seq, self._previous, self._previous_ended = head.seq, place, ended
        for frame_id in [each for each in self._frames if each < message.frame_ids[0]]:
            self._drop_frame(frame_id)  # ids grow: no later record names it
        return None if known else (message, named)

    def question(self, head: Observe, payload: memoryview) -> tuple[tuple[EncodedFrame, ...], FloatArray]:
        """Frames `(k,)` and proprioception `(P,)` of an observation; the frames it carries are kept."""
        spec = self._spec
        if len(head.frames) > spec.frames:
            raise WireError(f"a question carries {len(head.frames)} frames, and names {len(head.frame_ids)}")
        rest = payload[4 * spec.proprio_dim :]
        payload = payload[: 4 * spec.proprio_dim]
        for carried in head.frames:
            if carried.size > len(rest):
                raise WireError(f"a question's frame {carried.id} has {len(rest)} bytes, not {carried.size}")
            image = rest[: carried.size]
            if len(head.frames) > 1:  # a view of a part would keep all of the message in memory
                image = memoryview(bytes(image))
            self.frame(FrameHead(id=carried.id, captured_ns=carried.captured_ns), image)
            rest = rest[carried.size :]
        if rest:
            raise WireError(f"a question has {len(rest)} bytes that belong to nothing")
        if head.ask <= self._ask:
            raise WireError(f"question {head.ask} after question {self._ask}")
        if len(head.frame_ids) != spec.frames:
            raise WireError(f"a question names {len(head.frame_ids)} frames, not {spec.frames}")
        if len(payload) != 4 * spec.proprio_dim:
            raise WireError(f"a question's proprioception has {len(payload)} bytes, not {4 * spec.proprio_dim}")
        proprio = np.frombuffer(payload, "<f4").astype(np.float32)  # a copy: an actor may want to write
        _check_floats("proprioception", proprio, spec.proprio_dim)
        named = self._named(head.frame_ids)
        self._ask = head.ask
        return tuple(named[frame_id] for frame_id in head.frame_ids), proprio

    def release(self) -> None:
        """Free the frames."""
        self._frames.clear()
        self._frames_bytes = 0

    def _named(self, frame_ids: tuple[int, ...]) -> dict[int, EncodedFrame]:
        try:
            return {frame_id: self._frames[frame_id] for frame_id in frame_ids}
        except KeyError as error:
            raise WireError(f"frame {error} was not sent") from None

    def _drop_frame(self, frame_id: int) -> None:
        self._frames_bytes -= len(self._frames.pop(frame_id).data)


def check_spec(spec: TaskSpec) -> None:
    """`WireError` for a task of impossible sizes, or of sizes that one robot must not take up."""
    if not NAME.fullmatch(spec.name):  # it becomes a folder's
        raise WireError("a task whose name is none: letters, digits and . _ : - only, 64 at most")
    names = (spec.robot, *spec.proprio_names, *spec.action_names)
    if not all(name.isprintable() and len(name) <= 64 for name in names):
        raise WireError("a task with names that cannot be printed, or of more than 64 characters")
    height, width = spec.image_hw
    image_bytes = height * width * 3
    # Products of negative sizes are positive, so each is looked at.
    if min(height, width, spec.frames, spec.cycle_ns, spec.max_steps, *spec.camera_hw) < 1:
        raise WireError("a task with a size below 1")
    if image_bytes > MAX_IMAGE_BYTES or spec.frames > MAX_FRAMES or spec.frames * image_bytes > FRAMES_KEPT_BYTES // 2:
        raise WireError(f"a task of {spec.frames} images {height}x{width}: too large for a learner")
    if not 1 <= spec.action_dim <= MAX_ACTIONS or spec.proprio_dim > MAX_PROPRIO:
        raise WireError(f"a task of {spec.action_dim} actions and {spec.proprio_dim} values of proprioception")
    if not math.isfinite(spec.camera_fps) or spec.camera_fps <= 0:
        raise WireError(f"a camera of {spec.camera_fps} frames per second")


def _follows(place: Position, ended: bool, previous: Position | None, previous_ended: bool) -> bool:
    """Whether a record comes next: the first step of a later episode, or the next index (an end's is its length)."""
    if place[1] == 0:
        return not ended and (previous is None or place[0] > previous[0])
    return previous is not None and not previous_ended and place == (previous[0], previous[1] + 1)


def _decode(payload: memoryview) -> Step | EpisodeEnd:
    if len(payload) > MAX_MESSAGE_BYTES:
        raise WireError(f"a record of {len(payload)} bytes")
    try:
        return decode_record(payload)
    except msgspec.DecodeError as error:
        raise WireError(f"a record that cannot be read: {error}") from None


def _check_message(message: Step | EpisodeEnd, spec: TaskSpec) -> None:
    if len(message.frame_ids) != spec.frames:
        raise WireError(f"a record names {len(message.frame_ids)} frames, not {spec.frames}")
    _check_floats("proprioception", message.proprio, spec.proprio_dim)
    if isinstance(message, EpisodeEnd):
        _check_counts(message.episode, message.length)
        _check_number("return", message.return_)
        _check_stamps(message.observed_ns)
        return
    _check_counts(message.episode, message.index, *message.policy_version)
    _check_number("reward", message.reward)
    _check_stamps(message.observed_ns, message.acted_ns)
    _check_floats("action", message.action, spec.action_dim)
    if np.abs(message.action).max(initial=0.0) > 1 + ACTION_SLACK:
        raise WireError("an action outside [-1, 1]")
    _check_floats("extras", message.extras, message.extras.size)


def _check_floats(name: str, values: FloatArray, size: int) -> None:
    if values.size != size:
        raise WireError(f"{name} of {values.size} values, not {size}")
    if not np.isfinite(values).all():
        raise WireError(f"{name} that is not finite")


def _check_number(name: str, value: float) -> None:
    if not abs(value) <= LARGEST:  # nor is NaN
        raise WireError(f"a {name} that is not finite")


def _check_counts(*values: int) -> None:
    if min(values) < 0 or max(values) > MAX_COUNT:
        raise WireError("a count out of range")


def _check_stamps(*values: int) -> None:
    if max(values) > MAX_STAMP:
        raise WireError("a stamp out of range")
