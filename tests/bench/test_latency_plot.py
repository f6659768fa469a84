"""The picture of the modes' latencies: its parts, and that it is drawn from whatever there is."""

from __future__ import annotations

import numpy as np
import pytest

from relod.bench.latencyplot import segments, write_plot
from relod.bench.latencyrow import ModeRow
from relod.errors import StartError
from relod.runtime.timing import STAGES

LOCAL = {"sensor_delay": 5.0, "sensor_wait": 4.0, "inference": 2.0, "observed_to_wire": 3.0, "actuator_delay": 8.0}


def samples(**medians):
    return {name: np.array([median, median, 3 * median]) for name, median in medians.items()}


def row(mode="local-only", **medians):
    return ModeRow(mode=mode, samples=samples(deadline_to_wire=3.0, **medians), cycle_ms=45.0, measured_s=20.0)


def test_the_way_is_seen_from_the_observation():
    found = segments(samples(**LOCAL))
    assert [(each.start, each.p50) for each in found] == [(-9, 5), (-4, 4), (0, 2), (2, 1), (3, 8)]
    assert found[3].label == "hand-over, limits, write"  # observed > wire without inference


def test_a_real_robots_way_begins_and_ends_at_the_wire():
    found = segments(samples(sensor_wait=4.0, inference=2.0, observed_to_wire=3.0))
    assert (found[0].start, found[-1].start + found[-1].p50) == (-4, 3)
    assert segments({}) == []


def test_medians_of_parts_may_be_more_than_that_of_the_whole():
    assert segments(samples(uplink=4.0, observed_to_wire=3.0))[-1].p50 == 0


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_picture_is_drawn(tmp_path, ending):
    out = tmp_path / f"picture.{ending}"
    everything = {info.name: 3.0 for info in STAGES if info.name != "deadline_to_wire"}
    write_plot([row(**LOCAL), row("remote-only", **everything), ModeRow(mode="remote-local")], "a $title$", out)
    assert out.stat().st_size > 10_000
    if ending == "svg":
        text = out.read_text()
        assert "a $title$" in text
        assert "mathdefault" not in text, "a label was left to what is not there"
        assert "remote-local" not in text  # there is nothing to draw of it


def test_little_is_enough(tmp_path):
    write_plot([ModeRow(mode="local-only", samples=samples(lateness=1.0))], "title", tmp_path / "picture.png")


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(StartError, match="cannot be written"):
        write_plot([row(**LOCAL)], "title", tmp_path / "no" / "picture.png")
