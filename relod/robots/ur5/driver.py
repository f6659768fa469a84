"""The UR5 as the device process drives it: through ur_rtde in a process of its own, and the pendant's dashboard.

Trouble of any kind has one cure: the process with ur_rtde in it (`client.py`) is killed and another is started, which
connects anew, clears the controller's registers, uploads the control script and sets its watchdog. Before that, a
protective stop is unlocked. What only a person can mend (an emergency stop, for example) ends the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
import platform
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum

from ...errors import SafetyStop, StartError
from ...runtime.clock import NS_PER_S, monotonic_ns
from .client import Plan
from .clientprocess import ClientProcess
from .interface import COMMAND_NAMES, SENSOR_COLUMNS, RobotSettings
from .pendant import Pendant, trouble
from .states import RobotMode, RuntimeState, SafetyMode
from .target import NO_TARGET, place_of
from .targetlink import TargetLink, target_host

__all__ = ["StopBudget", "UR5Driver", "state_name"]

_SPEEDS = slice(6, 12)
_TARGET_SPEEDS = slice(18, 24)
_ROBOT_MODE, _SAFETY_MODE, _RUNTIME_STATE = (
    SENSOR_COLUMNS.index(name) for name in ("robot_mode", "safety_mode", "runtime_state")
)

MAX_JOINT_RAD_S = math.pi  # of a UR5's joints; ur_rtde accepts more
STILL_PACKETS = 4
STILL_RAD_S = 0.01  # a standing arm's measured speeds are noise below this [assumed]
LOOK_S = 0.1
SILENT_LOOKS = 5  # 0.5 s without a word of the client: it hangs
SETTLE_S = 0.05  # several packets tell of an event in turn: the program ends, then the safety mode changes
STAND_LIMIT_S = 0.6
UNLOCK_AFTER_S = 5.2  # the controller refuses before 5 s have passed
IN_USE = "already in use"  # of the controller's input registers, as ur_rtde words it
IN_USE_LIMIT_S = 2.0  # for a client whose driver was killed to leave
RETRY_S = 0.1

SAFE = (SafetyMode.NORMAL, SafetyMode.REDUCED)


class StopBudget:
    """How many protective stops are borne: at most `limit` within any `window_ns`. Pure."""

    def __init__(self, limit: int, window_ns: int) -> None:
        self._times_ns: deque[int] = deque()
        self._limit, self._window_ns = limit, window_ns

    def spend(self, now_ns: int) -> int:
        """Count a stop; how many there are in the window now."""
        self._times_ns.append(now_ns)
        while now_ns - self._times_ns[0] > self._window_ns:
            self._times_ns.popleft()
        return len(self._times_ns)

    @property
    def overdrawn(self) -> bool:
        """Whether it was one too many."""
        return len(self._times_ns) > self._limit


class UR5Driver:
    """`runtime.device.DeviceDriver` of a UR5; one per controller, on one event loop.

    `publish(arrived_ns, values)` gets every packet, values in the order of `SENSOR_COLUMNS`; `on_event(text)` what a
    person should read.
    """

    sensor_names = SENSOR_COLUMNS
    command_names = COMMAND_NAMES

    def __init__(
        self,
        address: str,
        settings: RobotSettings,
        publish: Callable[[int, Sequence[float]], object],
        on_event: Callable[[str], object],
    ) -> None:
        self.address = address
        self.connection_epoch = 0
        self.reopen_limit_s = settings.reopen_limit_s
        self._settings, self._publish, self._on_event = settings, publish, on_event
        self._client: ClientProcess | None = None
        where = settings.target or target_host(address)
        self._target = TargetLink(where, on_event) if where != "none" else None
        self._open = False  # packets are published: who sees one may command
        self._news = asyncio.Event()  # a packet that shows trouble, the client ready, a loss
        self._loss = ""
        self._recent: deque[tuple[int, tuple[float, ...]]] = deque(maxlen=STILL_PACKETS)
        self._stops = StopBudget(settings.protective_stops, int(settings.protective_window_s * NS_PER_S))
        self._packets = self._rejected = self._protective_stops = 0

    # Opening and closing.

    async def open(self) -> None:
        """Reach the controller, see that the robot can be driven, upload the script, and wait for the first packet.

        Raises:
            StartError: no ur_rtde for this platform, no controller, a robot that cannot be driven now, registers in
                use, or no target page.
        """
        _need_library()
        self._drop_client()
        async with Pendant.open(self.address) as pendant:
            await self._make_drivable(pendant)
        if self._target is not None:
            await self._target.open()
        self.connection_epoch += 1
        give_up_ns = monotonic_ns() + int(IN_USE_LIMIT_S * NS_PER_S)
        while not await self._start_client():
            self._drop_client()
            if IN_USE not in self._loss or monotonic_ns() > give_up_ns:
                raise self._no_start()
            await asyncio.sleep(RETRY_S)
        self._open = True

    async def _make_drivable(self, pendant: Pendant) -> None:
        """A protective stop from before this run is for a person to look at; one from within it is ended."""
        condition = await pendant.condition()
        if condition.safety_mode == "PROTECTIVE_STOP" and self.connection_epoch > 0 and await pendant.unlock():
            await asyncio.sleep(SETTLE_S)
            condition = await pendant.condition()
        found = trouble(self.address, condition)
        if found is not None:
            raise found

    async def _start_client(self) -> bool:
        """Start a client and wait until it obeys; False, with `_loss`, when it does not."""
        self._recent.clear()
        self._loss = ""
        settings = self._settings
        self._client = ClientProcess(
            Plan(
                address=self.address,
                acceleration_rad_s2=settings.acceleration_rad_s2,
                stop_rad_s2=settings.stop_rad_s2,
                hold_ms=settings.hold_ms,
                watchdog_hz=settings.watchdog_hz,
                connect_limit_s=settings.answer_limit_s,
            ),
            self._on_state,
            self._news.set,
            self._on_end,
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.answer_limit_s):
                while not (self._loss or (self._client.ready and self._recent)):
                    self._news.clear()
                    await self._news.wait()
                return not self._loss
        self._loss = f"it did not obey within {settings.answer_limit_s:g} s"
        return False

    def _no_start(self) -> StartError:
        if IN_USE in self._loss:
            return StartError(
                f"another program controls the robot at {self.address} (its RTDE input registers are in use)",
                "end it, and switch off EtherNet/IP, PROFINET and MODBUS on the pendant",
            )
        if "remote control" in self._loss.lower():
            return StartError(
                f"the controller at {self.address} is in local control", "switch the pendant to Remote Control"
            )
        return StartError(f"the controller at {self.address}: {self._loss}", "see what the pendant says")

    async def close(self) -> None:
        """Leave the arm standing, and no program on the controller."""
        if self._target is not None:
            await self._target.close()
        if self._client is not None:
            await self._client.end()
            self._client = None

    def _drop_client(self) -> None:
        self._open = False
        if self._client is not None:
            self._client.kill()
            self._client = None

    # Packets.

    def _on_state(self, arrived_ns: int, values: tuple[float, ...]) -> None:
        shown = self._target.shown if self._target is not None else NO_TARGET
        self._packets += 1
        if not self._recent or not _well(values):
            self._news.set()
        self._recent.append((arrived_ns, values))
        if self._open:
            self._publish(arrived_ns, (*values, shown, self.connection_epoch))

    def _on_end(self, why: str) -> None:
        self._loss = why
        self._news.set()

    async def run(self) -> None:
        """Serve the controller until the connection has to be made anew, or cannot be: `SafetyStop`."""
        seen, silent_looks = self._packets, 0
        while True:
            if not self._loss:
                await self._wait_for_news(LOOK_S)
            silent_looks, seen = (0 if self._packets != seen else silent_looks + 1), self._packets
            if not self._loss and silent_looks >= SILENT_LOOKS:
                self._loss = "the process that talks to the controller hangs"
            if self._loss:
                self._drop_client()
                raise SafetyStop(f"{self.address}: {self._loss}", "see the network cable and the pendant")
            if not _well(self._recent[-1][1]):
                await asyncio.sleep(SETTLE_S)
                await self._face_trouble()

    async def _face_trouble(self) -> None:
        """What the newest packet tells is mended, or ends the run: `SafetyStop`."""
        values = self._recent[-1][1]
        safety, mode = int(values[_SAFETY_MODE]), int(values[_ROBOT_MODE])
        if self._loss or _well(values):
            return
        if safety == SafetyMode.PROTECTIVE_STOP:
            await self._sit_out_protective_stop()
        elif safety not in SAFE:
            await self._end_run(
                f"{self.address}: safety mode {state_name('safety_mode', safety)}",
                "clear it on the pendant, then start again",
            )
        elif mode != RobotMode.RUNNING:
            await self._end_run(f"{self.address}: the robot was switched off", "switch it on, then start again")
        elif values[_RUNTIME_STATE] in (RuntimeState.PAUSING, RuntimeState.PAUSED):  # a watchdog ends it: a person did
            await self._end_run(
                f"{self.address}: the program was paused on the pendant", "start again when all is well"
            )
        else:
            self._drop_client()
            raise SafetyStop(f"{self.address}: the control script ended", "see the log on the pendant")

    async def _sit_out_protective_stop(self) -> None:
        """Wait, unlock, and connect anew; too many stops end the run."""
        count = self._stops.spend(monotonic_ns())
        self._protective_stops += 1
        limit, window_s = self._settings.protective_stops, self._settings.protective_window_s
        if self._stops.overdrawn:
            await self._end_run(
                f"{self.address}: {count} protective stops within {window_s:g} s, {limit} are borne",
                "see what the arm meets, and unlock it on the pendant",
            )
        self._on_event(f"protective stop {count} of {limit} within {window_s:g} s; to be unlocked in 5 s")
        await self._wait_for_loss(UNLOCK_AFTER_S)
        if self._loss:
            return
        with contextlib.suppress(StartError):  # `open` tries again
            async with Pendant.open(self.address) as pendant:
                await pendant.unlock()
        self._drop_client()
        raise SafetyStop(f"{self.address}: protective stop", "see what the arm meets, and unlock it on the pendant")

    async def _end_run(self, what: str, hint: str) -> None:
        """Let the arm come to a stand, then raise a `SafetyStop` from which there is no reopening."""
        begin_ns = monotonic_ns()
        await self._wait_for_loss(STAND_LIMIT_S, until=lambda: self.stands(begin_ns))
        self.reopen_limit_s = 0.0
        raise SafetyStop(what, hint)

    async def _wait_for_loss(self, limit_s: float, until: Callable[[], bool] = lambda: False) -> None:
        """Packets that show trouble are news, so that `until` is asked at every one of them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not self._loss and not until():
                    self._news.clear()
                    await self._news.wait()

    async def _wait_for_news(self, limit_s: float) -> None:
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._news.wait()

    # Commands.

    def command(self, values: tuple[float, ...]) -> None:
        """Set the joints' speeds in rad/s, cut to ±π; not-a-number makes the arm stand.

        Raises:
            OSError: the client is gone, or has not read for long.
        """
        if self._client is None:
            raise OSError(f"{self.address} is not open")
        if not all(map(math.isfinite, values)):
            self._rejected += 1
            values = (0.0,) * len(COMMAND_NAMES)
        self._client.order([min(max(value, -MAX_JOINT_RAD_S), MAX_JOINT_RAD_S) for value in values])

    def request(self, request: int) -> None:
        """Move the target (`target.request_for`); what is no place for it is ignored with an event."""
        try:
            place_of(request)
        except ValueError as error:
            self._on_event(str(error))
            return
        if self._target is not None:
            self._target.show(request)

    def stop(self) -> None:
        """Make the arm stand. Never raises."""
        with contextlib.suppress(OSError):
            self.command((0.0,) * len(COMMAND_NAMES))

    # What the device process asks.

    def guarded_wire(self) -> None:
        """Nobody else has to guard the arm: the client stops it when this process dies or falls silent, and the
        watchdog on the controller when the client does."""

    def stands(self, after_ns: int) -> bool:
        """Whether the newest packets, all after `after_ns`, ask for no speed and show none."""
        if len(self._recent) < STILL_PACKETS or self._recent[0][0] <= after_ns:
            return False
        return all(
            not any(values[_TARGET_SPEEDS]) and max(map(abs, values[_SPEEDS])) < STILL_RAD_S
            for _, values in self._recent
        )

    def counters(self) -> dict[str, float | str]:
        """Figures since the driver was made."""
        newest = self._recent[-1][1] if self._recent else None
        return {
            "packets": float(self._packets),
            "rejected_commands": float(self._rejected),
            "protective_stops": float(self._protective_stops),
            "connection_epoch": float(self.connection_epoch),
            "mode": state_name("safety_mode", int(newest[_SAFETY_MODE])) if newest is not None else "",
        }


def _well(values: Sequence[float]) -> bool:
    """Whether a packet shows a robot that can be driven, by our script."""
    return (
        values[_SAFETY_MODE] in SAFE
        and values[_ROBOT_MODE] == RobotMode.RUNNING
        and values[_RUNTIME_STATE] == RuntimeState.PLAYING
    )


STATES: dict[str, type[IntEnum]] = {
    "robot_mode": RobotMode,
    "safety_mode": SafetyMode,
    "runtime_state": RuntimeState,
}


def state_name(column: str, value: int) -> str:
    """A sensor's value for people; newer controllers have more states than are listed."""
    states = STATES.get(column)
    return states(value).name if states is not None and value in states._value2member_map_ else str(value)


def _need_library() -> None:
    if importlib.util.find_spec("rtde_control") is None:
        raise StartError(
            f"ur_rtde, which drives a UR5, is not installed (Python {platform.python_version()}, "
            f"{platform.system()} {platform.machine()})",
            "its wheels are for CPython 3.11 and 3.12 on x86-64 Linux: use one of these, or build it (pip install "
            "ur_rtde; needs Boost and CMake)",
        )
