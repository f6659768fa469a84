"""The simulated world of the rig: same seed, same world; a new disc with each episode; and it runs in real time."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from relod.config import CameraSettings, load
from relod.errors import StartError
from relod.robots.sources import open_camera, parse_source
from relod.robots.track.rig import STATE
from relod.robots.track.task import TRACK, Track, TrackSettings
from relod.robots.track.world import DISC_PLACES_MM, WORLDS, SimSettings, VirtualTrack, serve_world
from relod.runtime.clock import NS_PER_MS, NS_PER_S
from relod.types import Command

SPEC = Track(TrackSettings()).spec


def settings(name: str = "nominal") -> SimSettings:
    loaded = load(TRACK.sections(), presets=[WORLDS[name]])
    assert isinstance(loaded.sim, SimSettings)
    return loaded.sim


def trace(seed: int, name: str, parts: int = 1) -> list[object]:
    """Everything a world gives in a second of driving, asked for `parts` times a cycle."""
    world, packets, frames = VirtualTrack(settings(name), seed, SPEC, NS_PER_S), [], []
    for cycle in range(25):
        start_ns = NS_PER_S + cycle * SPEC.cycle_ns
        for part in range(1, parts + 1):
            new_packets, new_frames = world.advance(start_ns + SPEC.cycle_ns * part // parts)
            packets += new_packets
            frames += new_frames
        world.execute(Command(values=(90.0, -40.0, -30.0)), start_ns + SPEC.cycle_ns + 2 * NS_PER_MS)
        if cycle == 12:
            world.begin_episode()
    assert (len(packets), len(packets[0][1])) == (100, len(TRACK.sensor_names))
    assert all(frame.captured_ns <= frame.available_ns <= NS_PER_S + 25 * SPEC.cycle_ns for frame in frames)
    return [
        [(ns, values.tobytes()) for ns, values in packets],
        [(frame.captured_ns, frame.available_ns, frame.image.tobytes()) for frame in frames],
    ]


@pytest.mark.parametrize("name", list(WORLDS))
def test_the_same_seed_gives_the_same_world_and_another_seed_another(name):
    assert trace(3, name) == trace(3, name)
    assert trace(3, name) != trace(4, name)


def test_what_comes_does_not_depend_on_how_often_it_is_asked_for_but_a_new_disc_shows_at_once():
    world = VirtualTrack(settings("ideal"), 0, SPEC, 0)
    often = VirtualTrack(settings("ideal"), 0, SPEC, 0)
    images = [frame.image for frame in world.advance(NS_PER_S)[1]]
    seen = [frame.image for ms in range(1, 1001) for frame in often.advance(ms * NS_PER_MS)[1]]
    assert len(images) == len(seen) == 30
    assert all(np.array_equal(a, b) for a, b in zip(images, seen, strict=True))
    assert all(np.array_equal(image, images[0]) for image in images)  # nothing moved, and there is no noise
    world.begin_episode()
    assert not np.array_equal(world.advance(2 * NS_PER_S)[1][0].image, images[0])


def test_discs_lie_everywhere_the_rig_can_go():
    scene = VirtualTrack(settings(), 0, SPEC, 0).scene
    places = []
    for _ in range(300):
        scene.new_episode()
        places.append(scene.disc_mm)
    assert (np.abs(places).max(axis=0) <= DISC_PLACES_MM).all()
    assert (np.ptp(places, axis=0) > 1.9 * np.array(DISC_PLACES_MM)).all()


def test_the_picture_shows_where_the_rig_was_at_the_capture_not_at_the_arrival():
    def middle(latency_ms: float) -> float:
        sim = load(TRACK.sections(), presets=[WORLDS["ideal"]], assignments=[f"sim.camera.latency_ms={latency_ms}"]).sim
        world = VirtualTrack(sim, 0, SPEC, 0)
        world.scene.disc_mm = (0.0, 0.0)
        for _ in range(5):
            frames = world.advance(world.scene.rig.next_tick_ns + 4 * 10 * NS_PER_MS)[1]
            world.execute(Command(values=(100.0, 0.0, 0.0)), world.scene.rig.next_tick_ns - NS_PER_MS)
        image = frames[-1].image.astype(int)
        return float(np.mean(np.nonzero(image[..., 2] > image[..., 1] + 90)[1]))

    assert middle(0.0) + 1.5 < middle(60.0)  # the disc wanders left as the rig goes right


@pytest.mark.slow
def test_it_runs_in_real_time(tmp_path: Path):
    async def run() -> tuple[dict[str, str], int, int]:
        stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
        frames = tmp_path / "frames.sock"
        serving = asyncio.create_task(
            serve_world(
                settings("ideal"),
                0,
                SPEC,
                on_ready=ready.set_result,
                stop=stop,
                new_episode=asyncio.Event(),
                link=tmp_path / "rig.sock",
                frames=frames,
                mjpeg_port=0,
            )
        )
        where = await ready
        reader, writer = await asyncio.open_unix_connection(where["port"])
        await asyncio.wait_for(reader.readexactly(20 * STATE.size), 2.0)
        image = await asyncio.to_thread(_one_image, frames)
        stop.set()
        await serving
        writer.close()
        return where, *image.shape[:2]

    where, height, width = asyncio.run(run())
    assert (height, width) == SPEC.camera_hw
    assert where["camera_url"].startswith("http://127.0.0.1:")
    assert json.dumps(where)
    assert list(tmp_path.iterdir()) == []


def _one_image(frames: Path) -> np.ndarray:
    camera = open_camera(parse_source(f"sim:{frames}"), CameraSettings(), 48, 64)
    try:
        capture = camera.read()
        assert capture is not None
        return capture.image
    finally:
        camera.close()


def test_a_socket_that_cannot_be_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("not a socket")

    async def run() -> None:
        await serve_world(
            settings(),
            0,
            SPEC,
            on_ready=lambda where: None,
            stop=asyncio.Event(),
            new_episode=asyncio.Event(),
            link=tmp_path / "file" / "rig.sock",
        )

    with pytest.raises(StartError, match=r"the rig's socket cannot be .*/file/rig\.sock"):
        asyncio.run(run())
