from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from relod.errors import SettingsError, StartError
from relod.robots.ur5 import target, targetlink
from relod.robots.ur5.target import HEIGHT, NO_TARGET, RADIUS, WIDTH, Place, Show, draw_place, place_of, request_for
from relod.robots.ur5.targetlink import TargetLink, target_host
from relod.robots.ur5.targetpage import PAGE, TargetServer, serve_target

HERE, THERE = request_for(Place(80.0, 45.0)), request_for(Place(27.0, 63.0))
LIMIT_S = 5.0


# Geometry.


@given(x=st.integers(0, 1600), y=st.integers(0, 900))
def test_a_place_survives_its_request(x: int, y: int) -> None:
    place = Place(x / 10, y / 10)
    assert place_of(request_for(place)) == place
    assert request_for(place) > NO_TARGET


@given(x=st.floats(0, WIDTH), y=st.floats(0, HEIGHT))
def test_a_request_is_within_half_a_step(x: float, y: float) -> None:
    told = place_of(request_for(Place(x, y)))
    assert abs(told.x - x) <= 0.0500001
    assert abs(told.y - y) <= 0.0500001


def test_a_request_fits_the_command_ring() -> None:
    assert request_for(Place(WIDTH, HEIGHT)) < 1 << 32


@pytest.mark.parametrize("request_", [0, -1, request_for(Place(WIDTH, HEIGHT)) + 1, 1 << 31])
def test_what_is_no_request_is_refused(request_: int) -> None:
    with pytest.raises(ValueError, match="none for the target"):
        place_of(request_)


@pytest.mark.parametrize("place", [Place(-0.1, 0), Place(0, 90.1), Place(160.1, 0)])
def test_a_place_off_the_screen_is_refused(place: Place) -> None:
    with pytest.raises(ValueError, match="not on the screen"):
        request_for(place)


def test_drawn_places_fill_the_screen_up_to_the_margin() -> None:
    rng = np.random.default_rng(0)
    places = [draw_place(rng, 20.0) for _ in range(4000)]
    for values, size in (([p.x for p in places], WIDTH), ([p.y for p in places], HEIGHT)):
        low, high = RADIUS + 20.0, size - RADIUS - 20.0
        assert low <= min(values) < low + 0.5
        assert high - 0.5 < max(values) <= high
        assert abs(np.mean(values) - size / 2) < 0.05 * size
    assert all(request_for(place_of(request_for(place))) == request_for(place) for place in places)


def test_what_is_shown_is_in_shares_of_the_screen() -> None:
    assert target.show(HERE) == Show(id=HERE, x=0.5, y=0.5, radius=7 / 160)


# Server and robot.


async def until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Robot:
    """A `TargetLink` and what it said."""

    def __init__(self, server: TargetServer) -> None:
        self.events: list[str] = []
        self.link = TargetLink(f"127.0.0.1:{server.port}", self.events.append)


@contextlib.asynccontextmanager
async def robot_at(server: TargetServer) -> AsyncIterator[Robot]:
    robot = Robot(server)
    try:
        yield robot
    finally:
        await robot.link.close()


@contextlib.asynccontextmanager
async def page_at(server: TargetServer, **options: object) -> AsyncIterator[ClientConnection]:
    """A stand-in for a browser with the page open."""
    async with connect(f"ws://127.0.0.1:{server.port}/page", **options) as page:  # type: ignore[arg-type]
        yield page


async def next_show(page: ClientConnection) -> Show:
    async with asyncio.timeout(LIMIT_S):
        message = json.loads(await page.recv())
    assert message.pop("type") == "show"
    return Show(**message)


async def paint(page: ClientConnection, request: int) -> None:
    await page.send(json.dumps({"type": "painted", "id": request}))


