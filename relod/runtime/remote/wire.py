"""Messages between robot and learner as bytes, and back; pure. docs/wire-protocol.md states every one of them.

A websocket message is a header's length (4 bytes, little-endian), the header (msgpack, checked against a schema), and
the payload: raw bytes that the header gives a meaning. No pickle, no name that is imported, no size that is not
bounded before anything is allocated for it.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from ...types import TaskSpec

__all__ = [
    "ACTION_SLACK",
    "MAX_HEADER_BYTES",
    "PROTOCOL",
    "Ack",
    "Answer",
    "Bye",
    "Bytes",
    "CarriedFrame",
    "Challenge",
    "Finished",
    "FrameHead",
    "FromLearner",
    "FromRobot",
    "Hold",
    "Join",
    "LearnerNews",
    "Name",
    "Observe",
    "Ping",
    "PolicyPart",
    "Pong",
    "Precision",
    "RecordHead",
    "Refused",
    "Stamps",
    "Welcome",
    "WireError",
    "pack",
    "unpack_from_learner",
    "unpack_from_robot",
]

PROTOCOL = 1
SUBPROTOCOL = "relod"  # of the websocket: anything else at the port gets a page that says what this is
MAX_HEADER_BYTES = 1 << 16
POLICY_PART_BYTES = 1 << 16  # small enough that an answer or an ack never waits long behind a policy
MAX_ERROR_CHARS = 300
NONCE_BYTES = 16
PROOF_BYTES = 32
ACTION_SLACK = 1e-6  # by which rounding may take an action out of [-1, 1]

Bytes: TypeAlias = bytes | memoryview
Precision: TypeAlias = Literal["float16", "float32"]  # of policies on the way

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
RunId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
# What people read in terminals and logs: no line ends, no escapes.
Text = Annotated[str, Meta(max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z")]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Stamp = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Proof = Annotated[bytes, Meta(max_length=PROOF_BYTES)]  # empty where no token is asked for
FrameIds = Annotated[tuple[Count, ...], Meta(min_length=1, max_length=64)]
Pixels = Annotated[int, Meta(ge=1, le=4096)]
Version = tuple[Count, Count]  # of a policy: learner epoch, update count
Position = tuple[Count, Count]  # of a record: episode, and index of the step or, for an episode's end, its length

# Settings travel as trees of plain values, without the bytes, times and odd keys that msgpack has as well.
_Leaf: TypeAlias = bool | int | float | str | None
_Twig: TypeAlias = _Leaf | list[_Leaf] | dict[str, _Leaf]
_Branch: TypeAlias = _Leaf | list[_Twig] | dict[str, _Twig]
SettingsTree: TypeAlias = dict[str, _Leaf | list[_Branch] | dict[str, _Branch]]


class _Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """A message's header."""


# -- robot to learner --------------------------------------------------------------------------------------------------


class Join(_Head, frozen=True, tag="join"):
    """First message of a robot, answering the challenge."""

    protocol: Count
    relod: Text  # version of relod, or of whatever this is
    robot: Name  # no two robots of one name at a time
    run: RunId  # of the robot's run: the same after each reconnection, another after a restart
    acts: Literal["robot", "learner"]  # who answers observations
    task: TaskSpec
    codec: Literal["raw", "jpeg"]
    algorithm: Annotated[str, Meta(max_length=64)]  # that the robot is to act with; empty: whatever is taught
    presets: dict[str, SettingsTree]  # settings that suit the task, by an agent's preset; the learner's own win
    nonce: Nonce
    proof: Proof  # HMAC-SHA256, see `access`


class FrameHead(_Head, frozen=True, tag="frame"):
    """A camera frame that records or observations will name. Payload: the image, encoded by the codec."""

    id: Count
    captured_ns: Stamp


class RecordHead(_Head, frozen=True, tag="record"):
    """The next step or end of an episode, after the frames it names. Payload: `messages.encode` of it."""

    seq: Count  # counts a run's records from 1


class CarriedFrame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A camera frame that travels in the payload of the question which names it."""

    id: Count
    captured_ns: Stamp
    size: Count  # bytes of its image, encoded by the codec


class Observe(_Head, frozen=True, tag="observe"):
    """A question for an action. Payload: proprioception, float32; then the images of `frames`, one after the other.

    What it names and does not carry was sent before.
    """

    ask: Count  # grows; only the newest is answered
    episode: Count
    index: Count
    frame_ids: FrameIds
    now_ns: Stamp
    frames: Annotated[tuple[CarriedFrame, ...], Meta(max_length=64)] = ()


class Ping(_Head, frozen=True, tag="ping"):
    """Sent a few times a second: proof of life, and the clock's exchange."""

    sent_ns: Stamp
    backlog: Count = 0  # records not acked yet
    rtt_ms: float = 0.0  # median round trip so far


class Bye(_Head, frozen=True, tag="bye"):
    """The robot's run is over and all its records are acked."""

    reason: Text


# -- learner to robot --------------------------------------------------------------------------------------------------


class Challenge(_Head, frozen=True, tag="challenge"):
    """First message of a learner."""

    protocol: Count
    relod: Text
    nonce: Nonce
    token: bool  # whether a proof is asked for
    image_hw: tuple[Pixels, Pixels] | None = None  # the images that its networks are made for, if it cares
    preset: Annotated[str, Meta(max_length=64)] = ""  # of the agent, as long as no robot has brought the task


