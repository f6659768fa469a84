"""Suites that whoever adds to relod inherits in tests of their own; they need pytest."""

from .robot import RobotContract

__all__ = ["RobotContract"]
