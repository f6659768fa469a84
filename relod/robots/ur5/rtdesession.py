"""One RTDE connection, as the controller serves it: requests in, replies and data packages out. Pure."""

from __future__ import annotations

import struct
from typing import TypeAlias

from ...runtime.clock import NS_PER_S
from .controller import Controller
from .outputs import INPUTS, Output, Read, Write, known_output
from .rtde import (
    FORMATS,
    IN_USE,
    NOT_FOUND,
    PROTOCOL_VERSION,
    Message,
    MessageDecoder,
    MessageType,
    Number,
    Recipe,
    encode,
    join_names,
    read_output_request,
    split_names,
)
from .states import Sample

__all__ = ["Claims", "RtdeSession"]

# Input variables by name -> the connection that may write them. Shared by the connections of one controller.
Claims: TypeAlias = dict[str, object]

OUTPUT_RECIPE = 1
ACCEPTED, REFUSED = b"\1", b"\0"


class RtdeSession:
    """The controller's end of one connection."""

    def __init__(self, controller: Controller, claims: Claims) -> None:
        self._controller, self._claims = controller, claims
        self._decoder = MessageDecoder()
        self._inputs: list[tuple[Recipe, list[tuple[int, Write]]]] = []  # with the numbers' places and their writers
        self._package: _Package | None = None
        self._started = False
        self.refused = 0  # data packages of a wrong size, or of a recipe that nobody asked for

    def receive(self, data: bytes, now_ns: int) -> bytes:
        """Take what the client sent; returns the replies.

        Raises:
            ValueError: the client does not speak the protocol; its connection is of no use.
        """
        return b"".join(self._handle(message, now_ns) for message in self._decoder.feed(data))

    def package(self, sample: Sample) -> bytes:
        """The data package of a tick; empty when the client wants none."""
        if not self._started or self._package is None:
            return b""
        return self._package.at(self._controller, sample)

    def close(self) -> None:
        """The client is gone: others may write what it wrote."""
        for name in [name for name, owner in self._claims.items() if owner is self]:
            del self._claims[name]

    def _handle(self, message: Message, now_ns: int) -> bytes:
        kind, body = message.type, message.body
        match kind:
            case MessageType.DATA:
                self._write(body, now_ns)
                return b""
            case MessageType.PROTOCOL_VERSION:
                known = body == PROTOCOL_VERSION.to_bytes(2, "big")
                return encode(kind, ACCEPTED if known else REFUSED)
            case MessageType.CONTROLLER_VERSION:
                return encode(kind, struct.pack(">4I", *self._controller.version))
            case MessageType.OUTPUTS:
                return encode(kind, self._want(body))
            case MessageType.INPUTS:
                return encode(kind, self._claim(split_names(body)))
            case MessageType.START:
                self._started = self._package is not None or bool(self._inputs)
                return encode(kind, ACCEPTED if self._started else REFUSED)
            case MessageType.PAUSE:
                self._started = False
                return encode(kind, ACCEPTED)
            case MessageType.TEXT:
                return b""

    def _want(self, body: bytes) -> bytes:
        """Answer a request for outputs: recipe and types."""
        frequency_hz, names = read_output_request(body)
        if not 0 < frequency_hz < float("inf"):
            raise ValueError(f"data packages at {frequency_hz} Hz")
        outputs = [known_output(name, self._controller.version) for name in names]
        types = [output.type if output is not None else NOT_FOUND for output in outputs]
        found = [output for output in outputs if output is not None]
        if len(found) < len(outputs) or not found:
            self._package = None
            return bytes([0]) + join_names(types)
        ticks = max(1, round(NS_PER_S / (self._controller.tick_ns * frequency_hz)))
        self._package = _Package(Recipe(names, types), found, ticks)
        return bytes([OUTPUT_RECIPE]) + join_names(types)

    def _claim(self, names: list[str]) -> bytes:
        """Answer a request for inputs. Recipes count from 1 in the order in which a client asks for them."""
        types = [self._type_of_input(name) for name in names]
        if not names or not set(types) <= FORMATS.keys():
            return bytes([0]) + join_names(types)
        for name in names:
            self._claims[name] = self
        recipe = Recipe(names, types)
        writers = [(place.start, INPUTS[name].write) for name, place in zip(names, recipe.places, strict=True)]
        self._inputs.append((recipe, [(place, write) for place, write in writers if write is not None]))
        return bytes([len(self._inputs)]) + join_names(types)

    def _type_of_input(self, name: str) -> str:
        if self._claims.get(name, self) is not self:
            return IN_USE
        return INPUTS[name].type if name in INPUTS else NOT_FOUND

    def _write(self, body: bytes, now_ns: int) -> None:
        """Write a data package to the registers. One that does not fit its recipe is dropped."""
        number = body[0] if body else 0
        if not 1 <= number <= len(self._inputs):
            self._refuse(f"a data package of unknown recipe {number}", now_ns)
            return
        recipe, writers = self._inputs[number - 1]
        try:
            numbers = recipe.unpack(body[1:])
        except ValueError as error:
            self._refuse(str(error), now_ns)
            return
        for place, write in writers:
            write(self._controller, numbers[place], now_ns)

    def _refuse(self, what: str, now_ns: int) -> None:
        self.refused += 1
        self._controller.note(what, now_ns)


class _Package:
    """The data packages that a client asked for, one every `ticks` ticks."""

    def __init__(self, recipe: Recipe, outputs: list[Output], ticks: int) -> None:
        self._recipe, self._ticks = recipe, ticks
        self._since = 0  # ticks since the last package
        self._numbers: list[Number] = [0] * recipe.count
        self._live: list[tuple[slice, Read]] = []
        for place, output in zip(recipe.places, outputs, strict=True):
            if output.read is None:
                self._numbers[place] = output.constant
            else:
                self._live.append((place, output.read))

    def at(self, controller: Controller, sample: Sample) -> bytes:
        self._since += 1
        if self._since < self._ticks:
            return b""
        self._since = 0
        for place, read in self._live:
            self._numbers[place] = read(controller, sample)
        return encode(MessageType.DATA, bytes([OUTPUT_RECIPE]) + self._recipe.pack(self._numbers))
