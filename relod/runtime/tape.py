"""The tape of a run in virtual time: every answer of its actor, from the first.

Seed and answers determine all that plant, camera, task and resets do, so a run that goes on plays its tape through a
fresh world, without learning, instead of saving the world's state. It is about thirty times as fast as the run was.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

import msgpack
import numpy as np

from ..errors import StartError
from ..types import Action, Actor, FloatArray, Observation
from .rundir import disk_errors

__all__ = ["TapedActor"]


class TapedActor:
    """Answers as the tape says, then as `actor` does, whose answers go to the tape; implements `types.Actor`.

    Args:
        path: the tape; created when it is not there.
        keep_bytes: what is played of it; the rest is cut off.
    """

    def __init__(self, actor: Actor, path: Path, *, keep_bytes: int = 0) -> None:
        self._actor, self._path = actor, path
        self._new: list[bytes] = []
        self.size_bytes = keep_bytes
        self._played = deque(_read(path, keep_bytes) if keep_bytes else ())
        with disk_errors(path, StartError), path.open("ab") as file:
            file.truncate(keep_bytes)

    def act(self, observation: Observation) -> Action:
        """The next answer."""
        if self._played:
            return self._played.popleft()
        action = self._actor.act(observation)
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


def _read(path: Path, count: int) -> list[Action]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}", "without its tape this run cannot go on") from error
    if len(data) < count:
        raise StartError(f"{path} has {len(data)} of {count} bytes", "without its tape this run cannot go on")
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    unpacker.feed(data[:count])
    return [
        Action(values=_floats(values), extras=_floats(extras), policy_version=(epoch, updates))
        for values, extras, epoch, updates in unpacker
    ]


def _bytes(values: FloatArray) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def _floats(data: bytes) -> FloatArray:
    return np.frombuffer(data, "<f4").astype(np.float32)