def run(body: Callable[[TargetServer], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with TargetServer("127.0.0.1", 0, **options) as server:  # type: ignore[arg-type]
            await body(server)

    asyncio.run(main())


def test_a_place_is_shown_once_the_page_has_painted_it() -> None:
    async def body(server: TargetServer) -> None:
        async with page_at(server) as page, robot_at(server) as robot:
            await robot.link.open()
            robot.link.show(HERE)
            assert await next_show(page) == target.show(HERE)
            await asyncio.sleep(0.05)
            assert robot.link.shown == NO_TARGET
            await paint(page, HERE)
            await until(lambda: robot.link.shown == HERE)

    run(body)


def test_the_newest_place_counts() -> None:
    async def body(server: TargetServer) -> None:
        async with page_at(server) as page, robot_at(server) as robot:
            await robot.link.open()
            robot.link.show(HERE)
            assert (await next_show(page)).id == HERE
            robot.link.show(THERE)
            assert (await next_show(page)).id == THERE
            await paint(page, HERE)
            await asyncio.sleep(0.05)
            assert robot.link.shown == NO_TARGET
            await paint(page, THERE)
            await until(lambda: robot.link.shown == THERE)

    run(body)


def test_every_open_page_must_have_painted() -> None:
    async def body(server: TargetServer) -> None:
        async with page_at(server) as first, robot_at(server) as robot:
            async with page_at(server) as second:
                await robot.link.open()
                await until(lambda: robot.link.pages == 2)
                robot.link.show(HERE)
                assert (await next_show(first)).id == (await next_show(second)).id == HERE
                await paint(first, HERE)
                await asyncio.sleep(0.05)
                assert robot.link.shown == NO_TARGET
            assert (await next_show(first)).id == HERE  # the pages changed: it is asked again
            await paint(first, HERE)
            await until(lambda: robot.link.shown == HERE)

    run(body)


def test_a_page_that_comes_later_is_told_and_waited_for() -> None:
    async def body(server: TargetServer) -> None:
        async with robot_at(server) as robot:
            async with page_at(server) as page:
                await robot.link.open()
                robot.link.show(HERE)
                await next_show(page)
                await paint(page, HERE)
                await until(lambda: robot.link.shown == HERE)
            await until(lambda: robot.link.shown == NO_TARGET)
            assert "any more" in robot.events[-1]
            async with page_at(server) as page:
                assert (await next_show(page)).id == HERE
                await paint(page, HERE)
                await until(lambda: robot.link.shown == HERE)

    run(body)


def test_a_server_that_comes_back_is_told_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targetlink, "RETRY_S", 0.02)

    async def body() -> None:
        async with TargetServer("127.0.0.1", 0, paint=lambda show: None) as server, robot_at(server) as robot:
            await robot.link.open()
            robot.link.show(HERE)
            await until(lambda: robot.link.shown == HERE)
            await server.__aexit__(None, None, None)
            await until(lambda: robot.link.shown == NO_TARGET)
            assert "is gone" in robot.events[-1]
            painted: list[Show] = []
            async with TargetServer("127.0.0.1", server.port, paint=painted.append):
                await until(lambda: robot.link.shown == HERE)
            assert painted[-1] == target.show(HERE)

    asyncio.run(body())


def test_a_robot_that_comes_back_knows_what_is_shown() -> None:
    async def body(server: TargetServer) -> None:
        async with robot_at(server) as robot:
            await robot.link.open()
            robot.link.show(HERE)
            await until(lambda: robot.link.shown == HERE)
        await until(lambda: server._robot is None)
        async with robot_at(server) as successor:
            await successor.link.open()
            await until(lambda: successor.link.shown == HERE)

    run(body, paint=lambda show: None)


def test_a_simulated_monitor_is_a_page() -> None:
    painted: list[Show] = []

    async def body(server: TargetServer) -> None:
        async with robot_at(server) as robot:
            await robot.link.open()
            robot.link.show(THERE)
            await until(lambda: robot.link.shown == THERE)
        assert painted == [target.show(THERE)]

    run(body, paint=painted.append)


# What goes wrong.


def test_no_server_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        link = TargetLink("127.0.0.1:9", lambda text: None)
        with pytest.raises(StartError, match=r"no target page at 127.0.0.1:9 .*; run `relod target`"):
            await link.open()

    asyncio.run(body())


def test_no_page_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targetlink, "CONNECT_LIMIT_S", 0.2)

    async def body(server: TargetServer) -> None:
        async with robot_at(server) as robot:
            with pytest.raises(StartError, match=r"no browser shows the target .*; open http://127.0.0.1:"):
                await robot.link.open()

    run(body)


def test_a_second_robot_is_refused() -> None:
    async def body(server: TargetServer) -> None:
        async with robot_at(server) as first, robot_at(server) as second:
            await first.link.open()
            with pytest.raises(StartError, match="another robot moves this target"):
                await second.link.open()

    run(body, paint=lambda show: None)


@pytest.mark.parametrize("where", ["", "host:port", "http://host", "a/b", "host:99999"])
def test_what_is_no_address_is_refused(where: str) -> None:
    with pytest.raises(SettingsError, match="no address"):
        TargetLink(where, lambda text: None)


def test_addresses() -> None:
    assert [(link.host, link.port) for link in (TargetLink(w, print) for w in ("desk", "desk:81", "[::1]:82"))] == [
        ("desk", 8770),
        ("desk", 81),
        ("::1", 82),
    ]


def test_a_busy_port_is_one_line() -> None:
    async def body(server: TargetServer) -> None:
        with pytest.raises(StartError, match="cannot be served on"):
            async with TargetServer("127.0.0.1", server.port):
                pass

    run(body)


@pytest.mark.parametrize("nonsense", ["x", "[]", '{"type": "painted"}', '{"type": "painted", "id": 1, "more": 2}'])
def test_a_page_that_talks_nonsense_loses_its_connection_only(nonsense: str) -> None:
    async def body(server: TargetServer) -> None:
        async with page_at(server) as good, page_at(server) as bad, robot_at(server) as robot:
            await robot.link.open()
            await bad.send(nonsense)
            with pytest.raises(ConnectionClosed):
                async with asyncio.timeout(LIMIT_S):
                    await bad.recv()
            robot.link.show(HERE)
            assert (await next_show(good)).id == HERE

    run(body)


