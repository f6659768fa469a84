"""The Create 2 as the device process drives it: control of its modes, its sensor stream, and its ways to fall silent.

Sensors come from the robot's own stream, one frame every 15 ms, decoded by `oi.StreamDecoder`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Annotated

from msgspec import Meta

from ...config import Section
from ...errors import SafetyStop, StartError
from ...runtime.clock import NS_PER_S, monotonic_ns
from . import oi
from .port import Port, open_error

__all__ = ["COMMAND_NAMES", "MODE_COMMANDS", "SENSOR_COLUMNS", "Create2Driver", "Create2Settings", "Request"]

COMMAND_NAMES = ("left_mm_s", "right_mm_s")
SENSOR_COLUMNS = (*oi.SENSOR_NAMES, "connection_epoch")

STAND = oi.drive_direct(0, 0)
# SAFE ends what the robot does by itself, such as driving to its dock, and keeps its wheels braked. On a charger
# the robot falls back to PASSIVE at once and goes on charging.
GUARD_STOP = STAND + oi.safe()

MODE_PAUSE_S = 0.15  # after a change of mode, as SenseAct does
WAKE_PULSE_S = 1.0  # of the robot's BRC pin through RTS: high, low, high, as SenseAct does
STILL_PACKETS = 4  # 45 ms without a count on either encoder: slower than 10 mm/s
POLL_S = 0.25

_LEFT, _RIGHT, _ASKED_LEFT, _ASKED_RIGHT, _MODE, _CHARGERS = (
    oi.SENSOR_NAMES.index(name)
    for name in (
        "encoder_left_counts",
        "encoder_right_counts",
        "requested_left_mm_s",
        "requested_right_mm_s",
        "oi_mode",
        "charging_sources",
    )
)


class Request(IntEnum):
    """What can be asked of the robot beside motion."""

    NONE = 0
    SAFE = 1  # take control; hazards end it
    FULL = 2  # take control without the robot's own safety: only to drive off a ledge
    PASSIVE = 3  # give up control: the robot may charge, and sleeps after five minutes
    SEEK_DOCK = 4  # drive to the home base by itself
    WAKE = 5  # wake it from sleep; needs a cable that wires RTS to BRC


MODE_COMMANDS = {
    Request.SAFE: oi.safe(),
    Request.FULL: oi.full(),
    Request.PASSIVE: oi.start(),
    Request.SEEK_DOCK: oi.seek_dock(),
}


class Create2Settings(Section, frozen=True):
    """How the robot's serial port is used."""

    baud: Annotated[int, Meta(ge=300, le=115200, description="bits per second the robot is set to")] = 115_200
    answer_limit_s: Annotated[
        float, Meta(gt=0, le=60, description="how long the robot may take to send its first packet")
    ] = 2.0
    stream_limit_s: Annotated[
        float, Meta(gt=0, le=60, description="time without a packet after which the stream is asked for again")
    ] = 1.0
    reopen_limit_s: Annotated[
        float, Meta(ge=0, le=600, description="how long a lost port may take to come back before the run ends")
    ] = 5.0


