"""Where a run's time went, from the spans it kept: each stage on the way from what was true to what moved.

Spans carry the stamps that were taken where things happened; here they are joined by cycle, question and time. A stage
that a run does not have, such as a link's in local-only, has no samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import StartError
from .clock import NS_PER_MS
from .spans import SPAN, Stage

__all__ = [
    "AGREEMENT",
    "PERCENTS",
    "STAGES",
    "Samples",
    "Spans",
    "StageInfo",
    "percentiles",
    "policy_lag",
    "stage_samples",
    "summarise",
]

Times: TypeAlias = npt.NDArray[np.int64]
Samples: TypeAlias = dict[str, npt.NDArray[np.float64]]  # ms, by the name of the stage

# What a simulated robot says it sent, or received, belongs to what this host stamped if it is at most so far away.
MATCH_NS = 30 * NS_PER_MS
PERCENTS = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9, "max": 100.0}


@dataclass(frozen=True, slots=True)
class StageInfo:
    """A stage as people see it."""

    name: str  # key in JSON
    title: str  # at most 24 characters
    meaning: str  # from -> to


STAGES: tuple[StageInfo, ...] = (
    StageInfo("sensor_delay", "sensor true > received", "newest packet's values were true -> it arrived here"),
    StageInfo("frame_delay", "frame taken > received", "middle of the newest frame's exposure -> it arrived here"),
    StageInfo("sensor_wait", "received > observed", "newest packet arrived -> the observation is assembled"),
    StageInfo("lateness", "deadline > cycle start", "deadline of the cycle -> it starts"),
    StageInfo("sentinel", "  the idle sentinel's", "deadline of a ticker that does nothing -> it wakes"),
    StageInfo("encode", "encode a frame", "a frame is taken -> it is encoded for the learner"),
    StageInfo("send", "cycle start > sent", "cycle starts -> its question is given to the socket"),
    StageInfo("uplink", "uplink", "question given to the socket -> whole at the learner"),
    StageInfo("decode", "decode", "question whole -> its images are decoded"),
    StageInfo("queue", "queue", "images decoded -> the network is asked"),
    StageInfo("inference", "inference", "the network is asked -> its action is there"),
    StageInfo("downlink", "downlink", "the action is there -> it is back at the robot"),
    StageInfo("write", "command > wire", "command in shared memory -> written on the robot's wire"),
    StageInfo("observed_to_wire", "observed > wire", "observation assembled -> command written on the robot's wire"),
    StageInfo(
        "deadline_to_wire",
        "deadline > wire",
        "deadline of a cycle of an episode -> command written on the robot's wire",
    ),
    StageInfo("wire_delay", "wire > robot", "command written -> it arrived at the (simulated) robot"),
    StageInfo("actuator_delay", "robot > moved", "command arrived at the (simulated) robot -> the actuators follow it"),
    StageInfo("sensor_to_motion", "SENSOR TRUE > MOVED", "newest packet's values were true -> the actuators follow"),
    StageInfo("frame_to_motion", "FRAME TAKEN > MOVED", "newest frame was taken -> the actuators follow"),
    StageInfo("policy_age", "age of the policy", "a policy was first seen at the robot -> a step it acts in"),
    StageInfo("delivery", "record > learner log", "a record is given to the link -> its ack is here"),
    StageInfo("step_to_memory", "step > memory", "a step reached the learner's process -> it is in log and memory"),
    StageInfo(
        "step_to_learned", "step > learned from", "a step is in memory -> the next update that can draw it ended"
    ),
    StageInfo("update", "an update", "an update starts -> it has ended"),
)
# Where both the profiler and a simulated robot's own log know the way from a packet's arrival to a command's.
AGREEMENT = "agreement"


class Spans:
    """Spans by their stage."""

    def __init__(self, rows: npt.NDArray[Any]) -> None:
        self._rows = rows

    @classmethod
    def read(cls, folder: Path) -> Spans:
        """Of a run; empty when it has none yet. `StartError` for a folder that is no run's."""
        try:
            header = json.loads((folder / "spans.json").read_bytes())
            dtype = np.dtype([tuple(field) for field in header["dtype"]])
            data = (folder / "spans.bin").read_bytes()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StartError(
                f"{folder} holds no spans: {error}", "name the folder of a run on the wall clock"
            ) from None
        if dtype != SPAN:
            raise StartError(f"{folder}/spans.bin is of another version", "look at it with the relod that wrote it")
        return cls(np.frombuffer(data[: len(data) // SPAN.itemsize * SPAN.itemsize], SPAN))

    @classmethod
    def none(cls) -> Spans:
        """No span at all."""
        return cls(np.zeros(0, SPAN))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def first_ns(self) -> int:
        """When the earliest of them began; there must be one."""
        return int(self._rows["start_ns"].min())

    def after(self, start_ns: int) -> Spans:
        """Those that began at `start_ns` or later."""
        return Spans(self._rows[self._rows["start_ns"] >= start_ns])

    def within(self, start_ns: int, end_ns: int) -> Spans:
        """Those that ended in this time. By their start, those of a policy that is acting already would be missing."""
        ended_ns = self._rows["end_ns"]
        return Spans(self._rows[(ended_ns >= start_ns) & (ended_ns <= end_ns)])

    def of(self, stage: Stage) -> npt.NDArray[Any]:
        """Spans of a stage, by their start."""
        rows: npt.NDArray[Any] = self._rows[self._rows["stage"] == stage]
        return rows[np.argsort(rows["start_ns"], kind="stable")]

    def by_index(self, stage: Stage) -> dict[int, tuple[int, int]]:
        """(start, end) of a stage's spans by their index; the newest of several."""
        rows = self.of(stage)
        pairs = zip(rows["start_ns"].tolist(), rows["end_ns"].tolist(), strict=True)
        return dict(zip(rows["index"].tolist(), pairs, strict=True))

    def durations_ms(self, stage: Stage) -> npt.NDArray[np.float64]:
        rows = self.of(stage)
        return np.asarray((rows["end_ns"] - rows["start_ns"]) / NS_PER_MS, np.float64)


def stage_samples(robot: Spans, learner: Spans | None = None, *, offset_ns: int = 0) -> Samples:
    """Samples of every stage, in ms, and `agreement`.

    Args:
        learner: spans of the learner's own run, where learning is another command's; None takes the robot's.
        offset_ns: the learner's clock minus the robot's.
    """
    learning = learner if learner is not None else robot
    direct = {
        "lateness": Stage.LATENESS,
        "sentinel": Stage.SENTINEL,
        "frame_delay": Stage.FRAME_ARRIVAL,
        "encode": Stage.ENCODE,
        "send": Stage.SEND,
        "uplink": Stage.UPLINK,
        "decode": Stage.DECODE,
        "queue": Stage.QUEUE,
        "inference": Stage.INFERENCE,
        "downlink": Stage.DOWNLINK,
        "write": Stage.WRITE,
        "actuator_delay": Stage.MOVED,
        "policy_age": Stage.POLICY_AGE,
        "delivery": Stage.DELIVER,
    }
    found = {name: robot.durations_ms(stage) for name, stage in direct.items()}
    found["update"] = learning.durations_ms(Stage.UPDATE)
    found["step_to_memory"] = learning.durations_ms(Stage.STORED)
    found["step_to_learned"] = _learned(learning)
    own, until = _commands(robot)
    acting = until.keys() & robot.by_index(Stage.SENSOR_AGE).keys()  # a reset's commands take no time, and are many
    found["deadline_to_wire"] = _ms(np.array([until[i][1] - until[i][0] for i in sorted(acting)], np.int64))
    found |= _cycles(robot, own)
    return {info.name: found.get(info.name, np.zeros(0)) for info in STAGES} | {AGREEMENT: found[AGREEMENT]}


def _commands(robot: Spans) -> tuple[dict[int, tuple[int, int]], dict[int, tuple[int, int]]]:
    """(deadline, written) of each cycle's own command; and the same of all cycles, until a command that is no held one.

    Where another host acts, a cycle whose answer is late has no command of its own: the next one begins by holding the
    former. Latency goes on until something newer is written, or the late ones would be missing and the held ones count
    as quick.
    """
    own = robot.by_index(Stage.ACT)
    asked = robot.by_index(Stage.SEND)  # by the cycle's start
    if not asked:
        return own, own
    cycles = robot.by_index(Stage.LATENESS)
    sent_ns = {index: asked[start_ns][1] for index, (_, start_ns) in cycles.items() if start_ns in asked}
    writes = robot.of(Stage.WRITE)
    answered = {
        index: written_ns
        for index, issued_ns, written_ns in zip(
            *(writes[name].tolist() for name in ("index", "start_ns", "end_ns")), strict=True
        )
        if issued_ns >= sent_ns.get(index, issued_ns)  # a held command is issued before the question leaves
    }
    own = {index: (own[index][0], answered[index]) for index in own.keys() & answered.keys()}
    until, newest_ns = {}, None
    for index in sorted(cycles.keys(), reverse=True):
        newest_ns = answered.get(index, newest_ns)
        if newest_ns is not None:
            until[index] = (cycles[index][0], newest_ns)
    return own, until


def _cycles(robot: Spans, written: Mapping[int, tuple[int, int]]) -> Samples:
    """What needs several stamps of one cycle, for cycles within episodes whose own command was `written`."""
    sensed, observed = (robot.by_index(stage) for stage in (Stage.SENSOR_AGE, Stage.OBSERVE))
    frames = robot.by_index(Stage.FRAME_AGE)
    index = sorted(sensed.keys() & observed.keys() & written.keys() & frames.keys())
    arrived_ns, observed_ns, written_ns, taken_ns = (
        np.array(times, np.int64)
        for times in (
            [sensed[i][0] for i in index],
            [observed[i][1] for i in index],
            [written[i][1] for i in index],
            [frames[i][0] for i in index],
        )
    )
    found = {"sensor_wait": _ms(observed_ns - arrived_ns), "observed_to_wire": _ms(written_ns - observed_ns)}
    packets, commands = robot.of(Stage.SENSED), robot.of(Stage.MOVED)
    packet = _last_before(packets["end_ns"], arrived_ns)
    command = _first_after(commands["start_ns"], written_ns)
    known, obeyed = packet >= 0, command >= 0
    both = known & obeyed
    found["sensor_delay"] = _ms(arrived_ns[known] - packets["start_ns"][packet[known]])
    found["wire_delay"] = _ms(commands["start_ns"][command[obeyed]] - written_ns[obeyed])
    moved_ns = commands["end_ns"][command[both]]
    found["sensor_to_motion"] = _ms(moved_ns - packets["start_ns"][packet[both]])
    found["frame_to_motion"] = _ms(commands["end_ns"][command[obeyed]] - taken_ns[obeyed])
    inside_ns = written_ns[both] - arrived_ns[both]
    outside_ns = commands["start_ns"][command[both]] - packets["end_ns"][packet[both]]
    found[AGREEMENT] = _ms(np.abs(inside_ns - outside_ns))
    return found


def _last_before(ends_ns: Times, moments_ns: Times) -> npt.NDArray[np.int64]:
    """For each moment the last of the sorted `ends_ns` at or before it; -1 where none is near."""
    at = np.searchsorted(ends_ns, moments_ns, side="right") - 1
    return _near(at, ends_ns, moments_ns)


def _first_after(starts_ns: Times, moments_ns: Times) -> npt.NDArray[np.int64]:
    """For each moment the first of the sorted `starts_ns` around or after it; -1 where none is near.

    The robot may have read a command before the process that wrote it could look at the clock.
    """
    at = np.searchsorted(starts_ns, moments_ns - NS_PER_MS, side="left")
    return _near(np.where(at < len(starts_ns), at, -1), starts_ns, moments_ns)


def _near(at: npt.NDArray[np.int64], times_ns: Times, moments_ns: Times) -> npt.NDArray[np.int64]:
    if not len(times_ns):
        return np.full(len(moments_ns), -1)
    return np.where((at >= 0) & (np.abs(times_ns[at] - moments_ns) <= MATCH_NS), at, -1)


def _learned(learning: Spans) -> npt.NDArray[np.float64]:
    """From each step's being in memory to the end of the first update that began afterwards."""
    stored_ns = np.sort(learning.of(Stage.STORED)["end_ns"])
    updates = learning.of(Stage.UPDATE)
    at = np.searchsorted(updates["start_ns"], stored_ns, side="left")
    there = at < len(updates)
    return _ms(updates["end_ns"][at[there]] - stored_ns[there])


def policy_lag(robot: Spans, learner: Spans | None = None, *, offset_ns: int = 0) -> npt.NDArray[np.float64]:
    """For each step, how many updates the learner had made that the acting policy had not."""
    steps = robot.of(Stage.POLICY_AGE)
    updates = (learner if learner is not None else robot).of(Stage.UPDATE)
    done = np.searchsorted(np.sort(updates["end_ns"]), steps["end_ns"] + offset_ns, side="right")
    first = int(updates["index"].min()) - 1 if len(updates) else 0
    return np.maximum(0.0, (done + first) - steps["index"].astype(np.float64))


def percentiles(values: npt.ArrayLike) -> dict[str, float] | None:
    """`p50 p90 p99 p999 max`, each a value that was seen; None of nothing."""
    sorted_ = np.sort(np.asarray(values, np.float64))
    if not len(sorted_):
        return None
    ranks = {name: max(1, int(np.ceil(len(sorted_) * percent / 100))) for name, percent in PERCENTS.items()}
    return {name: round(float(sorted_[rank - 1]), 3) for name, rank in ranks.items()}


def summarise(samples: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, dict[str, float] | None]:
    """Percentiles of every stage."""
    return {name: percentiles(values) for name, values in samples.items()}


def _ms(times_ns: Times) -> npt.NDArray[np.float64]:
    return np.asarray(times_ns / NS_PER_MS, np.float64)
