"""Sharpness and hue against other implementations."""

import colorsys

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from hgdpo_jax.scoring.appearance import hue_angle, hue_vector, sharpness
from tests.rounding import EPS, assert_close

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (3, 12, 10, 3)).astype(np.float32)
BLURRED = np.stack([scipy.ndimage.gaussian_filter(x, (1, 1, 0)) for x in IMAGES])


def test_sharpness_is_the_deviation_of_the_laplacian_and_blurring_lowers_it() -> None:
    found = np.asarray(sharpness(jnp.asarray(np.concatenate([IMAGES, BLURRED]))))
    for image, value in zip(IMAGES, found[:3], strict=True):
        grey = ((image + 1) * 127.5) @ np.array([0.299, 0.587, 0.114])
        expected = scipy.ndimage.laplace(grey)[1:-1, 1:-1].std()
        assert_close(value, expected, 4 * EPS, size=8 * 255)  # the Laplacian adds up eight times a grey of up to 255
    assert (found[3:] < found[:3]).all()


def test_hue_is_that_of_hsv_and_grey_has_none() -> None:
    degrees = np.array([0, 33, 120, 200, 299])
    colours = [np.array(colorsys.hsv_to_rgb(x / 360, 0.7, 0.8)) * 2 - 1 for x in degrees] + [np.full(3, 0.3)]
    images = np.broadcast_to(np.array(colours, np.float32)[:, None, None], (6, 4, 4, 3))
    *hues, grey = np.asarray(hue_vector(jnp.asarray(images)))
    x, y = np.array(hues).T
    assert np.hypot(x, y) == pytest.approx(1.0, abs=20 * EPS)
    assert (np.degrees(np.arctan2(y, x)) - degrees + 180) % 360 - 180 == pytest.approx(0, abs=1.2)
    assert np.array_equal(grey, np.zeros(2))  # x − (x + x)/2 rounds nothing, on any processor


def test_distance_goes_the_short_way_around() -> None:
    def unit(*degrees: float) -> np.ndarray:
        return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=-1)

    assert hue_angle(unit(350, 10), unit(10, 100)) == pytest.approx([20, 90])
    assert (hue_angle(unit(5, 7), unit(5, 7)) == 0).all()
