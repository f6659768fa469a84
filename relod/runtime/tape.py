"""The tape of a run in virtual time: every answer of its actor, from the first.

Seed and answers determine all that plant, camera, task and resets do, so a run that goes on plays its tape through a
fresh world, without learning, instead of saving the world's state. It is about thirty times as fast as the run was.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgpack
import numpy as np

from ..errors import StartError
from ..types import Action, Actor, FloatArray, Observation
from .rundir import disk_errors

__all__ = ["TapedActor", "read_tape"]


class TapedActor:
    """Answers as the tape says, then as `actor` does, whose answers go to the tape; implements `types.Actor`.

    Args:
        path: the tape; created when it is not there.
        played: the answers in its first `keep_bytes` bytes, see `read_tape`; the rest is cut off.
    """

    def __init__(self, actor: Actor, path: Path, *, played: Sequence[Action] = (), keep_bytes: int = 0) -> None:
        self._actor, self._path = actor, path
        self._new: list[bytes] = []
        self.size_bytes = keep_bytes
        self._played = deque(played)
        with disk_errors(path, StartError), path.open("ab") as file:
            file.truncate(keep_bytes)

    def act(self, observation: Observation) -> Action:
        """The next answer."""
        if self._played:
            return self._played.popleft()
        action = self._actor.act(observation)
        assert action is not None  # in virtual time the actor is in this process
        record = (_bytes(action.values), _bytes(action.extras), *action.policy_version)
        self._new.append(msgpack.packb(record))
        return action

    @property
    def playing(self) -> bool:
        """Whether the tape has more answers."""
        return bool(self._played)

    def flush(self) -> int:
        """Put all answers so far on the disk; returns the tape's bytes."""
        with disk_errors(self._path), self._path.open("ab") as file:
            file.write(b"".join(self._new))
            file.flush()
            os.fsync(file.fileno())
        self.size_bytes += sum(map(len, self._new))
        self._new.clear()
        return self.size_bytes


def read_tape(path: Path, count: int) -> list[Action]:
    """The answers in the first `count` bytes of a tape; `StartError` when they cannot be read."""
    hint = "without its tape this run cannot go on"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}", hint) from error
    if len(data) < count:
        raise StartError(f"{path} has {len(data)} of {count} bytes", hint)
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    unpacker.feed(data[:count])
    try:
        return [
            Action(values=_floats(values), extras=_floats(extras), policy_version=(epoch, updates))
            for values, extras, epoch, updates in unpacker
        ]
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        raise StartError(f"{path} is damaged: {error}", hint) from error


def _bytes(values: FloatArray) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def _floats(data: bytes) -> FloatArray:
    return np.frombuffer(data, "<f4").astype(np.float32)
