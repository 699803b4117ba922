"""Hair and beards: what chance decides of them, and styles in other forms than the package's: fuller, longer, wavy."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from tools.make_assets.people.backgrounds import Random, choose
from tools.make_assets.people.heads import Positions

Colour = tuple[float, float, float]

STYLES: dict[str, dict[str, float]] = {
    "male": {"short01": 0.26, "short02": 0.17, "short04": 0.24, "short03": 0.04, "": 0.2, "afro01": 0.02,
             "ponytail01": 0.02, "long01": 0.03, "bob02": 0.01},
    "female": {"long01": 0.45, "ponytail01": 0.12, "Braid01": 0.18, "bob02": 0.09, "bob01": 0.04, "short03": 0.05,
               "short02": 0.03, "afro01": 0.01},
}  # fmt: skip
HIDES_AN_EYE = ("bob01", "bob02", "short03")
TIED = ("short04", "ponytail01", "")  # a headband fits over them
_HANGS = ("long01",)  # can be cut anywhere, and waved
_SHAVED = {"bald": 0.35, "ring": 0.2, "shaved": 0.25, "cropped": 0.2}  # of those without a style
_BEARDS: dict[str, tuple[float, tuple[float, float, float]]] = {  # share; moustache, chin, jaws
    "": (0.65, (0, 0, 0)), "full": (0.16, (1, 1, 1)), "stubble": (0.09, (0.9, 0.9, 0.85)), "round": (0.04, (1, 1, 0)),
    "moustache": (0.035, (1, 0, 0)), "strap": (0.025, (0, 1, 1)),
}  # fmt: skip
_HAIR_COLOURS: dict[str, Colour] = {
    "black": (0.018, 0.015, 0.014), "dark brown": (0.055, 0.034, 0.022), "brown": (0.13, 0.077, 0.045),
    "light brown": (0.24, 0.15, 0.085), "blond": (0.48, 0.34, 0.18), "red": (0.27, 0.09, 0.035),
    "ginger": (0.42, 0.16, 0.045), "grey": (0.27, 0.265, 0.26), "white": (0.55, 0.54, 0.52),
}  # fmt: skip
_NATURAL = {"black": 0.16, "dark brown": 0.27, "brown": 0.22, "light brown": 0.12, "blond": 0.15, "red": 0.05,
            "ginger": 0.05}  # fmt: skip
DYED: tuple[Colour, ...] = ((0.45, 0.05, 0.14), (0.08, 0.1, 0.4), (0.2, 0.06, 0.3), (0.03, 0.25, 0.24), (0.6, 0.3, 0.4))


@dataclass(frozen=True)
class Hair:
    """Hair of the head.

    Attributes:
        style: a proxy's name, or empty for none.
        colour: what it reflects.
        cut: where it ends, in decimetres below the eyes.
        volume: how wide, high and deep it is, the style's being 1.
        waves: how far it swings in decimetres, how often in one decimetre, and where that begins, in turns.
        free: how far above the eyes it ends before the face, in decimetres.
        fringe: how far above the eyes a fringe ends, in decimetres, or 0 for none.
        cover: how much of the scalp it covers, in [0, 1].
        length: of what grows on it, in decimetres.
        bald: whether the crown is.
    """

    style: str
    colour: Colour
    cut: float
    volume: tuple[float, float, float]
    waves: tuple[float, float, float]
    free: float
    fringe: float
    cover: float
    length: float
    bald: bool


@dataclass(frozen=True)
class Beard:
    """How densely it grows on lip, chin and jaws, and how much of the skin it covers, in [0, 1]; its length in
    decimetres."""

    grown: tuple[float, float, float]
    cover: float
    length: float


def hair_of(random: Random, gender: str, age: str, race: str, colour: Colour) -> Hair:
    """A person's hair, of a colour."""
    styles = dict(STYLES[gender])
    if race == "african":
        styles["afro01"] += 0.25
        styles[""] = styles.get("", 0.0) * 1.5 + 0.04
    if age == "old":
        for name, factor in {"": 1.6, "short04": 1.5, "long01": 0.7}.items():
            if name in styles:
                styles[name] *= factor
    style = choose(random, styles)
    cut, waves, fringe, cover, length, bald = 9.0, (0.0, 0.0, 0.0), 0.0, 0.0, 0.0, False
    if style in _HANGS:
        cut = float(random.choice([9.0, random.uniform(0.6, 0.9), random.uniform(0.9, 1.35)], p=[0.4, 0.2, 0.4]))
        if random.random() < 0.5:
            waves = float(random.uniform(0.03, 0.11)), float(random.uniform(1.2, 3.2)), float(random.random())
    if style in ("long01", "ponytail01") and gender == "female" and random.random() < (0.3 if style in _HANGS else 0.6):
        fringe = float(random.uniform(0.2, 0.36))
    wide, high, deep = 1 + np.clip(random.normal(0.02, 0.025, 3), -0.01, 0.09) * (2.0 if style in _HANGS else 1.0)
    if not style:
        kind = choose(random, _SHAVED if gender == "male" else {"shaved": 0.3, "cropped": 0.7})
        bald = kind == "ring"
        cover = 0.0 if kind == "bald" else float(random.uniform(0.5, 0.8))
        length = {"bald": 0.0, "shaved": 0.0}.get(kind, float(random.uniform(0.03, 0.12)))
    free = float(random.uniform(0.24, 0.34))
    return Hair(style, colour, cut, (float(wide), float(high), float(deep)), waves, free, fringe, cover, length, bald)


