"""Spans: nothing is lost unnoticed, and percentiles are right to one per cent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.runtime.spans import Histogram, SpanRing, Stage


def add(writer, count: int, first: int = 0) -> None:
    for index in range(first, first + count):
        writer.add(Stage.ACT, index, 1000 + index, 2000 + index)


def test_spans_are_drained_once_in_order():
    ring = SpanRing(("control", "device"), capacity=16)
    writer = ring.writer("control")
    add(writer, 5)
    rows = ring.drain("control")
    assert rows["index"].tolist() == [0, 1, 2, 3, 4]
    assert rows["start_ns"].tolist() == [1000, 1001, 1002, 1003, 1004]
    assert set(rows["stage"]) == {Stage.ACT}
    assert len(ring.drain("control")) == 0
    add(writer, 2, 5)
    assert ring.drain("control")["index"].tolist() == [5, 6]
    assert len(ring.drain("device")) == 0
    assert ring.lost == 0


@given(blocks=st.lists(st.integers(0, 40), max_size=12))
def test_what_was_overwritten_is_counted_and_the_rest_is_the_newest(blocks):
    ring, written = SpanRing(("control",), capacity=16), 0
    writer = ring.writer("control")
    got, lost = 0, 0
    for count in blocks:
        add(writer, count, written)
        written += count
        rows = ring.drain("control")
        assert rows["index"].tolist() == list(range(written - min(count, 16), written))
        got, lost = got + len(rows), lost + max(0, count - 16)
        assert (ring.lost, got + ring.lost) == (lost, written)


def test_a_half_written_span_is_left_out_until_it_is_whole():
    ring = SpanRing(("control",), capacity=8)
    writer = ring.writer("control")
    add(writer, 3)
    row = ring._row("control")
    whole = row["end_ns"][3]
    row["end_ns"][3] = 7  # the third span's check no longer fits
    assert ring.drain("control")["index"].tolist() == [0, 1]
    row["end_ns"][3] = whole
    assert ring.drain("control")["index"].tolist() == [2]
    assert ring.lost == 0


def test_a_restarted_writer_goes_on_after_its_predecessor():
    ring = SpanRing(("control",), capacity=8)
    add(ring.writer("control"), 3)
    add(ring.writer("control"), 2, 3)
    assert ring.drain("control")["index"].tolist() == [0, 1, 2, 3, 4]


def test_stamps_may_be_negative_or_large():
    ring = SpanRing(("control",), capacity=8)
    ring.writer("control").add(Stage.UPDATE, 2**63, -5, 2**63 - 1)
    (row,) = ring.drain("control")
    assert (int(row["index"]), int(row["start_ns"]), int(row["end_ns"])) == (2**63, -5, 2**63 - 1)


durations_ms = st.lists(st.floats(1e-3, 1e5), min_size=1, max_size=200)


@given(values=durations_ms, percent=st.sampled_from([50.0, 90.0, 99.0, 99.9, 100.0]))
def test_percentiles_are_never_too_good_and_at_most_one_per_cent_above(values, percent):
    histogram = Histogram()
    histogram.add_ms(values)
    exact = float(np.percentile(values, percent, method="inverted_cdf"))
    assert exact * (1 - 1e-9) <= histogram.percentile_ms(percent) <= exact * (1.01 + 1e-9)


@given(values=durations_ms, cut=st.integers(0, 200))
def test_durations_may_come_in_parts_and_be_kept_as_counts(values, cut):
    at_once, in_parts = Histogram(), Histogram()
    at_once.add_ms(values)
    in_parts.add_ms(values[:cut])
    in_parts.add_ms(values[cut:])
    kept = Histogram.of(at_once.counts, at_once.max_ms)
    assert at_once.summary_ms() == in_parts.summary_ms() == kept.summary_ms()
    assert at_once.count == in_parts.count == kept.count == len(values)


@pytest.mark.parametrize("values", [[], [-3.0], [0.0], [1e-9], [5e9]])
def test_values_outside_the_bins_are_bounded_by_the_largest(values):
    histogram = Histogram()
    histogram.add_ms(values)
    told = histogram.summary_ms()
    assert told["max"] == round(max([0.0, *values]), 3)
    assert 0.0 <= told["p50"] <= told["p99"] <= told["max"]
    assert list(told) == ["p50", "p90", "p99", "p999", "max"]


def test_histograms_do_not_share_their_counts():
    one = Histogram()
    one.add_ms([1.0])
    other = Histogram.of(one.counts, one.max_ms)
    other.add_ms([1.0])
    assert (one.count, int(one.counts.sum())) == (1, 1)
