"""The simulated robot's end of the serial cable: how bytes leave it in time, and the pseudo-terminal they go to.

`Wire` is pure: what is on the line and when it arrives. `PtyPort` is the only I/O: a raw pseudo-terminal that any
serial library opens by path, with the line speed checked and unread bytes lost as on a real port.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import termios
import tty
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ...errors import StartError

__all__ = ["PtyPort", "Wire"]

BITS_PER_BYTE = 10  # start, eight data bits, stop
PIECE_BYTES = 62  # payload of one packet of a full-speed USB serial adapter: what a host sees arrive at once
UNREAD_LIMIT_BYTES = 4000  # of the 4096 a Linux terminal keeps; beyond it the terminal keeps more than a flush discards
GARBLED = bytes((b * 37 + 11) & 0xFF for b in range(256))  # what a wrong line speed makes of a byte

_BAUD_RATES = {getattr(termios, name): int(name[1:]) for name in dir(termios) if name[0] == "B" and name[1:].isdigit()}


class Wire:
    """Bytes on their way from the robot to the host, one behind the other, ten bits each."""

    def __init__(self, baud_rate: int = 115_200) -> None:
        self.baud_rate = baud_rate
        self.drop_bytes = 0  # fault: how many of the next bytes get lost
        self.corrupt_bytes = 0  # fault: how many of the next bytes arrive with a wrong bit
        self._busy_until_ns = 0
        self._pieces: deque[tuple[int, bytes]] = deque()  # (arrival_ns, bytes)

    def send(self, data: bytes, from_ns: int, not_before_ns: int = 0) -> int:
        """Put `data` on the line from `from_ns`, behind what is on it; no piece arrives before `not_before_ns`.

        Returns when the last one arrives.
        """
        self._busy_until_ns = max(self._busy_until_ns, from_ns)
        for at in range(0, len(data), PIECE_BYTES):
            piece = data[at : at + PIECE_BYTES]
            self._busy_until_ns += len(piece) * BITS_PER_BYTE * 1_000_000_000 // self.baud_rate
            self._pieces.append((max(self._busy_until_ns, not_before_ns), piece))
        return max(self._busy_until_ns, not_before_ns)

    @property
    def next_ns(self) -> int | None:
        """When the next bytes arrive; None while the line is idle."""
        return self._pieces[0][0] if self._pieces else None

    def due(self, now_ns: int) -> bytes:
        """What has arrived by `now_ns` and was not handed out before, with the faults of the line."""
        arrived = bytearray()
        while self._pieces and self._pieces[0][0] <= now_ns:
            arrived += self._pieces.popleft()[1]
        if self.drop_bytes:
            lost = min(self.drop_bytes, len(arrived))
            self.drop_bytes -= lost
            del arrived[:lost]
        for at in range(min(self.corrupt_bytes, len(arrived))):
            arrived[at] ^= 0x10
            self.corrupt_bytes -= 1
        return bytes(arrived)


class PtyPort:
    """A serial port that is a pseudo-terminal.

    Args:
        symlink: fixed name for the port, whose own is the kernel's choice.
        on_bytes: called with each piece the client wrote.
        on_open: called when a client flushes its input, as serial libraries do at opening a port. On the real cable
            opening moves the line that wakes the robot; a pseudo-terminal has no such lines.

    Raises:
        StartError: no pseudo-terminal can be had, or `symlink` names something that is no symbolic link.
    """

    def __init__(self, symlink: Path | None, on_bytes: Callable[[bytes], None], on_open: Callable[[], None]) -> None:
        self.lost_bytes = 0  # sent while nobody read
        self._on_bytes, self._on_open = on_bytes, on_open
        self._symlink = symlink
        try:
            self._master, self._slave = os.openpty()
        except OSError as error:
            raise StartError(f"no pseudo-terminal for the simulated robot: {error}", "is /dev/pts mounted?") from error
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        fcntl.ioctl(self._master, termios.TIOCPKT, struct.pack("i", 1))
        self.device = os.ttyname(self._slave)
        if symlink is not None:
            try:
                self._link(symlink)
            except OSError as error:
                self._close_files()
                raise StartError(f"cannot make the port's name {symlink}: {error.strerror}") from error
        asyncio.get_running_loop().add_reader(self._master, self._read)

    @property
    def path(self) -> str:
        """What a client opens."""
        return str(self._symlink) if self._symlink is not None else self.device

    def _link(self, symlink: Path) -> None:
        if symlink.exists() and not symlink.is_symlink():
            raise FileExistsError(17, "exists and is no symbolic link")
        new = symlink.with_name(f".{symlink.name}.{os.getpid()}")
        new.symlink_to(self.device)
        new.replace(symlink)

    def client_baud_rate(self) -> int:
        """The line speed the client set; 0 for one without a name."""
        return _BAUD_RATES.get(termios.tcgetattr(self._master)[5], 0)

    def write(self, data: bytes) -> None:
        """Deliver bytes to the client; those that find its buffer full are lost, as on a real port."""
        unread = struct.unpack("i", fcntl.ioctl(self._slave, termios.FIONREAD, b"\0\0\0\0"))[0]
        room = max(0, min(len(data), UNREAD_LIMIT_BYTES - unread))
        written = 0
        if room:
            try:
                written = os.write(self._master, data[:room])
            except BlockingIOError:
                pass
        self.lost_bytes += len(data) - written

    def _read(self) -> None:
        # In packet mode the first byte says what follows: 0 for data, else what the client did to its terminal.
        try:
            packet = os.read(self._master, 4096)
        except BlockingIOError:
            return
        if not packet:
            return
        if packet[0] == 0:
            self._on_bytes(packet[1:])
        elif packet[0] & termios.TIOCPKT_FLUSHREAD:
            self._on_open()

    def close(self) -> None:
        """Pull the cable: a client's reads and writes fail, the name goes."""
        asyncio.get_running_loop().remove_reader(self._master)
        if self._symlink is not None and self._symlink.is_symlink() and os.readlink(self._symlink) == self.device:
            self._symlink.unlink()
        self._close_files()

    def _close_files(self) -> None:
        os.close(self._slave)
        os.close(self._master)
