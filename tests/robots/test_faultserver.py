"""The control socket of simulated robots, and what it does to the camera."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from relod.errors import StartError
from relod.robots.faultserver import (
    CameraCable,
    CameraCorrupt,
    CameraOperation,
    CameraResize,
    CameraStall,
    CameraUnplug,
    FaultServer,
    ask,
)


class FakeCamera:
    """Remembers what happened to it."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.plugged = asyncio.Event()

    def stall(self, duration_s: float) -> None:
        self.events.append(("stall", duration_s))

    def resize(self, height: int, width: int) -> None:
        self.events.append(("resize", height, width))

    def corrupt(self, frames: int) -> None:
        self.events.append(("corrupt", frames))

    async def unplug(self) -> None:
        self.events.append(("unplug",))

    async def plug(self) -> None:
        self.events.append(("plug",))
        self.plugged.set()


def test_the_camera_breaks_as_asked() -> None:
    async def play() -> list[tuple[Any, ...]]:
        camera = FakeCamera()
        cable = CameraCable(camera)
        cable.apply(CameraStall(seconds=2.0))
        cable.apply(CameraResize(height=90, width=160))
        cable.apply(CameraCorrupt(count=3))
        cable.apply(CameraUnplug(seconds=0.01))
        with pytest.raises(ValueError, match="already pulled"):
            cable.apply(CameraUnplug(seconds=0.01))
        async with asyncio.timeout(5.0):
            await camera.plugged.wait()
        await asyncio.sleep(0)
        cable.apply(CameraUnplug(seconds=60.0))
        await asyncio.sleep(0)
        cable.cancel()
        return camera.events

    expected = [("stall", 2.0), ("resize", 90, 160), ("corrupt", 3), ("unplug",), ("plug",), ("unplug",)]
    assert asyncio.run(play()) == expected


def test_a_world_without_a_camera_says_so() -> None:
    with pytest.raises(ValueError, match="there is no camera"):
        CameraCable(None).apply(CameraStall(seconds=1.0))


def test_questions_are_answered_or_refused(tmp_path: Path) -> None:
    async def play() -> None:
        server = FaultServer(tmp_path / "control", CameraOperation, apply)
        async with server:
            assert (tmp_path / "control").stat().st_mode & 0o777 == 0o600
            assert await asyncio.to_thread(ask, server.path, "camera_corrupt", count=4) == {"frames": 4}
            for op, fields, words in [
                ("camera_corrupt", {"count": -1}, "count"),
                ("camera_corrupt", {"number": 1}, "number"),
                ("camera_stall", {"seconds": 1}, "not today"),
                ("explode", {}, "explode"),
            ]:
                with pytest.raises(ValueError, match=words):
                    await asyncio.to_thread(ask, server.path, op, **fields)
            reader, writer = await asyncio.open_unix_connection(server.path)
            writer.write(b"x" * 100_000)  # a line without an end
            async with asyncio.timeout(5.0):
                assert await reader.read() == b""
            writer.close()
        assert not server.path.exists()

    def apply(operation: CameraOperation) -> dict[str, Any]:
        if isinstance(operation, CameraCorrupt):
            return {"frames": operation.count}
        raise ValueError("not today")

    asyncio.run(play())


def test_a_name_that_cannot_be_a_socket_is_said(tmp_path: Path) -> None:
    async def play() -> None:
        async with FaultServer(tmp_path / "no such folder" / "control", CameraOperation, lambda _: {}):
            pass

    with pytest.raises(StartError, match="no control socket"):
        asyncio.run(play())
