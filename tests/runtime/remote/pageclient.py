"""A robot written from docs/wire-protocol.md alone, as someone would in another language: nothing of relod in here."""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from typing import Any

import msgpack
from websockets.asyncio.client import ClientConnection, connect

__all__ = ["PageRobot", "floats", "proof"]

TASK = {
    "name": "page",
    "robot": "paper",
    "cycle_ns": 45_000_000,
    "frames": 2,
    "camera_hw": [6, 8],
    "camera_fps": 30.0,
    "image_hw": [3, 4],
    "proprio_names": ["wheel_left_mm_s", "wheel_right_mm_s"],
    "action_names": ["left", "right"],
    "max_steps": 100,
    "sensor_window": 4,
}


def floats(*values: float) -> bytes:
    """float32, little-endian."""
    return struct.pack(f"<{len(values)}f", *values)


def unfloats(data: bytes) -> list[float]:
    return [value for (value,) in struct.iter_unpack("<f", data)]


def message(header: dict[str, Any], payload: bytes = b"") -> bytes:
    packed = msgpack.packb(header)
    return struct.pack("<I", len(packed)) + packed + payload


def proof(role: bytes, token: bytes, challenge_nonce: bytes, join_nonce: bytes, robot: str, run: str) -> bytes:
    text = role + challenge_nonce + join_nonce + robot.encode() + run.encode()
    return hmac.new(token, text, hashlib.sha256).digest()


class Refused(Exception):
    """The learner's words."""


class PageRobot:
    """One connection of a robot."""

    def __init__(self, name: str, run: str, *, acts: str = "robot", token: bytes = b"") -> None:
        self.name, self.run, self.acts, self.token = name, run, acts, token
        self.welcome: dict[str, Any] = {}
        self.seq = 0
        self.websocket: ClientConnection

    async def connect(self, url: str) -> None:
        self.websocket = await connect(url, subprotocols=["relod"], compression=None, ping_interval=None)  # type: ignore[list-item]
        challenge, _ = await self.receive()
        assert (challenge["type"], challenge["protocol"]) == ("challenge", 1)
        nonce = os.urandom(16)
        stamp = (challenge["nonce"], nonce, self.name, self.run)
        await self.send(
            {
                "type": "join",
                "protocol": 1,
                "relod": "page",
                "robot": self.name,
                "run": self.run,
                "acts": self.acts,
                "task": TASK,
                "codec": "raw",
                "algorithm": "sac" if self.acts == "robot" else "",
                "presets": {"sac": {"agent": {"discount": 0.99}}},
                "nonce": nonce,
                "proof": proof(b"relod-robot", self.token, *stamp) if challenge["token"] else b"",
            }
        )
        self.welcome, _ = await self.receive()
        assert self.welcome["type"] == "welcome"
        if self.token:
            assert hmac.compare_digest(self.welcome["proof"], proof(b"relod-learner", self.token, *stamp))

    async def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        await self.websocket.send(message(header, payload))

    async def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next message; `Refused` when it is that."""
        data = await self.websocket.recv()
        assert isinstance(data, bytes)
        (length,) = struct.unpack_from("<I", data)
        header = msgpack.unpackb(data[4 : 4 + length])
        if header["type"] == "refused":
            raise Refused(header["message"])
        return header, data[4 + length :]

    async def wait_for(self, kind: str) -> tuple[dict[str, Any], bytes]:
        """The next message of this type; others are passed over."""
        while True:
            header, payload = await self.receive()
            if header["type"] == kind:
                return header, payload

    async def frame(self, frame_id: int) -> bytes:
        """Send a picture; its pixels."""
        height, width = TASK["image_hw"]  # type: ignore[misc]
        pixels = bytes((frame_id + place) % 256 for place in range(height * width * 3))
        await self.send({"type": "frame", "id": frame_id, "captured_ns": frame_id * 33_000_000}, pixels)
        return pixels

    async def record(self, *elements: Any) -> None:
        self.seq += 1
        await self.send({"type": "record", "seq": self.seq}, msgpack.packb(elements))

    async def step(self, episode: int, index: int, frame_ids: list[int], terminated: bool = False) -> None:
        now_ns = 1_000_000_000 + index * TASK["cycle_ns"]  # type: ignore[operator]
        proprio, action = floats(0.25, index), floats(0.5, -1.0)
        await self.record(
            "step", episode, index, frame_ids, proprio, action, -1, terminated, False, b"", [0, 0], now_ns, now_ns + 9
        )

    async def end(self, episode: int, length: int, frame_ids: list[int]) -> None:
        last_ns = 1_000_000_000 + length * TASK["cycle_ns"]  # type: ignore[operator]
        await self.record(
            "end", episode, length, frame_ids, floats(0.25, length), -float(length), True, True, "goal", last_ns
        )

    async def acked(self) -> None:
        """Wait until everything sent is in the log."""
        while (await self.wait_for("ack"))[0]["seq"] < self.seq:
            pass

    async def observe(self, ask: int, frame_ids: list[int]) -> tuple[dict[str, Any], list[float], list[float]]:
        """Ask for an action: the answer's header, the action, the extras."""
        question = {"type": "observe", "ask": ask, "episode": 0, "index": ask, "frame_ids": frame_ids, "now_ns": 5}
        await self.send(question, floats(1.0, 2.0))
        header, payload = await self.wait_for("answer")
        values = unfloats(payload)
        return header, values[: header["actions"]], values[header["actions"] :]

    async def policy(self) -> tuple[list[int], list[float]]:
        """The next whole policy: its version and values."""
        data = b""
        size_bytes = self.welcome["policy_size"] * {"float16": 2, "float32": 4}[self.welcome["precision"]]
        while len(data) < size_bytes:
            header, payload = await self.wait_for("policy")
            data = data if header["offset"] else b""
            assert header["offset"] == len(data)
            data += payload
        kind = {"float16": "e", "float32": "f"}[self.welcome["precision"]]
        return header["version"], list(struct.unpack(f"<{self.welcome['policy_size']}{kind}", data))

    async def bye(self) -> None:
        await self.send({"type": "bye", "reason": "done"})
        await self.websocket.close()
