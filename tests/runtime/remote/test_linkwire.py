"""The link's messages as bytes: what goes in comes out, and what is none of them is refused as such."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relod.runtime import messages
from relod.runtime.remote import wire
from relod.runtime.remote.wire import WireError, pack, unpack_from_learner, unpack_from_robot
from relod.types import EpisodeEnd, TaskSpec
from tests.fakes import SPEC

PAGE = (Path(__file__).parents[3] / "docs" / "wire-protocol.md").read_text("utf-8")

counts = st.integers(0, 2**53)
pixels = st.integers(1, 4096)
stamps = st.integers(-(2**63), 2**63 - 1)
texts = st.text(max_size=1000)
short_texts = st.text(max_size=64)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
runs = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
nonces = st.binary(min_size=16, max_size=16)
proofs = st.sampled_from([b"", bytes(32), b"\xff" * 32])
floats = st.floats(allow_nan=False)
versions = st.tuples(counts, counts)
precisions = st.sampled_from(["float16", "float32"])
leaves = st.none() | st.booleans() | stamps | floats | texts
twigs = leaves | st.lists(leaves, max_size=3) | st.dictionaries(texts, leaves, max_size=3)
branches = leaves | st.lists(twigs, max_size=3) | st.dictionaries(texts, twigs, max_size=3)
trees = st.dictionaries(texts, leaves | st.lists(branches, max_size=3) | st.dictionaries(texts, branches, max_size=3))
sizes = st.tuples(stamps, stamps)
tasks = st.builds(
    TaskSpec,
    camera_fps=floats,
    **dict.fromkeys(("cycle_ns", "frames", "max_steps", "sensor_window"), stamps),
    **dict.fromkeys(("camera_hw", "image_hw"), sizes),
)

carried = st.builds(wire.CarriedFrame, id=counts, captured_ns=stamps, size=counts)
lines = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=1000)
FROM_ROBOT: dict[type[Any], st.SearchStrategy[Any]] = {
    wire.Join: st.builds(
        wire.Join,
        protocol=counts,
        relod=lines,
        robot=names,
        run=runs,
        acts=st.sampled_from(["robot", "learner"]),
        task=tasks,
        codec=st.sampled_from(["raw", "jpeg"]),
        algorithm=short_texts,
        presets=st.dictionaries(texts, trees, max_size=2),
        nonce=nonces,
        proof=proofs,
    ),
    wire.FrameHead: st.builds(wire.FrameHead, id=counts, captured_ns=stamps),
    wire.RecordHead: st.builds(wire.RecordHead, seq=counts),
    wire.Observe: st.builds(
        wire.Observe,
        ask=counts,
        episode=counts,
        index=counts,
        frame_ids=st.lists(counts, min_size=1, max_size=64).map(tuple),
        now_ns=stamps,
        frames=st.lists(carried, max_size=3).map(tuple),
    ),
    wire.Ping: st.builds(wire.Ping, sent_ns=stamps, backlog=counts, rtt_ms=floats),
    wire.Bye: st.builds(wire.Bye, reason=lines),
}
way_stamps = st.builds(wire.Stamps, received_ns=stamps, decoded_ns=stamps, asked_ns=stamps, acted_ns=stamps)
FROM_LEARNER: dict[type[Any], st.SearchStrategy[Any]] = {
    wire.Challenge: st.builds(
        wire.Challenge,
        protocol=counts,
        relod=lines,
        nonce=nonces,
        token=st.booleans(),
        image_hw=st.none() | st.tuples(pixels, pixels),
        preset=st.text(max_size=64),
    ),
    wire.Welcome: st.builds(
        wire.Welcome,
        learner=runs,
        run_dir=lines,
        algorithm=short_texts,
        preset=short_texts,
        agent=trees,
        seed=counts,
        position=st.none() | versions,
        env_steps=counts,
        policy_size=counts,
        policy_layout=short_texts,
        package=short_texts,
        has_policy=st.booleans(),
        precision=precisions,
        proof=proofs,
    ),
    wire.Refused: st.builds(
        wire.Refused, exit_code=st.integers(1, 255), message=lines, hint=lines, retry=st.booleans()
    ),
    wire.Ack: st.builds(wire.Ack, seq=counts),
    wire.PolicyPart: st.builds(wire.PolicyPart, version=versions, precision=precisions, size=counts, offset=counts),
    wire.Answer: st.builds(
        wire.Answer, ask=counts, version=versions, actions=st.integers(1, 1024), stamps=st.none() | way_stamps
    ),
    wire.Pong: st.builds(wire.Pong, sent_ns=stamps, received_ns=stamps, replied_ns=stamps),
    wire.LearnerNews: st.builds(
        wire.LearnerNews,
        updates=counts,
        updates_per_s=floats,
        replay_steps=counts,
        env_steps=counts,
        metrics=st.dictionaries(texts, floats, max_size=5),
    ),
    wire.Hold: st.builds(wire.Hold, reason=lines),
    wire.Finished: st.builds(wire.Finished, reason=lines),
}
ENDS = [(FROM_ROBOT, unpack_from_robot), (FROM_LEARNER, unpack_from_learner)]
KINDS = [(kind, strategy, unpack) for kinds, unpack in ENDS for kind, strategy in kinds.items()]
EACH_KIND = pytest.mark.parametrize(("kind", "heads", "unpack"), KINDS, ids=[kind.__name__ for kind, _, _ in KINDS])

Unpack = Callable[[bytes], tuple[Any, memoryview]]


def framed(header: Any) -> bytes:
    """A message with this header, whatever it is."""
    packed = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    return len(packed).to_bytes(4, "little") + packed


def unpacked_or_refused(unpack: Unpack, data: bytes) -> Any:
    """The header, or None for a `WireError` in one line."""
    refusal = ""
    try:
        return unpack(data)[0]
    except WireError as error:
        refusal = str(error)
    assert refusal.isprintable()
    return None


def sample(kind: type[Any]) -> dict[str, Any]:
    """A valid header as a map."""
    values: dict[str, Any] = {
        **dict.fromkeys(("protocol", "id", "captured_ns", "seq", "ask", "episode", "index", "now_ns", "sent_ns"), 1),
        **dict.fromkeys(("backlog", "seed", "env_steps", "policy_size", "exit_code", "size", "offset", "actions"), 1),
        **dict.fromkeys(("received_ns", "replied_ns", "updates", "replay_steps"), 1),
        **dict.fromkeys(("relod", "reason", "run_dir", "algorithm", "preset", "message", "hint", "robot"), "words"),
        **dict.fromkeys(("policy_layout", "package"), "words"),
        **dict.fromkeys(("run", "learner"), "0" * 32),
        **dict.fromkeys(("updates_per_s", "rtt_ms"), 0.5),
        **dict.fromkeys(("token", "retry", "has_policy"), True),
        "nonce": bytes(16),
        "proof": b"",
        "acts": "robot",
        "codec": "raw",
        "precision": "float16",
        "task": msgspec.to_builtins(SPEC),
        "presets": {},
        "agent": {},
        "metrics": {},
        "frame_ids": [1],
        "frames": [[1, 2, 3]],
        "version": [1, 2],
        "position": None,
        "image_hw": [3, 4],
        "stamps": [1, 2, 3, 4],
    }
    config = kind.__struct_config__
    return {config.tag_field: config.tag, **{name: values[name] for name in kind.__struct_fields__}}


def test_every_message_is_tested():
    assert set(FROM_ROBOT) == set(get_args(wire.FromRobot))
    assert set(FROM_LEARNER) == set(get_args(wire.FromLearner))


@EACH_KIND
@given(data=st.data(), payload=st.binary(max_size=100))
def test_what_is_packed_is_unpacked(kind, heads, unpack, data, payload):
    head = data.draw(heads)
    unpacked, rest = unpack(pack(head, payload))
    assert unpacked == head
    assert rest == payload


@EACH_KIND
def test_every_field_is_needed_unless_it_has_a_default(kind, heads, unpack):
    header = sample(kind)
    unpack(framed(header))
    optional = {field.name for field in msgspec.structs.fields(kind) if field.default is not msgspec.NODEFAULT}
    assert optional == {
        wire.Observe: {"frames"},
        wire.Ping: {"backlog", "rtt_ms"},
        wire.Challenge: {"image_hw", "preset"},
        wire.Answer: {"stamps"},
        wire.Refused: {"hint", "retry"},
        wire.Welcome: {"policy_layout", "package"},
    }.get(kind, set())
    for name in header:
        without = {key: value for key, value in header.items() if key != name}
        if name in optional:
            unpack(framed(without))
        else:
            with pytest.raises(WireError, match=name):
                unpack(framed(without))


@EACH_KIND
def test_no_other_field_is_allowed(kind, heads, unpack):
    with pytest.raises(WireError, match="unknown field `more`"):
        unpack(framed({**sample(kind), "more": 1}))


@EACH_KIND
def test_no_field_takes_a_value_of_another_type(kind, heads, unpack):
    for name in sample(kind):
        for wrong in ({"map": "of other things"}, ["list"], b"bytes" * 10, 2**63, -(2**63), None, "\n", 1.5, False):
            try:
                head, _ = unpack(framed({**sample(kind), name: wrong}))
            except WireError:
                continue
            assert acceptable(name, getattr(head, name), wrong), (name, wrong)


def acceptable(name: str, value: Any, given_: Any) -> bool:
    """Whether a field may be what another field must not."""
    if isinstance(given_, bool):
        return name in ("token", "retry", "has_policy")
    if given_ == {"map": "of other things"}:
        return name == "agent"
    free_text = ("algorithm", "preset", "policy_layout", "package")
    return {
        "\n": name in free_text,
        1.5: name in ("updates_per_s", "rtt_ms"),
        None: name in ("position", "image_hw", "stamps"),
        -(2**63): name.endswith("_ns") or name in ("updates_per_s", "rtt_ms"),
        2**63: name in ("updates_per_s", "rtt_ms"),
    }.get(given_ if not isinstance(given_, list) else "list", False)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (wire.Join, "robot", ""),
        (wire.Join, "robot", "a" * 65),
        (wire.Join, "robot", "../up"),
        (wire.Join, "robot", "name\n"),
        (wire.Join, "run", "0" * 32 + "\n"),
        (wire.Join, "run", "G" * 32),
        (wire.Join, "acts", "nobody"),
        (wire.Join, "codec", "pickle"),
        (wire.Join, "nonce", bytes(15)),
        (wire.Join, "proof", bytes(33)),
        (wire.Join, "task", {"name": "only"}),
        (wire.Join, "presets", {"sac": {"agent": b"bytes"}}),
        (wire.Join, "presets", {"sac": {"agent": msgspec.msgpack.Ext(5, b"")}}),
        (wire.Join, "presets", {"sac": {1: 1}}),
        (wire.Join, "presets", {"sac": {"a": {"b": {"c": {"d": {}}}}}}),
        (wire.Join, "relod", "x" * 1001),
        (wire.Observe, "frame_ids", []),
        (wire.Observe, "frame_ids", [1] * 65),
        (wire.Observe, "frame_ids", [-1]),
        (wire.RecordHead, "seq", -1),
        (wire.RecordHead, "seq", 2**53 + 1),
        (wire.RecordHead, "seq", 1.0),
        (wire.RecordHead, "type", b"record"),
        (wire.Challenge, "image_hw", [0, 1]),
        (wire.Challenge, "image_hw", [1, 4097]),
        (wire.Refused, "exit_code", 0),
        (wire.Answer, "actions", 1025),
        (wire.Welcome, "position", [1]),
        (wire.PolicyPart, "precision", "float64"),
    ],
)
def test_values_out_of_bounds_are_refused(kind, name, value):
    unpack = unpack_from_robot if kind in FROM_ROBOT else unpack_from_learner
    with pytest.raises(WireError, match="the header is not one of this protocol"):
        unpack(framed({**sample(kind), name: value}))


def test_a_message_of_the_other_end_is_none():
    for kinds, unpack in ((FROM_ROBOT, unpack_from_learner), (FROM_LEARNER, unpack_from_robot)):
        for kind in kinds:
            with pytest.raises(WireError, match="Invalid value"):
                unpack(framed(sample(kind)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\0",
        b"\1\0\0\0",
        (wire.MAX_HEADER_BYTES + 1).to_bytes(4, "little") + bytes(wire.MAX_HEADER_BYTES + 1),
        b"\xff\xff\xff\xff" + bytes(100),
        framed(b"\xc1"),
        framed(b"\x82\xa4type\xa4ping\xa7sent_ns\x01more"),
        framed(b"\x82\xa4type\xa3bye\xa6reason\xa2\xff\xfe"),  # no UTF-8
        framed(b"\x82\xa4type\xa3bye\xa6reason\xdb\xff\xff\xff\xff"),  # a text of 4 GiB, not there
        framed(b"\x91" * 10_000 + b"\1"),
        framed(b"\x82\xa4type\xa4join\xa7presets\x81\xa1x\x81\xa1y" + b"\x91" * 30_000 + b"\1"),
        framed(b"\x81\x80\x01"),
        framed(None),
        framed([]),
        framed({}),
    ],
)
@pytest.mark.parametrize("unpack", [unpack_from_robot, unpack_from_learner])
def test_what_is_no_message_is_refused(data, unpack):
    with pytest.raises(WireError):
        unpack(data)


def test_a_message_cut_anywhere_in_its_header_is_refused():
    data = pack(wire.Ping(sent_ns=5))
    for end in range(len(data)):
        with pytest.raises(WireError):
            unpack_from_robot(data[:end])


@EACH_KIND
@given(data=st.data())
def test_a_damaged_message_is_refused_or_another_message_and_nothing_else(kind, heads, unpack, data):
    damaged = bytearray(framed(sample(kind)))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    head = unpacked_or_refused(unpack, bytes(damaged))
    if head is not None:
        assert pack(unpack(pack(head))[0]) == pack(head)  # bytes, for a NaN equals nothing


@given(st.binary(max_size=200))
@example(b"\x04\0\0\0\xd6\xff\xff\xff")
def test_any_bytes_are_a_message_or_refused(data):
    for unpack in (unpack_from_robot, unpack_from_learner):
        for candidate in (data, framed(data)):
            unpacked_or_refused(unpack, candidate)


def test_an_error_quotes_what_was_received_in_one_short_line_that_moves_no_cursor():
    with pytest.raises(WireError) as caught:
        unpack_from_robot(framed({"type": "ping", "sent_ns": 1, "a\nb\x1b[2J" + "x" * 10_000: 1}))
    assert r"a\nb\x1b[2Jxxx" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_payload_is_not_copied():
    data = pack(wire.FrameHead(id=1, captured_ns=2), bytes(1000))
    assert unpack_from_robot(data)[1].obj is data


def test_the_pages_example_is_what_the_code_sends():
    dump = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} {1,2})+)", PAGE, re.MULTILINE)
    data = bytes.fromhex("".join(dump))
    head, payload = unpack_from_robot(data)
    end = messages.decode(bytes(payload))
    assert isinstance(end, EpisodeEnd)
    assert (head, end.episode, end.length, end.frame_ids, end.proprio.tolist()) == (
        wire.RecordHead(seq=7),
        3,
        2,
        (41,),
        [0.5],
    )
    assert (end.return_, end.terminated, end.success, end.reason, end.observed_ns) == (-2.0, True, True, "goal", 10**9)
    assert pack(head, messages.encode(end)) == data


def test_the_page_names_every_message_and_every_field():
    for kind, _, _ in KINDS:
        assert f"**`{kind.__struct_config__.tag}`**" in PAGE
        for name in kind.__struct_fields__:
            assert f"`{name}`" in PAGE, (kind, name)
    for name in TaskSpec.__slots__:
        assert f"`{name}`" in PAGE, name
