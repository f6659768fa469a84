"""The simulated world of a UR5: arm and controller, monitor, camera; in virtual time, and in real time behind wires.

`VirtualUR5` runs controller, monitor and camera in the caller's process, on the caller's clock. `serve_world` runs the
same in real time: the controller on its ports of a loopback address, the target's server on the same address, the
camera on a socket and as MJPEG over HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from ...config import Section
from ...runtime.clock import NS_PER_MS, NS_PER_S, DeadlineTimer, monotonic_ns
from ...runtime.tasks import TaskGroup
from ...seeds import random_stream
from ...types import NO_REQUEST, Command, Image, TaskSpec, Witness
from .. import simcamera
from ..frameserver import FrameServer
from ..simcamera import CameraTiming, SimCamera, SimFrame
from .arm import SpeedJ, Vector6
from .controller import Controller
from .emulator import EmulatorOptions, EmulatorReady, serve
from .interface import RobotSettings
from .monitor import Look, MonitorRenderer, WristOptics
from .states import ArmSettings, RuntimeState, Sample
from .target import DEFAULT_PORT, HEIGHT, NO_TARGET, WIDTH, Place, Show, place_of
from .targetpage import TargetServer

__all__ = ["WORLDS", "Scene", "SimSettings", "VirtualUR5", "serve_world"]

START_Q: Vector6 = (1.3, -1.7, 1.9, -3.1, -1.5, 3.1415)  # inside the tool's box, but not where episodes begin
LATENCIES = 1024  # of packets; then they repeat


class SimSettings(Section, frozen=True):
    """The simulated world."""

    look: Annotated[
        Literal["run", "episode"],
        Meta(description="a new look of room and monitor per run, as a real one has, or per episode"),
    ] = "run"
    look_level: Annotated[float, Meta(ge=0, le=1, description="how far looks differ; 0 = always the same")] = 1.0
    frame_per_step: Annotated[
        bool, Meta(description="one camera frame per action cycle, in virtual time only; for studies")
    ] = False
    # On the wall clock the wires have latencies of their own.
    command_ms: Annotated[
        float, Meta(ge=0, le=200, description="command on the wire to the controller, in virtual time")
    ] = 2.0
    packet_ms: Annotated[
        float, Meta(ge=0, le=200, description="controller's packet to its arrival, in virtual time, mean")
    ] = 2.0
    packet_jitter_ms: Annotated[float, Meta(ge=0, le=100, description="its mean excess, exponential")] = 0.6
    paint_ms: Annotated[float, Meta(ge=0, le=1000, description="target asked for until the monitor shows it")] = 32.0
    arm: ArmSettings = ArmSettings()
    camera: CameraTiming = CameraTiming()
    optics: WristOptics = WristOptics()


# Trees of settings by the world's name: how well-behaved arm and camera are.
WORLDS: Mapping[str, dict[str, Any]] = {
    name: {"sim": {**values, "camera": msgspec.to_builtins(simcamera.PRESETS[name])}}
    for name, values in {
        "ideal": {"command_ms": 0.0, "packet_ms": 0.0, "packet_jitter_ms": 0.0, "arm": {"lag_ms": 0.0}},
        "nominal": {},
        "harsh": {"command_ms": 6.0, "packet_ms": 4.0, "packet_jitter_ms": 3.0, "arm": {"lag_ms": 30.0}},
    }.items()
}


class Scene:
    """The controller with its arm, and what the camera on the tool sees."""

    def __init__(self, settings: SimSettings, seed: int, spec: TaskSpec, start_ns: int) -> None:
        self._settings = settings
        history_ns = settings.camera.longest_latency_ns + NS_PER_S
        self.controller = Controller(settings.arm, start_ns=start_ns, q=START_Q, history_ns=history_ns)
        self._looks = random_stream(seed, "look")
        height, width = spec.camera_hw
        self.renderer = MonitorRenderer(height=height, width=width, optics=settings.optics, seed=seed)
        self._to_show: deque[tuple[int, Place]] = deque()
        self._frames = 0
        self.draw_look()

    def draw_look(self) -> None:
        """Give room and monitor their next look; takes 20 ms."""
        self.renderer.set_look(Look.draw(self._looks, self._settings.look_level))

    def show(self, place: Place, at_ns: int) -> None:
        """From `at_ns` on the monitor shows the target there."""
        self._to_show.append((at_ns, place))

    def render(self, captured_ns: int) -> Image:
        """The camera's picture of an instant not long past."""
        while self._to_show and self._to_show[0][0] <= captured_ns:
            self.renderer.show(self._to_show.popleft()[1])
        controller = self.controller
        q, before = controller.posture_at(captured_ns), controller.posture_at(captured_ns - controller.tick_ns)
        qd = [(a - b) * NS_PER_S / controller.tick_ns for a, b in zip(q, before, strict=True)]
        self._frames += 1
        return self.renderer.render(q, qd, self._frames)


