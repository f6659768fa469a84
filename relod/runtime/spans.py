"""Where the time goes: spans stamped into one preallocated ring shared by all processes, and their percentiles.

A span is (stage, index, start, end). Latency counts from the intended time: a stage that begins late starts at its
deadline, not at its call. Stages are added here, so that every process and every report means the same by a name.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import numpy.typing as npt

from .shared import Memory

__all__ = ["Histogram", "SpanRing", "SpanWriter", "Stage"]


class Stage(enum.IntEnum):
    """What a span measures; `index` is the cycle's number unless said otherwise."""

    LATENESS = 1  # deadline of the cycle -> the cycle starts
    OBSERVE = 2  # cycle starts -> sensors and frames are gathered
    DECIDE = 3  # inputs gathered -> the cycle has its command, inference included
    ACT = 4  # deadline of the cycle -> its command is written on the robot's wire
    SENSOR_AGE = 5  # newest packet arrived -> deadline
    FRAME_AGE = 6  # newest frame captured -> deadline
    SENTINEL = 7  # deadline of the idle ticker -> it wakes; index counts its own ticks
    UPDATE = 8  # one update of the learner; index counts updates
    SWAP = 9  # newer policy found -> it acts
    FRAME_ARRIVAL = 10  # newest frame captured -> it arrived at this host
    INFERENCE = (
        11  # the network is asked -> its action is there; where another host acts, index is the question's number
    )
    WRITE = 12  # command in shared memory -> written on the robot's wire
    SENSED = 13  # simulated robot, by its own log: a packet's values were true -> it is on the wire; index counts
    MOVED = 14  # simulated robot, by its own log: a command arrived -> the actuators follow it; index counts
    ENCODE = 15  # a frame was taken -> it is encoded for the learner; index is the frame's number
    # Of a question to a learner, whose number is the stamp of its cycle's start.
    SEND = 16  # the cycle started -> its question is given to the socket
    UPLINK = 17  # -> it is whole at the learner; that clock's offset is taken off, here and below
    DECODE = 18  # -> its images are decoded
    QUEUE = 19  # -> the network is asked
    DOWNLINK = 20  # its action was there -> it is back
    DELIVER = (
        21  # a record was given to the link -> the learner said that it is in its log; index is the record's number
    )
    POLICY_AGE = 22  # the policy was first seen here -> a step it acted in; index is the policy's update
    STORED = 23  # a step reached the learner's process -> it is in log and memory; index counts the run's steps


SPAN = np.dtype(
    [
        ("seq", "<u8"),
        ("check", "<u8"),
        ("stage", "<u8"),
        ("index", "<u8"),
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
    ]
)


class SpanRing:
    """Spans of several writers; each process writes its own row, the parent drains them all."""

    def __init__(self, writers: tuple[str, ...], capacity: int = 4096) -> None:
        self.writers = writers
        self.capacity = capacity
        self._memory = Memory("spans", len(writers) * capacity * SPAN.itemsize)
        self._drained = dict.fromkeys(writers, 0)
        self.lost = 0  # spans overwritten before they were drained

    def _row(self, writer: str) -> npt.NDArray[Any]:
        row = self.writers.index(writer)
        rows: npt.NDArray[Any] = self._memory.array(SPAN, (self.capacity,), row * self.capacity * SPAN.itemsize)
        return rows

    def writer(self, name: str) -> SpanWriter:
        """The writing end of process `name`; a restarted process goes on after its predecessor's spans."""
        row = self._row(name)
        return SpanWriter(row, int(row["seq"].max()))

    def drain(self, name: str) -> npt.NDArray[Any]:
        """Spans of process `name` since the last call, oldest first."""
        rows = self._row(name).copy()
        check = rows["seq"] ^ rows["stage"] ^ rows["index"] ^ _bits(rows["start_ns"]) ^ _bits(rows["end_ns"])
        fresh: npt.NDArray[Any] = rows[(rows["check"] == check) & (rows["seq"] > self._drained[name])]
        fresh = fresh[np.argsort(fresh["seq"])]
        if len(fresh):
            self.lost += int(fresh["seq"][-1]) - self._drained[name] - len(fresh)
            self._drained[name] = int(fresh["seq"][-1])
        return fresh


def _bits(values: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(values).view(np.uint64)


class SpanWriter:
    """Appends spans in about 2 us, without a lock and without waiting."""

    def __init__(self, row: npt.NDArray[Any], seq: int) -> None:
        self._row = row
        self._seq = seq

    def add(self, stage: Stage, index: int, start_ns: int, end_ns: int) -> None:
        """Record one span."""
        self._seq = seq = self._seq + 1
        check = seq ^ int(stage) ^ index ^ (start_ns & 0xFFFFFFFFFFFFFFFF) ^ (end_ns & 0xFFFFFFFFFFFFFFFF)
        self._row[seq % len(self._row)] = (seq, check, int(stage), index, start_ns, end_ns)


class Histogram:
    """Percentiles of any number of durations in constant memory; bins 1 % wide from 1 us to 1000 s."""

    LOW_MS = 1e-3
    RATIO = 1.01

    def __init__(self) -> None:
        self.count = 0
        self.max_ms = 0.0
        bins = int(np.ceil(np.log(1e9) / np.log(self.RATIO))) + 2
        self.counts = np.zeros(bins, np.int64)

    @classmethod
    def of(cls, counts: npt.NDArray[np.int64], max_ms: float) -> Histogram:
        """A histogram that was kept as its `counts` and `max_ms`."""
        histogram = cls()
        histogram.counts[:] = counts
        histogram.count, histogram.max_ms = int(counts.sum()), max_ms
        return histogram

    def add_ms(self, durations_ms: npt.ArrayLike) -> None:
        """Add durations in milliseconds; negative ones count as zero."""
        values = np.atleast_1d(np.asarray(durations_ms, np.float64))
        if not values.size:
            return
        bins = np.log(np.maximum(values, self.LOW_MS) / self.LOW_MS) / np.log(self.RATIO)
        np.add.at(self.counts, np.minimum(bins.astype(np.int64), len(self.counts) - 1), 1)
        self.count += values.size
        self.max_ms = max(self.max_ms, float(values.max()))

    def percentile_ms(self, percent: float) -> float:
        """The upper edge of the bin that holds the percentile, so never too good; 0 when empty."""
        if not self.count:
            return 0.0
        rank = max(1, int(np.ceil(self.count * percent / 100)))
        index = int(np.searchsorted(np.cumsum(self.counts), rank))
        return min(self.max_ms, self.LOW_MS * self.RATIO ** (index + 1))

    def summary_ms(self) -> dict[str, float]:
        """`p50 p90 p99 p999 max`, in milliseconds."""
        percents = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}
        summary = {name: round(self.percentile_ms(percent), 3) for name, percent in percents.items()}
        return {**summary, "max": round(self.max_ms, 3)}
