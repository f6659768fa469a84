"""A recorded Create run, and robots that send it to a real learner at its own pace, each over a RobotLink of its own.

Nothing is simulated while that is measured: 22.2 steps and 30 raw frames of 57,600 bytes a second and robot.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..config import LinkSettings
from ..errors import RelodError, StartError
from ..runtime.clock import NS_PER_S, monotonic_ns
from ..runtime.log.format import EncodedFrame
from ..runtime.log.reader import LogReader, find_log
from ..runtime.remote import wire
from ..runtime.remote.link import JoinFacts, RobotLink
from ..runtime.remote.outbox import Outbox
from ..types import EpisodeEnd, Step
from .children import RELOD, run_relod
from .linkecho import create_spec

__all__ = ["LoadRobot", "Recording", "learner_settings", "record", "start_learner"]

IMAGE = ("--set", "task.image_height=120", "--set", "task.image_width=160")
MIB = 1 << 20

# Records, and the frames that each is the first to name.
Recording: TypeAlias = list[tuple[Step | EpisodeEnd, dict[int, EncodedFrame]]]


def record(folder: Path, steps: int) -> Recording:
    """Whole episodes of a run in virtual time that learns nothing."""
    settings = ("task.episode_s=9", "agent.init_steps=1000000", f"run.folder={folder}")  # 200 steps an episode
    options = [word for each in settings for word in ("--set", each)]
    ended = run_relod(["robot", "--json", "--clock", "virtual", "--steps", str(steps), *IMAGE, *options])
    if not ended.good:
        raise StartError(f"the run to be sent could not be recorded: {ended.complaint}")
    found: Recording = []
    seen: set[int] = set()
    for each in LogReader(find_log(folder / "latest")).iterate():
        if each.message is not None:
            new = {i: each.frames.encoded[i] for i in each.message.frame_ids if i not in seen}
            seen.update(new)
            found.append((each.message, new))
    while not isinstance(found[-1][0], EpisodeEnd):
        found.pop()
    return found


def endless(recording: Recording) -> Iterator[tuple[Step | EpisodeEnd, dict[int, EncodedFrame]]]:
    """The recording again and again, with episodes and frames that go on counting."""
    first, last = recording[0][0], recording[-1][0]
    episodes, frames = last.episode - first.episode + 1, last.frame_ids[-1]
    turn = 0
    while True:
        for message, new in recording:
            ids = tuple(i + turn * frames for i in message.frame_ids)
            moved = dataclasses.replace(message, episode=message.episode + turn * episodes, frame_ids=ids)
            yield moved, {i + turn * frames: frame for i, frame in new.items()}
        turn += 1


class LoadRobot:
    """A robot that sends a recording. `LinkEvents` to its link, of which only an end matters."""

    def __init__(self, number: int, url: str, folder: Path, recording: Recording) -> None:
        self.name, self.run, self.failure = f"robot-{number}", secrets.token_hex(16), ""
        self.outbox = Outbox(folder / self.name, memory_bytes=256 * MIB, spool_bytes=0)
        join = JoinFacts(
            robot=self.name,
            run=self.run,
            acts="robot",
            task=create_spec(),
            codec="raw",
            algorithm="sac",
            presets={},
        )
        self.link = RobotLink(
            url, token=None, ca=None, join=join, settings=LinkSettings(), outbox=self.outbox, events=self
        )
        self._records = endless(recording)

    async def drive(self, start_ns: int, seconds: float, cycle_ns: int) -> None:
        """Send a step every cycle, at the moment at which it is due."""
        for cycle in range(int(seconds * NS_PER_S / cycle_ns)):
            await asyncio.sleep((start_ns + cycle * cycle_ns - monotonic_ns()) / NS_PER_S)
            stepped = False
            while not stepped:
                message, frames = next(self._records)
                self.send(message, frames)
                stepped = isinstance(message, Step)
            self.link.wake()

    def send(self, message: Step | EpisodeEnd, frames: Mapping[int, EncodedFrame]) -> None:
        """Into the outbox."""
        for frame_id, frame in frames.items():
            self.outbox.add_frame(frame_id, frame)
        self.outbox.add(message)

    def failed(self, error: RelodError) -> None:
        self.failure = str(error)

    def say(self, text: str) -> None:
        print(f"{self.name}: {text}", file=sys.stderr)

    def policy(self, values: npt.NDArray[np.float32], version: tuple[int, int]) -> None:
        pass

    def answer(self, head: wire.Answer, values: bytes) -> None:
        pass

    def news(self, news: wire.LearnerNews) -> None:
        pass

    def link_state(self, up: bool) -> None:
        pass

    def hold(self, reason: str) -> None:
        pass

    def finished(self, reason: str) -> None:
        pass


def learner_settings(robots: int) -> list[str]:
    """Settings of a learner that has to take what `robots` send, and to learn little."""
    return [f"server.max_robots={robots}", "agent.init_steps=500", "log.limit_gib=4", "replay.capacity=20000"]


def start_learner(folder: Path, settings: list[str]) -> tuple[subprocess.Popen[bytes], str]:
    """`relod learner` in a session of its own, with A.B=C settings, and its address; `children.end` ends it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = [word for each in (f"run.folder={folder}", *settings) for word in ("--set", each)]
    command = [*RELOD, "learner", "--json", "--listen", address, *options]
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
    return process, f"ws://{address}"
