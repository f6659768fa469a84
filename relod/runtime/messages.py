"""Messages of the experience stream as bytes, and back; pure.

The control process sends them over a socket pair, one message a datagram, in the order in which they happened:
steps, ends of episodes, and, when a run is recorded, the inputs of every cycle. Arrays travel as raw little-endian
float32 bytes. No pickle.
"""

from __future__ import annotations

import msgspec
import numpy as np

from ..types import EpisodeEnd, FloatArray, Step

__all__ = ["CycleRecord", "decode", "encode"]

MAX_MESSAGE_BYTES = 1 << 16


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
    match message:
        case Step():
            return _encoder.encode(
                _Step(
                    episode=message.episode,
                    index=message.index,
                    frame_ids=message.frame_ids,
                    proprio=_bytes(message.proprio),
                    action=_bytes(message.action),
                    reward=message.reward,
                    terminated=message.terminated,
                    truncated=message.truncated,
                    extras=_bytes(message.extras),
                    policy_version=message.policy_version,
                    observed_ns=message.observed_ns,
                    acted_ns=message.acted_ns,
                )
            )
        case EpisodeEnd():
            return _encoder.encode(
                _EpisodeEnd(
                    episode=message.episode,
                    length=message.length,
                    frame_ids=message.frame_ids,
                    proprio=_bytes(message.proprio),
                    return_=message.return_,
                    terminated=message.terminated,
                    reason=message.reason,
                    observed_ns=message.observed_ns,
                )
            )
        case CycleRecord():
            return _encoder.encode(message)


def decode(data: bytes) -> Step | EpisodeEnd | CycleRecord:
    """The message in `data`; `msgspec.ValidationError` or `msgspec.DecodeError` when there is none."""
    message = _decoder.decode(data)
    match message:
        case _Step():
            return Step(
                episode=message.episode,
                index=message.index,
                frame_ids=message.frame_ids,
                proprio=_floats(message.proprio),
                action=_floats(message.action),
                reward=message.reward,
                terminated=message.terminated,
                truncated=message.truncated,
                extras=_floats(message.extras),
                policy_version=message.policy_version,
                observed_ns=message.observed_ns,
                acted_ns=message.acted_ns,
            )
        case _EpisodeEnd():
            return EpisodeEnd(
                episode=message.episode,
                length=message.length,
                frame_ids=message.frame_ids,
                proprio=_floats(message.proprio),
                return_=message.return_,
                terminated=message.terminated,
                reason=message.reason,
                observed_ns=message.observed_ns,
            )
        case CycleRecord():
            return message


def _bytes(values: FloatArray) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def _floats(data: bytes) -> FloatArray:
    if len(data) % 4:
        raise msgspec.ValidationError(f"{len(data)} bytes are no whole number of float32 values")
    return np.frombuffer(data, "<f4").astype(np.float32, copy=False)
