"""The replay of a recording: the recorded stamps, packets, pixels and policies go through the same pure cycle again.

Every command, transition and phase is compared bit for bit. It holds for the machine, thread count and library
versions of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from ..algos.agent import TorchActor, bind_policy, policy_size
from ..algos.checked import find_algorithm
from ..config import load
from ..errors import SafetyStop, StartError
from ..robots import registry
from ..seeds import random_stream
from ..types import EpisodeEnd, Frame, SensorWindow, Step
from .cycle import Cycle, Inputs, Tick
from .log.codec import make_look
from .messages import Asked, CycleRecord, decode
from .plan import steps_limit
from .recording import LENGTH

__all__ = ["ReplayReport", "replay_run"]


@dataclass(slots=True, kw_only=True)
class ReplayReport:
    """What a replay found."""

    cycles: int = 0
    steps: int = 0
    episodes: int = 0
    difference: str = ""  # the first one

    @property
    def identical(self) -> bool:
        return not self.difference

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "identical": self.identical}

    def __str__(self) -> str:
        told = f"{self.cycles} cycles, {self.steps} steps, {self.episodes} ends of episodes"
        return f"{told}: identical" if self.identical else f"{told}, then a difference: {self.difference}"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message of a trace that is none."""

    text: str


class _Policies:
    """The recorded policies, as the actor's source."""

    def __init__(self, folder: Path, module: torch.nn.Module) -> None:
        self._folder, self.module = folder, module
        self.version = (0, 0)
        self._flat = np.zeros(policy_size(module), np.float32)
        bind_policy(module, self._flat)

    def become(self, version: tuple[int, int]) -> None:
        if version == self.version:
            return
        path = self._folder / f"{version[0]}-{version[1]}.npy"
        if not path.is_file():
            raise StartError(f"{path} is missing from the recording", "replay needs the whole run folder")
        self._flat[:] = np.load(path, allow_pickle=False)
        self.version = version


def replay_run(folder: Path) -> ReplayReport:
    """Replay a recorded run folder; `StartError` when it holds no recording."""
    for name in ("trace.bin", "frames.bin", "run.json", "settings.toml"):
        if not (folder / name).is_file():
            raise StartError(f"{folder} holds no recording ({name})", "make the run with --record")
    torch.set_num_threads(1)
    meta = msgspec.json.decode((folder / "run.json").read_bytes())
    entry = registry.task(meta["task"])
    algorithm = find_algorithm(meta["algorithm_target"])
    sections = {**entry.sections(), "agent": algorithm.settings_type}
    settings = load(sections, file=folder / "settings.toml")
    task = entry.make_task(settings.task)
    policies = _Policies(folder / "policies", algorithm.build_actor(task.spec, settings.agent))
    needs = algorithm.needs(task.spec, settings.agent)
    cycle = Cycle(
        task=task,
        actor=TorchActor(policies, task.spec, needs, random_stream(settings.run.seed, "actor")),
        safety=settings.safety,
        rng=random_stream(settings.run.seed, "reset"),
        shrink=make_look(settings.log.codec, settings.log.jpeg_quality, image_hw=task.spec.image_hw),
        max_steps=steps_limit(settings.run, task.spec.cycle_ns),
    )
    frames = _FrameFile(folder / "frames.bin", task.spec.camera_hw)
    return _compare(cycle, policies, frames, _messages(folder / "trace.bin"), entry.sensor_names)


def _compare(
    cycle: Cycle,
    policies: _Policies,
    frames: _FrameFile,
    messages: Iterator[CycleRecord | Step | EpisodeEnd | Unreadable],
    sensor_names: tuple[str, ...],
) -> ReplayReport:
    report = ReplayReport()
    tick: Tick | None = None
    for message in messages:
        match message:
            case Unreadable(text):
                report.difference = f"the next message cannot be read: {text}"
            case CycleRecord():
                if frames.missing(message):
                    break  # the recording reached its size limit here
                policies.become(message.policy_version)
                try:
                    tick = cycle.tick(message.now_ns, _inputs(message, frames, sensor_names))
                except SafetyStop:
                    break
                report.cycles += 1
                said = (tick.command.values, tick.command.request, tick.phase.value)
                report.difference = _difference("command", (message.command, message.request, message.phase), said)
            case Step():
                report.steps += 1
                report.difference = _difference("step", _plain(message), _plain(tick.step if tick else None))
            case EpisodeEnd():
                report.episodes += 1
                replayed = tick.end if tick else None
                if replayed is None:  # the run was interrupted here, from outside the cycle
                    replayed = cycle.interrupt(message.reason).end
                report.difference = _difference("end of episode", _plain(message), _plain(replayed))
        if report.difference:
            report.difference = f"cycle {report.cycles}: {report.difference}"
            break
    return report


def _difference(what: str, recorded: object, replayed: object) -> str:
    return "" if recorded == replayed else f"{what}: recorded {recorded}, replayed {replayed}"


def _plain(message: Step | EpisodeEnd | None) -> dict[str, Any] | None:
    """Comparable bit for bit."""
    if message is None:
        return None
    values = asdict(message)
    return {key: value.tobytes() if isinstance(value, np.ndarray) else value for key, value in values.items()}


def _inputs(record: CycleRecord, frames: _FrameFile, names: tuple[str, ...]) -> Inputs:
    values = np.frombuffer(record.sensor_values, "<f8").reshape(len(record.sensor_seq), len(names))
    window = SensorWindow(
        names=names,
        seq=np.array(record.sensor_seq, np.int64),
        arrived_ns=np.array(record.sensor_arrived_ns, np.int64),
        values=values,
    )
    seen = tuple(frames[frame_id] for frame_id, _, _ in record.frames)
    return Inputs(window=window, frames=seen, hold=record.hold)


def _messages(path: Path) -> Iterator[CycleRecord | Step | EpisodeEnd | Unreadable]:
    """Messages of a trace; a torn last one is left out."""
    data = path.read_bytes()
    at = 0
    while at + LENGTH.size <= len(data):
        (length,) = LENGTH.unpack_from(data, at)
        at += LENGTH.size
        if at + length > len(data):
            return
        try:
            message = decode(data[at : at + length])
            if not isinstance(message, Asked):
                yield message
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            yield Unreadable(str(error))
        at += length


class _FrameFile:
    """Random access to recorded frames by id."""

    def __init__(self, path: Path, camera_hw: tuple[int, int]) -> None:
        self._shape = (*camera_hw, 3)
        self._dtype = np.dtype([("header", "<i8", (3,)), ("image", "u1", self._shape)])
        count = path.stat().st_size // self._dtype.itemsize
        self._rows = np.memmap(path, self._dtype, "r", shape=(count,)) if count else np.zeros(0, self._dtype)
        self._index = {int(frame_id): row for row, frame_id in enumerate(self._rows["header"][:, 0])}

    def missing(self, record: CycleRecord) -> bool:
        return any(frame_id not in self._index for frame_id, _, _ in record.frames)

    def __getitem__(self, frame_id: int) -> Frame:
        row = self._rows[self._index[frame_id]]
        _, captured_ns, arrived_ns = (int(value) for value in row["header"])
        return Frame(id=frame_id, captured_ns=captured_ns, arrived_ns=arrived_ns, image=np.array(row["image"]))
