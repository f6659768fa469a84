"""The rig's simulated world: a gray plane with a red disc; in virtual time, and in real time behind a socket.

`VirtualTrack` runs rig and camera in the caller's process, on the caller's clock; `serve_world` runs the same in real
time, the rig on a unix socket (`port.py`) and the camera on another.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from ...config import Section
from ...runtime.clock import DeadlineTimer, monotonic_ns
from ...seeds import random_stream
from ...types import Command, Image, TaskSpec, Witness
from .. import simcamera
from ..frameserver import FrameServer
from ..simcamera import CameraTiming, SimCamera, SimFrame
from .port import RigPort
from .rig import COMMAND, STATE, Rig

__all__ = ["WORLDS", "Scene", "SimSettings", "VirtualTrack", "serve_world"]

DISC_RADIUS_MM = 12.0
DISC_PLACES_MM = (80.0, 55.0)  # the disc lies within plus and minus this, where the carriage can go
DISC_BGR = (40, 30, 220)
GRAYS = (90, 150)  # of the plane, drawn for each episode
SLOPE = 20.0  # gray levels from the picture's middle to its right or left edge, downwards
NOISE_VALUES = 1 << 18  # drawn once: fresh noise would cost three times as much as the rest of a picture


class SimSettings(Section, frozen=True):
    """The simulated world."""

    # The speed gets half way to what was asked in 40 ms, the task's cycle.
    lag_ms: Annotated[float, Meta(gt=0, le=1000, description="time constant of the rig's speed")] = 57.7
    image_noise: Annotated[float, Meta(ge=0, le=50, description="standard deviation of a pixel, in gray levels")] = 6.0
    camera: CameraTiming = CameraTiming()


# Trees of settings by the world's name.
WORLDS: Mapping[str, dict[str, Any]] = {
    name: {"sim": {**values, "camera": msgspec.to_builtins(simcamera.PRESETS[name])}}
    for name, values in {
        "ideal": {"image_noise": 0.0},
        "nominal": {},
        "harsh": {"image_noise": 12.0, "lag_ms": 90.0},
    }.items()
}


class Scene:
    """The rig, and what its camera sees."""

    def __init__(self, settings: SimSettings, seed: int, spec: TaskSpec, start_ns: int) -> None:
        self.rig = Rig(lag_ms=settings.lag_ms, history_ns=settings.camera.longest_latency_ns, start_ns=start_ns)
        self.disc_mm = (0.0, 0.0)
        self._places = random_stream(seed, "disc")
        height, width = spec.camera_hw
        y, x = np.mgrid[:height, :width].astype(np.float32)
        self._x = (x - (width - 1) / 2) / (width / 2)  # tangents of the angles of view; +-45 degrees across
        self._y = (y - (height - 1) / 2) / (width / 2)
        self._offsets = random_stream(seed, "noise")
        size = NOISE_VALUES + self._x.size * 3
        self._noise = np.rint(self._offsets.normal(0.0, settings.image_noise, size)).astype(np.int16)
        self.new_episode()

    def new_episode(self) -> None:
        """The disc lies elsewhere, and the plane has another gray."""
        x, y = DISC_PLACES_MM
        self.disc_mm = (self._places.uniform(-x, x), self._places.uniform(-y, y))
        gray = self._places.integers(*GRAYS) + SLOPE * self._y
        self._plane = np.repeat(gray.astype(np.int16)[..., None], 3, axis=2)

    def render(self, captured_ns: int) -> Image:
        """The camera's picture of an instant not long past."""
        x_mm, y_mm, depth_mm = self.rig.pose_at(captured_ns)
        across = self._x - (self.disc_mm[0] - x_mm) / depth_mm
        down = self._y - (self.disc_mm[1] - y_mm) / depth_mm
        pixels = self._plane.copy()
        pixels[across * across + down * down < (DISC_RADIUS_MM / depth_mm) ** 2] = DISC_BGR
        start = int(self._offsets.integers(NOISE_VALUES))
        pixels += self._noise[start : start + pixels.size].reshape(pixels.shape)
        return pixels.clip(0, 255).astype(np.uint8)


class VirtualTrack:
    """The world in virtual time: bytes of the real protocol both ways, no socket, no process."""

    def __init__(self, settings: SimSettings, seed: int, spec: TaskSpec, start_ns: int) -> None:
        self.scene = Scene(settings, seed, spec, start_ns)
        self._camera = SimCamera(self.scene.render, settings.camera, seed, start_ns)

    def advance(self, now_ns: int) -> tuple[list[tuple[int, np.ndarray[Any, Any]]], list[SimFrame]]:
        """Sensor packets `(arrived_ns, values)` and camera frames that arrived since the last call."""
        # The last column says how often the wire was opened, as the driver's does.
        packets = [(sent_ns, np.array([*STATE.unpack(data), 1.0])) for sent_ns, data in self.scene.rig.advance(now_ns)]
        return packets, self._camera.due(now_ns)

    def execute(self, command: Command, now_ns: int) -> None:
        """Put a command on the wire at `now_ns`."""
        self.scene.rig.receive(COMMAND.pack(*command.values), now_ns)

    def begin_episode(self) -> None:
        """A reset begins: the disc is moved."""
        self.scene.new_episode()


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
        on_ready: called once with where things are: `port`, `camera_url`, and an empty `control`.
        new_episode: set by the caller when an episode ends; cleared here.
        link: the rig's socket; a name in a temporary folder if None.
        frames: unix socket on which raw camera frames are served.
        mjpeg_port: serve MJPEG on 127.0.0.1, on any free port if 0, not at all if None.
        witness: is told when states were true and commands are followed.
        control, wheel_log: every world is given these; this one has no faults to inject and no wheels.
    """
    scene = Scene(settings, seed, spec, monotonic_ns())
    camera = SimCamera(scene.render, settings.camera, seed, monotonic_ns())
    with (
        contextlib.closing(DeadlineTimer()) as timer,
        tempfile.TemporaryDirectory(prefix="relod-track-") as folder,
    ):
        address = link or Path(folder) / "rig.sock"
        async with (
            FrameServer(path=frames, http_port=mjpeg_port) as server,
            RigPort(scene.rig, address, witness) as port,
        ):
            on_ready({"port": str(address), "control": "", "camera_url": server.url or ""})
            while not stop.is_set():
                await timer.wait_until(min(scene.rig.next_tick_ns, camera.next_available_ns))
                now_ns = monotonic_ns()
                if new_episode.is_set():
                    new_episode.clear()
                    scene.new_episode()
                for sent_ns, state in scene.rig.advance(now_ns):
                    port.send(state)
                    if witness is not None:
                        witness.sensed(sent_ns, now_ns)
                for frame in camera.due(now_ns):
                    server.publish(frame)
