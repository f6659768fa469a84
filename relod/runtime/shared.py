"""Torch-free shared memory between the processes of one host: anonymous memory, newest-wins rings, frames.

Memory is a memfd handed to spawned children as a descriptor, so that nothing named is left in /dev/shm after any
death. Each ring has one writer. A record carries a sequence number and a CRC: a reader that meets a half-written
record tries again, then keeps what it had and counts it. Readers learn of news through an eventfd, never by
trusting a bare store. Lossless streams do not live here; they go through pipes.
"""

from __future__ import annotations

import mmap
import os
import weakref
import zlib
from collections.abc import Iterator
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt

from ..types import Frame, SensorWindow

__all__ = ["FrameRing", "Memory", "Ring", "SensorRing", "Signal"]

RETRIES = 3  # a writer fills a record in about 20 us, so the third look at one record only fails if it died there


class Memory:
    """Anonymous shared memory; pickles into a spawned child as an inherited descriptor."""

    def __init__(self, name: str, size_bytes: int) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self._attach(os.memfd_create(f"relod-{name}", os.MFD_CLOEXEC), create=True)

    def _attach(self, fd: int, *, create: bool) -> None:
        self._fd = fd
        weakref.finalize(self, os.close, fd)  # a mapping outlives its descriptor
        if create:
            os.ftruncate(fd, self.size_bytes)
        # All pages at once: copying a camera frame out of pages seen for the first time takes 22 us, else 9 (p99).
        self._map = mmap.mmap(fd, self.size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def array(self, dtype: npt.DTypeLike, shape: tuple[int, ...], offset_bytes: int = 0) -> npt.NDArray[Any]:
        """A view of the memory; keep it no longer than this object."""
        return np.ndarray(shape, dtype=dtype, buffer=self._map, offset=offset_bytes)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "size_bytes": self.size_bytes, "fd": DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name, self.size_bytes = state["name"], state["size_bytes"]
        self._attach(state["fd"].detach(), create=False)


class Signal:
    """An eventfd: `set` wakes whoever waits on `fileno()`; `clear` says how often it was set."""

    def __init__(self) -> None:
        self._attach(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def _attach(self, fd: int) -> None:
        self._fd = fd
        weakref.finalize(self, os.close, fd)

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        try:
            os.eventfd_write(self._fd, 1)
        except BlockingIOError:  # 2**64 - 2 unread signals: it is set all the same
            pass

    def clear(self) -> int:
        try:
            return os.eventfd_read(self._fd)
        except BlockingIOError:
            return 0

    def __getstate__(self) -> dict[str, Any]:
        return {"fd": DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._attach(state["fd"].detach())


class Ring:
    """Newest-wins ring of small records: one writer, any number of readers, nobody ever waits.

    `dtype` is a structured dtype. Sequence numbers start at 1 and grow by one for each record, across writers.
    A new writer calls `take_over` first, which begins a new generation.
    """

    def __init__(self, name: str, dtype: npt.DTypeLike, capacity: int) -> None:
        self.dtype = np.dtype(dtype)
        self.capacity = capacity
        self.retries = 0  # looks at a record that was being written
        self.kept = 0  # reads that gave up and kept the previous value
        self._signals: list[Signal] = []
        self._slot = np.dtype([("crc", "<u4"), ("generation", "<u4"), ("seq", "<u8"), ("data", self.dtype)])
        self._memory = Memory(name, self._slot.itemsize * (capacity + 1))
        self._bind()

    def _bind(self) -> None:
        # Slot 0 is the head: a record whose data is ignored and whose seq is that of the newest record.
        size = self._slot.itemsize
        self._raw = self._memory.array(np.uint8, (self.capacity + 1, size))
        self._scratch = np.zeros((), self._slot)
        self._scratch_bytes = self._scratch.reshape(1).view(np.uint8)
        self._newest_seq = 0
        self._generation = 0

    def add_signal(self) -> Signal:
        """A signal set at every publication; only before the children are spawned."""
        self._signals.append(Signal())
        return self._signals[-1]

    def take_over(self) -> None:
        """Become the writer: a new generation, sequence numbers go on after the last complete record."""
        # Not the head alone: the writer before may have died while it wrote that.
        for slot in range(self.capacity + 1):
            record = self._read(slot)
            if record is not None:
                self._newest_seq = max(self._newest_seq, int(record["seq"]))
                self._generation = max(self._generation, int(record["generation"]))
        self._generation += 1

    def begin_after(self, seq: int) -> None:
        """Let the first record be `seq + 1`; only before anyone else has the ring."""
        self._write(0, seq, None)

    def publish(self, record: npt.NDArray[Any] | tuple[Any, ...]) -> int:
        """Write the next record and wake the readers; returns its sequence number."""
        seq = self._newest_seq + 1
        self._write(1 + seq % self.capacity, seq, record)
        self._write(0, seq, None)
        self._newest_seq = seq
        for signal in self._signals:
            signal.set()
        return seq

    def invalidate(self, seq: int) -> None:
        """Make the slot that record `seq` will use unreadable, before what it points to is overwritten."""
        self._raw[1 + seq % self.capacity] = 0

    @property
    def newest_seq(self) -> int:
        """Sequence number of the newest record a reader may ask for; 0 before the first."""
        head = self._read(0)
        if head is not None:
            self._newest_seq = max(self._newest_seq, int(head["seq"]))
        return self._newest_seq

    def get(self, seq: int) -> npt.NDArray[Any] | None:
        """Record `seq`, or None when it was never written or has been overwritten."""
        record = self._read(1 + seq % self.capacity)
        if record is None or int(record["seq"]) != seq:
            return None
        return record["data"]

    def newest(self) -> tuple[int, npt.NDArray[Any]] | None:
        """The newest complete record with its sequence number, or None before the first."""
        seq = self.newest_seq
        record = self.get(seq) if seq else None
        return None if record is None else (seq, record)

    def since(self, seq: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Complete records after `seq`, oldest first; those already overwritten are skipped."""
        newest = self.newest_seq
        for number in range(max(seq + 1, newest - self.capacity + 1), newest + 1):
            record = self.get(number)
            if record is not None:
                yield number, record

    def _write(self, slot: int, seq: int, record: npt.NDArray[Any] | tuple[Any, ...] | None) -> None:
        scratch = self._scratch
        scratch["generation"], scratch["seq"] = self._generation, seq
        if record is not None:
            scratch["data"] = record
        scratch["crc"] = zlib.crc32(self._scratch_bytes[4:].data)
        self._raw[slot] = self._scratch_bytes

    def _read(self, slot: int) -> npt.NDArray[Any] | None:
        for _ in range(RETRIES):
            copy = self._raw[slot].copy()
            crc = int(copy[:4].view("<u4")[0])
            if zlib.crc32(copy[4:].data) == crc:
                return copy.view(self._slot)[0]  # type: ignore[no-any-return]
            if not copy.any():
                return None
            self.retries += 1
        self.kept += 1
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype.descr if self.dtype.names else self.dtype.str,
            "capacity": self.capacity,
            "memory": self._memory,
            "signals": self._signals,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.dtype = np.dtype(state["dtype"])
        self.capacity = state["capacity"]
        self.retries = self.kept = 0
        self._signals = state["signals"]
        self._slot = np.dtype([("crc", "<u4"), ("generation", "<u4"), ("seq", "<u8"), ("data", self.dtype)])
        self._memory = state["memory"]
        self._bind()


class SensorRing:
    """The newest sensor packets of one robot; the device process writes, anybody reads."""

    def __init__(self, names: tuple[str, ...], capacity: int = 128) -> None:
        self.names = names
        self.ring = Ring("sensors", [("arrived_ns", "<i8"), ("values", "<f8", (len(names),))], capacity)

    def publish(self, arrived_ns: int, values: npt.ArrayLike) -> int:
        """Add a packet; `values` in the order of `names`."""
        return self.ring.publish((arrived_ns, values))

    def window(self, length: int) -> SensorWindow:
        """The newest `length` packets, oldest first; fewer while fewer exist."""
        found = list(self.ring.since(max(0, self.ring.newest_seq - length)))[-length:]  # one may arrive in between
        return SensorWindow(
            names=self.names,
            seq=np.array([seq for seq, _ in found], np.int64),
            arrived_ns=np.array([record["arrived_ns"] for _, record in found], np.int64),
            values=np.array([record["values"] for _, record in found], np.float64).reshape(-1, len(self.names)),
        )


class FrameRing:
    """The newest camera frames: pixels in one block, their headers in a ring.

    The header of the slot to be reused is made unreadable before its pixels change, and a reader looks at the
    header again after copying, so that no torn image is ever returned. At 30 Hz, 64 slots hold 2.1 s. The first
    frame's id is `last_id + 1`, so that a run that goes on never gives one id to two frames.
    """

    def __init__(self, height: int, width: int, capacity: int = 64, *, last_id: int = 0) -> None:
        self.height, self.width, self.capacity = height, width, capacity
        self.ring = Ring("frames", [("captured_ns", "<i8"), ("arrived_ns", "<i8")], capacity)
        self.ring.begin_after(last_id)
        self._memory = Memory("pixels", capacity * height * width * 3)
        self._bind()

    def _bind(self) -> None:
        self._pixels = self._memory.array(np.uint8, (self.capacity, self.height, self.width, 3))

    def add_signal(self) -> Signal:
        """A signal set for every new frame; only before the children are spawned."""
        return self.ring.add_signal()

    def take_over(self) -> None:
        """Become the writer; frame ids go on after the last complete frame."""
        self.ring.take_over()

    def publish(self, captured_ns: int, arrived_ns: int, image: npt.NDArray[np.uint8]) -> int:
        """Add a frame `(H, W, 3) uint8` and return its id."""
        seq = self.ring._newest_seq + 1
        self.ring.invalidate(seq)
        self._pixels[seq % self.capacity] = image
        return self.ring.publish((captured_ns, arrived_ns))

    @property
    def newest_id(self) -> int:
        """Id of the newest frame; the one the ring began after, before the first."""
        return self.ring.newest_seq

    def get(self, frame_id: int) -> Frame | None:
        """A copy of frame `frame_id`, or None when it is not there (any more)."""
        header = self.ring.get(frame_id)
        if header is None:
            return None
        image = self._pixels[frame_id % self.capacity].copy()
        if self.ring.get(frame_id) is None:
            return None
        return Frame(
            id=frame_id,
            captured_ns=int(header["captured_ns"]),
            arrived_ns=int(header["arrived_ns"]),
            image=image,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("height", "width", "capacity", "ring", "_memory")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()