@pytest.mark.parametrize(
    ("path", "origin", "welcome"),
    [
        ("/page", "http://127.0.0.1:{port}", True),
        ("/page", "http://elsewhere.example", False),
        ("/robot", "http://127.0.0.1:{port}", False),  # a robot is no browser
        ("/other", None, False),
    ],
)
def test_pages_of_other_sites_are_kept_out(path: str, origin: str | None, welcome: bool) -> None:
    async def body(server: TargetServer) -> None:
        headers = {"Origin": origin.format(port=server.port)} if origin else {}
        url = f"ws://127.0.0.1:{server.port}{path}"
        with contextlib.nullcontext() if welcome else pytest.raises(InvalidStatus):
            async with connect(url, additional_headers=headers):
                pass

    run(body)


def test_the_page_is_served() -> None:
    async def body(server: TargetServer) -> None:
        def get(path: str) -> tuple[str, str]:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=LIMIT_S) as answer:
                return answer.headers["Content-Type"], answer.read().decode()

        assert await asyncio.to_thread(get, "/") == ("text/html; charset=utf-8", PAGE)
        with pytest.raises(urllib.error.HTTPError, match="404") as refused:
            await asyncio.to_thread(get, "/favicon.ico")
        refused.value.close()

    run(body)


def test_serving_ends_when_told() -> None:
    async def body() -> None:
        stop, ports, events = asyncio.Event(), [], []
        serving = asyncio.create_task(
            serve_target("127.0.0.1", 0, on_ready=ports.append, on_event=events.append, stop=stop)
        )
        await until(lambda: ports)
        async with connect(f"ws://127.0.0.1:{ports[0]}/page"):
            pass
        await until(lambda: len(events) == 2)
        stop.set()
        await serving
        assert events == ["page opened on 127.0.0.1", "page closed on 127.0.0.1"]

    asyncio.run(body())


# A real browser.


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WINDOW = (960, 540)


@contextlib.asynccontextmanager
async def chromium(url: str, folder: Path) -> AsyncIterator[str]:
    """A headless browser with `url` open; the address of its debugging websocket for that page."""
    assert CHROMIUM is not None
    browser = await asyncio.create_subprocess_exec(
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        f"--window-size={WINDOW[0]},{WINDOW[1]}",
        url,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port_file = folder / "DevToolsActivePort"
        async with asyncio.timeout(30.0):
            while not port_file.is_file() or not (words := port_file.read_text().split()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            yield f"http://127.0.0.1:{words[0]}/json/list"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(browser.pid, signal.SIGKILL)
        await browser.wait()


async def picture(debugger: str) -> npt.NDArray[np.uint8]:
    """What the browser's page looks like, BGR."""

    def pages() -> list[dict[str, str]]:
        with urllib.request.urlopen(debugger, timeout=LIMIT_S) as answer:
            listed: list[dict[str, str]] = json.load(answer)
        return [page for page in listed if page["type"] == "page"]

    (page,) = await asyncio.to_thread(pages)
    async with connect(page["webSocketDebuggerUrl"], max_size=None) as browser:
        await browser.send(json.dumps({"id": 1, "method": "Page.captureScreenshot"}))
        while "result" not in (answer := json.loads(await browser.recv())):
            pass
    png = np.frombuffer(base64.b64decode(answer["result"]["data"]), np.uint8)
    image = cv2.imdecode(png, cv2.IMREAD_COLOR)
    assert image is not None
    return image.astype(np.uint8)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_real_browser_shows_the_disc_where_it_was_asked_to(tmp_path: Path) -> None:
    async def body(server: TargetServer) -> None:
        async with chromium(f"http://127.0.0.1:{server.port}/", tmp_path) as debugger, robot_at(server) as robot:
            await until(lambda: server.pages, 30.0)
            await robot.link.open()
            for place in (Place(80.0, 45.0), Place(27.0, 63.0), Place(133.0, 27.0)):
                robot.link.show(request_for(place))
                await until(lambda place=place: robot.link.shown == request_for(place))
                image = await picture(debugger)
                height, width = image.shape[:2]
                red = (image == (0, 0, 255)).all(axis=2)
                white = (image == 255).all(axis=2)
                rows, columns = np.nonzero(red)
                assert abs(columns.mean() + 0.5 - place.x / WIDTH * width) < 1.0
                assert abs(rows.mean() + 0.5 - place.y / HEIGHT * height) < 1.0
                radius = RADIUS / WIDTH * width
                assert abs(red.sum() / (np.pi * radius**2) - 1) < 0.05
                assert (red | white).mean() > 0.985  # the rest: the disc's soft edge, a line of small gray print

    run(body)


@pytest.mark.parametrize(
    ("address", "host"), [("127.0.0.7", "127.0.0.7"), ("192.168.1.10", "127.0.0.1"), ("ur5.lab", "127.0.0.1")]
)
def test_unless_told_otherwise_this_host_or_the_simulated_world_serves_the_target(address: str, host: str) -> None:
    assert target_host(address) == host
