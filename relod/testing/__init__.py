"""Suites that whoever adds to relod inherits in tests of their own; they need pytest."""

from .agent import AgentContract
from .robot import RobotContract

__all__ = ["AgentContract", "RobotContract"]
