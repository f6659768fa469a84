"""Every robot that relod brings, held to what is asked of robots from outside."""

from __future__ import annotations

import importlib.util

import pytest

from relod.testing import RobotContract

needs_ur_rtde = pytest.mark.skipif(importlib.util.find_spec("rtde_control") is None, reason="no ur_rtde here")


class TestCreate(RobotContract):
    task = "create"


class TestTrack(RobotContract):
    task = "track"


@needs_ur_rtde
class TestUR5(RobotContract):
    task = "ur5"
    nowhere = "127.0.0.254"


@needs_ur_rtde
class TestUR5MinTime(RobotContract):
    task = "ur5-min-time"
    nowhere = "127.0.0.254"


class TestGymnasium(RobotContract):
    task = "gym:Pendulum-v1"
