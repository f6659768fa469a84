"""Messages of the experience stream as bytes, and back; pure.

The control process sends them over a socket pair, one message a datagram, in the order in which they happened:
steps, ends of episodes, and, when a run is recorded, the inputs of every cycle. Arrays travel as raw little-endian
float32 bytes. No pickle.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from ..types import EpisodeEnd, FloatArray, Step

__all__ = ["CycleRecord", "decode", "encode"]

MAX_MESSAGE_BYTES = 1 << 16


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
    """All a cycle was given and what it decided, for a replay: see `relod.runtime.recording`."""

    now_ns: int
    sensor_seq: tuple[int, ...]
    sensor_arrived_ns: tuple[int, ...]
    sensor_values: bytes  # (M, n) float64
    frames: tuple[tuple[int, int, int], ...]  # (id, captured_ns, arrived_ns), oldest first
    policy_version: tuple[int, int]
    command: tuple[float, ...]
    request: int
    phase: str


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[_Step | _EpisodeEnd | CycleRecord] = msgspec.msgpack.Decoder(
    _Step | _EpisodeEnd | CycleRecord
)


def encode(message: Step | EpisodeEnd | CycleRecord) -> bytes:
    """The message as bytes, at most `MAX_MESSAGE_BYTES`."""
    if isinstance(message, CycleRecord):
        return _encoder.encode(message)
    kind = _Step if isinstance(message, Step) else _EpisodeEnd
    values: dict[str, Any] = {name: getattr(message, name) for name in kind.__struct_fields__}
    values = {name: _bytes(v) if isinstance(v, np.ndarray) else v for name, v in values.items()}
    return _encoder.encode(kind(**values))


def decode(data: bytes) -> Step | EpisodeEnd | CycleRecord:
    """The message in `data`; `msgspec.ValidationError` or `msgspec.DecodeError` when there is none."""
    try:
        message = _decoder.decode(data)
    except (UnicodeDecodeError, RecursionError) as error:  # msgspec lets these two through
        raise msgspec.DecodeError(f"no message: {error}") from error
    if isinstance(message, CycleRecord):
        return message
    values: dict[str, Any] = {name: getattr(message, name) for name in message.__struct_fields__}
    values = {name: _floats(v) if isinstance(v, bytes) else v for name, v in values.items()}
    return Step(**values) if isinstance(message, _Step) else EpisodeEnd(**values)


def _bytes(values: FloatArray) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def _floats(data: bytes) -> FloatArray:
    if len(data) % 4:
        raise msgspec.ValidationError(f"{len(data)} bytes are no whole number of float32 values")
    return np.frombuffer(data, "<f4").astype(np.float32, copy=False)
