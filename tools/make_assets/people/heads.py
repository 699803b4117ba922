"""Where hair grows on the base mesh's head, where lips and creases are, and what can be wrapped around it.

Positions are the base mesh's, in decimetres: x to the left of the person, y upwards, z forwards. The chin is at 6.2,
the middle of the mouth at 6.62, the eyes at 7.28, the ears between 6.8 and 7.45, the crown at 8.5.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

Positions = Float[np.ndarray, "v 3"]
Weights = Float[np.ndarray, " v"]

_MOUTH = np.array([0.0, 6.65, 0.9], np.float32)  # its middle
_AXIS = 0.45  # z of the head's upright axis
# Where hair ends, by the angle from the middle of the face in degrees, and the same of a beard's upper edge.
_HAIRLINE = (
    (0, 25, 36, 48, 60, 72, 84, 98, 120, 140, 180),
    (8.02, 8.07, 8.02, 7.82, 7.45, 7.12, 7.12, 7.5, 7.25, 6.9, 6.8),
)
_CROWN = ((0, 60, 110, 180), (7.4, 7.55, 7.8, 7.75))  # what lies higher is bald where only a ring of hair is left
_BEARDLINE = ((0, 13, 18, 26, 45, 60, 68, 73, 78, 90), (6.46, 6.46, 6.55, 6.55, 6.6, 6.72, 6.95, 7.1, 6.5, 6.1))
_RISE = 0.2  # of a cap's edge from the ears to the forehead: decimetres upwards for each forwards
_EDGE = 7.44  # its height above the ears


class Skin(NamedTuple):
    """What each vertex of the body has, in [0, 1]: how much light reaches it, whether it is lip, or crown of the head;
    how well hair grows on it: moustache, beard of the chin, of the jaws and cheeks, hair of the head."""

    light: Weights
    lips: Weights
    crown: Weights
    moustache: Weights
    chin: Weights
    jaw: Weights
    scalp: Weights


def skin(base: Positions, normals: Positions, body: Bool[np.ndarray, " v"], lips: Weights) -> Skin:
    """Measures the base mesh.

    Args:
        base: its positions.
        normals: of its skin.
        body: which vertices are skin.
        lips: how far what makes lips fuller moves each vertex, at most 1.
    """
    x, y, z = base.T
    angle = np.degrees(np.arctan2(np.abs(x), z - _AXIS))
    mouth = _inside_mouth(base, normals)
    lip = np.where(mouth, 0.0, _step(lips, 0.3, 0.7))
    grows = body & ~mouth & ~_ears(base)
    free = np.where(grows, 1.0 - lip, 0.0)
    below = _step(np.interp(angle, *_BEARDLINE) - y, -0.08, 0.12) * free * (1.0 - 0.45 * _step(angle, 60, 75))
    throat = _step(y + 0.3 * (z - 1.0), 6.0, 6.2) * (angle < 92)
    beside = np.abs(x)
    moustache = free * _step(6.815 - 0.2 * beside - y, -0.02, 0.03) * _step(0.36 - beside, 0.0, 0.12) * (z > 1.2)
    moustache *= _step(y - 6.67 + 0.22 * beside, -0.12, -0.04)
    chin = below * throat * _step(0.36 - beside, 0.0, 0.14) * (z > 1.0) * (y < 6.62)
    chin = np.maximum(chin, below * throat * (beside < 0.42) * (beside > 0.2) * (z > 1.2))
    scalp = np.where(grows, _step(y - np.interp(angle, *_HAIRLINE), -0.06, 0.08), 0.0)
    crown = _step(y - np.interp(angle, *_CROWN), -0.1, 0.1)
    light = np.where(mouth, np.clip((z - 1.3) / 0.22, 0.1, 1.0), 1.0) * _open(base, normals, body & ~mouth)
    return Skin(*(part.astype(np.float32) for part in (light, lip, crown, moustache, chin, below * throat, scalp)))


def around(base: Positions) -> tuple[Bool[np.ndarray, " v"], Float[np.ndarray, "v 2"]]:
    """Which vertices can be wrapped in a cap, and where each is: the angle from the middle of the face, in turns, and
    how far it is above a cap's edge."""
    x, y, z = base.T
    above = y - _EDGE - _RISE * (z - _AXIS)
    return (above > -0.6) & ~_ears(base), np.stack([np.arctan2(x, z - _AXIS) / (2 * np.pi), above], 1)


def edge(positions: Positions, base: Positions) -> tuple[float, float]:
    """(height, rise) of a cap's edge on a head of any form: it lies at height + rise * z."""
    where, (_, above) = around(base)[0], around(base)[1].T
    there = where & (np.abs(above) < 0.1)
    rise, height = np.polyfit(positions[there, 2], positions[there, 1], 1)
    return float(height), float(rise)


def _step(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 up to `low`, 1 from `high`, and straight between."""
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def _ears(base: Positions) -> Bool[np.ndarray, " v"]:
    x, y, z = base.T
    return (np.abs(x) > 0.7) & (y > 6.75) & (y < 7.5) & (z < 0.64) & (z > 0.0)


def _inside_mouth(base: Positions, normals: Positions) -> Bool[np.ndarray, " v"]:
    beside, height, depth = np.abs(base[:, 0]), base[:, 1], base[:, 2]
    inside = (beside < 0.45) & (height > 6.3) & (height < 6.84) & (depth > 0.2) & (depth < 1.6)
    return inside & (((base - _MOUTH) * normals).sum(1) < 0)  # the skin around it looks outwards


def _open(base: Positions, normals: Positions, outside: Bool[np.ndarray, " v"]) -> Weights:
    """How much light reaches vertices: less where what is near stands higher than they do, as beside the nose."""
    found = np.ones(len(base))
    there = np.flatnonzero(outside)
    for begin in range(0, len(there), 500):
        rows = there[begin : begin + 500]
        towards = base[None, there] - base[rows][:, None]
        far = np.sqrt((towards**2).sum(-1)) + 1e-6
        higher = (towards * normals[rows][:, None]).sum(-1) / far
        for reach, strength in ((0.14, 0.7), (0.45, 0.75)):
            near = np.exp(-((far / reach) ** 2)) * (far > 1e-5)
            hollow = (near * higher).sum(1) / near.sum(1)
            found[rows] *= 1.0 - strength * np.clip(hollow, 0.0, 0.6)
    return found
