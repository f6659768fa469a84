"""Where time went, from spans that were made up: each stage by hand, and what must not be joined."""

from __future__ import annotations

import json

import numpy as np
import pytest

from relod.errors import StartError
from relod.runtime import timing
from relod.runtime.clock import NS_PER_MS
from relod.runtime.rundir import _spans_header
from relod.runtime.spans import SPAN, Stage
from relod.runtime.timing import Spans, percentiles, policy_lag, stage_samples

CYCLE_MS = 45.0


def spans(*found):
    """Spans from (stage, index, start_ms, end_ms)."""
    rows = np.zeros(len(found), SPAN)
    for row, (stage, index, start_ms, end_ms) in zip(rows, found, strict=True):
        row["stage"], row["index"] = stage, index
        row["start_ns"], row["end_ns"] = round(start_ms * NS_PER_MS), round(end_ms * NS_PER_MS)
    return Spans(rows)


def cycle(index, at_ms):
    """A cycle of an episode with a deadline at `at_ms`: 4 ms old packet, 60 ms old frame, command 3 ms later."""
    return (
        (Stage.LATENESS, index, at_ms, at_ms + 0.2),
        (Stage.OBSERVE, index, at_ms + 0.2, at_ms + 0.5),
        (Stage.SENSOR_AGE, index, at_ms - 4, at_ms + 0.2),
        (Stage.FRAME_AGE, index, at_ms - 60, at_ms + 0.2),
        (Stage.FRAME_ARRIVAL, index, at_ms - 60, at_ms - 10),
        (Stage.INFERENCE, index, at_ms + 0.6, at_ms + 2.6),
        (Stage.ACT, index, at_ms, at_ms + 3),
        (Stage.WRITE, index, at_ms + 2.8, at_ms + 3),
        (Stage.SENSED, index, at_ms - 9, at_ms - 4.1),
        (Stage.MOVED, index, at_ms + 3.1, at_ms + 11),
    )


def test_the_stages_of_a_local_cycle():
    found = stage_samples(spans(*cycle(1, 1000), *cycle(2, 1000 + CYCLE_MS)))
    expected = {
        "sensor_delay": 5,
        "frame_delay": 50,
        "sensor_wait": 4.5,
        "lateness": 0.2,
        "inference": 2,
        "write": 0.2,
        "observed_to_wire": 2.5,
        "deadline_to_wire": 3,
        "wire_delay": 0.1,
        "actuator_delay": 7.9,
        "sensor_to_motion": 20,
        "frame_to_motion": 71,
        "agreement": 0.2,
    }
    assert {name: values.tolist() for name, values in found.items() if len(values)} == {
        name: pytest.approx([value, value]) for name, value in expected.items()
    }


def test_a_late_answer_counts_until_something_newer_is_written():
    rows = [(Stage.LATENESS, n, 40 * n, 40 * n + 0.5) for n in range(5)]
    rows += [(Stage.SENSOR_AGE, n, 40 * n - 4, 40 * n + 0.5) for n in range(4)]
    rows += [(Stage.SEND, round((40 * n + 0.5) * NS_PER_MS), 40 * n + 0.5, 40 * n + 2) for n in (1, 2, 3)]
    # Cycle 0 asks nothing; answers to 1 and 2 come too late: 2 and 3 begin with what is held; 4 is of no episode.
    for number, issued_ms in ((0, 1), (2, 80.6), (3, 120.6), (3, 130), (4, 161)):
        rows += [(Stage.WRITE, number, issued_ms, issued_ms + 0.4), (Stage.ACT, number, 40 * number, issued_ms + 0.4)]
    found = stage_samples(spans(*rows))
    assert sorted(found["deadline_to_wire"]) == pytest.approx([1.4, 10.4, 50.4, 90.4])


def test_a_late_answer_moves_nothing():
    rows = [
        *cycle(1, 1000),
        *cycle(2, 1045),
        (Stage.SEND, 1000_200_000, 1000.2, 1010),
        (Stage.SEND, 1045_200_000, 1045.2, 1046),
    ]
    found = stage_samples(spans(*rows))
    assert len(found["observed_to_wire"]) == len(found["sensor_to_motion"]) == 1  # the first cycle only held


