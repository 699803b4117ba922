"""SDRecon with a mask: a photograph loses against itself, of which the base redrew a part."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hgdpo_jax.config import ASSETS
from hgdpo_jax.curriculum.boxes import Redrawn
from hgdpo_jax.curriculum.missing import why_no_record
from hgdpo_jax.curriculum.winners import Group, Reconstruction
from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.data.shards import ShardPhotograph
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.diffusion.sdrecon import sdrecon
from hgdpo_jax.diffusion.trajectory import sample
from hgdpo_jax.faces.detection import FaceDetector
from hgdpo_jax.run.settings import load_config
from tests import tiny
from tests.curriculum.test_store import Fake, group_of


def test_outside_the_mask_is_the_photograph_and_inside_is_redrawn(one_level: Path) -> None:
    pipeline = pipelines.load_pipeline(one_level)
    sampler = Sampler(pipeline, tiny.mesh(), solver="ddim", steps=3, guidance=1.0, batch=2, seed=0)
    photographs, images = load_images(list_photographs(ASSETS / "portraits", "heldout")[:2], (32, 32))
    ids, names = pipeline.tokenize([p.caption for p in photographs]), [p.id for p in photographs]
    keys = {strength: sampler.keys("sdrecon", names, [strength] * 2) for strength in (0, 10)}
    mask = np.zeros((2, 4, 4, 1), np.float32)
    mask[0, 1:3, 2:] = 1

    found = np.asarray(sampler.reconstructions(images, ids, keys, lambda images, ids: ids[:, 0], "", mask)[0])
    encoded, redrawn = found[:, 0], found[:, 1]
    inside = np.broadcast_to(mask > 0, encoded.shape)
    assert np.array_equal(redrawn[~inside], encoded[~inside])
    assert (redrawn[inside] != encoded[inside]).all()


def test_every_step_begins_with_the_photograph_outside_the_mask() -> None:
    """With a network that sees the whole latent in each of its places."""
    schedule, shape = NoiseSchedule.from_config(tiny.SCHEDULER), (1, 4, 4, 2)
    trajectory, keys = sdrecon(schedule, "ddim", 3, 10), jax.random.split(jax.random.key(1), 1)
    photograph = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    mask = np.zeros((1, 4, 4, 1), np.float32)
    mask[0, 1:3, :2] = 1

    def network(x: Any, t: Any = None) -> Any:
        return 0.0 * x + x.mean((1, 2, 3), keepdims=True)

    found, _ = jax.jit(lambda: sample(network, schedule, trajectory, photograph, keys, redrawn=mask))()
    noise = np.asarray(jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[0], shape[1:]))(keys))
    steps = jax.tree.map(lambda column: column[:3], trajectory.table)
    x = trajectory.signal * photograph + trajectory.noise * noise
    for signal, sigma, keep, of_x_0 in zip(steps.signal, steps.sigma, steps.x, steps.x_0, strict=True):
        x = np.where(mask > 0, x, signal * photograph + sigma * noise)
        x = keep * x + of_x_0 * (x - sigma * network(x)) / signal
    np.testing.assert_allclose(found, np.where(mask > 0, x, photograph), rtol=1e-4, atol=1e-5)


def test_the_cells_that_a_face_touches_are_redrawn_and_of_a_body_those_below() -> None:
    _, images = load_images(list_photographs(ASSETS / "portraits", "heldout")[:3], (96, 96))
    images = np.concatenate([images, np.zeros_like(images[:1])])  # the last without a face
    found = FaceDetector().detect(images)
    (face, has_face), (body, _) = (Redrawn(part)(images, 12, 12) for part in ("face", "body"))
    assert has_face.tolist() == [True, True, True, False]
    for mask, (left, top, right, bottom) in zip(face[:3, ..., 0], np.asarray(found.boxes)[:3] / 8, strict=True):
        y, x = np.arange(12)[:, None], np.arange(12)
        touched = (x + 1 > left) & (x < right) & (y + 1 > top) & (y < bottom)
        assert np.array_equal(mask > 0, touched) and 0 < touched.mean() < 1
    assert (body >= face)[:3].all() and (body.sum() > face.sum()) and body[:3, -1].all()


def test_realalign_pairs_a_photograph_with_itself_where_it_has_a_face_and_scores_enough(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = load_config("configs/baselines/realalign.py:sd15").pairs
    winners = object.__new__(Reconstruction)
    winners.settings, winners.sampler, winners.scorers, winners.store = settings, Fake(), [], None
    winners.sampler.latent_shape = lambda resolution: (4, 4, 8)
    asked: list[tuple[int, int]] = []
    faces = np.array([True, False, True, True])

    def find(images: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append((height, width))
        return np.ones((len(images), height, width, 1), np.float32) * np.arange(4)[:, None, None, None], faces

    winners.find = find
    masks: list[np.ndarray] = []
    inner = winners.sampler.reconstructions
    winners.sampler.reconstructions = lambda *given: masks.append(given[-1]) or inner(*given)
    group: Group = group_of("abcd")
    records = winners.begin(group)()
    kept = {record["id"]: record for record in records}
    gaps = {name: np.sin(np.float32(10 * ord(name))) - np.sin(np.float32(10 * ord(name) + 10)) for name in "acd"}
    assert set(kept) == {name for name, gap in gaps.items() if gap >= 0.02} and 0 < len(kept) < 3
    assert asked == [(4, 4)] and all(np.array_equal(mask[:, 0, 0, 0], [0, 2, 3]) for mask in masks)
    for name, record in kept.items():
        assert record["winner_number"] == 0 and record["winner"].flat[0] == np.float16(10 * ord(name))
        assert record["loser"].flat[0] == np.float16(10 * ord(name) + 10)
    assert "photograph b: no face found; left out" in caplog.text
    reasons = why_no_record(load_config("configs/baselines/realalign.py:sd15"), [ShardPhotograph("b", "x")], [])
    assert reasons == {"b": "no face is found in it, or its winner scores lower than its loser"}
    winners.find = lambda images, *_: (np.zeros((len(images), 4, 4, 1), np.float32), np.zeros(len(images), bool))
    assert winners.begin(group)() == []
