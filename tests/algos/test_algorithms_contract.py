"""Every algorithm that relod brings, held to what is asked of algorithms from outside."""

from __future__ import annotations

from typing import ClassVar

from relod.testing import AgentContract

NETWORK = {"conv_channels": 4, "conv_strides": [2, 1], "hidden": [16], "shift_px": 1}


class TestSac(AgentContract):
    algorithm = "sac"
    small: ClassVar = {**NETWORK, "batch_size": 8, "init_steps": 40, "update_after": 40}


class TestPpo(AgentContract):
    algorithm = "ppo"
    small: ClassVar = {**NETWORK, "rollout_steps": 60, "reuse_steps": 120, "minibatch": 16, "epochs": 2}
