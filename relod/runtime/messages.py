"""Messages of the experience stream as bytes, and back; pure.

The control process sends them over a socket pair, one message a datagram, in the order in which they happened:
steps, ends of episodes, observations whose action comes from another host, and, when a run is recorded, the inputs of
every cycle. Answers come back the same way. Arrays travel as raw little-endian float32 bytes. No pickle.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec
import numpy as np

from ..types import Action, EpisodeEnd, FloatArray, Step

__all__ = [
    "Answered",
    "Asked",
    "CycleRecord",
    "Position",
    "decode",
    "decode_answer",
    "decode_record",
    "encode",
    "position",
]

MAX_MESSAGE_BYTES = 1 << 16

Position: TypeAlias = tuple[int, int]  # of a step: episode and index; of an episode's end: episode and length


# The fields of the types of the same name, arrays as bytes.
class _Step(msgspec.Struct, frozen=True, tag="step", array_like=True):
    episode: int
    index: int
    frame_ids: tuple[int, ...]
    proprio: bytes
    action: bytes
    reward: float
    terminated: bool
    truncated: bool
    extras: bytes
    policy_version: tuple[int, int]
    observed_ns: int
    acted_ns: int


class _EpisodeEnd(msgspec.Struct, frozen=True, tag="end", array_like=True):
    episode: int
    length: int
    frame_ids: tuple[int, ...]
    proprio: bytes
    return_: float
    terminated: bool
    success: bool
    reason: str
    observed_ns: int


class CycleRecord(msgspec.Struct, frozen=True, tag="cycle", array_like=True):
    """All a cycle was given and what it decided, for a replay: see `relod.runtime.playback`."""

    now_ns: int
    sensor_seq: tuple[int, ...]
    sensor_arrived_ns: tuple[int, ...]
    sensor_values: bytes  # (M, n) float64
    frames: tuple[tuple[int, int, int], ...]  # (id, captured_ns, arrived_ns), oldest first
    policy_version: tuple[int, int]
    command: tuple[float, ...]
    request: int
    phase: str
    hold: str = ""


class Asked(msgspec.Struct, frozen=True, tag="ask", array_like=True):
    """An observation whose action is to come from the learner."""

    episode: int
    index: int
    frame_ids: tuple[int, ...]
    proprio: bytes  # (P,) float32
    now_ns: int


class Answered(msgspec.Struct, frozen=True, tag="answer", array_like=True):
    """The action for what was asked at `asked_ns`."""

    asked_ns: int
    action: bytes  # (A,) float32
    extras: bytes  # (E,) float32
    policy_version: tuple[int, int]


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[_Step | _EpisodeEnd | CycleRecord | Asked] = msgspec.msgpack.Decoder(
    _Step | _EpisodeEnd | CycleRecord | Asked
)
_answer_decoder: msgspec.msgpack.Decoder[Answered] = msgspec.msgpack.Decoder(Answered)


def encode(message: Step | EpisodeEnd | CycleRecord | Asked | Answered) -> bytes:
    """The message as bytes, at most `MAX_MESSAGE_BYTES`."""
    if isinstance(message, msgspec.Struct):
        return _encoder.encode(message)
    kind = _Step if isinstance(message, Step) else _EpisodeEnd
    values: dict[str, Any] = {name: getattr(message, name) for name in kind.__struct_fields__}
    values = {name: _bytes(v) if isinstance(v, np.ndarray) else v for name, v in values.items()}
    return _encoder.encode(kind(**values))


def decode(data: bytes | memoryview) -> Step | EpisodeEnd | CycleRecord | Asked:
    """A control process's message; `msgspec.ValidationError` or `msgspec.DecodeError` when there is none."""
    try:
        message = _decoder.decode(data)
    except (UnicodeDecodeError, RecursionError) as error:  # msgspec lets these two through
        raise msgspec.DecodeError(f"no message: {error}") from error
    if isinstance(message, CycleRecord | Asked):
        return message
    values: dict[str, Any] = {name: getattr(message, name) for name in message.__struct_fields__}
    values = {name: _floats(v) if isinstance(v, bytes) else v for name, v in values.items()}
    return Step(**values) if isinstance(message, _Step) else EpisodeEnd(**values)


def decode_record(data: bytes | memoryview) -> Step | EpisodeEnd:
    """The step or end of an episode in `data`, from a log or a wire; raises as `decode` does."""
    message = decode(data)
    if not isinstance(message, Step | EpisodeEnd):
        raise msgspec.ValidationError(f"{type(message).__name__} is neither a step nor an end of an episode")
    return message


def position(message: Step | EpisodeEnd) -> Position:
    """Where a record is in its robot's run; grows from record to record."""
    return message.episode, message.index if isinstance(message, Step) else message.length


def decode_answer(data: bytes) -> tuple[int, Action]:
    """Stamp of the observation and the action of an `Answered`; raises as `decode` does."""
    answer = _answer_decoder.decode(data)
    action = Action(values=_floats(answer.action), extras=_floats(answer.extras), policy_version=answer.policy_version)
    return answer.asked_ns, action


def _bytes(values: FloatArray) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def _floats(data: bytes) -> FloatArray:
    if len(data) % 4:
        raise msgspec.ValidationError(f"{len(data)} bytes are no whole number of float32 values")
    return np.frombuffer(data, "<f4").astype(np.float32, copy=False)
