"""The actor of a control process whose actions come from another host; without torch."""

from __future__ import annotations

from ...types import Observation

__all__ = ["AskingHost"]


class AskingHost:
    """`control.ActorHost` and its actor: every answer comes later, and there is no policy here to keep up to date."""

    version = (0, 0)

    @property
    def actor(self) -> AskingHost:
        return self

    def act(self, observation: Observation) -> None:
        """Nothing yet: the control process sends the observation on."""

    def poll(self) -> bool:
        """No policy ever comes."""
        return False
