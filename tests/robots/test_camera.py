"""Cameras of every kind: what they are called, what they deliver, how they fail and come back."""

import asyncio
import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from relod.config import CameraSettings
from relod.errors import SettingsError, StartError
from relod.robots import camera, sources
from relod.robots.camera import CameraReader, fit_image, parse_source, run_camera
from relod.robots.frameserver import FrameServer
from relod.robots.simcamera import SimFrame
from relod.robots.sources import CameraSource, Capture, SourceKind
from relod.runtime.clock import monotonic_ns
from relod.runtime.shared import FrameRing

HERE = Path(__file__).parent
QUICK = CameraSettings(read_timeout_s=0.1, reopen_s=0.02)


@pytest.mark.parametrize(
    ("text", "kind", "address"),
    [
        ("0", SourceKind.V4L2, "/dev/video0"),
        ("12", SourceKind.V4L2, "/dev/video12"),
        ("/dev/v4l/by-id/usb-cam", SourceKind.V4L2, "/dev/v4l/by-id/usb-cam"),
        ("http://cam:8080/video", SourceKind.HTTP, "http://cam:8080/video"),
        ("https://cam/", SourceKind.HTTP, "https://cam/"),
        ("sim:/tmp/a:b", SourceKind.SIM, "/tmp/a:b"),
    ],
)
def test_sources(text, kind, address):
    assert parse_source(text) == CameraSource(kind, address)


@pytest.mark.parametrize("text", ["", "sim", "sim:", "webcam", "-1", "²", "http://", "rtsp://cam/", "film.mp4", "1.5"])
def test_nonsense_is_no_source(text):
    with pytest.raises(SettingsError, match=r"is no camera.*give a number"):
        parse_source(text)


def test_passwords_are_not_shown():
    assert str(parse_source("http://user:secret@cam:81/v?a=1")) == "http://cam:81/v?a=1"


class TestFit:
    def test_the_right_size_is_untouched(self):
        image = np.zeros((120, 160, 3), np.uint8)
        assert fit_image(image, 120, 160) is image

    def test_scaling_averages(self):
        image = np.zeros((240, 320, 3), np.uint8)
        image[::2] = 200
        fitted = fit_image(image, 120, 160)
        assert fitted.shape == (120, 160, 3)
        assert (fitted == 100).all()

    def test_another_aspect_keeps_the_middle(self):
        image = np.zeros((360, 640, 3), np.uint8)
        image[:, 80:560] = 255
        assert (fit_image(image, 120, 160) == 255).all()
        tall = np.zeros((640, 360, 3), np.uint8)
        tall[185:455] = 255
        assert (fit_image(tall, 120, 160) == 255).all()

    @pytest.mark.parametrize("shape", [(60, 80, 3), (120, 80, 3), (120, 160), (120, 160, 4)])
    def test_what_cannot_be_used(self, shape):
        with pytest.raises(StartError, match="the camera delivers"):
            fit_image(np.zeros(shape, np.uint8), 120, 160)


class FakeDevice:
    """Delivers what it is given: images, None for a failed read, exceptions."""

    def __init__(self, script):
        self.script = script
        self.closed = False

    def read(self):
        if not self.script:
            time.sleep(0.001)
            return Capture(captured_ns=1, arrived_ns=monotonic_ns(), image=np.zeros((120, 160, 3), np.uint8))
        item = self.script.pop(0)
        if isinstance(item, Exception):
            raise item
        if item is None:
            return None
        return Capture(captured_ns=1, arrived_ns=monotonic_ns(), image=np.zeros(item, np.uint8))

    def close(self):
        self.closed = True


@pytest.fixture
def fakes(monkeypatch):
    """Each opening takes the next script; a script that is an exception is raised."""
    scripts, devices = [], []

    def open_camera(*_):
        script = scripts.pop(0) if scripts else []
        if isinstance(script, Exception):
            raise script
        devices.append(FakeDevice(script))
        return devices[-1]

    monkeypatch.setattr(camera, "open_camera", open_camera)
    return scripts, devices


def reader(settings=QUICK, source="0"):
    return CameraReader(parse_source(source), settings, height=120, width=160)


