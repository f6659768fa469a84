"""The ray caster against a plain one that follows every pixel's ray by itself."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relod.robots.optics import CameraOptics, Finish, Rays
from relod.robots.scene import Atlas, Box, BoxCaster, texture_noise

BOX = Box(half_x_m=0.55, half_y_m=0.35, wall_m=0.20, texel_m=0.005)
OPTICS = CameraOptics()
HEIGHT, WIDTH = 60, 80


def gradient(patch, height, width):
    """A texture that says which patch it is and where on it."""
    red = np.full((height, width), 40 * patch, np.float32)
    across = np.broadcast_to((np.arange(width, dtype=np.float32) + 0.5) * 255 / width, (height, width))
    down = np.broadcast_to(((np.arange(height, dtype=np.float32) + 0.5) * 255 / height)[:, None], (height, width))
    return np.dstack([across, down, red])


def make_caster(optics=OPTICS, height=HEIGHT, width=WIDTH):
    rays, atlas = Rays.through_lens(height, width, optics), BOX.atlas()
    for patch, size in enumerate(atlas.sizes_hw[:5]):
        atlas.paint(patch, gradient(patch, *size))
    BOX.paint_panorama(atlas, gradient(5, *BOX.panorama_hw))
    return BoxCaster(rays, BOX, atlas, optics), rays


CASTER, RAYS = make_caster()


def reference(x, y, heading, speed, turn):
    """What each pixel must show: patch, and place on it from 0 to 255; from its ray alone."""
    answer = np.zeros((HEIGHT, WIDTH, 3))
    for row in range(HEIGHT):
        t = RAYS.row_s[row, 0]
        angle = heading + turn * t
        forward, left = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
        centre = np.array([x, y]) + speed * t * forward
        lens = centre + OPTICS.ahead_m * forward
        for column in range(WIDTH):
            direction = forward + RAYS.left[row, column] * left
            answer[row, column] = follow(lens, direction, float(RAYS.up[row, column]))
    return answer


def follow(lens, direction, up):
    half = np.array([BOX.half_x_m, BOX.half_y_m])
    reach = [(math.copysign(half[i], direction[i]) - lens[i]) / direction[i] for i in range(2)]
    axis = int(np.argmin(reach))
    depth = reach[axis]
    z = OPTICS.height_m + depth * up
    if z < 0:
        spot = (lens + direction * OPTICS.height_m / -up + half) / (2 * half)
        return 255 * spot[0], 255 * spot[1], 0
    if z > BOX.wall_m:
        azimuth = math.atan2(direction[1], direction[0])
        low, high = BOX.panorama_up
        return 255 * (0.5 - azimuth / (2 * math.pi)), 255 * (1 - min(1, max(0, (up - low) / (high - low)))), 200
    side = axis + (0 if direction[axis] > 0 else 2)
    along = (lens + direction * depth)[1 - axis]
    return 255 * (0.5 + along / (2 * half[1 - axis])), 255 * (1 - z / BOX.wall_m), 40 * (1 + side)


@settings(max_examples=10, deadline=None)
@example(x=-0.125, y=0.0, heading=0.0, speed=0.0, turn=0.0)  # both corners at the edge of the picture
@given(
    x=st.floats(-0.37, 0.37),
    y=st.floats(-0.17, 0.17),
    heading=st.floats(-7, 7),
    speed=st.floats(-0.5, 0.5),
    turn=st.floats(-2, 2),
)
def test_every_pixel_shows_what_its_ray_meets(x, y, heading, speed, turn):
    picture = CASTER.picture(x, y, heading, speed, turn).astype(float)
    expected = reference(x, y, heading, speed, turn)
    inside = away_from_edges(expected)
    assert inside.mean() > 0.5
    assert np.abs(picture - expected)[inside].max() < 4
    assert np.abs(picture - expected)[inside].mean() < 1


def away_from_edges(expected):
    """Pixels whose neighbours are on the same patch, and not beyond the panorama's seam."""
    near = [np.roll(expected, (down, right), (0, 1)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    smooth = [(other[..., 2] == expected[..., 2]) & (np.abs(other[..., 0] - expected[..., 0]) < 64) for other in near]
    inside = np.all(smooth, axis=0)
    inside[[0, -1]] = inside[:, [0, -1]] = False
    return inside


@pytest.mark.parametrize("heading", [0.0, math.pi / 2, math.pi, -math.pi / 2, math.pi / 4, 3 * math.pi])
@pytest.mark.parametrize("place", [(0.0, 0.0), (0.55, 0.35), (-3.0, 9.0)])
def test_any_pose_gives_a_picture(place, heading):
    with np.errstate(all="raise"):
        picture = CASTER.picture(*place, heading, 0.5, 2.0)
    assert picture.shape == (HEIGHT, WIDTH, 3)
    assert picture.dtype == np.uint8
    assert picture[..., 2].min() >= 0


def test_standing_still_has_no_rolling_shutter():
    slow = CameraOptics(readout_ms=100.0)
    caster, _ = make_caster(slow)
    np.testing.assert_array_equal(caster.picture(0.1, 0.0, 0.3, 0, 0), CASTER.picture(0.1, 0.0, 0.3, 0, 0))
    assert (caster.picture(0.1, 0.0, 0.3, 0, 1.0) != CASTER.picture(0.1, 0.0, 0.3, 0, 1.0)).any()


@pytest.mark.parametrize(("height", "width"), [(120, 160), (90, 160), (33, 50)])
def test_sizes(height, width):
    caster, _ = make_caster(height=height, width=width)
    assert caster.picture(0, 0, 0, 0, 0).shape == (height, width, 3)


def test_atlas_borders_repeat_the_edge():
    atlas = Atlas([(3, 5), (4, 2)])
    atlas.paint(1, np.full((4, 2, 3), 77, np.float32))
    top, left = atlas.tops[1], atlas.left
    assert (atlas.image[top - 4 : top + 8, left - 4 : left + 6, :3] == 77).all()
    assert not atlas.image[: top - 4].any()
    copy = atlas.copy()
    copy.paint(1, np.zeros((4, 2, 3), np.float32))
    assert (atlas.image[top, left, :3] == 77).all()


def test_rays_look_left_and_up():
    rays = Rays.through_lens(HEIGHT, WIDTH, OPTICS)
    assert rays.left[30, 0] > 0 > rays.left[30, -1]
    assert rays.up[0, 40] > 0 > rays.up[-1, 40]
    width_deg = math.degrees(math.atan(rays.left[30, 0]) - math.atan(rays.left[30, -1]))
    assert width_deg == pytest.approx(70 * (1 - 1 / WIDTH), abs=4)  # barrel distortion widens the edge
    assert rays.row_s[-1, 0] - rays.row_s[0, 0] == pytest.approx(0.022, rel=0.02)


class TestFinish:
    GRAY = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)

    def test_noise_is_a_matter_of_seed_and_index(self):
        rays = Rays.through_lens(HEIGHT, WIDTH, OPTICS)
        one, same, other = Finish(rays, OPTICS, 1), Finish(rays, OPTICS, 1), Finish(rays, OPTICS, 2)
        third = one.apply(self.GRAY.copy(), 0, 3)
        same.apply(self.GRAY.copy(), 1, 0)
        np.testing.assert_array_equal(third, same.apply(self.GRAY.copy(), 0, 3))
        assert (third != one.apply(self.GRAY.copy(), 0, 4)).any()
        assert (third != other.apply(self.GRAY.copy(), 0, 3)).any()

    def test_noise_has_its_size(self):
        optics = CameraOptics(vignette=0, flicker=0, noise=3.0)
        image = Finish(Rays.through_lens(HEIGHT, WIDTH, optics), optics, 0).apply(self.GRAY.copy(), 0, 0)
        assert image.mean() == pytest.approx(128, abs=0.3)
        assert image.std() == pytest.approx(3.0, rel=0.05)

    def test_turning_blurs_along_the_rows_only(self):
        optics = CameraOptics(vignette=0, flicker=0, noise=0, softness=0)
        finish = Finish(Rays.through_lens(HEIGHT, WIDTH, optics), optics, 0)
        edge = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        edge[:, 40:] = 200
        still, turning = finish.apply(edge.copy(), 0.0, 0), finish.apply(edge.copy(), 4.0, 0)
        np.testing.assert_array_equal(still, edge)
        # 4 rad/s for 12 ms at 80 px per 70 degrees are 3.1 px.
        assert np.count_nonzero((turning[30, :, 0] > 0) & (turning[30, :, 0] < 200)) in (3, 4)
        assert turning.mean() == pytest.approx(edge.mean(), rel=0.01)
        flat = edge.transpose(1, 0, 2)[:HEIGHT, :].copy()
        flat = np.repeat(flat[:, :1], WIDTH, axis=1)
        np.testing.assert_array_equal(finish.apply(flat.copy(), 4.0, 0), flat)

    def test_corners_are_darker(self):
        optics = CameraOptics(vignette=0.5, flicker=0, noise=0)
        image = Finish(Rays.through_lens(HEIGHT, WIDTH, optics), optics, 0).apply(self.GRAY.copy(), 0, 0)
        assert image[0, 0, 0] == pytest.approx(64, abs=3)
        assert image[30, 40, 0] == pytest.approx(128, abs=2)


def test_texture_noise_is_zero_on_average():
    noise = texture_noise(np.random.default_rng(0), 200, 300, ((16, 5.0), (256, 2.0)))
    assert noise.shape == (200, 300)
    assert abs(noise.mean()) < 1
    assert 3 < noise.std() < 6
