"""Frames over a unix socket and as MJPEG: newest wins, slow readers delay nobody, faults are what they say."""

import asyncio
import socket

import cv2
import numpy as np
import pytest

from relod.errors import StartError
from relod.robots.frameserver import HEADER, MAGIC, FrameServer
from relod.robots.simcamera import SimFrame

SHAPE = (120, 160, 3)


def frame(number):
    return SimFrame(captured_ns=number, available_ns=number, image=np.full(SHAPE, number % 256, np.uint8))


def run(test):
    async def limited():
        async with asyncio.timeout(10):
            await test()

    asyncio.run(limited())


async def connect(server):
    reader, writer = await asyncio.open_unix_connection(server._path)
    await asyncio.sleep(0.01)
    return reader, writer


async def receive(reader):
    magic, height, width, captured_ns = HEADER.unpack(await reader.readexactly(HEADER.size))
    pixels = await reader.readexactly(height * width * 3)
    return magic, captured_ns, np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def test_raw_frames(tmp_path):
    async def test():
        async with FrameServer(path=tmp_path / "frames") as server:
            reader, writer = await connect(server)
            for number in (7, 8):
                server.publish(frame(number))
                magic, captured_ns, image = await receive(reader)
                assert (magic, captured_ns) == (MAGIC, number)
                np.testing.assert_array_equal(image, frame(number).image)
            writer.close()
        assert not (tmp_path / "frames").exists()
        assert server.url is None

    run(test)


def test_slow_reader_gets_the_newest_and_delays_nobody(tmp_path):
    async def test():
        async with FrameServer(path=tmp_path / "frames") as server:
            slow, slow_writer = await asyncio.open_unix_connection(server._path, limit=1024)
            fast, fast_writer = await connect(server)
            for number in range(1, 101):
                server.publish(frame(number))
                assert (await receive(fast))[1] == number
            seen = []
            while not seen or seen[-1] < 100:
                seen.append((await receive(slow))[1])
            assert seen == sorted(seen)
            assert len(seen) < 10  # what fits into the buffers, then the newest
            slow_writer.close()
            fast_writer.close()

    run(test)


def test_new_reader_waits_for_a_new_frame(tmp_path):
    async def test():
        async with FrameServer(path=tmp_path / "frames") as server:
            server.publish(frame(1))
            reader, writer = await connect(server)
            server.publish(frame(2))
            assert (await receive(reader))[1] == 2
            writer.close()

    run(test)


async def http(server, request=b"GET /video HTTP/1.1\r\nHost: x\r\n\r\n"):
    port = int(server.url.rsplit(":", 1)[1].strip("/"))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    return reader, writer


async def part(reader):
    header = await reader.readuntil(b"\r\n\r\n")
    assert header.startswith(b"--frame\r\nContent-Type: image/jpeg\r\n")
    length = int(header.split(b"Content-Length: ")[1])
    jpeg = await reader.readexactly(length)
    assert await reader.readexactly(2) == b"\r\n"
    return jpeg


def test_mjpeg_over_http():
    async def test():
        async with FrameServer(http_port=0) as server:
            reader, writer = await http(server)
            response = await reader.readuntil(b"\r\n\r\n")
            assert response.startswith(b"HTTP/1.0 200 OK\r\n")
            assert b"multipart/x-mixed-replace; boundary=frame" in response
            await asyncio.sleep(0.01)
            server.publish(frame(90))
            image = cv2.imdecode(np.frombuffer(await part(reader), np.uint8), cv2.IMREAD_COLOR)
            assert image.shape == SHAPE
            assert abs(int(image.mean()) - 90) <= 1
            writer.close()

    run(test)


def test_other_methods_are_refused():
    async def test():
        async with FrameServer(http_port=0) as server:
            reader, writer = await http(server, b"POST / HTTP/1.1\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.0 405")
            writer.close()

    run(test)


@pytest.mark.parametrize("request_bytes", [b"", b"GET / HTTP/1.1\r\n", b"x" * 40_000])
def test_half_a_request_ends_the_connection(request_bytes, monkeypatch):
    monkeypatch.setattr("relod.robots.frameserver.REQUEST_TIMEOUT_S", 0.05)

    async def test():
        async with FrameServer(http_port=0) as server:
            reader, writer = await http(server, request_bytes)
            try:
                assert await reader.read() == b""
            except ConnectionResetError:
                pass
            writer.close()

    run(test)


def test_faults(tmp_path):
    async def test():
        async with FrameServer(path=tmp_path / "frames", http_port=0) as server:
            reader, writer = await connect(server)
            server.resize(60, 80)
            server.publish(frame(1))
            assert (await receive(reader))[2].shape == (60, 80, 3)
            server.corrupt()
            server.publish(frame(2))
            assert (await receive(reader))[0] != MAGIC
            server.stall(0.05)
            server.publish(frame(3))
            await asyncio.sleep(0.06)
            server.publish(frame(4))
            assert (await receive(reader))[1] == 4

            url = server.url
            await server.unplug()
            assert await reader.read() == b""
            writer.close()
            with pytest.raises(FileNotFoundError):
                await connect(server)
            with pytest.raises(ConnectionRefusedError):
                await http(server)
            server.publish(frame(5))
            await server.plug()
            assert server.url == url
            reader, writer = await connect(server)
            server.publish(frame(6))
            assert (await receive(reader))[1] == 6
            writer.close()

    run(test)


def test_damaged_jpeg_is_short():
    async def test():
        async with FrameServer(http_port=0) as server:
            reader, writer = await http(server)
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.01)
            server.corrupt()
            server.publish(frame(50))
            jpeg = await part(reader)
            assert jpeg[:2] == b"\xff\xd8"
            assert jpeg[-2:] != b"\xff\xd9"
            writer.close()

    run(test)


def test_readers_that_leave_are_forgotten(tmp_path):
    async def test():
        async with FrameServer(path=tmp_path / "frames") as server:
            _, writer = await connect(server)
            (client,) = server._clients
            writer.close()
            await client
            assert not server._clients

    run(test)


def test_a_taken_port_is_a_start_error():
    async def test():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(StartError, match=f"cannot be served at 127.0.0.1:{port}: "):
                async with FrameServer(http_port=port):
                    pass

    run(test)


def test_a_missing_folder_is_a_start_error(tmp_path):
    async def test():
        with pytest.raises(StartError, match=r"cannot be served at .*nowhere/frames"):
            async with FrameServer(path=tmp_path / "nowhere" / "frames"):
                pass

    run(test)
