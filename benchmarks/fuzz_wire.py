"""A coverage-guided fuzzer over all that a learner and a robot do to bytes from the network before they trust them.

    pip install atheris
    python benchmarks/fuzz_wire.py --inputs 1000000 --out fuzz.json

An input is one message. It is unpacked as a robot's and as a learner's; what comes out goes on to the record's decoder,
the learner's intake of a robot that has sent its frames, the check of a task, and the robot's collection of a policy's
parts. Each may refuse it with the error that it states, in one printable line; anything else is a finding.

Guided by the Python code's branches and, since msgpack is decoded in C, by the refusals: each wording counts as a
branch. Two mutations of five are of bytes, the others of a header's fields or a record's elements.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
import traceback
import zlib
from pathlib import Path
from typing import Any

import atheris
import msgpack
import msgspec
import numpy as np

with atheris.instrument_imports(include=["relod"]):
    from relod.runtime import messages
    from relod.runtime.remote import wire
    from relod.runtime.remote.intake import Intake, check_spec
    from relod.runtime.remote.policyparts import PolicyParts

from relod.runtime.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from relod.runtime.provenance import describe
from relod.types import EpisodeEnd, Step, TaskSpec

MAX_INPUT_BYTES = 4096
SPEC = TaskSpec(
    name="fuzz",
    robot="none",
    cycle_ns=45_000_000,
    frames=2,
    camera_hw=(6, 8),
    camera_fps=30.0,
    image_hw=(3, 4),
    proprio_names=("a", "b"),
    action_names=("left", "right"),
    max_steps=100,
    sensor_window=4,
)
POLICY_VALUES = 16
STEP = Step(
    episode=0,
    index=0,
    frame_ids=(1, 2),
    proprio=np.zeros(2, np.float32),
    action=np.zeros(2, np.float32),
    reward=0.0,
    terminated=False,
    truncated=False,
    extras=np.zeros(1, np.float32),
    policy_version=(0, 0),
    observed_ns=1,
    acted_ns=2,
)
END = EpisodeEnd(
    episode=0,
    length=1,
    frame_ids=(1, 2),
    proprio=np.zeros(2, np.float32),
    return_=0.0,
    terminated=True,
    success=True,
    reason="goal",
    observed_ns=3,
)
JOIN = wire.Join(
    protocol=1,
    relod="0",
    robot="r",
    run="0" * 32,
    acts="robot",
    task=SPEC,
    codec="raw",
    algorithm="sac",
    presets={"sac": {"agent": {"rate": [1, 2.5, None, True, {"a": "b"}]}}},
    nonce=bytes(16),
    proof=bytes(32),
)
WELCOME = wire.Welcome(
    learner="0" * 32,
    run_dir="/",
    algorithm="sac",
    preset="sac",
    agent={"a": 1},
    seed=0,
    position=(0, 1),
    env_steps=1,
    policy_size=POLICY_VALUES,
    has_policy=True,
    precision="float16",
    proof=b"",
)
NEST = b"\x91" * 1500 + b"\xc0"


def _framed(header: bytes) -> bytes:
    return len(header).to_bytes(4, "little") + header


SEEDS = (
    wire.pack(JOIN),
    wire.pack(wire.FrameHead(id=3, captured_ns=1), bytes(36)),
    wire.pack(wire.RecordHead(seq=1), messages.encode(STEP)),
    wire.pack(wire.RecordHead(seq=2), messages.encode(END)),
    wire.pack(wire.Observe(ask=1, episode=0, index=0, frame_ids=(1, 2), now_ns=1), bytes(8)),
    wire.pack(
        wire.Observe(
            ask=2,
            episode=0,
            index=0,
            frame_ids=(1, 2),
            now_ns=1,
            frames=(wire.CarriedFrame(id=2, captured_ns=5, size=36),),
        ),
        bytes(44),
    ),
    wire.pack(wire.Ping(sent_ns=1, backlog=2)),
    wire.pack(wire.Bye(reason="over")),
    wire.pack(wire.Challenge(protocol=1, relod="0", nonce=bytes(16), token=True)),
    wire.pack(WELCOME),
    wire.pack(wire.Refused(exit_code=3, message="no", hint="go", retry=True)),
    wire.pack(wire.Ack(seq=1)),
    wire.pack(wire.PolicyPart(version=(1, 2), precision="float16", size=POLICY_VALUES, offset=0), bytes(32)),
    wire.pack(wire.Answer(ask=1, version=(1, 2), actions=2), bytes(12)),
    wire.pack(wire.Pong(sent_ns=1, received_ns=2, replied_ns=3)),
    wire.pack(wire.LearnerNews(updates=1, updates_per_s=2.0, replay_steps=3, env_steps=4, metrics={"loss": 0.5})),
    wire.pack(wire.Hold(reason="")),
    wire.pack(wire.Finished(reason="done")),
    # Deeper than any stack: as a header, as settings, and where a decoder only skips.
    _framed(NEST),
    _framed(msgspec.msgpack.encode(JOIN).replace(b"\xa4rate", b"\xa4rate" + NEST)),
    _framed(msgspec.msgpack.encode(JOIN).replace(b"\xa4name\xa4fuzz", b"\xa4nope" + NEST)),
    wire.pack(wire.RecordHead(seq=1), b"\x9e" + messages.encode(STEP)[1:] + NEST),
)

# Values that have broken decoders before: the edges of every range, other types, and what only msgpack has.
ODD: tuple[Any, ...] = (
    *(0, 1, -1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**64 - 1, -(2**63), 0.0, -0.0, 1e308, float("nan"), float("inf")),
    *(None, True, "", "x" * 70, "\n\x1b[2J", "\ud7ff", "0" * 32, b"", bytes(16), bytes(8), b"\0\0\xc0\x7f" * 2),
    *([], [1], [1, 2], [[1]], {}, {"a": 1}, {1: 1}, {b"a": 1}, msgpack.Timestamp(1), msgpack.ExtType(5, b"x")),
    *("join", "frame", "record", "observe", "ping", "policy", "step", "end", "cycle", "float16", "learner", "jpeg"),
)

# What of a refusal's words is the input's or a number.
QUOTED = r"(?s)unknown field .*|Invalid (enum )?value .*(?= - at)|'utf-8' codec .*|`[^`]*`|\$[^ ]*|'[^']*'|[0-9]+"

_LANDMARKS = [atheris.instrument_func(eval(f"lambda: {number}")) for number in range(2048)]  # noqa: S307


class Findings:
    """What the inputs did."""

    def __init__(self) -> None:
        self.inputs = 0
        self.outcomes: dict[str, int] = {}
        self.crashes: dict[str, dict[str, str]] = {}
        self.slowest_ns = 0

    def outcome(self, stage: str, error: Exception | None) -> None:
        """Count an outcome, and make a new one a branch for the fuzzer."""
        words = re.sub(QUOTED, "#", str(error)) if error else "accepted"
        name = f"{stage}: {words}"
        self.outcomes[name] = self.outcomes.get(name, 0) + 1
        _LANDMARKS[zlib.crc32(name.encode()) % len(_LANDMARKS)]()

    def crash(self, stage: str, error: BaseException, data: bytes) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{stage}: {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
        if where not in self.crashes:
            self.crashes[where] = {"error": repr(error)[:300], "input": data.hex()}
            print(f"\nFOUND {where}: {error!r}", file=sys.stderr)


findings = Findings()


def one_input(data: bytes) -> None:
    """All that is done to a message."""
    begun_ns = monotonic_ns()
    for stage, handle in (("learner", _as_learner), ("robot", _as_robot)):
        try:
            handle(data)
        except wire.WireError as error:
            findings.outcome(stage, error)
            if not str(error).isprintable():
                findings.crash(stage, error, data)
        except Exception as error:
            findings.crash(stage, error, data)
        else:
            findings.outcome(stage, None)
    took_ns = monotonic_ns() - begun_ns
    findings.inputs += 1
    findings.slowest_ns = max(findings.slowest_ns, took_ns)


def _as_learner(data: bytes) -> None:
    head, payload = wire.unpack_from_robot(data)
    findings.outcome(f"unpacked {type(head).__name__}", None)
    intake = Intake(SPEC, "raw", None)
    for frame_id in (1, 2):
        intake.frame(wire.FrameHead(id=frame_id, captured_ns=0), memoryview(bytes(36)))
    match head:
        case wire.FrameHead():
            intake.frame(head, payload)
        case wire.RecordHead():
            try:
                decoded = messages.decode(payload)  # type: ignore[arg-type]
            except msgspec.DecodeError as error:
                raise wire.WireError(f"no record: {error}") from None
            findings.outcome(f"decoded {type(decoded).__name__}", None)
            if isinstance(decoded, EpisodeEnd):
                intake.record(wire.RecordHead(seq=1), memoryview(messages.encode(STEP)))
            intake.record(head, payload)
        case wire.Observe():
            intake.question(head, payload)
        case wire.Join():
            check_spec(head.task)
            wire.pack(head)


def _as_robot(data: bytes) -> None:
    head, payload = wire.unpack_from_learner(data)
    findings.outcome(f"unpacked {type(head).__name__}", None)
    if isinstance(head, wire.PolicyPart):
        try:
            PolicyParts(POLICY_VALUES, "float16").add(head, payload)
        except ValueError as error:
            raise wire.WireError(str(error)) from None


# -- mutations ---------------------------------------------------------------------------------------------------------


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """A changed message; three times of four its framing stays whole."""
    rng = random.Random(seed)
    if rng.random() < 0.25:
        return bytes(atheris.Mutate(data, max_size))
    try:
        length = int.from_bytes(data[:4], "little")
        header, payload = msgpack.unpackb(data[4 : 4 + length], strict_map_key=False), data[4 + length :]
        match rng.randrange(5):
            case 0 | 1:
                packed = msgpack.packb(_changed(header, rng))
            case 2 | 3:
                packed, payload = data[4 : 4 + length], _changed_payload(payload, rng)
            case _:
                packed = bytes(atheris.Mutate(data[4 : 4 + length], max(8, max_size - len(payload) - 4)))
    except Exception:  # no message of its own: only its bytes can be changed
        return bytes(atheris.Mutate(data, max_size))
    return (len(packed).to_bytes(4, "little") + packed + payload)[:max_size]


def _changed(value: Any, rng: random.Random) -> Any:
    """The value with something in it exchanged, added or left out."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {other: value[other] for other in value if other != key}
            case 1:
                return {**value, rng.choice(("more", "", "backlog", "hint", 1)): rng.choice(ODD)}
            case _:
                return {**value, key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return [*value, rng.choice(ODD)]
            case _:
                return [*value[:place], _changed(value[place], rng), *value[place + 1 :]]
    if isinstance(value, bytes) and value and rng.random() < 0.5:
        return bytes(atheris.Mutate(value, len(value) + 8))
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return max(-(2**63), min(2**64 - 1, value + rng.choice((-1, 1, 2, 64))))
    return rng.choice(ODD)


def _changed_payload(payload: bytes, rng: random.Random) -> bytes:
    try:
        return msgpack.packb(_changed(msgpack.unpackb(payload, strict_map_key=False), rng))  # type: ignore[no-any-return]
    except Exception:
        return bytes(atheris.Mutate(payload, len(payload) + 16))


# -- the run -----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("fuzz_wire.json"))
    options = parser.parse_args()
    begun_ns = monotonic_ns()

    def target(data: bytes) -> None:
        one_input(data)
        if findings.inputs == options.inputs:  # the fuzzer itself never returns
            _finish(options.out, monotonic_ns() - begun_ns)

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(SEEDS):
            (Path(corpus) / f"{number:02}").write_bytes(seed)
        limits = [f"-max_len={MAX_INPUT_BYTES}", "-timeout=10", "-rss_limit_mb=1024", "-len_control=0", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *limits, f"-seed={options.seed}", corpus], target, custom_mutator=mutate)
        atheris.Fuzz()


def _finish(path: Path, took_ns: int) -> None:
    document = {
        "benchmark": "fuzz_wire",
        "made_with": describe(sys.argv),
        "inputs": findings.inputs,
        "seconds": round(took_ns / NS_PER_S, 1),
        "inputs_per_s": round(findings.inputs * NS_PER_S / took_ns),
        "slowest_ms": round(findings.slowest_ns / NS_PER_MS, 3),
        "outcomes": dict(sorted(findings.outcomes.items(), key=lambda item: -item[1])),
        "crashes": findings.crashes,
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document)))
    print(f"{findings.inputs} inputs, {len(findings.outcomes)} outcomes, {len(findings.crashes)} crashes; {path}")
    sys.stdout.flush()
    os._exit(1 if findings.crashes else 0)


if __name__ == "__main__":
    main()
