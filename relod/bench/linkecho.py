"""relod's way of `relod bench transport`: RobotLink and LearnerServer, whole, with a learner behind that answers at
once."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..config import LinkSettings, ServerSettings
from ..robots import registry
from ..runtime.log.format import EncodedFrame
from ..runtime.remote import wire
from ..runtime.remote.link import JoinFacts, RobotLink
from ..runtime.remote.outbox import Outbox
from ..runtime.remote.server import Admission, LearnerServer
from ..types import TaskSpec
from .echoes import ACTION_BYTES, FRAME, MIB, STACK, Exchange, Tell

__all__ = ["Events", "Hall", "create_spec", "open_relod", "serve_relod"]


def create_spec() -> TaskSpec:
    """Create-Reacher's, with images of its own size."""
    entry = registry.task("create")
    found: TaskSpec = entry.build(entry.sections()["task"]()).spec
    return found


class Hall:
    """A learner that lets everyone in and answers at once, with nothing."""

    def __init__(self) -> None:
        self._action = np.zeros(2, np.float32), np.zeros(ACTION_BYTES // 4 - 2, np.float32), (1, 1)

    def admit(self, join: wire.Join) -> Admission:
        welcome = wire.Welcome(
            learner=secrets.token_hex(16),
            run_dir="",
            algorithm="sac",
            preset="paper",
            agent={},
            seed=0,
            position=None,
            env_steps=0,
            policy_size=1,
            has_policy=False,
            precision="float16",
            proof=b"",
        )
        return Admission(
            stream=0, robot=join.robot, run=join.run, acts=join.acts, spec=join.task, codec=join.codec, welcome=welcome
        )

    def record(self, *_: object) -> None:
        raise NotImplementedError("only questions are asked here")

    def act(self, *_: object) -> tuple[Any, Any, tuple[int, int]]:
        return self._action

    def left(self, *_: object) -> None:
        pass


async def serve_relod(tell: Tell) -> None:
    """Serve until this process ends."""
    server = LearnerServer(hall=Hall(), settings=ServerSettings(max_mib_per_s=1e6), token=None, tls=None)
    tell(await server.start("127.0.0.1", 0))
    await asyncio.Event().wait()


class Events:
    """`LinkEvents` of which only answers matter, and that the link is up."""

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def answer(self, head: wire.Answer, values: bytes) -> None:
        self.answered.set_result(values)

    def link_state(self, up: bool) -> None:
        self.up.set()

    def failed(self, error: Exception) -> None:
        self.answered.set_exception(error)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@contextlib.asynccontextmanager
async def open_relod(port: int, folder: Path) -> AsyncIterator[Exchange]:
    """A robot's link to that server; its outbox in `folder`."""
    spec, events = create_spec(), Events()
    outbox = Outbox(folder / "outbox", memory_bytes=64 * MIB, spool_bytes=0)
    join = JoinFacts(
        robot="bench", run=secrets.token_hex(16), acts="learner", task=spec, codec="raw", algorithm="", presets={}
    )
    link = RobotLink(
        f"ws://127.0.0.1:{port}",
        token=None,
        ca=None,
        join=join,
        settings=LinkSettings(wait_s=10),
        outbox=outbox,
        events=events,
    )
    await link.open()
    await events.up.wait()
    frame, proprio = EncodedFrame(captured_ns=0, data=FRAME), bytes(4 * spec.proprio_dim)
    newest = STACK
    for frame_id in range(newest):
        outbox.add_frame(frame_id + 1, frame)

    async def exchange(frames: int) -> None:
        nonlocal newest
        for _ in range(frames):
            newest += 1
            outbox.add_frame(newest, frame)
        events.answered = asyncio.get_running_loop().create_future()
        ids = tuple(range(newest - STACK + 1, newest + 1))
        link.ask(wire.Observe(ask=newest, episode=0, index=0, frame_ids=ids, now_ns=newest), proprio)
        await events.answered

    try:
        yield exchange
    finally:
        await link.close(drain=False)
        outbox.close()
