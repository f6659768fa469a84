"""The simulated UR controller in real time: dashboard, script and RTDE servers on their fixed ports.

Unmodified clients connect to it. The ports cannot be changed, but the address can: several run side by side on
127.0.0.2, 127.0.0.3 and so on. The controller follows the wall clock by catching up tick by tick, so that a late
wake-up delays what is seen but never what happens. A client of ur_rtde must live in another process: its constructors
hold the interpreter's lock while they wait for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import msgspec

from ...runtime.clock import NS_PER_S, DeadlineTimer, monotonic_ns
from ..faultserver import CameraCable, CameraCorrupt, CameraFaults, CameraResize, CameraStall, CameraUnplug, FaultServer
from . import faults as ops
from .controller import Controller
from .faults import AnyOperation, WireOperation
from .ports import Ports
from .states import Limits

__all__ = ["EmulatorOptions", "EmulatorReady", "serve"]

STAND_LIMIT_NS = NS_PER_S  # how long an arm that moves may keep the emulator from ending


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatorOptions:
    """Where the emulator is found and what it leaves behind."""

    host: str | None = None  # address to listen on; the first free one from 127.0.0.2 on if None
    control: Path | None = None  # unix socket for faults
    motion_log: Path | None = None  # file of JSON lines, written at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatorReady:
    """What a client needs to know."""

    host: str
    control: str | None


async def serve(
    controller: Controller,
    options: EmulatorOptions,
    *,
    on_ready: Callable[[EmulatorReady], None],
    stop: asyncio.Event,
    camera_faults: CameraFaults | None = None,
) -> None:
    """Run the robot until `stop` is set and its arm stands, or one second later if it does not.

    `controller` must live on the host's monotonic clock.

    Raises:
        StartError: an address or a name for the control socket that cannot be used.
    """
    ports = Ports(controller)
    faults = _Faults(ports, CameraCable(camera_faults))
    control = str(options.control) if options.control is not None else None
    try:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(ports.close)
            stack.callback(faults.cable.cancel)
            await ports.listen(options.host)
            if options.control is not None:
                await stack.enter_async_context(FaultServer(options.control, AnyOperation, faults.apply))
            on_ready(EmulatorReady(host=ports.host, control=control))
            await _run(ports, stop)
    finally:
        if options.motion_log is not None:
            lines = [msgspec.json.encode(record._asdict()) + b"\n" for record in controller.motion_log]
            options.motion_log.write_bytes(b"".join(lines))


async def _run(ports: Ports, stop: asyncio.Event) -> None:
    """Follow the clock until `stop` is set and the arm stands."""
    controller = ports.controller
    give_up_ns: int | None = None
    with contextlib.closing(DeadlineTimer()) as timer:
        while True:
            now_ns = monotonic_ns()
            ports.follow(now_ns)
            if stop.is_set():
                give_up_ns = give_up_ns or now_ns + STAND_LIMIT_NS
                if controller.standing or now_ns >= give_up_ns:
                    return
            if controller.next_tick_ns <= monotonic_ns():
                await asyncio.sleep(0)  # late: still let the others have their turn
            await timer.wait_until(controller.next_tick_ns)


class _Faults:
    """What the control socket does to the robot."""

    def __init__(self, ports: Ports, cable: CameraCable) -> None:
        self.cable = cable
        self._ports, self._controller = ports, ports.controller

    def apply(self, operation: AnyOperation) -> dict[str, Any]:
        """Perform one operation; returns what it answers beside `ok`, ValueError to refuse."""
        controller, now_ns = self._controller, monotonic_ns()
        self._ports.follow(now_ns)
        match operation:
            case ops.ProtectiveStop():
                controller.protective_stop("asked for over the control socket", now_ns)
            case ops.EmergencyStop():
                controller.emergency_stop(operation.pressed, now_ns)
            case ops.Safeguard():
                controller.safeguard(operation.open, now_ns)
            case ops.Violation():
                controller.violate("asked for over the control socket", now_ns)
            case ops.KillProgram():
                controller.stop_program("a runtime error", now_ns)
            case ops.JointLimits():
                controller.limits = Limits(low=operation.low, high=operation.high)
            case ops.Place():
                controller.place(operation.q, now_ns)
            case ops.State():
                return self._state(now_ns)
            case ops.MotionLog():
                return {"records": [record._asdict() for record in controller.motion_log]}
            case CameraStall() | CameraUnplug() | CameraResize() | CameraCorrupt():
                self.cable.apply(operation)
            case _:
                self._break_wires(operation, now_ns)
        return {}

    def _break_wires(self, operation: WireOperation, now_ns: int) -> None:
        ports = self._ports
        match operation:
            case ops.RemoteControl():
                ports.dashboard.remote_control = operation.on
            case ops.Claim():
                ports.claim(operation.names)
            case ops.Mute():
                ports.mute = operation.on
            case ops.Stall():
                ports.stall(operation.seconds, now_ns)
            case ops.Freeze():
                ports.freeze(operation.seconds, now_ns)
            case ops.Drop():
                ports.cut(operation.servers)
            case ops.HangUp():
                ports.hang_up(operation.servers, operation.seconds)
            case _:
                assert_never(operation)

    def _state(self, now_ns: int) -> dict[str, Any]:
        controller, ports = self._controller, self._ports
        arm, registers = controller.arm, controller.registers
        return {
            "now_ns": now_ns,
            "host": ports.host,
            "robot_mode": controller.robot_mode.name,
            "safety_mode": controller.safety_mode.name,
            "runtime_state": controller.runtime_state.name,
            "program": controller.program_name,
            "q": arm.q,
            "qd": arm.qd,
            "target_q": arm.target_q,
            "target_qd": arm.target_qd,
            "standing": controller.standing,
            "int_in": registers.int_in[:2],
            "int_out": registers.int_out[:3],
            "connections": [connection.server for connection in ports.connections],
            "packages": ports.packages,
            "missed_packages": ports.missed_packages,
            "refused_packages": ports.refused_packages,
            "notes": list(controller.notes),
        }