def beard_of(random: Random, gender: str) -> Beard:
    """A person's beard, which 35 in 100 men have."""
    kind = choose(random, {name: share for name, (share, _) in _BEARDS.items()})
    if gender == "female" or not kind:
        return Beard((0.0, 0.0, 0.0), 0.0, 0.0)
    if kind == "stubble":
        return Beard(_BEARDS[kind][1], float(random.uniform(0.25, 0.5)), 0.0)
    length = random.uniform(0.0, 0.05) if random.random() < 0.5 else random.uniform(0.05, 0.16)
    return Beard(_BEARDS[kind][1], float(random.uniform(0.75, 0.95)), float(length))


def hair_colour(random: Random, age: str, race: str) -> Colour:
    """What hair reflects that is not dyed."""
    natural = _NATURAL if race == "caucasian" else {"black": 0.7, "dark brown": 0.28, "brown": 0.02}
    colour = _HAIR_COLOURS[choose(random, natural)]
    grey = {"young": 0.0, "middleage": 0.1, "old": 0.75}[age]
    if random.random() < grey:
        colour = _HAIR_COLOURS[choose(random, {"grey": 0.6, "white": 0.4})]
        if random.random() < 0.4:  # not all of it is yet
            colour = as_colour(0.5 * np.array(colour) + 0.5 * np.array(_HAIR_COLOURS[choose(random, natural)]))
    dark = 0.7 if race == "african" else 1.0
    return as_colour(np.array(colour) * dark * np.exp(random.normal(0, 0.15)) * (1 + random.normal(0, 0.02, 3)))


def dressed(
    positions: Positions,
    eyes: Float[np.ndarray, "3"],
    volume: tuple[float, float, float],
    waves: tuple[float, float, float],
) -> Positions:
    """A style's vertices, moved.

    Args:
        positions: of the style's mesh.
        eyes: their middle.
        volume: how wide, high and deep it becomes.
        waves: how far strands swing in decimetres, how often in one decimetre downwards, where they begin in turns.
    """
    centre = eyes + np.array([0.0, 0.15, -0.85], np.float32)
    found = centre + (positions - centre) * np.array(volume, np.float32)
    swing, often, begin = waves
    if swing:
        x, y, z = (found - centre).T
        angle = np.arctan2(x, z)
        low = np.clip(0.75 - y, 0.0, 1.0)  # roots do not swing
        phase = 2 * np.pi * (often * y + begin) + 3.0 * angle
        radius = 1.0 + swing * low * np.sin(phase) / np.maximum(np.hypot(x, z), 0.3)
        found = centre + np.stack([x * radius, y + 0.3 * swing * low * np.cos(phase), z * radius], 1)
    return found.astype(np.float32)


def as_colour(values: Any) -> Colour:
    """Three numbers of any kind."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue
