"""The policy box: newest policy from one writer to one reader on the same host, without waiting and without decoding.

Three flat float32 buffers, one torch tensor in shared memory. The writer fills the one that is neither the latest nor
held by the reader, then publishes a small record naming it. The reader's networks are views of the three buffers, so
taking a new policy is a change of reference.

Why a held buffer is never written. The reader (1) reads which buffer is the latest, (2) publishes that it holds that
one, (3) reads the latest again, and repeats until (3) agrees with (1). The writer publishes a buffer before it looks
for the next one to fill, and never fills the latest. Take a reader that stopped with buffer b: at (3) b was the
latest, so any later choice of the writer comes after it published another buffer, hence after (3), hence after (2):
it sees that b is held. Before that, b was the latest and not eligible. Between (2) and (3) lie a checksum and several
system calls, so the store of (2) is visible before the load of (3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from ..types import FloatArray
from .shared import Ring, Signal
from .tensors import shared_tensor

__all__ = ["NO_POLICY", "PolicyBox", "PolicyReader", "PolicyWriter"]

BUFFERS = 3
NO_POLICY = (0, 0)  # version before the first policy

T = TypeVar("T")
_LATEST = [("buffer", "<u4"), ("epoch", "<u4"), ("updates", "<u8")]
_HELD = [("buffer", "<u4")]


class PolicyBox:
    """The shared memory of one writer and one reader; pickles into a spawned child."""

    def __init__(self, size: int) -> None:
        self.size = size  # float32 values in a policy
        self.latest = Ring("policy-latest", _LATEST, 8)
        self.held = Ring("policy-held", _HELD, 8)
        self._tensor = shared_tensor((BUFFERS, size), torch.float32)
        self._bind()

    def _bind(self) -> None:
        self.buffers: list[FloatArray] = list(self._tensor.numpy())

    def add_signal(self) -> Signal:
        """A signal set at every new policy; only before the children are spawned."""
        return self.latest.add_signal()

    def __getstate__(self) -> dict[str, object]:
        return {"size": self.size, "latest": self.latest, "held": self.held, "_tensor": self._tensor}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._bind()


class PolicyWriter:
    """Publishes policies. A new writer takes over from a dead one wherever that stopped."""

    def __init__(self, box: PolicyBox) -> None:
        self._box = box
        box.latest.take_over()

    def publish(self, flat: FloatArray, version: tuple[int, int]) -> bool:
        """Make `flat` `(size,) float32` the latest policy; `version` is (learner epoch, update count).

        False, and nothing done, when the box holds this version or a newer one. `ValueError` for a wrong size.
        """
        if flat.shape != (self._box.size,):
            raise ValueError(f"a policy of shape {flat.shape} does not fit a box of {self._box.size} values")
        latest = self._box.latest.newest()
        if latest is not None and version <= (int(latest[1]["epoch"]), int(latest[1]["updates"])):
            return False
        target = self._free_buffer()
        self._box.buffers[target][:] = flat
        self._box.latest.publish((target, *version))
        return True

    def _free_buffer(self) -> int:
        taken = {int(found[1]["buffer"]) for ring in (self._box.latest, self._box.held) if (found := ring.newest())}
        return min(set(range(BUFFERS)) - taken)


class PolicyReader(Generic[T]):
    """The newest policy as a ready object, for example a network; `poll` right after a command, when there is slack.

    `make` is called once for each buffer and returns an object whose parameters are views of it.
    """

    def __init__(self, box: PolicyBox, make: Callable[[FloatArray], T]) -> None:
        self._box = box
        self._modules = [make(buffer) for buffer in box.buffers]
        self._seen = 0
        self.version = NO_POLICY
        self.module = self._modules[0]  # zeros until the first policy
        box.held.take_over()
        box.held.publish((0,))
        self.poll()

    def poll(self) -> bool:
        """Take the latest policy if it is another than the one in use; True when the module changed."""
        if self._box.latest.newest_seq == self._seen:
            return False
        while (found := self._box.latest.newest()) is not None:
            seq, record = found
            buffer = int(record["buffer"])
            self._box.held.publish((buffer,))
            again = self._box.latest.newest()
            if again is not None and again[0] == seq:
                self._seen, self.module = seq, self._modules[buffer]
                self.version = (int(record["epoch"]), int(record["updates"]))
                return True
        return False
