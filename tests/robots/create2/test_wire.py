"""The serial line: pacing and damage of bytes, and the pseudo-terminal at its end."""

from __future__ import annotations

import asyncio
import os
import termios
from pathlib import Path

import pytest
import serial

from relod.errors import StartError
from relod.robots.create2.wire import PIECE_BYTES, UNREAD_LIMIT_BYTES, PtyPort, Wire

MS = 1_000_000
BYTE_NS = 86_805  # ten bits at 115200 baud


def test_bytes_take_ten_bits_each() -> None:
    wire = Wire()
    wire.send(b"hello", from_ns=1 * MS)
    assert wire.next_ns == pytest.approx(1 * MS + 5 * BYTE_NS, abs=5)
    assert wire.due(1 * MS + 4 * BYTE_NS) == b""
    assert wire.due(1 * MS + 6 * BYTE_NS) == b"hello"
    assert wire.next_ns is None


def test_bytes_queue_behind_each_other() -> None:
    wire = Wire(19_200)
    wire.send(b"a" * 10, 0)
    wire.send(b"b" * 10, 0)
    slow_ns = 6 * BYTE_NS
    assert wire.due(11 * slow_ns) == b"a" * 10
    assert wire.due(21 * slow_ns) == b"b" * 10


def test_long_replies_come_in_packets() -> None:
    wire = Wire()
    wire.send(bytes(80), 0)
    assert len(wire.due(PIECE_BYTES * BYTE_NS + MS // 10)) == PIECE_BYTES
    assert len(wire.due(81 * BYTE_NS)) == 80 - PIECE_BYTES


def test_a_late_frame_does_not_hold_up_the_line() -> None:
    wire = Wire()
    wire.send(b"frame", 0, not_before_ns=8 * MS)
    assert wire.next_ns == 8 * MS
    wire.send(b"reply", 1 * MS)
    assert wire.due(8 * MS) == b"framereply"


def test_dropped_and_corrupted_bytes() -> None:
    wire = Wire()
    wire.drop_bytes, wire.corrupt_bytes = 3, 2
    wire.send(b"ab", 0)
    assert wire.due(MS) == b""
    wire.send(b"cdef", MS)
    assert wire.due(2 * MS) == b"tuf"
    assert (wire.drop_bytes, wire.corrupt_bytes) == (0, 0)


class Client:
    """What a port under test was told."""

    def __init__(self) -> None:
        self.received = b""
        self.opened = 0

    def port(self, symlink: Path | None = None) -> PtyPort:
        return PtyPort(symlink, self._take, self._open)

    def _take(self, data: bytes) -> None:
        self.received += data

    def _open(self) -> None:
        self.opened += 1


async def _settle() -> None:
    await asyncio.sleep(0.01)


def test_a_serial_client_opens_reads_writes_and_reopens(tmp_path: Path) -> None:
    async def scenario() -> None:
        client, name = Client(), tmp_path / "robot"
        port = client.port(name)
        assert port.path == str(name)
        for times in (1, 2):
            with serial.Serial(str(name), 115_200, timeout=0.5) as connection:
                await _settle()
                assert client.opened >= times
                assert port.client_baud_rate() == 115_200
                connection.write(bytes(range(256)))
                await _settle()
                port.write(bytes(range(256)))
                assert connection.read(256) == bytes(range(256))
        assert client.received == bytes(range(256)) * 2
        port.close()
        assert not name.is_symlink()

    asyncio.run(scenario())


def test_unread_bytes_are_lost_and_a_flush_leaves_nothing_old() -> None:
    async def scenario() -> None:
        port = Client().port()
        for _ in range(200):
            port.write(b"old " * 25)
            await asyncio.sleep(0.0005)  # bytes on their way through the kernel are not counted as unread yet
        assert 20_000 - 2 * UNREAD_LIMIT_BYTES <= port.lost_bytes <= 20_000 - UNREAD_LIMIT_BYTES
        with serial.Serial(port.path, 115_200, timeout=0.05) as connection:  # flushes at opening
            port.write(b"new")
            assert connection.read(100) == b"new"
        port.close()

    asyncio.run(scenario())


def test_a_pulled_cable_fails_the_client() -> None:
    async def scenario() -> None:
        port = Client().port()
        file = os.open(port.path, os.O_RDWR | os.O_NOCTTY)
        port.close()
        with pytest.raises(OSError, match="Input/output error"):
            os.write(file, b"x")
        assert os.read(file, 1) == b""
        os.close(file)

    asyncio.run(scenario())


def test_a_speed_without_a_name_is_no_speed() -> None:
    async def scenario() -> None:
        port = Client().port()
        file = os.open(port.path, os.O_RDWR | os.O_NOCTTY)
        attributes = termios.tcgetattr(file)
        attributes[4] = attributes[5] = termios.B57600
        termios.tcsetattr(file, termios.TCSANOW, attributes)
        assert port.client_baud_rate() == 57_600
        os.close(file)
        port.close()

    asyncio.run(scenario())


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    async def scenario() -> None:
        with pytest.raises(StartError, match="no symbolic link"):
            Client().port(tmp_path / "file")
        with pytest.raises(StartError, match="No such file"):
            Client().port(tmp_path / "missing" / "name")
        old = Client().port(tmp_path / "name")
        new = Client().port(tmp_path / "name")  # a name left behind is taken over
        assert os.readlink(tmp_path / "name") == new.device
        old.close()
        assert os.readlink(tmp_path / "name") == new.device
        new.close()

    asyncio.run(scenario())
    assert (tmp_path / "file").read_text() == "mine"