class Create2Driver:
    """`runtime.device.DeviceDriver` of a Create 2; one per port, on one event loop.

    `publish(arrived_ns, values)` gets every packet, values in the order of `SENSOR_COLUMNS`; `on_event(text)` what a
    person should read.
    """

    sensor_names = SENSOR_COLUMNS
    command_names = COMMAND_NAMES

    def __init__(
        self,
        address: str,
        settings: Create2Settings,
        publish: Callable[[int, Sequence[float]], object],
        on_event: Callable[[str], object],
    ) -> None:
        self.address = address
        self.connection_epoch = 0
        self.reopen_limit_s = settings.reopen_limit_s
        self._settings, self._publish, self._on_event = settings, publish, on_event
        self._port = Port(address, self._on_data, self._on_lost)
        self._decoder = oi.StreamDecoder(oi.STREAM_IDS)
        self._news = asyncio.Event()  # a packet, a loss or a wish to wake: something for `open` or `run` to look at
        self._loss = ""
        self._received_bytes = 0  # since the port was opened
        self._wanted = Request.SAFE  # the last mode asked for
        self._wake_asked = False
        self._recent: deque[tuple[int, tuple[int, ...]]] = deque(maxlen=STILL_PACKETS)
        self._rejected = self._stalls = 0

    # Opening and closing.

    async def open(self) -> None:
        """Open the port, stop the robot, take control (SAFE), and wait for the first packet.

        Raises:
            StartError: no port, no permission, port busy, not a serial port, no answer, or answers at another rate.
        """
        self._port.close()
        self._decoder.clear()
        self._recent.clear()
        self._received_bytes = 0
        self._loss = ""
        self._wanted = Request.SAFE
        try:
            await self._port.open(self._settings.baud)
            self.connection_epoch += 1
            await self._begin()
        except BaseException:
            self._port.close()
            raise

    async def _begin(self) -> None:
        await self._take_control()
        if await self._answers():
            return
        if not self._received_bytes and await self._wake():
            await self._take_control()
            if await self._answers():
                return
        raise self._no_answer()

    async def _take_control(self) -> None:
        """Stop the robot, then set mode and stream from whatever state it is in."""
        try:
            self._port.write(STAND)
            self._port.write(oi.start())
            await asyncio.sleep(MODE_PAUSE_S)
            self._port.write(MODE_COMMANDS[self._wanted])
            self._port.write(STAND)
            self._port.write(oi.stream(oi.STREAM_IDS))
        except OSError as error:
            raise open_error(self.address, error) from error

    async def _answers(self) -> bool:
        """Whether a packet comes in time; `StartError` when the port is lost meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.answer_limit_s):
                while not self._recent and not self._loss:
                    self._news.clear()
                    await self._news.wait()
        if self._loss:
            raise StartError(self._loss, "check the cable")
        return bool(self._recent)

    def _no_answer(self) -> StartError:
        limit_s, baud = self._settings.answer_limit_s, self._settings.baud
        if self._received_bytes:
            return StartError(
                f"{self.address} sent {self._received_bytes} bytes but no valid packet within {limit_s:g} s "
                f"at {baud} baud",
                "the robot talks at another rate, or this is no Create 2: set robot.baud (115200 is its default)",
            )
        return StartError(
            f"{self.address} opens but nothing answers within {limit_s:g} s at {baud} baud",
            "is the robot on and awake (press its power button)? is the cable in its serial socket?",
        )

    async def close(self) -> None:
        """Leave the robot standing in PASSIVE, where it may charge and sleep, with its stream off."""
        self.stop()
        with contextlib.suppress(OSError):
            self._port.write(oi.pause_stream())
            self._port.write(oi.start())
        self._port.close()

    # The stream.

    def _on_data(self, data: bytes) -> None:
        arrived_ns = monotonic_ns()
        self._received_bytes += len(data)
        for values in self._decoder.feed(data):
            if not self._recent:
                self._news.set()
            self._recent.append((arrived_ns, values))
            self._publish(arrived_ns, (*values, self.connection_epoch))

    def _on_lost(self, why: str) -> None:
        self._loss = why
        self._news.set()

    async def run(self) -> None:
        """Serve the port until it is lost: `SafetyStop`. A silent robot is asked again, for as long as it takes."""
        limit_ns = int(self._settings.stream_limit_s * NS_PER_S)
        silent_since_ns = asked_ns = 0
        attempts = 0
        while True:
            await self._wait_for_news(POLL_S)
            if self._loss:
                raise SafetyStop(self._loss, "check the cable, then start again")
            if self._wake_asked:
                self._wake_asked = False
                await self._wake()
            now_ns, newest_ns = monotonic_ns(), self._recent[-1][0]
            if now_ns - newest_ns < limit_ns:
                if attempts:
                    self._on_event(f"packets are back after {(newest_ns - silent_since_ns) / NS_PER_S:.1f} s")
                attempts = 0
            elif not attempts or now_ns - asked_ns >= limit_ns:
                silent_since_ns = silent_since_ns if attempts else newest_ns
                attempts += 1
                await self._ask_again(attempts)
                asked_ns = monotonic_ns()

    async def _wait_for_news(self, limit_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not (self._loss or self._wake_asked):
                    self._news.clear()
                    await self._news.wait()

    async def _ask_again(self, attempt: int) -> None:
        """First only the stream may be gone; then the robot may have restarted; then it may be asleep."""
        self._port.pad_next()
        with contextlib.suppress(OSError, StartError):  # a lost port is noticed by `run` itself
            if attempt == 1:
                self._stalls += 1
                self._on_event(f"no packets for {self._settings.stream_limit_s:g} s; asking for them again")
                self._port.write(oi.stream(oi.STREAM_IDS))
                return
            if attempt == 3:
                await self._wake()
            await self._take_control()

    async def _wake(self) -> bool:
        """Pulse the robot's BRC pin through RTS; False when this port has no such line."""
        try:
            for level in (True, False, True):
                self._port.set_rts(level)
                await asyncio.sleep(WAKE_PULSE_S)
        except OSError:  # ENOTTY on a pseudo-terminal
            self._on_event(f"{self.address} has no RTS line: a robot asleep must be woken by its power button")
            return False
        return True

    # Commands.

    def command(self, values: tuple[float, ...]) -> None:
        """Set the wheels' speeds `(left, right)` in mm/s, cut to ±500 and to whole numbers; not-a-number stops.

        Raises:
            OSError: the port is gone.
        """
        left, right = values
        if not (math.isfinite(left) and math.isfinite(right)):
            self._rejected += 1
            left = right = 0.0
        self._port.write(oi.drive_direct(_whole_speed(left), _whole_speed(right)))

    def request(self, request: int) -> None:
        """Execute a `Request`; an unknown one is ignored with an event. `OSError`: the port is gone."""
        try:
            wanted = Request(request)
        except ValueError:
            self._on_event(f"request {request} is none of the Create 2's")
            return
        if wanted is Request.WAKE:
            self._wake_asked = True
            self._news.set()
        elif wanted is not Request.NONE:
            self._wanted = wanted
            self._port.write(MODE_COMMANDS[wanted])

    def stop(self) -> None:
        """Wheels to zero; a robot on its way to the dock is taken out of that first. Never raises."""
        with contextlib.suppress(OSError):
            if self._wanted is Request.SEEK_DOCK and not self._on_charger():
                self.request(Request.SAFE)
            self._port.write(STAND)

    def _on_charger(self) -> bool:
        return bool(self._recent and self._recent[-1][1][_CHARGERS])

    # What the device process asks.

    def guarded_wire(self) -> tuple[int, bytes]:
        """The port's descriptor, and what another process writes there to stop the robot."""
        return self._port.fd, GUARD_STOP

    def stands(self, after_ns: int) -> bool:
        """Whether the newest packets, all after `after_ns`, ask for no speed and count no motion."""
        if len(self._recent) < STILL_PACKETS or self._recent[0][0] <= after_ns:
            return False
        first = self._recent[0][1]
        return all(
            values[_ASKED_LEFT] == values[_ASKED_RIGHT] == 0
            and values[_LEFT] == first[_LEFT]
            and values[_RIGHT] == first[_RIGHT]
            for _, values in self._recent
        )

    def counters(self) -> dict[str, float | str]:
        """Figures since the driver was made."""
        return {
            "packets": float(self._decoder.frames),
            "checksum_errors": float(self._decoder.checksum_errors),
            "skipped_bytes": float(self._decoder.skipped_bytes),
            "stalls": float(self._stalls),
            "write_errors": float(self._port.write_errors),
            "rejected_commands": float(self._rejected),
            "connection_epoch": float(self.connection_epoch),
            "mode": oi.Mode(self._recent[-1][1][_MODE]).name if self._recent else "",
        }


def _whole_speed(mm_s: float) -> int:
    return int(min(max(mm_s, -oi.MAX_SPEED_MM_S), oi.MAX_SPEED_MM_S))
