"""The table of stages: what fits into a line, what is shown and what is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from relod.bench.stagetable import COLUMNS, TITLE, format_stages, histogram, pair_ms, short_ms
from relod.runtime.timing import STAGES


@pytest.mark.parametrize(
    ("value_ms", "shown"),
    [
        *((0, "0.00"), (0.006, "0.01"), (1.234, "1.23"), (9.996, "10.0"), (14.26, "14.3"), (99.96, "100")),
        *((1234.4, "1234"), (9999.6, "10s"), (123_456, "123s"), (999_600, "17m"), (1e9, "999m")),
    ],
)
def test_a_time_in_four_characters(value_ms, shown):
    assert short_ms(value_ms) == shown


def test_a_pair_of_nothing():
    assert pair_ms([]) == "-"
    assert pair_ms([0.5] * 98 + [2000.0] * 2) == "0.50/2000"


def test_the_histogram_has_one_scale():
    assert histogram([], 2) == " " * 8
    assert histogram([0.001, 0.2], 2) == "█       "
    assert histogram([0.4, 2.0, 2.0], 2) == " ▄█     "
    assert histogram([500.0, 9e9], 2) == "       █"
    assert histogram([1.0] * 1000 + [50.0], 2) == "  █  ▁  "  # one in a thousand is seen
    assert len(histogram([3.0], 4)) == 16


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_line_fits(count):
    full = {info.name: np.array([1e-3, 99.0, 123456.0]) for info in STAGES}
    columns = {f"a column with a long name {number}": full for number in range(count)}
    text = format_stages(columns, [("a fact that is told at length", ["figure " * 9] * count)])
    assert max(map(len, text.splitlines())) <= COLUMNS
    for number in range(count):
        assert f"{number}" in text or count >= 3  # names are cut only where there is no room


def test_titles_are_shown_whole():
    assert all(len(info.title) <= TITLE for info in STAGES)


def test_what_nobody_has_is_left_out():
    columns = {"local-only": {"write": np.array([0.5])}, "remote-only": {"uplink": np.array([3.0])}}
    head, names, *rows = format_stages(columns, [("overruns", ["0", "12"]), ("lag", ["", ""])]).splitlines()
    assert "0.1 to 1000 ms, 4 bars per decade" in head
    assert names.split() == ["local-only", "remote-only"]
    assert [row.split()[0] for row in rows] == ["uplink", "command", "overruns"]
    uplink, write, overruns = rows
    assert uplink.split() == ["uplink", "-", "3.00/3.00", "█"]
    assert write.split() == ["command", ">", "wire", "0.50/0.50", "█", "-"]
    assert overruns.split() == ["overruns", "0", "12"]
    assert overruns.index("12") + 2 == uplink.index("3.00/3.00") + 9  # under each other, by their right end


def test_the_manual_explains_every_stage():
    manual = (Path(__file__).parents[2] / "docs" / "timing.md").read_text()
    assert [info.name for info in STAGES if f"| `{info.name}` |" not in manual] == []
