"""The simulated Create 2 in real time: its firmware behind a pseudo-terminal, and its camera's frames.

Any unmodified serial client opens the port. The plant follows the wall clock by catching up in substeps, so that a
late wake-up delays what is seen but never what happens. It wakes once per stream frame; with the stream running and
a command every 45 ms it took 2.2 % of a core of a 2-core cloud machine (1.9 % on uvloop).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, assert_never

import msgspec

from ...runtime.clock import NS_PER_S, DeadlineTimer, monotonic_ns
from ...runtime.tasks import TaskGroup
from ...types import Witness
from ..faultserver import CameraCable, CameraCorrupt, CameraFaults, CameraResize, CameraStall, CameraUnplug, FaultServer
from ..simcamera import SimFrame
from . import faultport as ops
from .faultport import AnyOperation
from .firmware import Firmware
from .oi import STREAM_PERIOD_NS, Bumps
from .plant import Pose
from .wire import GARBLED, PtyPort, Wire

__all__ = ["CameraFeed", "EmulatorOptions", "EmulatorReady", "serve"]

STAND_LIMIT_NS = NS_PER_S  # how long wheels that turn may keep the emulator from ending


class CameraFeed(Protocol):
    """A simulated camera."""

    @property
    def next_available_ns(self) -> int:
        """When the next frame arrives."""
        ...

    def due(self, now_ns: int) -> Sequence[SimFrame]:
        """Frames that have arrived since the last call."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatorOptions:
    """Where the emulator is found and what it leaves behind."""

    symlink: Path | None = None  # name of the serial port
    control: Path | None = None  # unix socket for faults
    wheel_log: Path | None = None  # file of JSON lines, written at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatorReady:
    """What a client needs to know."""

    port: str
    control: str | None


async def serve(
    firmware: Firmware,
    options: EmulatorOptions,
    *,
    on_ready: Callable[[EmulatorReady], None],
    stop: asyncio.Event,
    camera: CameraFeed | None = None,
    publish: Callable[[SimFrame], None] | None = None,
    camera_faults: CameraFaults | None = None,
    witness: Witness | None = None,
) -> None:
    """Run the robot until `stop` is set and its wheels stand, or one second later if they do not.

    `firmware` must live on the host's monotonic clock. `publish` is called with each of the camera's frames as it
    becomes available.

    Raises:
        StartError: no pseudo-terminal, or a name for port or socket that cannot be used.
    """
    emulator = _Emulator(firmware, options.symlink, camera, publish, camera_faults, witness)
    control = str(options.control) if options.control is not None else None
    try:
        async with AsyncExitStack() as stack:
            if options.control is not None:
                await stack.enter_async_context(FaultServer(options.control, AnyOperation, emulator.apply))
            async with TaskGroup() as tasks:
                emulator.tasks = tasks
                transmit = tasks.create_task(emulator.transmit(), name="create2-transmit")
                on_ready(EmulatorReady(port=emulator.port_path, control=control))
                await emulator.run(stop)
                transmit.cancel()
                emulator.cancel_replug()
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        emulator.close()
        if options.wheel_log is not None:
            lines = [msgspec.json.encode(record._asdict()) + b"\n" for record in firmware.wheel_log]
            options.wheel_log.write_bytes(b"".join(lines))