def test_a_real_robot_tells_nothing_of_itself():
    rows = [row for row in cycle(1, 1000) if row[0] not in (Stage.SENSED, Stage.MOVED)]
    found = stage_samples(spans(*rows))
    assert not any(len(found[name]) for name in ("sensor_delay", "wire_delay", "sensor_to_motion", "agreement"))
    assert found["observed_to_wire"].tolist() == [2.5]


def test_what_is_far_away_in_time_is_not_joined():
    rows = [row for row in cycle(1, 1000) if row[0] not in (Stage.SENSED, Stage.MOVED)]
    far = [(Stage.SENSED, 1, 900, 910), (Stage.MOVED, 1, 1100, 1110)]
    assert not len(stage_samples(spans(*rows, *far))["sensor_to_motion"])


def test_steps_are_learned_from_by_the_next_update_that_begins():
    learner = spans(
        *((Stage.STORED, 1, 99, 100), (Stage.STORED, 2, 109, 110), (Stage.STORED, 3, 300, 301)),
        *((Stage.UPDATE, 7, 90, 120), (Stage.UPDATE, 8, 120, 150)),
    )
    found = stage_samples(spans(), learner)
    assert found["step_to_learned"].tolist() == [50, 40]  # the third step waits still
    assert found["update"].tolist() == [30, 30]


def test_the_lag_of_the_policy_counts_updates_it_does_not_have():
    learner = spans((Stage.UPDATE, 7, 0, 10), (Stage.UPDATE, 8, 10, 20), (Stage.UPDATE, 9, 20, 30))
    robot = spans((Stage.POLICY_AGE, 7, 12, 15), (Stage.POLICY_AGE, 7, 12, 35), (Stage.POLICY_AGE, 9, 31, 36))
    assert policy_lag(robot, learner).tolist() == [0, 2, 0]
    assert policy_lag(robot, learner, offset_ns=-10 * NS_PER_MS).tolist() == [0, 1, 0]


def test_a_stretch_has_what_ended_in_it():
    found = spans((Stage.POLICY_AGE, 1, 0, 90), (Stage.POLICY_AGE, 2, 0, 100), (Stage.ACT, 3, 150, 200))
    found = found.within(100 * NS_PER_MS, 150 * NS_PER_MS)
    assert found.by_index(Stage.POLICY_AGE).keys() == {2}
    assert not len(found.of(Stage.ACT))


def test_percentiles_are_values_that_were_seen():
    assert percentiles([]) is None
    assert percentiles(range(1, 1001)) == {"p50": 500, "p90": 900, "p99": 990, "p999": 999, "max": 1000}
    assert percentiles([3.0]) == dict.fromkeys(("p50", "p90", "p99", "p999", "max"), 3.0)


def test_spans_are_read_from_a_run(tmp_path):
    with pytest.raises(StartError, match="no spans"):
        Spans.read(tmp_path)
    rows = np.zeros(3, SPAN)
    rows["stage"] = Stage.UPDATE
    (tmp_path / "spans.json").write_text(json.dumps(_spans_header()))
    (tmp_path / "spans.bin").write_bytes(rows.tobytes()[:-5])  # the last one is still being written
    assert len(Spans.read(tmp_path).of(Stage.UPDATE)) == 2
    header = _spans_header() | {"dtype": [["seq", "<u8"]]}
    (tmp_path / "spans.json").write_text(json.dumps(header))
    with pytest.raises(StartError, match="another version"):
        Spans.read(tmp_path)


def test_every_stage_has_a_place_in_the_table():
    names = [info.name for info in timing.STAGES]
    assert len(set(names)) == len(names)
    assert all(len(info.title) <= 24 and "->" in info.meaning for info in timing.STAGES)
    assert set(stage_samples(Spans.none())) == {*names, "agreement"}
