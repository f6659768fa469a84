"""The arena: the paper is where it should be, and nothing else looks like it."""

import math

import cv2
import numpy as np
import pytest

from relod.robots.create2.arena import ARENA, ArenaLook, ArenaRenderer


def target_fraction(image):
    return np.mean(cv2.inRange(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), (30, 68, 0), (85, 255, 255)) > 0)


@pytest.fixture(scope="module")
def renderer():
    return ArenaRenderer()


def facing(renderer, distance_m, look):
    return target_fraction(renderer.render(ARENA.half_x_m - distance_m, look.paper_y_m, 0.0))


def test_target_fills_twelve_percent_at_half_a_metre(renderer):
    look = ArenaLook()
    renderer.set_look(look)
    assert facing(renderer, 0.60, look) < 0.105
    assert facing(renderer, 0.56, look) < 0.12 < facing(renderer, 0.50, look)
    assert facing(renderer, 0.35, look) > 0.3


def test_target_is_on_the_far_wall_only(renderer):
    renderer.set_look(ArenaLook())
    seen = [target_fraction(renderer.render(0.0, 0.0, i * math.pi / 6)) for i in range(12)]
    assert max(seen) == seen[0]
    assert max(seen[3:10]) < 0.005


def test_target_is_left_when_the_robot_looks_right(renderer):
    renderer.set_look(ArenaLook())
    image = renderer.render(0.0, 0.0, -0.35)
    mask = cv2.inRange(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), (30, 68, 0), (85, 255, 255))
    assert np.nonzero(mask)[1].mean() < 60


@pytest.mark.parametrize("seed", range(3))
def test_drawn_looks_can_be_told_apart_from_their_target(renderer, seed):
    check_look(renderer, seed)


@pytest.mark.slow
def test_sixty_more_looks(renderer):
    for seed in range(100, 160):
        check_look(renderer, seed)


def check_look(renderer, seed):
    look = ArenaLook.draw(np.random.default_rng(seed))
    renderer.set_look(look)
    assert facing(renderer, 0.60, look) < 0.12 < facing(renderer, 0.47, look)
    rng = np.random.default_rng([seed, 1])
    for index in range(10):  # backs to the paper
        x, y, heading = rng.uniform(-0.3, 0.3), rng.uniform(-0.15, 0.15), rng.uniform(1.9, 4.3)
        assert target_fraction(renderer.render(x, y, heading, index=index)) < 0.01


def test_level_zero_is_the_default_look():
    assert ArenaLook.draw(np.random.default_rng(5), 0.0) == ArenaLook()


def test_same_generator_same_look():
    looks = [ArenaLook.draw(np.random.default_rng(9)) for _ in range(2)]
    assert looks[0] == looks[1]
    assert looks[0] != ArenaLook.draw(np.random.default_rng(10))


def test_pictures_repeat_bit_by_bit(renderer):
    look = ArenaLook.draw(np.random.default_rng(4))
    other = ArenaRenderer()
    other.set_look(look)
    renderer.set_look(look)
    renderer.render(0.3, 0.1, 2.0)
    pose = (0.1, -0.1, 0.7, 0.15, 1.2, 17)
    first = renderer.render(*pose)
    np.testing.assert_array_equal(first, other.render(*pose))
    assert first.shape == (120, 160, 3)
    kept = first.copy()
    renderer.render(0.0, 0.0, 0.0)
    np.testing.assert_array_equal(first, kept)  # a new array each time


def test_another_seed_is_another_noise():
    pictures = [ArenaRenderer(seed=seed).render(0.0, 0.0, 0.0).astype(int) for seed in (0, 1)]
    assert 1 < np.abs(pictures[0] - pictures[1]).mean() < 8
