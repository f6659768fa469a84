"""Checkpoints: equal bytes for equal states, whole files only, and nothing damaged is ever taken for good."""

from __future__ import annotations

import errno
import math
import resource
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from relod.errors import EXIT_START, SafetyStop, StartError
from relod.runtime import rundir
from relod.runtime.checkpoint import (
    FORMAT,
    METADATA,
    Checkpoint,
    Counters,
    good_checkpoints,
    newest_readable,
    read_checkpoint,
    write_checkpoint,
)
from tests.runtime.smallrun import Run

# A 128-bit random state, as PCG64 has it, is beyond what most JSON readers keep.
RNG = {"bit_generator": "PCG64", "state": {"state": 2**127 + 1, "inc": 2**100 + 3}, "has_uint32": 0, "uinteger": 0}


def make(updates: int = 7, **extra: object) -> Checkpoint:
    tensors = {
        "policy.weight": torch.arange(600, dtype=torch.float32).reshape(20, 30) + updates,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0),
        "count": torch.tensor(updates),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
    }
    counters = Counters(
        updates=updates,
        env_steps=2 * updates,
        epoch=3,
        published=updates - 1,
        published_ns=10**15 + 1,
        rate_ns=12345,
        rollbacks=0,
        rng=RNG,
        extra=dict(extra),
    )
    return Checkpoint(tensors=tensors, counters=counters)


def refused(path: Path) -> str:
    with pytest.raises(StartError) as caught:
        read_checkpoint(path)
    assert caught.value.exit_code == EXIT_START
    assert "\n" not in str(caught.value)
    assert str(path) in caught.value.message
    return caught.value.message


def test_what_was_written_is_read(tmp_path):
    written = make(task="create", actor={"rng": RNG, "held": [0.25, -1.0]}, log={"offset": 2**40})
    read = read_checkpoint(write_checkpoint(tmp_path / "made", written))
    assert read.counters == written.counters
    assert read.tensors.keys() == written.tensors.keys()
    for name, tensor in written.tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)


def test_equal_states_give_equal_bytes(tmp_path):
    written = make(a=1, b=2, c=3)
    shuffled = Checkpoint(
        tensors=dict(reversed(written.tensors.items())),
        counters={**make(c=3, b=2, a=1).counters, "rng": dict(reversed(RNG.items()))},
    )
    files = {
        write_checkpoint(tmp_path / str(n), checkpoint).read_bytes() for n, checkpoint in enumerate([written, shuffled])
    }
    assert len(files) == 1
    assert write_checkpoint(tmp_path / "other", make(a=1, b=2, c=4)).read_bytes() not in files


def test_the_newest_and_the_one_before_it_are_kept(tmp_path):
    assert good_checkpoints(tmp_path) == []
    paths = [write_checkpoint(tmp_path, make(updates)) for updates in (5, 50, 500, 1_000_000)]
    assert good_checkpoints(tmp_path) == [paths[3], paths[2]]
    assert sorted(tmp_path.iterdir()) == paths[2:]


def test_checkpoints_of_a_way_that_was_given_up_go(tmp_path):
    for updates in (100, 300):
        write_checkpoint(tmp_path, make(updates))
    write_checkpoint(tmp_path, make(200))  # after going back to 100, as 300 was found damaged
    assert [read_checkpoint(path).counters["updates"] for path in good_checkpoints(tmp_path)] == [200, 100]


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "learner-000000001.safetensors")


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path_factory, place, bit):
    path = write_checkpoint(tmp_path_factory.mktemp("flip"), make())
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    refused(path)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, part):
    path = write_checkpoint(tmp_path, make())
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    assert "damaged" in refused(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda header: header | {"format": FORMAT + 1}, f"has format {FORMAT + 1}; .* reads format {FORMAT}"),
        (lambda header: {"format": FORMAT + 1}, f"has format {FORMAT + 1}; .* reads format {FORMAT}"),
        (lambda header: header | {"counters": {"updates": 1}}, "missing required field"),
        (lambda header: header | {"counters": header["counters"] | {"updates": 8}}, "does not match its digest"),
    ],
)
def test_another_header_is_refused(tmp_path, change: Callable[[dict], dict], told):
    path = write_checkpoint(tmp_path, make())
    with safe_open(path, framework="pt") as file:
        header = msgspec.json.decode(file.metadata()[METADATA])
    path.write_bytes(save(make().tensors, {METADATA: msgspec.json.encode(change(header)).decode()}))
    with pytest.raises(StartError, match=told):
        read_checkpoint(path)


def test_a_file_of_another_program_is_refused(tmp_path):
    path = tmp_path / "learner-000000001.safetensors"
    path.write_bytes(save({"weight": torch.zeros(3)}, {"format": "pt"}))
    assert f"has no number of its format; this version of relod reads format {FORMAT}" in refused(path)


def test_what_is_not_finite_is_refused(tmp_path):
    checkpoint = make()
    checkpoint.tensors["scalar"].fill_(math.nan)
    assert "scalar is not finite" in refused(write_checkpoint(tmp_path, checkpoint))


def test_the_older_one_is_taken_when_the_newest_is_damaged(tmp_path):
    assert newest_readable(tmp_path) == (None, None, [])
    older, newer = write_checkpoint(tmp_path, make(1)), write_checkpoint(tmp_path, make(2))
    found = newest_readable(tmp_path)
    assert found.checkpoint is not None
    assert (found.checkpoint.counters["updates"], found.path, found.problems) == (2, newer, [])
    newer.write_bytes(newer.read_bytes()[:-1])
    found = newest_readable(tmp_path)
    assert found.checkpoint is not None
    assert (found.checkpoint.counters["updates"], found.path) == (1, older)
    (problem,) = found.problems
    assert str(newer) in problem
    assert "damaged" in problem
    with pytest.raises(StartError, match="damaged"):
        newest_readable(newer)
    older.write_bytes(b"")
    with pytest.raises(StartError, match=r"2\.safetensors: damaged.*1\.safetensors: damaged.*; none is left"):
        newest_readable(tmp_path)


def test_a_half_written_file_is_no_checkpoint(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path, make(1))

    def die(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rundir.os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, make(2))
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    assert newest_readable(tmp_path).path == path


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(tmp_path):
    run = Run()
    run.steps(30)
    path = write_checkpoint(tmp_path, run.loop.checkpoint())
    before = path.read_bytes()
    run.steps(30)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(SafetyStop, match="the disk is full") as caught:
            write_checkpoint(tmp_path, run.loop.checkpoint())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    assert read_checkpoint(path).counters["updates"] == 5
