"""RTDE, the Real-Time Data Exchange protocol of UR controllers, version 2: bytes in, messages out, and back.

Pure. A message is a big-endian `uint16` size (with its own three bytes of header), a type, and a body. Lists of
variables are names with commas between, a client's with one more at the end; a recipe says what a data package holds.
Source: Universal Robots, "Real-Time Data Exchange (RTDE) Guide".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

__all__ = [
    "FORMATS",
    "IN_USE",
    "NOT_FOUND",
    "PROTOCOL_VERSION",
    "Message",
    "MessageDecoder",
    "MessageType",
    "Number",
    "Recipe",
    "encode",
    "join_names",
    "read_output_request",
    "split_names",
]

Number: TypeAlias = int | float

PROTOCOL_VERSION = 2
HEADER = struct.Struct(">HB")

FORMATS = {  # a variable's type -> how its numbers are packed
    "BOOL": "?",
    "UINT8": "B",
    "UINT32": "I",
    "UINT64": "Q",
    "INT32": "i",
    "DOUBLE": "d",
    "VECTOR3D": "3d",
    "VECTOR6D": "6d",
    "VECTOR6INT32": "6i",
    "VECTOR6UINT32": "6I",
}
# What a controller answers in a type's place.
NOT_FOUND = "NOT_FOUND"
IN_USE = "IN_USE"


class MessageType(IntEnum):
    """What a message is about; each is a letter."""

    PROTOCOL_VERSION = ord("V")
    CONTROLLER_VERSION = ord("v")
    TEXT = ord("M")
    DATA = ord("U")
    OUTPUTS = ord("O")
    INPUTS = ord("I")
    START = ord("S")
    PAUSE = ord("P")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message off the wire."""

    type: MessageType
    body: bytes


def encode(kind: MessageType, body: bytes = b"") -> bytes:
    """A message's bytes; ValueError when it is too long for its header."""
    size = HEADER.size + len(body)
    if size > 0xFFFF:
        raise ValueError(f"an RTDE message of {size} bytes is too long")
    return HEADER.pack(size, kind) + body


class MessageDecoder:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are complete now.

        Raises:
            ValueError: the stream is not RTDE; nothing after can be trusted.
        """
        self._rest += data
        messages = []
        while len(self._rest) >= HEADER.size:
            size, letter = HEADER.unpack_from(self._rest)
            if size < HEADER.size:
                raise ValueError(f"an RTDE message cannot have {size} bytes")
            kind = MessageType(letter)
            if len(self._rest) < size:
                break
            messages.append(Message(type=kind, body=bytes(self._rest[HEADER.size : size])))
            del self._rest[:size]
        return messages


class Recipe:
    """What a data package holds: variables by name and type, in order."""

    def __init__(self, names: Sequence[str], types: Sequence[str]) -> None:
        """`types`: keys of `FORMATS`, one for each name; KeyError otherwise."""
        self.names = tuple(names)
        self._packer = struct.Struct(">" + "".join(FORMATS[kind] for kind in types))
        self.places: list[slice] = []  # of each variable among the package's numbers
        start = 0
        for _, kind in zip(self.names, types, strict=True):
            count = count_of(kind)
            self.places.append(slice(start, start + count))
            start += count
        self.count = start  # of the package's numbers

    def pack(self, numbers: Sequence[Number]) -> bytes:
        """The package's bytes, for `count` numbers."""
        return self._packer.pack(*numbers)

    def unpack(self, body: bytes) -> tuple[Number, ...]:
        """The package's numbers; ValueError when it has the wrong size."""
        if len(body) != self._packer.size:
            raise ValueError(f"a data package of {len(body)} bytes, where its recipe has {self._packer.size}")
        return self._packer.unpack(body)


def count_of(kind: str) -> int:
    """How many numbers a variable of this type has."""
    digits = FORMATS[kind][:-1]
    return int(digits) if digits else 1


def split_names(text: bytes) -> list[str]:
    """Variables' names off the wire; ValueError when they are not text."""
    return [name for name in text.decode("ascii").split(",") if name]


def join_names(names: Sequence[str]) -> bytes:
    """Names or types for the wire."""
    return ",".join(names).encode("ascii")


def read_output_request(body: bytes) -> tuple[float, list[str]]:
    """Packages a second, and names of variables; ValueError when it is neither."""
    if len(body) < 8:
        raise ValueError(f"a request for outputs of {len(body)} bytes")
    (frequency_hz,) = struct.unpack_from(">d", body)
    return frequency_hz, split_names(body[8:])