class _Emulator:
    """One robot on one port. The port is None while its cable is pulled."""

    tasks: TaskGroup

    def __init__(
        self,
        firmware: Firmware,
        symlink: Path | None,
        camera: CameraFeed | None,
        publish: Callable[[SimFrame], None] | None,
        camera_faults: CameraFaults | None,
        witness: Witness | None,
    ) -> None:
        self.camera_cable = CameraCable(camera_faults)
        self.firmware = firmware
        self.wire = Wire(firmware.baud_rate)
        self.symlink = symlink
        self.camera, self.publish, self.witness = camera, publish, witness
        self.frames = 0
        self.lost_bytes = 0  # on ports that were unplugged
        self.queued = asyncio.Event()
        self.timers = DeadlineTimer(), DeadlineTimer(), DeadlineTimer()  # run, transmit, replug
        self.replugging: asyncio.Task[None] | None = None
        try:
            self.port: PtyPort | None = self.open_port()
        except BaseException:
            self.close_timers()
            raise

    @property
    def port_path(self) -> str:
        return self.port.path if self.port is not None else ""

    def open_port(self) -> PtyPort:
        return PtyPort(self.symlink, self.receive, lambda: self.firmware.wake(monotonic_ns()))

    def close(self) -> None:
        self.unplug()
        self.close_timers()

    def close_timers(self) -> None:
        for timer in self.timers:
            timer.close()

    # The robot's life

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the clock until `stop` is set and the wheels stand."""
        give_up_ns: int | None = None
        while True:
            now_ns = monotonic_ns()
            self.step(now_ns)
            if stop.is_set():
                give_up_ns = give_up_ns or now_ns + STAND_LIMIT_NS
                if self.firmware.plant.standing or now_ns >= give_up_ns:
                    return
            deadline_ns = self.next_deadline_ns(now_ns)
            if deadline_ns <= monotonic_ns():
                await asyncio.sleep(0)  # late: still let the others have their turn
            await self.timers[0].wait_until(deadline_ns)

    def next_deadline_ns(self, now_ns: int) -> int:
        deadlines_ns = [now_ns + STREAM_PERIOD_NS]
        if (frame_ns := self.firmware.next_frame_ns) is not None:
            deadlines_ns[0] = max(now_ns + 1, frame_ns)
        if self.camera is not None:
            deadlines_ns.append(self.camera.next_available_ns)
        return min(deadlines_ns)

    def step(self, now_ns: int) -> None:
        for frame in self.firmware.advance(now_ns):
            self.frames += 1
            arrival_ns = self.wire.send(frame.data, frame.sampled_ns, frame.available_ns)
            if self.witness is not None:
                self.witness.sensed(frame.sampled_ns, arrival_ns)
        self.flush(now_ns)
        if self.camera is not None:
            for image in self.camera.due(now_ns):
                if self.publish is not None:
                    self.publish(image)

    def receive(self, data: bytes) -> None:
        """Bytes from the client."""
        assert self.port is not None
        now_ns = monotonic_ns()
        if self.port.client_baud_rate() != self.firmware.baud_rate:
            data = data.translate(GARBLED)
        plant = self.firmware.plant
        before = plant.commands
        reply = self.firmware.receive(data, now_ns)
        if self.witness is not None and plant.commands != before:
            self.witness.obeyed(now_ns, plant.effective_ns)
        self.wire.baud_rate = self.firmware.baud_rate
        if reply:
            self.wire.send(reply, now_ns)
            self.flush(now_ns)

    def flush(self, now_ns: int) -> None:
        """Deliver what has arrived; `transmit` delivers the rest when it does."""
        data = self.wire.due(now_ns)
        if data and self.port is not None:
            if self.port.client_baud_rate() != self.firmware.baud_rate:
                data = data.translate(GARBLED)
            self.port.write(data)
        if self.wire.next_ns is not None:
            self.queued.set()

    async def transmit(self) -> None:
        """Deliver bytes that were still on the line when they were sent."""
        while True:
            await self.queued.wait()
            while (arrival_ns := self.wire.next_ns) is not None:
                await self.timers[1].wait_until(arrival_ns)
                self.flush(monotonic_ns())
            self.queued.clear()

    # Faults

    def unplug(self) -> None:
        if self.port is not None:
            self.lost_bytes += self.port.lost_bytes
            self.port.close()
            self.port = None

    async def replug(self, at_ns: int) -> None:
        await self.timers[2].wait_until(at_ns)
        self.port = self.open_port()

    def cancel_replug(self) -> None:
        self.camera_cable.cancel()
        if self.replugging is not None:
            self.replugging.cancel()

    def hang_up(self, seconds: float) -> None:
        if self.port is None:
            raise ValueError("the cable is already pulled")
        self.unplug()
        at_ns = monotonic_ns() + int(seconds * NS_PER_S)
        self.replugging = self.tasks.create_task(self.replug(at_ns), name="create2-replug")

    def apply(self, operation: AnyOperation) -> dict[str, Any]:
        """Perform one operation of the control socket; returns what it answers beside `ok`."""
        firmware, now_ns = self.firmware, monotonic_ns()
        plant, faults = firmware.plant, firmware.faults
        match operation:
            case ops.Battery():
                plant.battery_mah = min(operation.charge_mah, plant.settings.battery_capacity_mah)
            case ops.Dock():
                plant.dock_present = operation.present
            case ops.Cliff():
                faults.cliff = (operation.left, operation.front_left, operation.front_right, operation.right)
            case ops.WheelDrop():
                faults.wheel_drop = _bits(operation, Bumps.WHEEL_DROP_LEFT, Bumps.WHEEL_DROP_RIGHT)
            case ops.Bump():
                faults.bump = _bits(operation, Bumps.BUMP_LEFT, Bumps.BUMP_RIGHT)
            case ops.Charger():
                faults.internal_charger = operation.plugged
            case ops.Force():
                faults.force(operation.packet, operation.value)
            case ops.Stall():
                faults.silent_until_ns = now_ns + int(operation.seconds * NS_PER_S)
            case ops.Freeze():
                faults.frozen_until_ns = now_ns + int(operation.seconds * NS_PER_S)
            case ops.Drop():
                self.wire.drop_bytes = operation.count
            case ops.Corrupt():
                self.wire.corrupt_bytes = operation.count
            case ops.HangUp():
                self.hang_up(operation.seconds)
            case ops.Wake():
                firmware.wake(now_ns)
            case ops.Place():
                pose = Pose(x_m=operation.x_m, y_m=operation.y_m, heading_rad=operation.heading_rad)
                firmware.place(pose, now_ns)
            case CameraStall() | CameraUnplug() | CameraResize() | CameraCorrupt():
                self.camera_cable.apply(operation)
            case ops.State():
                return self.state(now_ns)
            case ops.WheelLog():
                return {"records": [record._asdict() for record in firmware.wheel_log]}
            case _:
                assert_never(operation)
        return {}

    def state(self, now_ns: int) -> dict[str, Any]:
        firmware, plant = self.firmware, self.firmware.plant
        pose = plant.pose
        return {
            "now_ns": now_ns,
            "port": self.port_path,
            "mode": firmware.mode.name,
            "asleep": firmware.asleep,
            "streaming": firmware.streaming,
            "x_m": pose.x_m,
            "y_m": pose.y_m,
            "heading_rad": pose.heading_rad,
            "requested_left_mm_s": plant.requested_left_mm_s,
            "requested_right_mm_s": plant.requested_right_mm_s,
            "left_mm_s": plant.left_mm_s,
            "right_mm_s": plant.right_mm_s,
            "standing": plant.standing,
            "battery_mah": plant.battery_mah,
            "charging": firmware.charging,
            "on_dock": plant.on_dock,
            "frames": self.frames,
            "lost_bytes": self.lost_bytes + (self.port.lost_bytes if self.port is not None else 0),
            "unknown_bytes": firmware.unknown_bytes,
            "ignored_bytes": firmware.ignored_bytes,
            "commands": {opcode.name: count for opcode, count in firmware.commands.items()},
            "notes": list(firmware.notes),
        }


def _bits(sides: ops.WheelDrop | ops.Bump, left: Bumps, right: Bumps) -> int:
    return (left.value if sides.left else 0) | (right.value if sides.right else 0)
