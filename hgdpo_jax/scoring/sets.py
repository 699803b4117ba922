"""Distances between sets of pictures as other papers give them: FID, KID, FD-DINOv2 and CMMD, each with its network.

They compare drawings with the photographs of the same captions, each photograph once. Which file each network is, and
where it is published, is in docs/metrics.md.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from hgdpo_jax.devices.sharding import replicated
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import abstract, from_torch, require_fit
from hgdpo_jax.models.dinov2 import Dinov2Model, dinov2_pixels
from hgdpo_jax.models.inception import FIDInception
from hgdpo_jax.models.model_config import read_config
from hgdpo_jax.models.preprocessing import clip_pixels
from hgdpo_jax.models.weights import Weights, open_folder
from hgdpo_jax.run.files import json_hash
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.settings import get_setting, named
from hgdpo_jax.scoring import bootstrap
from hgdpo_jax.scoring.bootstrap import Measure
from hgdpo_jax.scoring.distance import frechet_distances, gaussian_distance, kernel_distance
from hgdpo_jax.scoring.preference import Images

INCEPTION, DINOV2, CMMD = "inception_features", "dinov2_features", "cmmd_features"
METRICS = {"fid": INCEPTION, "kid": INCEPTION, "fd_dinov2": DINOV2, "cmmd": CMMD}  # and the features that they compare
_WIDE = 101  # resamples of a Fréchet distance of so many dimensions: with thousands of pictures one takes seconds


class _Network(NamedTuple):
    """A network that makes features of pictures in [-1, 1]."""

    key: str  # of the setting that says where its weights are
    model: type[nnx.Module]
    compute: Callable[..., Array]


NETWORKS = {
    INCEPTION: _Network("evaluate.inception", FIDInception, lambda model, images: model(images)),
    DINOV2: _Network("evaluate.dinov2", Dinov2Model, lambda model, images: model(dinov2_pixels(images))),
    CMMD: _Network(
        "evaluate.cmmd",
        CLIPModel,
        lambda model, images: model.image_embeds(clip_pixels(images, model.config["vision_config"]["image_size"])),
    ),
}


class SetFeatures:
    """The networks that a config names, compiled.

    Args:
        config: of an evaluation.
        mesh: where the pictures lie.

    Raises:
        UserError: no such file or folder, or weights of another network.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh) -> None:
        self._networks: dict[str, tuple[Callable[..., Array], Any]] = {}
        for features, path in given(config).items():
            key, _, compute = NETWORKS[features]
            with named(key, path):
                model, weights, expected_by = _opened(features, path)
                from_torch(weights, model, str(path), expected_by=expected_by)
            _warn_of_another(key, model)
            graph, state = nnx.split(model)
            run = jax.jit(lambda state, x, graph=graph, compute=compute: compute(nnx.merge(graph, state), x))
            self._networks[features] = run, jax.device_put(state, replicated(mesh))

    def __call__(self, images: Images) -> dict[str, Float[Array, "b p"]]:
        """Name → features of pictures in [-1, 1]."""
        return {name: run(state, images) for name, (run, state) in self._networks.items()}


def given(config: ConfigDict) -> dict[str, Path]:
    """Name of features → where the weights of their network are, of those that a config names."""
    paths = {features: get_setting(config, network.key) for features, network in NETWORKS.items()}
    return {features: Path(path) for features, path in paths.items() if path}


def _opened(features: str, path: Path) -> tuple[nnx.Module, Mapping[str, np.ndarray], str]:
    """A network without its weights, these, and what they have to fit."""
    if features == INCEPTION:
        return abstract(FIDInception, {}), Weights(path), "the Inception network of FID"
    return abstract(NETWORKS[features].model, read_config(path)), open_folder(path), "its config.json"


def _warn_of_another(key: str, model: Any) -> None:
    """Other networks of the same kind are computed, too, but their numbers are not those that papers give."""
    if isinstance(model, Dinov2Model) and model.config["hidden_size"] != 1024:
        logging.warning("%s: is no dinov2-large, with which papers give FD-DINOv2", key)
    if isinstance(model, CLIPModel) and model.config["vision_config"]["image_size"] != 336:
        logging.warning("%s: is no CLIP ViT-L/14@336, with which papers give CMMD", key)


def require_networks(config: ConfigDict) -> list[str]:
    """A line for each network that is given. Reads headers, no weights.

    Raises:
        UserError: one is missing or not whole.
    """
    lines = []
    for features, path in given(config).items():
        key = NETWORKS[features].key
        with named(key, path):
            model, weights, expected_by = _opened(features, path)
            require_fit(weights, model, str(path), expected_by)
        lines.append(f"{key} {path}: fits")
    return lines


def content(config: ConfigDict, index: Index) -> dict[str, str]:
    """Setting → hash of what its network computes with, of those that are given."""
    found = {}
    for features, path in given(config).items():
        key = NETWORKS[features].key
        with named(key, path):
            weights = [*map(index.hash, (Weights(path) if features == INCEPTION else open_folder(path)).files)]
            found[key] = json_hash([weights, {} if features == INCEPTION else read_config(path)])
    return found


def set_distances(
    drawn: Mapping[str, Mapping[str, np.ndarray]], photographs: Mapping[str, np.ndarray], weights: bootstrap.Weights
) -> dict[str, dict[str, Measure]]:
    """Model → metric → its measure, of the networks that saw the pictures.

    Args:
        drawn: model → name of features → [n people, k pictures, p].
        photographs: the same of the photographs, [n 1 p].
        weights: of the resamples.
    """
    found: dict[str, dict[str, Measure]] = {name: {} for name in drawn}
    for metric, features in METRICS.items():
        if features not in photographs:
            continue
        sets, real = {name: seen[features] for name, seen in drawn.items()}, photographs[features]
        if metric in ("fid", "fd_dinov2"):
            measures = frechet_distances(sets, real, weights[:_WIDE])
        elif metric == "kid":
            measures = {name: _thousandfold(kernel_distance(a, real, weights)) for name, a in sets.items()}
        else:
            measures = {name: gaussian_distance(a, real, weights) for name, a in sets.items()}
        for name, measure in measures.items():
            found[name][metric] = measure
    return found


def _thousandfold(measure: Measure) -> Measure:
    return Measure(1000.0 * measure.values)