class VirtualUR5:
    """The world in virtual time: no wire, no process; the controller is told what ur_rtde's script would tell it."""

    def __init__(self, settings: SimSettings, seed: int, spec: TaskSpec, start_ns: int) -> None:
        self._settings = settings
        self._driving = RobotSettings()
        self.scene = Scene(settings, seed, spec, start_ns)
        if settings.frame_per_step:
            self._camera = SimCamera.one_frame_per(spec.cycle_ns, self.scene.render, settings.camera, seed, start_ns)
        else:
            self._camera = SimCamera(self.scene.render, settings.camera, seed, start_ns)
        excess_ms = random_stream(seed, "packets").exponential(settings.packet_jitter_ms, LATENCIES)
        self._latencies_ns = ((settings.packet_ms + excess_ms) * NS_PER_MS).astype(np.int64).tolist()
        self._commands: deque[tuple[int, Vector6]] = deque()  # on the wire: arrival, joint speeds
        self._packets: deque[tuple[int, np.ndarray[Any, Any]]] = deque()  # on the wire
        self._painted: deque[tuple[int, int]] = deque()  # since when which request's target is to be seen
        self._shown = NO_TARGET
        self._sent = self._arrived_ns = 0

    def advance(self, now_ns: int) -> tuple[list[tuple[int, np.ndarray[Any, Any]]], list[SimFrame]]:
        """Sensor packets `(arrived_ns, values)` and camera frames that arrived since the last call."""
        while self._commands and self._commands[0][0] <= now_ns:
            self._obey(*self._commands.popleft())
        for sample in self.scene.controller.advance(now_ns):
            self._send(sample)
        arrived = []
        while self._packets and self._packets[0][0] <= now_ns:
            arrived.append(self._packets.popleft())
        return arrived, self._camera.due(now_ns)

    def execute(self, command: Command, now_ns: int) -> None:
        """Put a command on the wire at `now_ns`."""
        a, b, c, d, e, f = command.values
        self._commands.append((now_ns + round(self._settings.command_ms * NS_PER_MS), (a, b, c, d, e, f)))
        if command.request != NO_REQUEST:
            shown_ns = now_ns + round(self._settings.paint_ms * NS_PER_MS)
            while self._painted and self._painted[-1][0] >= now_ns:
                self._painted.pop()
            self._painted += [(now_ns, NO_TARGET), (shown_ns, command.request)]
            self.scene.show(place_of(command.request), shown_ns)

    def begin_episode(self) -> None:
        """A reset begins: the room may change its look."""
        if self._settings.look == "episode":
            self.scene.draw_look()

    def _obey(self, arrived_ns: int, speeds: Vector6) -> None:
        """As the driver does: a command to stand brakes harder."""
        driving = self._driving
        acceleration = driving.acceleration_rad_s2 if any(speeds) else driving.stop_rad_s2
        self.scene.controller.begin(SpeedJ(qd=speeds, acceleration=acceleration), arrived_ns)

    def _send(self, sample: Sample) -> None:
        self._arrived_ns = max(self._arrived_ns, sample.t_ns + self._latencies_ns[self._sent % LATENCIES])
        self._sent += 1
        while self._painted and self._painted[0][0] <= self._arrived_ns:
            self._shown = self._painted.popleft()[1]
        # The arm is moved without a program; to the task one plays. The last columns: speed scaling, the target that
        # is painted, and how often the wire was opened.
        state = (sample.t_ns / NS_PER_S, sample.robot_mode, sample.safety_mode, RuntimeState.PLAYING, 1.0)
        values = (*sample.q, *sample.qd, *sample.target_q, *sample.target_qd, *state, self._shown, 1.0)
        self._packets.append((self._arrived_ns, np.array(values)))


async def serve_world(
    settings: SimSettings,
    seed: int,
    spec: TaskSpec,
    *,
    on_ready: Callable[[dict[str, str]], None],
    stop: asyncio.Event,
    new_episode: asyncio.Event,
    control: Path | None = None,
    frames: Path | None = None,
    mjpeg_port: int | None = None,
    wheel_log: Path | None = None,
    host: str | None = None,
    witness: Witness | None = None,
) -> None:
    """The world in real time until `stop` is set.

    Args:
        on_ready: called once with where things are: `port` (the controller's address), `control`, `camera_url`.
        new_episode: set by the caller when an episode ends; cleared here.
        control: unix socket for fault injection.
        frames: unix socket on which raw camera frames are served.
        mjpeg_port: serve MJPEG on 127.0.0.1, on any free port if 0, not at all if None.
        wheel_log: file for what the arm did.
        witness: is told when packets were true and commands are followed.
        host: loopback address of controller and target; the first free one if None.
    """
    scene = Scene(settings, seed, spec, monotonic_ns())
    scene.controller.witness = witness
    camera = SimCamera(scene.render, settings.camera, seed, monotonic_ns())
    listening: asyncio.Future[EmulatorReady] = asyncio.get_running_loop().create_future()

    def paint(show: Show) -> None:
        scene.show(Place(show.x * WIDTH, show.y * HEIGHT), monotonic_ns())

    try:
        async with TaskGroup() as tasks, FrameServer(path=frames, http_port=mjpeg_port) as server:
            arm = tasks.create_task(
                serve(
                    scene.controller,
                    EmulatorOptions(host=host, control=control, motion_log=wheel_log),
                    on_ready=listening.set_result,
                    stop=stop,
                    camera_faults=server,
                ),
                name="ur5-controller",
            )
            address = (await listening).host
            async with TargetServer(address, DEFAULT_PORT, paint=paint):
                watch = tasks.create_task(_show_camera(scene, camera, server, settings, new_episode), name="ur5-camera")
                on_ready({"port": address, "control": str(control or ""), "camera_url": server.url or ""})
                await arm
                watch.cancel()
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


async def _show_camera(
    scene: Scene, camera: SimCamera, server: FrameServer, settings: SimSettings, new_episode: asyncio.Event
) -> None:
    """Publish frames as they arrive; numpy lets the emulator's loop run while a new look is painted in a thread."""
    with contextlib.closing(DeadlineTimer()) as timer:
        while True:
            await timer.wait_until(camera.next_available_ns)
            for frame in camera.due(monotonic_ns()):
                server.publish(frame)
            if new_episode.is_set():
                new_episode.clear()
                if settings.look == "episode":
                    await asyncio.to_thread(scene.draw_look)