def wait_for(condition, limit_s=5.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def test_camera_is_opened_again_until_it_is_back(fakes):
    scripts, devices = fakes
    scripts += [[(120, 160, 3), None], StartError("gone"), StartError("gone"), []]
    with reader() as cam:
        wait_for(lambda: cam.reopens == 1 and cam.frames > 2)
        assert cam.stalls == 1
        stopped, back = cam.take_events()
        assert stopped == "camera /dev/video0 stopped delivering; opening it again"
        assert back.startswith("camera /dev/video0 is back after 0.")
        assert cam.take_events() == []
    assert [device.closed for device in devices] == [True, True]


def test_scaling_is_told_once_and_unfit_frames_are_left_out(fakes):
    fakes[0].append([(240, 320, 3), (240, 320, 3), (60, 80, 3), (60, 80, 3)])
    with reader() as cam:
        wait_for(lambda: cam.frames > 3)
        assert cam.unfit == 2
        assert cam.take_events() == [
            "camera /dev/video0 delivers 320x240; scaled to 160x120",
            "the camera delivers 80x60, which cannot be scaled up to 160x120; such frames are left out",
        ]


def test_first_frame_that_does_not_fit_is_a_start_error(fakes):
    fakes[0].append([(60, 80, 3)])
    with pytest.raises(StartError, match="cannot be scaled up"), reader():
        pass
    assert fakes[1][0].closed


def test_silence_at_the_start_is_a_start_error(fakes, monkeypatch):
    monkeypatch.setattr(camera, "FIRST_FRAME_S", 0.05)
    fakes[0].extend([[None] * 100] * 10)
    with pytest.raises(StartError, match="opens but delivers no frame within"), reader():
        pass


def test_a_defect_in_the_thread_reaches_the_reader(fakes):
    fakes[0].append([(120, 160, 3), ZeroDivisionError("defect")])

    def read_on():
        with reader() as cam:
            while True:
                cam.read(1.0)

    with pytest.raises(ZeroDivisionError):
        read_on()


def test_only_the_newest_frame_is_kept(fakes):
    with reader() as cam:
        wait_for(lambda: cam.frames > 5)
        assert monotonic_ns() - cam.read(1.0).arrived_ns < 50_000_000


# --- against a frame server -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(**where):
    """A frame server that publishes 100 frames a second on a thread of its own; yields it and a way to call it."""
    loop = asyncio.new_event_loop()
    server = FrameServer(**where)
    up, stop = threading.Event(), asyncio.Event()

    async def publish():
        async with server:
            up.set()
            while not stop.is_set():
                now = monotonic_ns()
                server.publish(SimFrame(captured_ns=now, available_ns=now, image=np.full((120, 160, 3), 90, np.uint8)))
                await asyncio.sleep(0.01)

    def call(function, *args):
        async def run():
            result = function(*args)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), loop).result(5)

    def body():
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(publish())

    thread = threading.Thread(target=body)
    thread.start()
    assert up.wait(5)
    try:
        yield server, call
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(5)


def check_faults(cam, server, call):
    first = cam.read(1.0)
    assert first.image.shape == (120, 160, 3)
    assert abs(int(first.image.mean()) - 90) <= 1

    call(server.stall, 0.4)
    wait_for(lambda: cam.stalls >= 1)
    wait_for(lambda: cam.reopens >= 1)

    frames = cam.frames
    call(server.unplug)
    stalls = cam.stalls
    wait_for(lambda: cam.stalls > stalls or not cam.read(0.1))
    call(server.plug)
    wait_for(lambda: cam.frames > frames + 5)
    assert cam.reopens >= 2

    for fault, *values in ((server.resize, 240, 320), (server.corrupt, 2)):
        frames = cam.frames
        call(fault, *values)
        wait_for(lambda frames=frames: cam.frames > frames + 5)
        assert cam.read(1.0).image.shape == (120, 160, 3)


def test_simulated_camera(tmp_path):
    with served(path=tmp_path / "frames") as (server, call), reader(source=f"sim:{tmp_path / 'frames'}") as cam:
        capture = cam.read(1.0)
        assert 0 <= capture.arrived_ns - capture.captured_ns < 50_000_000
        check_faults(cam, server, call)
        assert any("320x240" in event for event in cam.take_events())


def test_mjpeg_camera_through_opencv():
    settings = CameraSettings(read_timeout_s=0.2, reopen_s=0.02, latency_ms=30)
    with served(http_port=0) as (server, call), reader(settings, server.url) as cam:
        capture = cam.read(1.0)
        assert capture.arrived_ns - capture.captured_ns == 30_000_000
        check_faults(cam, server, call)


def test_run_camera_publishes(tmp_path):
    ring, stop, events = FrameRing(60, 80), threading.Event(), []
    source = parse_source(f"sim:{tmp_path / 'frames'}")
    with served(path=tmp_path / "frames"):
        thread = threading.Thread(target=run_camera, args=(source, QUICK, ring, stop, events.append))
        thread.start()
        wait_for(lambda: ring.newest_id >= 5)
        stop.set()
        thread.join(2)
    assert not thread.is_alive()
    frame = ring.get(ring.newest_id)
    assert frame.image.shape == (60, 80, 3)
    assert frame.captured_ns <= frame.arrived_ns
    assert events == [f"camera {source} delivers 160x120; scaled to 80x60"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sim:/nowhere/frames", "no simulated camera at /nowhere/frames: No such file or directory"),
        ("/dev/video987", "no camera at /dev/video987; "),
        ("http://127.0.0.1:9/", "camera http://127.0.0.1:9/ cannot be opened: Connection refused"),
    ],
)
def test_missing_cameras(source, message):
    with pytest.raises(StartError) as caught, reader(source=source):
        pass
    assert str(caught.value).startswith(message)


