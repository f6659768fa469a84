"""A link that is cut on purpose: a real robot's end, a relay that resets and stalls, a real learner behind it."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import StartError
from ..runtime.clock import monotonic_ns
from ..runtime.log.format import EncodedFrame
from ..runtime.remote.audit import audit
from ..runtime.remote.chain import CHAIN_NAME, ChainWriter
from ..runtime.remote.emulation import Relay
from ..runtime.remote.linkprofile import profile_named
from ..types import EpisodeEnd, Step
from .children import END_LIMIT_S, end
from .loadrobot import LoadRobot, Recording, learner_settings, start_learner

__all__ = ["SILENCE_S", "ChainedRobot", "CutWay"]

SILENCE_S = (1.3, 3.0)  # longer than the link waits before it calls its learner silent


class ChainedRobot(LoadRobot):
    """A robot that keeps the chain of what it sends and knows when its link is up."""

    def __init__(self, url: str, folder: Path, recording: Recording) -> None:
        super().__init__(0, url, folder, recording)
        self.folder = folder
        self.up, self.down = asyncio.Event(), asyncio.Event()
        self.came_up_ns = self.went_down_ns = 0
        self.due = 0  # records that there were when the link came up
        self._chain = ChainWriter(folder / CHAIN_NAME)
        self._seen: dict[int, EncodedFrame] = {}
        (folder / "run.json").write_text(json.dumps({"link_run": self.run}))

    def send(self, message: Step | EpisodeEnd, frames: Mapping[int, EncodedFrame]) -> None:
        self._seen.update(frames)
        self._chain.add(message, self._seen)
        for old in [each for each in self._seen if each < message.frame_ids[0]]:
            del self._seen[old]
        super().send(message, frames)

    def link_state(self, up: bool) -> None:
        if up:
            self.came_up_ns, self.due = monotonic_ns(), self.outbox.acked + self.outbox.backlog
        else:
            self.went_down_ns = monotonic_ns()
        (self.up if up else self.down).set()
        (self.down if up else self.up).clear()

    def say(self, text: str) -> None:
        pass  # it is cut on purpose

    def close(self) -> None:
        self._chain.close()


class CutWay:
    """A relay and a learner behind it. Cuts return when the learner could be reached again, in ns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.relay = Relay()
        self.learner: subprocess.Popen[bytes]
        self.learner, url = start_learner(folder, learner_settings(4))
        self.target = int(url.rpartition(":")[2])

    @property
    def run_folder(self) -> Path:
        """Of the learner's run."""
        return next(self.folder.glob("*learner*"))

    async def open(self) -> str:
        """Begin to relay; the address for the robot."""
        host, port = await self.relay.start("127.0.0.1", self.target, profile_named("none"))
        return f"ws://{host}:{port}"

    async def reset(self, rng: random.Random) -> int:
        """Both ends are told at once."""
        self.relay.cut()
        return monotonic_ns()

    async def silence(self, rng: random.Random) -> int:
        """Nothing passes and nothing closes, for longer than the link waits."""
        duration_s = rng.uniform(*SILENCE_S)
        self.relay.stall(duration_s)
        await asyncio.sleep(duration_s)
        return monotonic_ns()

    async def finish(self, robot: ChainedRobot) -> dict[str, Any]:
        """Deliver what is left and end the learner; what became of all that was sent, as its log has it."""
        delivered = await robot.link.close(drain=True)
        self.learner.send_signal(signal.SIGINT)
        out, _ = await asyncio.to_thread(self.learner.communicate, None, END_LIMIT_S)
        if not out.strip():
            raise StartError("the learner ended without a word", "run `relod learner` by itself to see why")
        report = await asyncio.to_thread(audit, robot.folder, self.run_folder)
        return {
            "failure": robot.failure,
            "delivered": delivered,
            "audit": report.to_dict(),
            "audit_exit_code": report.exit_code,
            "records": {n: getattr(robot.outbox, n) for n in ("sent", "acked", "resent", "duplicates", "backlog_max")},
            "learner_steps": json.loads(out).get("steps"),
        }

    async def close(self) -> None:
        """End what is left."""
        await asyncio.to_thread(end, self.learner)
        assert self.learner.stdout is not None
        self.learner.stdout.close()
        await self.relay.close()
