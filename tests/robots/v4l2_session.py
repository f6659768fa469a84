"""Run under the V4L2 shim: read the camera, let it stall, unplug it; print what was seen as JSON."""

import json
import os
import sys
import time
from pathlib import Path

from relod.config import CameraSettings
from relod.robots.camera import CameraReader, parse_source


def main(device: Path) -> None:
    stall, away = device.with_name(f"{device.name}.stall"), device.with_name("away.jpg")
    seen: dict[str, object] = {}

    def frames(reader: CameraReader, duration_s: float) -> list[float]:
        """Ages in ms of the frames read for a while."""
        ages, end = [], time.monotonic() + duration_s
        while time.monotonic() < end:
            capture = reader.read(0.1)
            if capture is not None:
                ages.append((time.monotonic_ns() - capture.captured_ns) / 1e6)
                seen["shape"] = capture.image.shape
        return ages

    with CameraReader(parse_source(str(device)), CameraSettings(reopen_s=0.05), height=120, width=160) as reader:
        seen["ages"] = frames(reader, 1.0)
        stall.touch()
        frames(reader, 0.2)
        seen["stalled"] = len(frames(reader, 1.3))
        seen["stalls"] = reader.stalls
        stall.unlink()
        seen["after_stall"] = len(frames(reader, 1.5))
        os.replace(device, away)
        frames(reader, 0.2)
        seen["unplugged"] = len(frames(reader, 0.3))
        os.replace(away, device)
        seen["after_unplug"] = len(frames(reader, 0.7))
        seen["reopens"] = reader.reopens
        seen["events"] = reader.take_events()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
