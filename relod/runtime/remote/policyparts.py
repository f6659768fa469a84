"""A policy that arrives in parts, put together as float32; pure. The newest version wins."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import wire

__all__ = ["PolicyParts"]

NO_VERSION = (-1, -1)


class PolicyParts:
    """Puts together one policy at a time; parts of a version no newer than the newest complete one are passed over.

    Each part is converted as it comes, 32,768 values in some tens of microseconds, so a whole policy holds nobody up.

    Args:
        size: values of a policy, as the learner's welcome said.
        precision: of the values on the wire.
    """

    def __init__(self, size: int, precision: str) -> None:
        self._size = size
        self._precision = precision
        self._kind = np.dtype("<f2" if precision == "float16" else "<f4")
        self._values: npt.NDArray[np.float32] | None = None
        self._under_way = NO_VERSION
        self._next = 0  # value of the policy under way
        self.newest = NO_VERSION  # version of the newest complete policy

    def begin(self) -> None:
        """A new connection: what came of a policy over the former one is dropped."""
        self._values = None

    def add(self, head: wire.PolicyPart, payload: wire.Bytes) -> npt.NDArray[np.float32] | None:
        """The policy `(size,) float32` when this was its last part, else None. It is the caller's from then on.

        Raises:
            ValueError: the part does not fit the policy, is out of order, or holds values that are not finite.
        """
        if head.version <= self.newest:
            return None
        if head.size != self._size or head.precision != self._precision:
            raise ValueError(
                f"a policy of {head.size} {head.precision} values instead of {self._size} {self._precision}"
            )
        if head.offset == 0:
            self._values = np.empty(self._size, np.float32)
            self._under_way, self._next = head.version, 0
        if self._values is None or head.version != self._under_way or head.offset != self._next * self._kind.itemsize:
            raise ValueError(f"a part of policy {head.version} at byte {head.offset} out of order")
        count, rest = divmod(len(payload), self._kind.itemsize)
        if rest or not 0 < count <= self._size - self._next:
            raise ValueError(f"a part of policy {head.version} of {len(payload)} bytes")
        part = self._values[self._next : self._next + count]
        part[:] = np.frombuffer(payload, self._kind)
        if not np.isfinite(part).all():
            raise ValueError(f"policy {head.version} has values that are not finite")
        self._next += count
        if self._next < self._size:
            return None
        values, self._values, self.newest = self._values, None, head.version
        return values
