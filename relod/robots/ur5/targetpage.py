"""The server of the target page: a browser on any computer shows the disc, the robot says where.

`/` is the page, `/page` its websocket, `/robot` the robot's. A place counts as painted when every open page has said
so, which a browser does after the frame with the disc in it; a page whose window is hidden never does.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
from collections.abc import Callable
from typing import Self
from urllib.parse import urlsplit

import msgspec
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from ...errors import StartError
from .target import PAGE_PATH, ROBOT_PATH, Pages, Painted, Refused, Show

__all__ = ["TargetServer", "serve_target"]

PING_S = 2.0
MAX_MESSAGE_BYTES = 1024

_show_decoder = msgspec.json.Decoder(Show)
_painted_decoder = msgspec.json.Decoder(Painted)

# Sizes are shares of the window, so that the browser keeps them right when it changes. A frame is on the screen when
# the one after it begins: hence two of them.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>relod target</title>
<style>
  html, body { margin: 0; height: 100%; overflow: hidden; background: #fff; cursor: none; }
  #disc { position: absolute; border-radius: 50%; background: #f00; }
  #note { position: absolute; bottom: 4px; left: 8px; margin: 0; font: 13px sans-serif; color: #999; }
</style></head>
<body><div id="disc" hidden></div><p id="note"></p>
<script>
  const disc = document.getElementById("disc"), note = document.getElementById("note");
  let connected = false;
  function say() {
    const small = window.innerWidth < screen.width - 2 || window.innerHeight < screen.height - 2;
    note.textContent = !connected ? "not connected to relod target" : small ? "click for full screen" : "";
  }
  function paint(show) {
    const size = 200 * show.radius + "vw", half = 100 * show.radius + "vw";
    disc.style.width = disc.style.height = size;
    disc.style.left = `calc(${100 * show.x}vw - ${half})`;
    disc.style.top = `calc(${100 * show.y}vh - ${half})`;
    disc.hidden = false;
  }
  function connect() {
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/page`);
    socket.onopen = () => { connected = true; say(); };
    socket.onclose = () => { connected = false; say(); setTimeout(connect, 500); };
    socket.onmessage = event => {
      const show = JSON.parse(event.data);
      paint(show);
      requestAnimationFrame(() => requestAnimationFrame(() => {
        if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type: "painted", id: show.id }));
      }));
    };
  }
  document.onclick = () => document.documentElement.requestFullscreen().catch(() => {});
  window.onresize = say;
  if (navigator.wakeLock) navigator.wakeLock.request("screen").catch(() => {});
  say();
  connect();
</script></body></html>
"""


class TargetServer:
    """Page and websockets on `host`:`port`; an async context manager.

    Args:
        on_event: told what a person should read.
        paint: a page without a browser, as a simulated monitor is: the place is painted when the call returns.

    Raises:
        StartError: on entering, when it cannot listen there.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        on_event: Callable[[str], object] = lambda text: None,
        paint: Callable[[Show], object] | None = None,
    ) -> None:
        self.host, self.port = host, port
        self._on_event, self._paint = on_event, paint
        self._pages: set[ServerConnection] = set()
        self._robot: ServerConnection | None = None
        self._show: Show | None = None  # what is to be seen
        self._unpainted: set[ServerConnection] = set()  # pages that have not said that they show it

    @property
    def pages(self) -> int:
        """How many are open."""
        return len(self._pages) + (self._paint is not None)

    async def __aenter__(self) -> Self:
        try:
            self._server: Server = await serve(
                self._serve,
                self.host,
                self.port,
                process_request=_respond,
                ping_interval=PING_S,
                ping_timeout=PING_S,
                close_timeout=PING_S,
                max_size=MAX_MESSAGE_BYTES,
                compression=None,
            )
        except OSError as error:
            raise StartError(
                f"the target page cannot be served on {self.host}:{self.port}: {error.strerror or error}",
                "give another address with --listen",
            ) from error
        self.port = next(iter(self._server.sockets)).getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        with contextlib.suppress(ConnectionClosed):
            try:
                await (self._serve_robot if connection.request.path == ROBOT_PATH else self._serve_page)(connection)
            except msgspec.MsgspecError as error:
                await connection.close(1008, str(error)[:100])

    # The robot.

    async def _serve_robot(self, robot: ServerConnection) -> None:
        if self._robot is not None:
            await robot.send(msgspec.json.encode(Refused(why="another robot moves this target")), text=True)
            return
        self._robot = robot
        self._on_event(f"robot connected from {_peer(robot)}")
        try:
            await self._say(Pages(count=self.pages))
            await self._tell_if_painted()
            async for data in robot:
                self._show = _show_decoder.decode(data)
                await self._show_everywhere()
        finally:
            self._robot = None
            self._on_event("robot disconnected")

    async def _show_everywhere(self) -> None:
        if self._show is None:
            return
        if self._paint is not None:
            self._paint(self._show)
        self._unpainted = set(self._pages)
        for page in tuple(self._pages):
            await _send(page, self._show)
        await self._tell_if_painted()

    async def _tell_if_painted(self) -> None:
        if self._show is not None and not self._unpainted and self.pages:
            await self._say(Painted(id=self._show.id))

    async def _say(self, message: Pages | Painted) -> None:
        if self._robot is not None:
            await _send(self._robot, message)

    # The pages.

    async def _serve_page(self, page: ServerConnection) -> None:
        self._pages.add(page)
        self._on_event(f"page opened on {_peer(page)}")
        try:
            await self._pages_changed()
            async for data in page:
                painted = _painted_decoder.decode(data)
                if self._show is not None and painted.id == self._show.id and page in self._unpainted:
                    self._unpainted.discard(page)
                    await self._tell_if_painted()
        finally:
            self._pages.discard(page)
            self._on_event(f"page closed on {_peer(page)}")
            await self._pages_changed()

    async def _pages_changed(self) -> None:
        await self._say(Pages(count=self.pages))
        await self._show_everywhere()


async def serve_target(
    host: str, port: int, *, on_ready: Callable[[int], None], on_event: Callable[[str], object], stop: asyncio.Event
) -> None:
    """Serve the target page until `stop` is set; `on_ready` is given its port. `StartError` as `TargetServer`."""
    async with TargetServer(host, port, on_event=on_event) as server:
        on_ready(server.port)
        await stop.wait()


def _respond(connection: ServerConnection, request: Request) -> Response | None:
    """The page, or None where a websocket is wanted. Other sites' pages cannot pose as a robot or as this page."""
    origin = request.headers.get("Origin")
    match request.path:
        case "/":
            response = connection.respond(http.HTTPStatus.OK, PAGE)
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "text/html; charset=utf-8"
            response.headers["Cache-Control"] = "no-store"
            return response
        case path if path == ROBOT_PATH and origin is None:
            return None
        case path if path == PAGE_PATH and (origin is None or urlsplit(origin).netloc == request.headers.get("Host")):
            return None
        case path if path in (ROBOT_PATH, PAGE_PATH):
            return connection.respond(http.HTTPStatus.FORBIDDEN, "not from here\n")
    return connection.respond(http.HTTPStatus.NOT_FOUND, "the target is at /\n")


async def _send(connection: ServerConnection, message: Show | Pages | Painted) -> None:
    with contextlib.suppress(ConnectionClosed):
        await connection.send(msgspec.json.encode(message), text=True)


def _peer(connection: ServerConnection) -> str:
    return str(connection.remote_address[0]) if connection.remote_address else "?"
