"""The simulated world of the UR5: same seed, same world; pictures show what the arm does; and it runs in real time."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from relod.config import CameraSettings, load
from relod.robots.optics import Rays
from relod.robots.sources import open_camera, parse_source
from relod.robots.ur5.arm import ZERO
from relod.robots.ur5.interface import SENSOR_COLUMNS
from relod.robots.ur5.kinematics import tool_pose
from relod.robots.ur5.monitor import MONITOR_M, ROOM, SCREEN_HW_M, Look, MonitorRenderer, WristOptics
from relod.robots.ur5.reward import target_fraction, target_mask
from relod.robots.ur5.target import HEIGHT, WIDTH, Place, request_for
from relod.robots.ur5.targetlink import TargetLink
from relod.robots.ur5.visual_reacher import UR5_VISUAL_REACHER, VisualReacherSettings
from relod.robots.ur5.world import WORLDS, SimSettings, VirtualUR5, serve_world
from relod.robots.ur5.wristview import MONITOR_PATCH, WristCaster
from relod.runtime.clock import NS_PER_MS, NS_PER_S
from relod.types import Command, SensorWindow

TASK = UR5_VISUAL_REACHER.build(VisualReacherSettings())
SPEC = TASK.spec
HOME = VisualReacherSettings().home_rad
MIDDLE = request_for(Place(80.0, 45.0))


def settings(name: str = "nominal", *assignments: str) -> SimSettings:
    loaded = load(UR5_VISUAL_REACHER.sections(), presets=[WORLDS[name]], assignments=assignments)
    assert isinstance(loaded.sim, SimSettings)
    return loaded.sim


def trace(seed: int, name: str, parts: int = 1) -> list[object]:
    """Everything a world gives in a second of driving, asked for `parts` times a cycle."""
    world, packets, frames = VirtualUR5(settings(name), seed, SPEC, NS_PER_S), [], []
    for cycle in range(25):
        start_ns = NS_PER_S + cycle * SPEC.cycle_ns
        for part in range(1, parts + 1):
            new_packets, new_frames = world.advance(start_ns + SPEC.cycle_ns * part // parts)
            packets += new_packets
            frames += new_frames
        command = Command(values=(0.2, -0.3, 0.1, 0.4, -0.2, 0.0), request=MIDDLE if cycle == 3 else 0)
        world.execute(command, start_ns + SPEC.cycle_ns + 2 * NS_PER_MS)
        if cycle == 12:
            world.begin_episode()
    assert len(packets[0][1]) == len(SENSOR_COLUMNS)
    assert all(frame.captured_ns <= frame.available_ns <= NS_PER_S + 25 * SPEC.cycle_ns for frame in frames)
    return [
        [(ns, values.tobytes()) for ns, values in packets],
        [(frame.captured_ns, frame.available_ns, frame.image.tobytes()) for frame in frames],
    ]


@pytest.mark.parametrize("name", list(WORLDS))
def test_the_same_seed_gives_the_same_world_and_another_seed_another(name):
    assert trace(3, name) == trace(3, name)
    assert trace(3, name) != trace(4, name)


@pytest.mark.parametrize("name", ["nominal", "harsh"])
def test_what_comes_does_not_depend_on_how_often_it_is_asked_for(name):
    assert trace(5, name) == trace(5, name, parts=40)


def test_packets_come_every_8_ms_and_say_what_the_arm_does():
    world = VirtualUR5(settings("ideal"), 0, SPEC, 0)
    world.execute(Command(values=(0.3, 0.0, 0.0, 0.0, 0.0, 0.0)), 0)
    packets, _ = world.advance(NS_PER_S)
    assert [arrived_ns for arrived_ns, _ in packets] == [8 * NS_PER_MS * (1 + i) for i in range(125)]
    named = dict(zip(SENSOR_COLUMNS, packets[-1][1].tolist(), strict=True))
    assert named["base_rad_s"] == pytest.approx(0.3)
    assert named["base_target_rad_s"] == 0.3
    # It accelerates by 1.4 rad/s² for 0.21 s.
    assert named["base_rad"] - packets[0][1][0] == pytest.approx(0.3 * (1 - 0.3 / 1.4 / 2), abs=0.005)
    assert (named["robot_mode"], named["safety_mode"], named["runtime_state"]) == (7, 1, 2)
    assert named["connection_epoch"] == 1


def test_a_command_to_stand_brakes_as_the_driver_does():
    world = VirtualUR5(settings("ideal"), 0, SPEC, 0)
    world.execute(Command(values=(0.7, 0.0, 0.0, 0.0, 0.0, 0.0)), 0)
    world.advance(NS_PER_S)
    world.execute(Command(values=ZERO), NS_PER_S)
    world.advance(NS_PER_S + 184 * NS_PER_MS)
    assert world.scene.controller.standing  # 0.7 rad/s by 4 rad/s² take 175 ms


def test_a_target_is_seen_and_reported_when_it_is_painted():
    world = VirtualUR5(settings("ideal"), 0, SPEC, 0)
    shown = SENSOR_COLUMNS.index("target_shown")
    before, frames = world.advance(NS_PER_S)
    assert before[-1][1][shown] == 0
    assert target_fraction(frames[-1].image) == 0
    world.scene.controller.place(HOME, NS_PER_S)
    world.execute(Command(values=ZERO, request=MIDDLE), NS_PER_S)
    packets, frames = world.advance(NS_PER_S + NS_PER_S // 2)
    for arrived_ns, values in packets:
        assert values[shown] == (MIDDLE if arrived_ns >= NS_PER_S + 32 * NS_PER_MS else 0)
    for frame in frames:
        assert (target_fraction(frame.image) > 0) == (frame.captured_ns >= NS_PER_S + 32 * NS_PER_MS)
    world.execute(Command(values=ZERO, request=MIDDLE + 1), 2 * NS_PER_S)
    world.execute(Command(values=ZERO, request=MIDDLE + 2), 2 * NS_PER_S + 10 * NS_PER_MS)  # the newest counts
    packets, _ = world.advance(3 * NS_PER_S)
    assert {values[shown] for _, values in packets} == {MIDDLE, 0, MIDDLE + 2}


def test_the_look_changes_with_the_episode_if_asked_to():
    for look, same in (("run", True), ("episode", False)):
        world = VirtualUR5(settings("ideal", f"sim.look={look}"), 0, SPEC, 0)
        before = world.scene.renderer.look
        world.begin_episode()
        assert (world.scene.renderer.look == before) == same


def test_no_sequence_of_actions_leaves_the_workspace_in_the_plant():
    """Over the wires' delays, the arm's lag and 40 ms cycles."""
    task = UR5_VISUAL_REACHER.build(VisualReacherSettings(camera_height=16, camera_width=16))
    for name, seed in (("nominal", 0), ("harsh", 1)):
        world, now_ns = VirtualUR5(settings(name), seed, task.spec, 0), 0
        world.scene.controller.place(HOME, 0)
        rng, visited = np.random.default_rng(seed), []
        for cycle in range(400):
            now_ns += SPEC.cycle_ns
            packets, _ = world.advance(now_ns)
            arrived_ns, values = packets[-1]
            window = SensorWindow(
                names=SENSOR_COLUMNS, seq=np.array([1]), arrived_ns=np.array([arrived_ns]), values=values[None]
            )
            if cycle % 20 == 0:
                action = rng.choice((-1.0, 0.0, 1.0), 5).astype(np.float32)
            world.execute(task.command(action, window), now_ns + 2 * NS_PER_MS)
            visited += [tuple(values[:6]) for _, values in packets]
        assert all(map(task.fence.contains, visited))
        assert np.ptp(visited, axis=0)[:5].min() > 0.3


# --- the picture -----------------------------------------------------------------------------------------------------

OPTICS = WristOptics(noise=0.0, flicker=0.0, softness=0.0, vignette=0.0)


def make_caster(optics: WristOptics = OPTICS, height: int = 36, width: int = 64) -> tuple[WristCaster, Rays]:
    """A room whose textures say which patch they are and where on it."""
    atlas = ROOM.atlas()
    for patch, (rows, columns) in enumerate(atlas.sizes_hw):
        across = np.broadcast_to((np.arange(columns) + 0.5) * 255 / columns, (rows, columns))
        down = np.broadcast_to(((np.arange(rows) + 0.5) * 255 / rows)[:, None], (rows, columns))
        atlas.paint(patch, np.dstack([across, down, np.full((rows, columns), 40 * patch)]).astype(np.float32))
    rays = Rays.through_lens(height, width, optics)
    return WristCaster(rays, ROOM, atlas, optics), rays


def follow(origin: np.ndarray, ray: np.ndarray) -> tuple[float, float, float]:
    """What one ray meets: place on it from 0 to 255, across and down, and 40 times its patch."""
    with np.errstate(divide="ignore"):
        reach = np.where(ray > 0, (np.array(ROOM.high_m) - origin) / ray, (np.array(ROOM.low_m) - origin) / ray)
        monitor = (MONITOR_M[1] - origin[1]) / ray[1]
    height_m, width_m = ROOM.monitor_hw_m
    spot = origin + monitor * ray - MONITOR_M
    if monitor > 0 and abs(spot[0]) < width_m / 2 and abs(spot[2]) < height_m / 2:
        return 255 * (0.5 + spot[0] / width_m), 255 * (0.5 - spot[2] / height_m), 40 * MONITOR_PATCH
    axis = int(np.argmin(reach))
    place = (origin + reach[axis] * ray - ROOM.low_m) / np.subtract(ROOM.high_m, ROOM.low_m)
    across, up = ((1, 2), (0, 2), (0, 1))[axis]
    return 255 * place[across], 255 * (1 - place[up]), 40 * (2 * axis + (ray[axis] > 0))


POSTURES = {
    "home": HOME,
    "left and up": (1.2, -1.7, 1.9, -3.6, -1.1, 2.7),
    "right and down": (2.0, -1.4, 1.8, -2.9, -2.0, 3.3),
    "to the ceiling and back": (1.5, -1.4, 1.8, -5.2, -1.5, 3.1),
}


@pytest.mark.parametrize("name", list(POSTURES))
@pytest.mark.parametrize("qd", [ZERO, (0.7, -0.5, 0.7, 0.3, -0.7, 0.0)])
def test_every_pixel_shows_what_its_ray_meets(name, qd):
    q = POSTURES[name]
    caster, rays = make_caster()
    picture = caster.picture(q, qd, MONITOR_M).astype(float)
    wrong = 0
    for row in range(0, 36, 3):
        t = float(rays.row_s[row, 0])
        pose = np.array(tool_pose([a + t * b for a, b in zip(q, qd, strict=True)]))
        for column in range(0, 64, 3):
            ray = pose[1] - rays.left[row, column] * pose[2] - rays.up[row, column] * pose[3]
            wanted = follow(pose[0] + OPTICS.ahead_m * pose[1], ray)
            wrong += bool(np.abs(picture[row, column] - wanted).max() > 4)  # edges are soft, and cut at pixels
    assert wrong <= 8  # of 264


def test_the_target_is_where_the_screen_has_it():
    renderer = MonitorRenderer(height=90, width=160, optics=OPTICS, seed=0)
    assert target_fraction(renderer.render(HOME, ZERO)) == 0
    rays = Rays.through_lens(90, 160, OPTICS)
    pose = np.array(tool_pose(HOME))
    for place in (Place(80.0, 45.0), Place(27.0, 27.0), Place(133.0, 63.0), Place(27.0, 63.0)):
        renderer.show(place)
        rows, columns = np.nonzero(target_mask(renderer.render(HOME, ZERO)))
        spot = np.add(
            MONITOR_M, [(place.x / WIDTH - 0.5) * SCREEN_HW_M[1], 0, (0.5 - place.y / HEIGHT) * SCREEN_HW_M[0]]
        )
        ahead, right, down = pose[1:] @ (spot - pose[0] - OPTICS.ahead_m * pose[1])
        seen = -float(rays.left[round(rows.mean()), round(columns.mean())]) * ahead
        assert seen == pytest.approx(right, abs=0.004)
        assert -float(rays.up[round(rows.mean()), round(columns.mean())]) * ahead == pytest.approx(down, abs=0.004)
        assert 0.003 < len(rows) / (90 * 160) < 0.006  # 0.4 % of the picture


@pytest.mark.parametrize("seed", range(12))
def test_in_every_look_the_target_is_told_from_everything_else(seed):
    """Over the whole range of levels; from where the arm begins, close by, and with the disc nowhere."""
    renderer = MonitorRenderer(height=90, width=160, optics=WristOptics(), seed=seed)
    renderer.set_look(Look.draw(np.random.default_rng(seed), 1.0))
    views = [HOME, (1.46, -1.13, 1.57, -3.5, -1.46, 3.1415), *POSTURES.values()]
    assert max(target_fraction(renderer.render(q, ZERO, index)) for index, q in enumerate(views)) == 0
    renderer.show(Place(80.0, 45.0))
    assert 0.003 < target_fraction(renderer.render(HOME, ZERO)) < 0.006
    assert target_fraction(renderer.render((1.46, -1.13, 1.57, -3.3, -1.46, 3.1415), ZERO)) > 0.015


def test_a_turning_camera_blurs_along_rows():
    renderer = MonitorRenderer(height=90, width=160, optics=WristOptics(noise=0.0), seed=0)
    renderer.show(Place(80.0, 45.0))
    still, turning = (renderer.render(HOME, (0.0, 0.0, 0.0, 0.0, speed, 0.0)) for speed in (0.0, 3.0))
    reds = [picture.astype(int)[..., 2] - picture[..., 1] for picture in (still, turning)]
    softness = [(np.abs(np.diff(red, axis=1)) > 60).sum() for red in reds]
    assert softness[1] < 0.5 * softness[0]


# --- in real time ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_runs_in_real_time(tmp_path: Path):
    async def run() -> tuple[dict[str, str], tuple[int, ...], float]:
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
                control=tmp_path / "control.sock",
                frames=frames,
                mjpeg_port=0,
                wheel_log=tmp_path / "arm.jsonl",
            )
        )
        where = await ready
        target = TargetLink(where["port"], lambda text: None)
        try:
            await target.open()
            target.show(MIDDLE)
            await asyncio.sleep(0.5)
            assert target.shown == MIDDLE
            reader, writer = await asyncio.open_connection(where["port"], 29999)
            assert (await reader.readline()).startswith(b"Connected: Universal Robots Dashboard Server")
            writer.close()
            image = await asyncio.to_thread(_one_image, frames)
        finally:
            await target.close()
            stop.set()
            await serving
        return where, image.shape, target_fraction(image)

    where, shape, fraction = asyncio.run(run())
    assert shape == (*SPEC.camera_hw, 3)
    assert fraction > 0.002
    assert where["camera_url"].startswith("http://127.0.0.1:")
    assert json.dumps(where)
    assert {path.name for path in tmp_path.iterdir()} == {"arm.jsonl"}


def _one_image(frames: Path) -> np.ndarray:
    camera = open_camera(parse_source(f"sim:{frames}"), CameraSettings(), *SPEC.camera_hw)
    try:
        capture = camera.read()
        assert capture is not None
        return capture.image
    finally:
        camera.close()