def test_a_web_page_is_no_camera():
    with served(http_port=0) as (server, call):
        call(server.unplug)

        async def page(stream, writer):
            if await stream.read(1000):
                writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nhi")
                await writer.drain()
            writer.close()

        port = int(server.url.rsplit(":", 1)[1].strip("/"))
        site = call(asyncio.start_server, page, "127.0.0.1", port)
        with pytest.raises(StartError, match="answers, but not with a video stream"), reader(source=server.url):
            pass
        call(asyncio.sleep, 0.05)  # for the connections in progress to end
        call(site.close)


def test_v4l2_permission_and_rubbish(tmp_path, monkeypatch):
    device = tmp_path / "video"
    device.touch()
    with pytest.raises(StartError, match="cannot be opened"), reader(source=str(device)):
        pass
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StartError, match=r"no permission.*usermod -aG video"), reader(source=str(device)):
        pass


class FakeVideoCapture:
    """cv2.VideoCapture as a webcam's driver answers it."""

    def __init__(self, path, backend):
        self.opened = (path, backend)
        self.asked = []
        self.stamp_ms = None
        FakeVideoCapture.last = self

    def isOpened(self):
        return True

    def set(self, name, value):
        self.asked.append((name, value))

    def get(self, name):
        assert name == cv2.CAP_PROP_POS_MSEC
        return self.stamp_ms if self.stamp_ms is not None else monotonic_ns() / 1e6 - 20

    def read(self):
        return True, np.zeros((120, 160, 3), np.uint8)

    def release(self):
        pass


def test_v4l2_is_asked_in_the_right_order_and_stamps_by_the_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.cv2, "VideoCapture", FakeVideoCapture)
    monkeypatch.setenv("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", "")
    monkeypatch.delenv("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT")
    path = tmp_path / "video"
    path.touch()
    settings = CameraSettings(fps=25, latency_ms=5)
    device = sources.open_camera(CameraSource(SourceKind.V4L2, str(path)), settings, 120, 160)
    fake = FakeVideoCapture.last
    assert fake.opened == (str(path), cv2.CAP_V4L2)
    assert os.environ["OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT"] == "1"
    names = ["FOURCC", "FRAME_WIDTH", "FRAME_HEIGHT", "FPS", "BUFFERSIZE"]
    values = [cv2.VideoWriter.fourcc(*"MJPG"), 160, 120, 25, 1]
    assert fake.asked == [(getattr(cv2, f"CAP_PROP_{n}"), v) for n, v in zip(names, values, strict=True)]
    capture = device.read()
    assert capture.arrived_ns - capture.captured_ns == pytest.approx(20e6, abs=5e6)
    for stamp_ms in (0.0, -1.0, monotonic_ns() / 1e6 + 1e6):  # drivers that do not stamp
        fake.stamp_ms = stamp_ms
        capture = device.read()
        assert capture.arrived_ns - capture.captured_ns == 5_000_000


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_v4l2_through_opencv(tmp_path):
    shim, device = tmp_path / "shim.so", tmp_path / "camera.jpg"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", shim, HERE / "v4l2_shim.c", "-ldl"], check=True)
    assert cv2.imwrite(str(device), np.full((480, 640, 3), 120, np.uint8))
    environment = {**os.environ, "LD_PRELOAD": str(shim), "V4L2_SHIM": str(device)}
    done = subprocess.run(
        [sys.executable, HERE / "v4l2_session.py", device], env=environment, capture_output=True, timeout=30
    )
    assert done.returncode == 0, done.stderr.decode()
    seen = json.loads(done.stdout)
    assert seen["shape"] == [120, 160, 3]
    assert 20 <= len(seen["ages"]) <= 33
    assert np.median(seen["ages"]) < 30
    assert (seen["stalled"], seen["unplugged"]) == (0, 0)
    assert seen["stalls"] >= 1
    assert seen["after_stall"] > 10
    assert seen["after_unplug"] > 5
    assert seen["reopens"] == 2
    assert any("640x480" in event for event in seen["events"])


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.delitem(sys.modules, "relod.robots.vision")
    with pytest.raises(StartError) as caught:
        importlib.import_module("relod.robots.vision")
    text = str(caught.value)
    assert all(word in text for word in ("libgl1", "libglib2.0-0", "libglib2.0-0t64", "opencv-python-headless"))
