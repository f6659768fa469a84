"""The simulated world of a Create 2: robot, arena, camera; in virtual time, and in real time behind real wires.

`VirtualCreate` runs firmware, plant and camera in the caller's process, on the caller's clock. `serve_world` runs the
same firmware and camera in real time: the robot on a pseudo-terminal, the camera on a socket and as MJPEG over HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from ...config import Section
from ...runtime.clock import monotonic_ns
from ...seeds import random_stream
from ...types import Command, Image, TaskSpec, Witness
from .. import simcamera
from ..frameserver import FrameServer
from ..scene import CameraOptics
from ..simcamera import CameraTiming, SimCamera, SimFrame
from . import oi, plant
from .arena import ArenaLook, ArenaRenderer
from .driver import MODE_COMMANDS, Request
from .emulator import EmulatorOptions, EmulatorReady, serve
from .firmware import Firmware
from .plant import Plant, PlantSettings

__all__ = ["WORLDS", "SimSettings", "VirtualCreate", "serve_world"]


class SimSettings(Section, frozen=True):
    """The simulated world."""

    look: Annotated[
        Literal["run", "episode"],
        Meta(description="a new look of the arena per run, as a real one has, or per episode"),
    ] = "run"
    look_level: Annotated[float, Meta(ge=0, le=1, description="how far looks differ; 0 = always the same")] = 1.0
    frame_per_step: Annotated[
        bool, Meta(description="one camera frame per action cycle, in virtual time only; for studies")
    ] = False
    plant: PlantSettings = PlantSettings()
    camera: CameraTiming = CameraTiming()
    optics: CameraOptics = CameraOptics()


# Trees of settings by the world's name: how well-behaved robot and camera are.
WORLDS: Mapping[str, dict[str, Any]] = {
    name: {"sim": {"plant": plant.PRESETS[name], "camera": msgspec.to_builtins(simcamera.PRESETS[name])}}
    for name in ("ideal", "nominal", "harsh")
}


class _Scene:
    """Firmware, plant and renderer of one robot."""

    def __init__(self, settings: SimSettings, seed: int, spec: TaskSpec, start_ns: int) -> None:
        self._settings = settings
        self._looks = random_stream(seed, "look")
        self.plant = Plant(settings.plant, seed, start_ns=start_ns)
        self.firmware = Firmware(self.plant)
        height, width = spec.camera_hw
        self.renderer = ArenaRenderer(height=height, width=width, optics=settings.optics, seed=seed)
        self._frames = 0
        self.draw_look()

    def draw_look(self) -> None:
        """Give the arena its next look; takes about 0.1 s."""
        self.renderer.set_look(ArenaLook.draw(self._looks, self._settings.look_level))

    def render(self, captured_ns: int) -> Image:
        """The camera's picture of an instant not long past."""
        pose = self.plant.pose_at(captured_ns)
        self._frames += 1
        return self.renderer.render(pose.x_m, pose.y_m, pose.heading_rad, pose.speed_m_s, pose.turn_rad_s, self._frames)


class VirtualCreate:
    """The world in virtual time: bytes of the real protocol both ways, no port, no process."""

    def __init__(self, settings: SimSettings, seed: int, spec: TaskSpec, start_ns: int) -> None:
        self._settings = settings
        self._scene = _Scene(settings, seed, spec, start_ns)
        self._decoder = oi.StreamDecoder(oi.STREAM_IDS)
        if settings.frame_per_step:
            self._camera = SimCamera.one_frame_per(spec.cycle_ns, self._scene.render, settings.camera, seed, start_ns)
        else:
            self._camera = SimCamera(self._scene.render, settings.camera, seed, start_ns)
        self._scene.firmware.receive(oi.start() + oi.safe() + oi.stream(oi.STREAM_IDS), start_ns)

    def advance(self, now_ns: int) -> tuple[list[tuple[int, np.ndarray[Any, Any]]], list[SimFrame]]:
        """Sensor packets `(arrived_ns, values)` and camera frames that arrived since the last call."""
        # The last column says how often the port was opened, as the driver's does.
        packets = [
            (frame.available_ns, np.array([*values, 1], np.float64))
            for frame in self._scene.firmware.advance(now_ns)
            for values in self._decoder.feed(frame.data)
        ]
        return packets, self._camera.due(now_ns)

    def execute(self, command: Command, now_ns: int) -> None:
        """Put a command on the wire at `now_ns`."""
        data = MODE_COMMANDS.get(Request(command.request), b"")
        left, right = (int(value) for value in command.values)
        self._scene.firmware.receive(data + oi.drive_direct(left, right), now_ns)

    def begin_episode(self) -> None:
        """A reset begins: the arena may change its look."""
        if self._settings.look == "episode":
            self._scene.draw_look()


async def serve_world(
    settings: SimSettings,
    seed: int,
    spec: TaskSpec,
    *,
    on_ready: Callable[[dict[str, str]], None],
    stop: asyncio.Event,
    new_episode: asyncio.Event,
    link: Path | None = None,
    control: Path | None = None,
    frames: Path | None = None,
    mjpeg_port: int | None = None,
    wheel_log: Path | None = None,
    witness: Witness | None = None,
) -> None:
    """The world in real time until `stop` is set.

    Args:
        on_ready: called once with where things are: `port`, `frames`, `camera_url`, `control`.
        new_episode: set by the caller when an episode ends; cleared here.
        link: symbolic link to make to the port.
        control: unix socket for fault injection.
        frames: unix socket on which raw camera frames are served.
        mjpeg_port: serve MJPEG on 127.0.0.1, on any free port if 0, not at all if None.
        wheel_log: file for what the wheels did.
        witness: is told when packets were true and commands are followed.
    """
    scene = _Scene(settings, seed, spec, monotonic_ns())
    camera = SimCamera(scene.render, settings.camera, seed, monotonic_ns())
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(FrameServer(path=frames, http_port=mjpeg_port))
        if settings.look == "episode":
            changes = asyncio.create_task(_change_looks(scene, new_episode), name="looks")
            stack.callback(changes.cancel)

        def ready(where: EmulatorReady) -> None:
            on_ready({"port": where.port, "control": str(control or ""), "camera_url": server.url or ""})

        await serve(
            scene.firmware,
            EmulatorOptions(symlink=link, control=control, wheel_log=wheel_log),
            on_ready=ready,
            stop=stop,
            camera=camera,
            publish=server.publish,
            camera_faults=server,
            witness=witness,
        )


async def _change_looks(scene: _Scene, new_episode: asyncio.Event) -> None:
    """Paint in a thread: numpy lets the emulator's loop run meanwhile, and the atlas is swapped in at once."""
    while True:
        await new_episode.wait()
        new_episode.clear()
        await asyncio.to_thread(scene.draw_look)
