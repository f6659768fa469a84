"""The robot's end of the target page: asks for the target's places, and knows which one is on the screen."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, WebSocketException

from ...errors import SettingsError, StartError
from .target import DEFAULT_PORT, NO_TARGET, ROBOT_PATH, Pages, Painted, Refused, show

__all__ = ["TargetLink", "target_host"]

CONNECT_LIMIT_S = 1.0
PING_S = 2.0  # a monitor's computer that is gone without a word is noticed within twice this
RETRY_S = 0.5
MAX_MESSAGE_BYTES = 1024

_decoder = msgspec.json.Decoder(Painted | Pages | Refused)


class TargetLink:
    """A connection to `relod target` at `where`, HOST[:PORT]; made anew whenever it breaks.

    `shown` is the request whose place is painted on every open page, or `NO_TARGET`. `SettingsError`: `where` is no
    address.
    """

    def __init__(self, where: str, on_event: Callable[[str], object]) -> None:
        self.host, self.port = _address(where)
        self.shown = NO_TARGET
        self.pages = 0
        self._wanted = NO_TARGET
        self._on_event = on_event
        self._connection: ClientConnection | None = None
        self._news = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._asking: set[asyncio.Task[None]] = set()
        self._failure = ""

    async def open(self) -> None:
        """Connect and see that a page is open; nothing when that was done already, whatever became of it.

        Raises:
            StartError: no server, or no page.
        """
        if self._keeper is not None:
            return
        self._keeper = asyncio.create_task(self._keep(), name="target-link")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_LIMIT_S):
                while not self.pages and not self._failure:
                    self._news.clear()
                    await self._news.wait()
        if self.pages:
            return
        no_target = "to do without a target: --set robot.target=none"
        await self.close()
        if self._failure:
            raise StartError(
                f"no target page at {self.host}:{self.port} ({self._failure})",
                "run `relod target` on the computer with the monitor and give its address: --set robot.target=HOST; "
                + no_target,
            )
        raise StartError(
            f"no browser shows the target of {self.host}:{self.port}",
            f"open http://{self.host}:{self.port}/ full screen on the monitor in front of the robot; {no_target}",
        )

    def show(self, request: int) -> None:
        """Ask for the place of `request` (`target.request_for`); the newest counts, also after a loss."""
        self._wanted, self.shown = request, NO_TARGET
        asking = asyncio.create_task(self._ask(), name="target-ask")
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)

    async def close(self) -> None:
        """Hang up."""
        tasks = [*self._asking, *([self._keeper] if self._keeper is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._keeper = None

    async def _ask(self) -> None:
        if self._connection is not None and self._wanted != NO_TARGET:
            with contextlib.suppress(WebSocketException):
                await self._connection.send(msgspec.json.encode(show(self._wanted)), text=True)

    async def _keep(self) -> None:
        while True:
            self._failure = ""
            try:
                await self._talk()
            except (OSError, TimeoutError, InvalidHandshake) as error:
                self._failure = getattr(error, "strerror", None) or str(error) or "no answer"
            except (WebSocketException, msgspec.MsgspecError) as error:
                self._failure = str(error)
            self._connection = None
            if self.pages:
                self._on_event(f"the target page at {self.host}:{self.port} is gone")
            self.pages, self.shown = 0, NO_TARGET
            self._news.set()
            await asyncio.sleep(RETRY_S)

    async def _talk(self) -> None:
        async with connect(
            f"ws://{_bracketed(self.host)}:{self.port}{ROBOT_PATH}",
            open_timeout=CONNECT_LIMIT_S,
            ping_interval=PING_S,
            ping_timeout=PING_S,
            close_timeout=PING_S,
            max_size=MAX_MESSAGE_BYTES,
            compression=None,
            proxy=None,
        ) as self._connection:
            await self._ask()
            async for data in self._connection:
                self._take(_decoder.decode(data))

    def _take(self, message: Painted | Pages | Refused) -> None:
        match message:
            case Painted(id=request):
                if self._wanted in (NO_TARGET, request):  # what is there may have been asked for by a process that died
                    self.shown = request
            case Pages(count=count):
                if self.pages and not count:
                    self._on_event(f"no browser shows the target of {self.host}:{self.port} any more")
                self.pages, self.shown = count, NO_TARGET
                self._news.set()
            case Refused(why=why):
                raise WebSocketException(why)


def target_host(address: str) -> str:
    """Where the target of the robot at `address` is served if nobody says: a simulated one's world does it, on its
    loopback address; for any other robot this host does."""
    try:
        return address if ipaddress.ip_address(address).is_loopback else "127.0.0.1"
    except ValueError:
        return "127.0.0.1"


def _address(where: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{where}")
        if parts.hostname and not parts.path:
            return parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        pass
    raise SettingsError(f"robot.target={where!r} is no address", "give HOST or HOST:PORT, or none")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