class Welcome(_Head, frozen=True, tag="welcome"):
    """The robot is in."""

    learner: RunId  # of the learner's run, the same after it was resumed
    run_dir: Text  # where it is kept, for people
    algorithm: Annotated[str, Meta(max_length=64)]
    preset: Annotated[str, Meta(max_length=64)]
    agent: SettingsTree  # the algorithm's settings
    seed: Count
    position: Position | None  # of the newest record of the robot's run that is in the log
    env_steps: Count  # of the learner's run so far
    policy_size: Count  # float32 values of a policy
    has_policy: bool  # whether there is one, which comes next
    precision: Precision  # of the policies sent
    proof: Proof
    policy_layout: Annotated[str, Meta(max_length=64)] = ""  # digest of its parameters' names and shapes
    package: Annotated[str, Meta(max_length=64)] = ""  # that brings the algorithm, and its version; empty if unknown


class Refused(_Head, frozen=True, tag="refused"):
    """The robot is not in, or not any longer; the connection is closed next."""

    exit_code: Annotated[int, Meta(ge=1, le=255)]  # what the robot's command ends with
    message: Text
    hint: Text = ""
    retry: bool = False  # whether the same may be accepted a little later


class Ack(_Head, frozen=True, tag="ack"):
    """All records up to `seq` are in the log."""

    seq: Count


class PolicyPart(_Head, frozen=True, tag="policy"):
    """A part of a policy. Payload: bytes `offset` to `offset + len` of its values, little-endian.

    Parts of one version come in order; a part at offset 0 begins another and drops what came before.
    """

    version: Version
    precision: Precision
    size: Count  # values in the whole policy
    offset: Count  # in bytes


class Stamps(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Moments of the learner's clock. For showing where time goes; nothing is decided by them."""

    received_ns: Stamp  # the question was whole
    decoded_ns: Stamp  # its images were decoded
    asked_ns: Stamp  # the network was asked
    acted_ns: Stamp  # its action was there; what follows is the way back


class Answer(_Head, frozen=True, tag="answer"):
    """The action for the observation `ask`. Payload: the action, then the algorithm's extras, float32."""

    ask: Count
    version: Version
    actions: Annotated[int, Meta(ge=1, le=1024)]  # values of the action in the payload
    stamps: Stamps | None = None  # of the question's way through the learner


class Pong(_Head, frozen=True, tag="pong"):
    """The answer to a ping."""

    sent_ns: Stamp  # the ping's
    received_ns: Stamp  # learner's clock
    replied_ns: Stamp


class LearnerNews(_Head, frozen=True, tag="news"):
    """How learning goes, about once a second."""

    updates: Count
    updates_per_s: float
    replay_steps: Count
    env_steps: Count
    metrics: dict[str, float]


class Hold(_Head, frozen=True, tag="hold"):
    """Begin no episode until a `Hold` without a reason comes."""

    reason: Text


class Finished(_Head, frozen=True, tag="finished"):
    """The learner's run is over; the robot ends its own in good order."""

    reason: Text


FromRobot: TypeAlias = Join | FrameHead | RecordHead | Observe | Ping | Bye
FromLearner: TypeAlias = (
    Challenge | Welcome | Refused | Ack | PolicyPart | Answer | Pong | LearnerNews | Hold | Finished
)

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_from_robot: msgspec.msgpack.Decoder[FromRobot] = msgspec.msgpack.Decoder(FromRobot)
_from_learner: msgspec.msgpack.Decoder[FromLearner] = msgspec.msgpack.Decoder(FromLearner)


class WireError(Exception):
    """Bytes that are no message of this protocol; the text says why, in one line without control characters."""

    def __init__(self, text: str) -> None:
        super().__init__(_one_line(text))


def pack(head: FromRobot | FromLearner, payload: Bytes = b"") -> bytes:
    """A message as bytes."""
    header = _encoder.encode(head)
    return b"".join((_LENGTH.pack(len(header)), header, payload))


def unpack_from_robot(data: bytes) -> tuple[FromRobot, memoryview]:
    """Header and payload of a robot's message; `WireError`. The payload is a view of `data`."""
    return _unpack(_from_robot, data)


def unpack_from_learner(data: bytes) -> tuple[FromLearner, memoryview]:
    """Header and payload of a learner's message; `WireError`. The payload is a view of `data`."""
    return _unpack(_from_learner, data)


def _unpack(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> tuple[Any, memoryview]:
    if len(data) < _LENGTH.size:
        raise WireError(f"a message of {len(data)} bytes has no header")
    (length,) = _LENGTH.unpack_from(data)
    end = _LENGTH.size + length
    if length > MAX_HEADER_BYTES or end > len(data):
        raise WireError(f"a header of {length} bytes in a message of {len(data)}")
    view = memoryview(data)
    try:
        head = decoder.decode(view[_LENGTH.size : end])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"the header is not one of this protocol: {error}") from error
    return head, view[end:]


def _one_line(text: str) -> str:
    """The text with everything escaped that could move a terminal's cursor, and cut: it may quote what was received."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:MAX_ERROR_CHARS])
    return shown + "…" if len(text) > MAX_ERROR_CHARS else shown
