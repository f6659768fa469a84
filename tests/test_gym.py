"""relod's tasks behind Gymnasium's interface, on both clocks."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from relod.errors import SettingsError, StartError
from relod.gym import ENVIRONMENTS

SMALL = ("task.image_height=24", "task.image_width=32", "task.frames=2")


def make(name: str = "relod/CreateReacher-v0", **options):
    return gymnasium.make(name, settings=SMALL, **options)


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("name", sorted(ENVIRONMENTS))
@pytest.mark.filterwarnings("ignore:.*Box observation space (m|max).*infinity.*")
def test_gymnasiums_own_check_passes(name, images):
    env = make(f"relod/{name}", images=images, render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=False)
    env.close()


def test_a_seed_repeats_an_episode_and_the_next_ones():
    def run(seed: int) -> list[float]:
        env = make("relod/UR5VisualReacher-v0")
        rng, seen = np.random.default_rng(0), []
        observation, _ = env.reset(seed=seed)
        for _ in range(2):
            over = False
            while not over:
                seen.append(float(observation["vector"].sum()) + float(observation["images"].mean()))
                observation, reward, terminated, truncated, info = env.step(rng.uniform(-1, 1, 5).astype(np.float32))
                seen.append(reward)
                over = terminated or truncated
            assert (terminated, info["reason"], info["success"]) == (False, "time limit", False)
            observation, _ = env.reset()
        env.close()
        return seen

    first, second, other = run(1), run(1), run(2)
    assert len(first) == 400
    assert first == second
    assert first != other


def test_observations_are_the_tasks_and_pictures_the_cameras():
    env = make(render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    assert observation["images"].shape == (2, 24, 32, 3)
    assert env.observation_space.contains(observation)
    picture = env.render()
    assert picture.shape == (120, 160, 3)
    assert picture.dtype == np.uint8
    assert make(images=False).reset(seed=0)[0].shape == (8,)


def test_an_episode_can_be_left_and_begun_anew():
    env = make("relod/UR5VisualReacher-v0")
    env.reset(seed=0)
    for _ in range(10):
        env.step(np.ones(5, np.float32))
    observation, _ = env.reset()
    assert observation["vector"][:5] == pytest.approx([1.5707, -2.0, 2.17, -3.0415, -1.5707], abs=0.01)
    assert observation["vector"][10:] == pytest.approx(np.zeros(5))


def test_an_action_that_is_no_number_makes_the_robot_stand():
    env = make("relod/UR5VisualReacher-v0")
    env.reset(seed=0)
    before = env.step(np.zeros(5, np.float32))[0]["vector"][:5]
    for _ in range(5):
        observation, _, _, _, _ = env.step(np.full(5, np.nan, np.float32))
    assert observation["vector"][:5] == pytest.approx(before, abs=1e-3)


def test_what_is_wrong_is_said():
    with pytest.raises(SettingsError, match=r"unknown clock 'real'; known: virtual, wall"):
        make(clock="real")
    env = make().unwrapped
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(2, np.float32))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"an action of shape \(3,\), where \(2,\) is expected"):
        env.step(np.zeros(3, np.float32))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_in_real_time_the_robot_does_not_wait_for_the_caller():
    import time

    env = gymnasium.make(
        "relod/CreateReacher-v0",
        clock="wall",
        settings=(
            *SMALL,
            "task.episode_s=2",
            "safety.max_unanswered=10",
            "task.back_off_min_s=0.2",
            "task.back_off_max_s=0.3",
        ),
    ).unwrapped
    try:
        observation, _ = env.reset(seed=0)
        assert env.observation_space.contains(observation)
        begun = time.monotonic()
        for _ in range(10):
            _, reward, terminated, truncated, info = env.step(np.array([0.2, -0.2], np.float32))
            assert (reward, terminated, truncated, info["late"]) == (-1.0, False, False, 0)
        assert time.monotonic() - begun == pytest.approx(0.45, abs=0.2)
        time.sleep(0.3)  # the caller thinks; the robot goes on
        _, reward, _, _, info = env.step(np.array([0.2, -0.2], np.float32))
        assert 5 <= info["late"] <= 9
        assert reward == -1.0 - info["late"]
        steps = 0
        while not truncated:
            _, _, _, truncated, info = env.step(np.zeros(2, np.float32))
            steps += 1
        assert info["reason"] == "time limit"
        assert 20 <= steps <= 44
        observation, _ = env.reset()
        env.step(np.zeros(2, np.float32))
        assert env.observation_space.contains(env.reset()[0])  # in the middle of an episode
    finally:
        env.close()


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_robot_that_is_not_there_is_said_by_the_first_reset():
    env = gymnasium.make("relod/CreateReacher-v0", clock="wall", robot="/dev/nowhere", camera="0").unwrapped
    with pytest.raises(StartError):
        env.reset(seed=0)
