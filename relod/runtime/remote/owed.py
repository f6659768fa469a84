"""What a learner owes one robot, most urgent first; pure.

Slots, not queues: each holds the newest of its kind, so a robot that reads slowly holds up nothing and takes no memory.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..clock import Clock
from .wire import POLICY_PART_BYTES, Ack, FromLearner, PolicyPart, Pong, Precision, pack

__all__ = ["Owed", "PackedPolicy", "pack_policy"]

PONGS_KEPT = 8  # a robot that pings faster than it reads loses the oldest answers
FLOAT16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class PackedPolicy:
    """A policy as wire messages, the same for all robots."""

    version: tuple[int, int]
    parts: tuple[bytes, ...]


def pack_policy(values: npt.NDArray[np.float32], version: tuple[int, int], precision: Precision) -> PackedPolicy:
    """The messages of a policy; values beyond the range of float16 become the largest it has."""
    if precision == "float16":
        data = np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype("<f2").tobytes()
    else:
        data = values.astype("<f4", copy=False).tobytes()
    view = memoryview(data)
    parts = [
        pack(
            PolicyPart(version=version, precision=precision, size=values.size, offset=offset),
            view[offset : offset + POLICY_PART_BYTES],
        )
        for offset in range(0, len(data), POLICY_PART_BYTES)
    ]
    return PackedPolicy(version, tuple(parts))


class Owed:
    """Pongs, acks, messages, a policy, then messages that must not overtake it; answers do not pass through here."""

    def __init__(self, clock: Clock) -> None:
        self.acked = 0  # sequence number of the last ack handed out
        self.policy_version: tuple[int, int] | None = None  # of the last policy handed out whole
        self._clock = clock
        self._pongs: deque[tuple[int, int]] = deque(maxlen=PONGS_KEPT)
        self._ack = 0
        self._told: dict[type[FromLearner], bytes] = {}
        self._told_last: dict[type[FromLearner], bytes] = {}
        self._policy: PackedPolicy | None = None  # on its way
        self._part = 0
        self._newest: PackedPolicy | None = None

    def pong(self, sent_ns: int, received_ns: int) -> None:
        """A ping is to be answered."""
        self._pongs.append((sent_ns, received_ns))

    def ack(self, seq: int) -> None:
        """All records up to `seq` are in the log; acks not handed out yet become one."""
        self._ack = seq

    def tell(self, kind: type[FromLearner], packed: bytes, *, last: bool = False) -> None:
        """A message, at once or when the newest policy is handed out; one of its kind that still waits is dropped."""
        told, other = (self._told_last, self._told) if last else (self._told, self._told_last)
        other.pop(kind, None)
        told[kind] = packed

    def offer(self, policy: PackedPolicy) -> None:
        """A newer policy. One that is on its way is finished first: else a slow link would never get a whole one."""
        self._newest = policy

    def next(self) -> bytes | None:
        """The most urgent wire message, or None."""
        if self._pongs:
            sent_ns, received_ns = self._pongs.popleft()
            return pack(Pong(sent_ns=sent_ns, received_ns=received_ns, replied_ns=self._clock.now_ns()))
        if self._ack > self.acked:
            self.acked = self._ack
            return pack(Ack(seq=self._ack))
        if self._told:
            return self._told.pop(next(iter(self._told)))
        if self._policy is None:
            self._policy, self._newest, self._part = self._newest, None, 0
        if self._policy is not None:
            return self._next_part(self._policy)
        return self._told_last.pop(next(iter(self._told_last))) if self._told_last else None

    def _next_part(self, policy: PackedPolicy) -> bytes:
        part = policy.parts[self._part]
        self._part += 1
        if self._part == len(policy.parts):
            self._policy, self.policy_version = None, policy.version
        return part
