"""The Create 2's serial port on an event loop, opened and written through the unmodified pycreate2.

pycreate2 opens the port and carries the opcodes. Everything it does by waiting, printing or polling is left alone:
its start/safe/full sleep 0.5 s, its destructor 2 s, and its get_sensors decodes shifted bytes without noticing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import glob
import grp
import os
import termios
from collections.abc import Callable
from typing import Protocol

import serial

from ...errors import StartError
from ...runtime.clock import NS_PER_S, monotonic_ns, sleep_s

__all__ = ["PADDING", "Port", "open_error"]

PADDING = bytes(4)  # completes a command of which only the first bytes were sent; the robot ignores opcode 0
WRITE_PAUSE_S = 0.0005  # between attempts while the buffer is full
WRITE_LIMIT_S = 0.005  # a command is 5 bytes, 0.4 ms on the wire; only a stuck port needs longer
LOCK_LIMIT_S = 0.5  # the guard of a killed predecessor lets go of the port within 0.1 s
LOCK_PAUSE_S = 0.02
READ_BYTES = 4096
EMPTY_READS = 8  # in a row, from a port that says it can be read: its device is gone


class _Create2(Protocol):
    """The part of pycreate2, which has no types, that is used here."""

    class _Interface(Protocol):
        ser: serial.Serial

        def write(self, opcode: int, data: tuple[int, ...] | None = None) -> None: ...

    SCI: _Interface


class Port:
    """One serial port. `on_data(bytes)` gets what arrives, `on_lost(why)` is called once when the port is gone."""

    def __init__(self, address: str, on_data: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        self.address = address
        self.write_errors = 0  # since this object was made
        self._on_data, self._on_lost = on_data, on_lost
        self._bot: _Create2 | None = None
        self._fd = self._lock_fd = -1
        self._half_sent = False
        self._empty_reads = 0
        self._lost = False

    @property
    def fd(self) -> int:
        """The open port's descriptor, or -1."""
        return self._fd

    async def open(self, baud: int) -> None:
        """Open the port for this process alone.

        Raises:
            StartError: no such port, no permission, busy, not a serial port.
        """
        self._lock_fd = await _locked(self.address)
        try:
            self._bot = _quiet_create2(self.address, baud)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):  # pyserial's exceptions are
                raise open_error(self.address, error) from error
            if isinstance(error, termios.error):
                raise open_error(self.address, OSError(*error.args)) from error
            raise
        port = self._bot.SCI.ser
        port.timeout = 0
        port.write = self._put  # in place of pyserial's, see there
        self._fd = port.fileno()
        self._half_sent = True  # whoever drove the robot before may have died in the middle of a command
        self._empty_reads, self._lost = 0, False
        asyncio.get_running_loop().add_reader(self._fd, self._on_readable)

    def _put(self, data: bytes) -> int:
        """Write all of `data`; `SerialTimeoutException` when the port's buffer stays full for `WRITE_LIMIT_S`.

        pyserial's own write polls the port afterwards if it has a time limit, and polling a terminal waits for the
        kernel's worker that carries its input, whatever the limit: the bytes are out, and on a busy machine this
        process stood still for up to 28 ms; some writes that were out ended as timeouts, too. Without a limit pyserial
        spins while the buffer is full.
        """
        left, give_up_ns = data, monotonic_ns() + int(WRITE_LIMIT_S * NS_PER_S)
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:
                if monotonic_ns() > give_up_ns:
                    raise serial.SerialTimeoutException("Write timeout") from None
                sleep_s(WRITE_PAUSE_S)
        return len(data)

    def close(self) -> None:
        """Let go of the port; again is harmless."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._fd = -1
        if self._bot is not None:
            with contextlib.suppress(OSError):
                self._bot.SCI.ser.close()
            self._bot = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def write(self, command: bytes) -> None:
        """Send one command. A port whose buffer stays full costs 5 ms and the command, which is counted, not raised.

        Raises:
            OSError: the port is closed or gone.
        """
        if self._bot is None:
            raise OSError(errno.ENODEV, f"{self.address} is not open")
        try:
            if self._half_sent:
                self._bot.SCI.write(PADDING[0], tuple(PADDING[1:]))
                self._half_sent = False
            self._bot.SCI.write(command[0], tuple(command[1:]))
        except serial.SerialTimeoutException:
            self.write_errors += 1
            self._half_sent = True
        except OSError as error:
            self.write_errors += 1
            self._lose(error)
            raise

    def pad_next(self) -> None:
        """Put padding before the next command: bytes of the last one may not have arrived."""
        self._half_sent = True

    def set_rts(self, level: bool) -> None:
        """Set the RTS line; `OSError` where there is none, as on a pseudo-terminal."""
        if self._bot is None:
            raise OSError(errno.ENODEV, f"{self.address} is not open")
        self._bot.SCI.ser.rts = level

    def _on_readable(self) -> None:
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        if data:
            self._empty_reads = 0
            self._on_data(data)
        else:
            self._on_empty_read()

    def _on_empty_read(self) -> None:
        """A terminal reads as empty when its device is gone, but also when another reader was faster."""
        self._empty_reads += 1
        try:
            termios.tcgetattr(self._fd)
        except termios.error as error:
            self._lose(OSError(*error.args))
            return
        if self._empty_reads >= EMPTY_READS:
            self._lose(OSError(errno.EIO, "it reads as empty"))

    def _lose(self, error: OSError) -> None:
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
        if not self._lost:
            self._lost = True
            self._on_lost(f"the connection to {self.address} was lost ({error.strerror or error})")


async def _locked(address: str) -> int:
    """A descriptor of the port that holds its lock, so that a second opener is told it is busy."""
    try:
        fd = os.open(address, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise open_error(address, error) from error
    if not os.isatty(fd):
        os.close(fd)
        raise open_error(address, OSError(errno.ENOTTY, "not a terminal"))
    give_up_ns = monotonic_ns() + int(LOCK_LIMIT_S * NS_PER_S)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except BlockingIOError as error:
                if monotonic_ns() > give_up_ns:
                    raise open_error(address, error) from error
            await asyncio.sleep(LOCK_PAUSE_S)
    except BaseException:
        os.close(fd)
        raise


def _quiet_create2(address: str, baud: int) -> _Create2:
    """pycreate2's own object without its destructor, which takes 2 s and switches the interface off."""
    from pycreate2 import Create2

    class QuietCreate2(Create2):  # type: ignore[misc]
        def __del__(self) -> None:
            pass

    bot: _Create2 = QuietCreate2(address, baud)
    return bot


def open_error(address: str, error: OSError) -> StartError:
    """One line that says what is wrong with the port, and what to do."""
    match error.errno:
        case errno.ENOENT:
            return StartError(f"there is no port {address}", f"ports of this host: {_ports() or 'none'}")
        case errno.EACCES | errno.EPERM:
            return StartError(
                f"no permission to open {address}",
                f"join its group and log in again: sudo usermod -aG {_group(address)} $USER",
            )
        case errno.EBUSY | errno.EAGAIN:
            return StartError(f"{address} is busy: another program holds it", "is another relod running?")
        case errno.ENOTTY | errno.EISDIR | errno.EINVAL | errno.ENXIO:
            return StartError(f"{address} is not a serial port", f"ports of this host: {_ports() or 'none'}")
    return StartError(f"{address} cannot be opened: {error.strerror or error}", "check the cable, or plug it in again")


def _ports() -> str:
    return ", ".join(sorted(glob.glob("/dev/ttyUSB*") + glob.glob("/dev/ttyACM*") + glob.glob("/dev/ttyAMA*")))


def _group(address: str) -> str:
    try:
        return grp.getgrgid(os.stat(address).st_gid).gr_name
    except (OSError, KeyError):
        return "dialout"
