"""Augmentation windows: ranges, edges, one corner per stack, and both implementations against a padded reference."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from relod.algos.augment import gather_windows
from relod.algos.batch import PIXEL, centre_window, copy_stacks, copy_window, crop_window, shift_window


def window_of(stack: np.ndarray, corner: tuple[int, int], out_hw: tuple[int, int]) -> np.ndarray:
    out = np.zeros((len(stack), *out_hw), PIXEL)
    copy_window(np.ascontiguousarray(stack).view(PIXEL)[..., 0], *corner, out)
    return out.view(np.uint8).reshape(len(stack), *out_hw, 3)


def padded_reference(stack: np.ndarray, corner: tuple[int, int], out_hw: tuple[int, int]) -> np.ndarray:
    pad = 8
    padded = np.pad(stack, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    y, x = corner[0] + pad, corner[1] + pad
    return padded[:, y : y + out_hw[0], x : x + out_hw[1]]


@given(
    hw=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    corner=st.tuples(st.integers(-3, 3), st.integers(-3, 3)),
    shrink=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    seed=st.integers(0, 1000),
)
def test_copy_and_gather_are_a_crop_of_the_edge_padded_image(hw, corner, shrink, seed):
    out_hw = (hw[0] - shrink[0], hw[1] - shrink[1])
    corner = tuple(max(1 - out, min(c, size - 1)) for c, out, size in zip(corner, out_hw, hw, strict=True))
    stack = np.random.default_rng(seed).integers(0, 256, (3, *hw, 3), np.uint8)
    expected = padded_reference(stack, corner, out_hw)
    assert np.array_equal(window_of(stack, corner, out_hw), expected)
    gathered = gather_windows(torch.from_numpy(stack)[None], torch.tensor([corner]), out_hw)
    assert np.array_equal(gathered[0].numpy(), expected)


def test_zero_shift_is_the_identity():
    window = shift_window((6, 8), 0)
    stack = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), np.uint8)
    (corner,) = window.offsets(np.random.default_rng(0), 1).tolist()
    assert np.array_equal(window_of(stack, corner, window.out_hw), stack)
    assert np.array_equal(window_of(stack, (0, 0), centre_window((6, 8)).out_hw), stack)


def test_a_plain_image_keeps_its_colour_under_any_shift():
    stack = np.full((3, 6, 8, 3), (10, 200, 30), np.uint8)
    for corner in shift_window((6, 8), 4).offsets(np.random.default_rng(0), 50).tolist():
        assert (window_of(stack, corner, (6, 8)) == (10, 200, 30)).all()


def test_shift_covers_its_whole_range_evenly():
    offsets = shift_window((48, 64), 2).offsets(np.random.default_rng(1), 10_000)
    for axis in (0, 1):
        values, counts = np.unique(offsets[:, axis], return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert counts.min() > 1_700


def test_the_papers_crop_has_its_sizes_and_half_range():
    window = crop_window((120, 160), 0.01)
    assert window.out_hw == (118, 156)
    assert window.centre == (1, 2)
    offsets = window.offsets(np.random.default_rng(0), 1_000)
    assert offsets.min(0).tolist() == [0, 0]
    assert offsets.max(0).tolist() == [1, 2]


def test_every_frame_of_a_stack_is_cut_at_the_same_place():
    frame = np.random.default_rng(0).integers(0, 256, (1, 6, 8, 3), np.uint8)
    out = window_of(np.repeat(frame, 3, 0), (1, -2), (6, 8))
    assert np.array_equal(out[0], out[1])
    assert np.array_equal(out[0], out[2])


@given(
    stacks=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=4),
    in_a_row=st.booleans(),
    pad=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_stacks_are_copied_frame_by_frame_wherever_their_frames_lie(stacks, in_a_row, pad, seed):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (12, 6, 8, 3), np.uint8)
    numbers = np.array([range(stack[0], stack[0] + 3) for stack in stacks] if in_a_row else stacks)
    corners = shift_window((6, 8), pad).offsets(rng, len(numbers))
    out = np.zeros((*numbers.shape, 6, 8, 3), np.uint8)
    copy_stacks(frames.view(PIXEL)[..., 0], numbers, corners, out.view(PIXEL)[..., 0])
    for stack, corner, copied in zip(numbers, corners.tolist(), out, strict=True):
        assert np.array_equal(copied, padded_reference(frames[stack], corner, (6, 8)))
    copy_stacks(frames.view(PIXEL)[..., 0], numbers, None, out.view(PIXEL)[..., 0])
    assert np.array_equal(out, frames[numbers])
