"""The controller's packets over an RTDE connection of their own, which never commands.

ur_rtde's receive interface keeps the newest packet only: what comes while its process waits for a core is lost. Here
packets wait in the socket, so a look that comes late finds all of them.
"""

from __future__ import annotations

import socket
import struct

from .rtde import PROTOCOL_VERSION, MessageDecoder, MessageType, Recipe, encode, join_names, split_names

__all__ = ["FREQUENCY_HZ", "STATES", "StateListener"]

FREQUENCY_HZ = 125.0  # of a CB3's packets; an e-Series is asked for the same
# In the order of the first sensor columns.
STATES = (
    "actual_q",
    "actual_qd",
    "target_q",
    "target_qd",
    "timestamp",
    "robot_mode",
    "safety_mode",
    "runtime_state",
    "speed_scaling",
)

RTDE_PORT = 30004  # fixed by the controller
LIMIT_S = 1.0  # for each answer
READ_BYTES = 65_536


class StateListener:
    """A connection on which packets come from now on; can be waited for, as it has a `fileno`.

    Raises:
        OSError: there is no controller, or it hung up.
        ValueError: it does not speak RTDE, or does not know one of `STATES`.
    """

    def __init__(self, address: str) -> None:
        self._decoder = MessageDecoder()
        self._wire = socket.create_connection((address, RTDE_PORT), LIMIT_S)
        try:
            self._wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._ask(MessageType.PROTOCOL_VERSION, PROTOCOL_VERSION.to_bytes(2, "big"))
            wanted = struct.pack(">d", FREQUENCY_HZ) + join_names(STATES) + b","
            self._recipe = self._read_recipe(self._ask(MessageType.OUTPUTS, wanted))
            self._ask(MessageType.START)
            self._wire.setblocking(False)
        except BaseException:
            self._wire.close()
            raise

    def fileno(self) -> int:
        """Of the socket."""
        return self._wire.fileno()

    def read(self) -> list[tuple[float, ...]]:
        """Values of every packet since the last call, oldest first; does not wait.

        Raises:
            OSError: the connection is lost.
            ValueError: what came is no packet.
        """
        try:
            data = self._wire.recv(READ_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionResetError("the controller hung up")
        messages = self._decoder.feed(data)
        return [self._recipe.unpack(message.body[1:]) for message in messages if message.type is MessageType.DATA]

    def close(self) -> None:
        """Hang up."""
        self._wire.close()

    @staticmethod
    def _read_recipe(body: bytes) -> Recipe:
        types = split_names(body[1:])
        try:
            return Recipe(STATES, types)
        except KeyError as error:
            raise ValueError(f"the controller answers {error} where its packets' variables were asked for") from error

    def _ask(self, kind: MessageType, body: bytes = b"") -> bytes:
        self._wire.sendall(encode(kind, body))
        while True:
            data = self._wire.recv(READ_BYTES)
            if not data:
                raise ConnectionResetError("it hung up")
            for message in self._decoder.feed(data):
                if message.type is kind:
                    return message.body
