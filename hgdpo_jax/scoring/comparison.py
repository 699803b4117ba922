"""Models compared on the same prompts and seeds, and with photographs of the people whose captions they were given."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.places import Place
from hgdpo_jax.scoring.appearance import hue_angle
from hgdpo_jax.scoring.bootstrap import Measure, Weights, mean, resamples
from hgdpo_jax.scoring.distance import frechet_distances, kernel_distance
from hgdpo_jax.scoring.scorers import KINDS, listed
from hgdpo_jax.scoring.sets import set_distances

# What :class:`hgdpo_jax.scoring.judges.Judges` saw of n people: name → array [n, k, ...], k pictures of each person.
Seen = Mapping[str, np.ndarray]
Measures = dict[str, Measure]

METRICS = {
    "faces_found": "faces found ↑",
    "face_score": "face score ↑",
    "second_score": "judge's score ↑",
    "second_win_rate": "judge prefers it to base ↑",
    "third_score": "second judge's score ↑",
    "third_win_rate": "second judge prefers it to base ↑",
    "face_kernel_distance": "kernel distance of faces ↓",
    "face_frechet_distance": "Fréchet distance of faces ↓",
    "preference_score": "scorer's score ↑ (it chose the winners)",
    "win_rate": "scorer prefers it to base ↑ (it chose the winners)",
    "kernel_distance": "CLIP kernel distance ↓",
    "frechet_distance": "CLIP Fréchet distance ↓",
    "fid": "FID ↓",
    "kid": "KID × 1000 ↓",
    "fd_dinov2": "FD-DINOv2 ↓",
    "cmmd": "CMMD ↓",
    "sharpness": "sharpness",
    "hue_distance": "hue distance to base",
}
# Those that compare with photographs.
OF_PHOTOGRAPHS = {"face_kernel_distance", "face_frechet_distance", "kernel_distance", "frechet_distance"}
OF_PHOTOGRAPHS |= {"fid", "kid", "fd_dinov2", "cmmd"}
# What each of them is, in a line.
MEANINGS = {
    "faces_found": "share of pictures in which the detector finds a face",
    "face_score": "how sure the detector is of the face, 0 to 1",
    "second_score": "mean score of a preference model that chose no winners; only differences mean something",
    "second_win_rate": "share of pictures that the judge scores above base's of the same caption and seed; 0.5 is even",
    "third_score": "the same of another judge",
    "third_win_rate": "the same of another judge; where the two differ, trust neither alone",
    "face_kernel_distance": "how far the faces are from the photographs', as a set, by the face network; 0: no farther",
    "face_frechet_distance": "the same by the Fréchet distance, which is larger the fewer pictures there are",
    "preference_score": "mean score of the model that chose the winners: a policy can learn to please it",
    "win_rate": "share of pictures that it scores above base's; no evidence by itself",
    "kernel_distance": "how far whole pictures are from the photographs, as a set, by that scorer's CLIP; not KID",
    "frechet_distance": "the same by the Fréchet distance; not FID",
    "fid": "Fréchet distance to the photographs by the usual Inception; too large without thousands of pictures",
    "kid": "kernel distance to the photographs by the same network; unbiased, so that few pictures do",
    "fd_dinov2": "Fréchet distance by DINOv2, which agrees with people more than Inception does; too large with few",
    "cmmd": "Gaussian kernel distance by CLIP ViT-L/14@336",
    "sharpness": "fine detail (deviation of the Laplacian); too much is as wrong as too little",
    "hue_distance": "how far the colours have moved from base's, in degrees of hue",
}
# What the judges saw, and the metrics made of it.
SCORED = "scored_"  # comes before the name of a further scorer
_SCORES = (
    ("score", "preference_score", "win_rate"),
    ("second_score", "second_score", "second_win_rate"),
    ("third_score", "third_score", "third_win_rate"),
)


def columns(text: str) -> list[Place]:
    """The further scorers of a setting, each of which is a metric under its own name.

    Raises:
        UserError: a name is unknown, is that of another metric, or stands there twice.
    """
    found = listed(text)
    names = [place.name for place in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"scorer {name}: stands there twice; expects each once")
        if name in METRICS or name.endswith("_interval"):
            raise UserError(f"scorer {name}: results have something else under this name; choose another")
    return found


def title_of(metric: str) -> str:
    """What a column of a table is headed. Its arrow says what is better: ↑ more, ↓ less."""
    return METRICS.get(metric) or (KINDS[metric].title if metric in KINDS else f"{metric} ↑")


def meaning_of(metric: str) -> str:
    """What a metric is, in a line."""
    return MEANINGS.get(metric) or (KINDS[metric].meaning if metric in KINDS else "mean score of a scorer of one's own")


def compare(drawn: Mapping[str, Seen], photographs: Seen | None) -> dict[str, Measures]:
    """Model → name of a metric → its measure.

    Args:
        drawn: what the judges saw of each model's pictures; the first is what the others are compared with: base.
        photographs: what they saw of the same n > 1 people's photographs, with another k; None: there are none of the
            prompts, and no metric compares with them.
    """
    base, photographs = next(iter(drawn.values())), photographs or {}
    weights = resamples(len(base["sharpness"]))
    frechet = {
        kind: frechet_distances({name: seen[kind] for name, seen in drawn.items()}, photographs[kind], weights)
        for kind in ("face_embedding", "embedding")
        if kind in photographs
    }
    of_sets = set_distances(drawn, photographs, weights)
    found = {
        name: _measures(seen, base, photographs, {kind: found[name] for kind, found in frechet.items()}, weights)
        for name, seen in drawn.items()
    }
    return {name: _ordered(own | of_sets[name]) for name, own in found.items()}


def _ordered(measures: Measures) -> Measures:
    """Scorers that were added come last."""
    return {name: measures[name] for name in METRICS if name in measures} | measures


def _measures(seen: Seen, base: Seen, photographs: Seen, frechet: Mapping[str, Measure], weights: Weights) -> Measures:
    found = {
        "faces_found": mean(seen["face_found"], weights, 0, 1),
        "face_score": mean(seen["face_score"], weights, 0, 1),
        "sharpness": mean(seen["sharpness"], weights, 0),
        "hue_distance": mean(hue_angle(seen["hue"], base["hue"]), weights, 0, 180),
    }
    for score, name, wins in _SCORES:
        if score in seen:
            found[name] = mean(seen[score], weights)
            found[wins] = mean(0.5 + 0.5 * np.sign(seen[score] - base[score]), weights, 0, 1)
    for embedding, prefix in (("face_embedding", "face_"), ("embedding", "")):
        if embedding in seen and photographs:
            a, b = seen[embedding], photographs[embedding]
            # The kernel is made for entries of about 1; the face network's embeddings have a length of about 1.
            scale = a.shape[-1] ** 0.5 if prefix else 1.0
            found[f"{prefix}kernel_distance"] = kernel_distance(a * scale, b * scale, weights)
            found[f"{prefix}frechet_distance"] = frechet[embedding]
    return found | {key.removeprefix(SCORED): mean(seen[key], weights) for key in seen if key.startswith(SCORED)}


def differences(models: Mapping[str, Measures], pairs: Sequence[tuple[str, str]]) -> dict[str, Measures]:
    """`a - b` → metric → the measure of a less that of b, for the pairs whose models were both measured."""
    return {
        f"{a} - {b}": {name: models[a][name] - models[b][name] for name in models[a]}
        for a, b in pairs
        if a in models and b in models
    }


def to_json(measures: Measures) -> dict[str, Any]:
    """metric → number, and metric_interval → [low, high]."""
    found: dict[str, Any] = {}
    for name, measure in measures.items():
        found |= {name: measure.value, f"{name}_interval": measure.interval}
    return found
