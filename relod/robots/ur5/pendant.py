"""The controller's dashboard server, spoken from an event loop: what state the robot is in, and how to get it out.

A line-based text protocol, the same as the buttons of the teach pendant. It says why a robot cannot be driven, where
ur_rtde only fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ...errors import StartError

__all__ = ["Condition", "Pendant", "trouble"]

DASHBOARD_PORT = 29999  # fixed by the controller and by ur_rtde
CONNECT_LIMIT_S = 0.5  # a controller in the same network answers within a millisecond
ANSWER_LIMIT_S = 2.5  # ur_rtde's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What the dashboard says; names as the controller writes them."""

    robot_mode: str  # RUNNING when it can move
    safety_mode: str  # NORMAL or REDUCED when it can move
    remote_control: bool  # True also for controllers that do not know of such a thing


class Pendant:
    """A connection to the dashboard server; made by `open`."""

    def __init__(self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._address, self._reader, self._writer = address, reader, writer

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, address: str) -> AsyncIterator[Pendant]:
        """Connect for the length of the block. `StartError`: nobody there, or somebody else than a controller."""
        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                reader, writer = await asyncio.open_connection(address, DASHBOARD_PORT)
        except OSError as error:  # TimeoutError is one
            raise StartError(
                f"no UR controller at {address}: port {DASHBOARD_PORT} {_why(error)}",
                "is the controller on, is the address right, and is this computer in the controller's network?",
            ) from error
        pendant = cls(address, reader, writer)
        try:
            greeting = await pendant._line()
            if "Dashboard" not in greeting:
                raise StartError(f"{address} is no UR controller: it says {greeting[:60]!r}", "check the address")
            yield pendant
        finally:
            writer.transport.abort()

    async def ask(self, question: str) -> str:
        """The answer to one line. `StartError`: none came."""
        self._writer.write(question.encode() + b"\n")
        return await self._line()

    async def condition(self) -> Condition:
        """What state the robot is in."""
        return Condition(
            robot_mode=_value(await self.ask("robotmode")),
            safety_mode=_value(await self.ask("safetymode")),
            remote_control="false" not in (await self.ask("is in remote control")).lower(),
        )

    async def unlock(self) -> bool:
        """End a protective stop; False when the controller refuses, as in a stop's first 5 s."""
        return "releasing" in await self.ask("unlock protective stop")

    async def _line(self) -> str:
        try:
            async with asyncio.timeout(ANSWER_LIMIT_S):
                line = await self._reader.readline()
        except (OSError, ValueError, TimeoutError):
            line = b""
        if not line:
            raise StartError(f"the controller at {self._address} does not answer", "restart the controller")
        return line.decode(errors="replace").strip()


def trouble(address: str, condition: Condition) -> StartError | None:
    """Why a robot in this condition cannot be driven, and the step to take; None when it can.

    A protective stop counts as trouble here too, although the driver can end one.
    """
    start_again = "then start again"
    match condition.safety_mode:
        case "NORMAL" | "REDUCED":
            pass
        case "PROTECTIVE_STOP":
            return StartError(
                f"the robot at {address} is in a protective stop",
                f"look at why, free the arm, unlock the stop on the pendant, {start_again}",
            )
        case "SAFEGUARD_STOP":
            return StartError(f"the safeguard of the robot at {address} is open", f"close it, {start_again}")
        case "ROBOT_EMERGENCY_STOP" | "SYSTEM_EMERGENCY_STOP":
            return StartError(
                f"the emergency stop of the robot at {address} is pressed",
                f"release it, switch the robot on and release its brakes on the pendant, {start_again}",
            )
        case other:
            return StartError(
                f"the safety mode of the robot at {address} is {other}", f"clear it on the pendant, {start_again}"
            )
    match condition.robot_mode:
        case "RUNNING":
            pass
        case "IDLE":
            return StartError(
                f"the brakes of the robot at {address} are on", f"release them on the pendant, {start_again}"
            )
        case "POWER_OFF" | "POWER_ON" | "BOOTING":
            return StartError(
                f"the robot at {address} is not switched on (robot mode {condition.robot_mode})",
                f"switch it on and release its brakes on the pendant, {start_again}",
            )
        case other:
            return StartError(
                f"the robot at {address} cannot be driven (robot mode {other})", "see what the pendant says"
            )
    if not condition.remote_control:
        return StartError(
            f"the controller at {address} is in local control", "switch the pendant to Remote Control, top right"
        )
    return None


def _value(answer: str) -> str:
    """`Robotmode: RUNNING` -> `RUNNING`."""
    return answer.rpartition(":")[2].strip().upper()


def _why(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"does not answer within {CONNECT_LIMIT_S:g} s"
    return f"cannot be reached ({os.strerror(error.errno) if error.errno else error})"
