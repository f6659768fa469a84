"""Scalars for TensorBoard, through its own writer: no torch, and nothing imported unless it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import SettingsError

__all__ = ["EventWriter"]


class EventWriter:
    """Writes an event file into `folder`; `SettingsError` when TensorBoard is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise SettingsError(
                f"run.tensorboard is set, but TensorBoard cannot be imported ({error})", "pip install relod[tb]"
            ) from error
        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))

    def add(self, scalars: Mapping[str, float], steps: int, utc_s: float) -> None:
        """Add scalars at an environment step."""
        values = [self._summary.Value(tag=name, simple_value=float(value)) for name, value in scalars.items()]
        self._writer.add_event(self._event(step=steps, wall_time=utc_s, summary=self._summary(value=values)))

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
