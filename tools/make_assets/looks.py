"""Who a computer-made person is, and how each of his or her pictures differs: all that chance decides.

A person and each view have a random stream of their own, so that any order of work draws the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.make_assets.backgrounds import Random, choose
from tools.make_assets.rendering import Light

Colour = tuple[float, float, float]

AGES = {"young": 0.3, "middleage": 0.45, "old": 0.25}
RACES = {"caucasian": 0.5, "african": 0.25, "asian": 0.25}
EXPRESSIONS = {"neutral": 0.35, "smiling": 0.40, "surprised": 0.08, "serious": 0.17}
GLASSES, BLACK_AND_WHITE = 0.15, 0.06
_HATS = {"": 0.96, "fedora": 0.015, "fedora_cocked": 0.01, "Fishing_Hat_01": 0.015}

# Of what is left of a name without its last word, two targets change the form in opposite directions.
_OPPOSITES = dict(pair.split() for pair in (
    "less more", "decr incr", "down up", "in out", "min max", "backward forward", "small big", "deflate inflate",
    "decrease increase", "concave convex", "compress uncompress", "lessgreek moregreek", "lesshump morehump",
))  # fmt: skip
_FEATURES = ("head", "forehead", "eyebrows", "eyes", "nose", "mouth", "ears", "chin", "cheek", "neck")
_SKIPPED = (  # they move the whole head, or make it another's, or too strange
    "head-age", "head-angle", "head-trans", "back-scale", "neck-scale", "neck-trans", "mouth-trans", "eye-push",
    "nose-trans-horiz", "nose-compression", "laugh-lines", "dimples", "ear-wing", "ear-rot", "ear-trans", "jaw-drop",
    "nose-flaring", "prognathism", "eye-move", "lowerlip-ext", "upperlip-ext", "double",
    "eye-bag-max",  # the package's of the right eye has a coordinate that overflowed
)  # fmt: skip
_SHAPES = {
    "male": ("diamond", "invertedtriangular", "oval", "rectangular", "round", "square", "triangular", "fat", "skinny"),
    "female": ("invertedtriangular", "oval", "round", "fat", "skinny"),
}
_TYPICAL = {  # weights up to these make the two easier to tell apart
    "male": {"chin/chin-width-max": 0.4, "eyebrows/eyebrows-trans-depth-more": 0.4, "neck/neck-scale-horiz-more": 0.4},
    "female": {"eyes/l-eye-size-big": 0.4, "eyes/r-eye-size-big": 0.4, "nose/nose-scale-horiz-decr": 0.4,
               "mouth/mouth-upperlip-volume-inflate": 0.5, "mouth/mouth-lowerlip-volume-inflate": 0.5,
               "chin/chin-width-min": 0.4},
}  # fmt: skip
_VARIATION = {"male": 0.27, "female": 0.21}  # standard deviation of a feature's weight

_HAIR: dict[str, dict[str, float]] = {
    "male": {"short01": 0.26, "short02": 0.23, "short04": 0.24, "short03": 0.01, "afro01": 0.03, "": 0.14,
             "ponytail01": 0.03, "long_alpha7": 0.02},
    "female": {"long01": 0.2, "long_alpha7": 0.15, "ponytail01": 0.13, "Wig_bun_blonde": 0.09, "Braid01": 0.09,
               "junglebookhair": 0.07, "curly": 0.05, "curly2": 0.02, "southernbelleringlets": 0.015, "short02": 0.04,
               "short04": 0.02, "afro01": 0.01, "blondwithheadband": 0.04, "bob02": 0.01,
               "short03": 0.01},
}  # fmt: skip
_CAN_BE_CUT = ("long01", "long_alpha7", "junglebookhair", "curly", "curly2")
_HAIR_COLOURS: dict[str, Colour] = {
    "black": (0.018, 0.015, 0.014), "dark brown": (0.055, 0.034, 0.022), "brown": (0.13, 0.077, 0.045),
    "light brown": (0.24, 0.15, 0.085), "blond": (0.48, 0.34, 0.18), "red": (0.27, 0.09, 0.035),
    "grey": (0.3, 0.3, 0.31), "white": (0.62, 0.61, 0.6),
}  # fmt: skip
_NATURAL = {"black": 0.16, "dark brown": 0.27, "brown": 0.22, "light brown": 0.12, "blond": 0.15, "red": 0.08}
_EYES = {"brown": 0.22, "brownlight": 0.2, "blue": 0.14, "deepblue": 0.08, "lightblue": 0.08, "green": 0.12,
         "bluegreen": 0.06, "grey": 0.1}  # fmt: skip
_BROWS = {
    "male": ("eyebrow001", "eyebrow008", "eyebrow009", "eyebrow010", "eyebrow012"),
    "female": ("eyebrow001", "eyebrow006", "eyebrow010", "eyebrow012"),
}  # the others look angry
_CLOTHES: dict[str, tuple[str, ...]] = {
    "male": ("male_casualsuit01", "male_casualsuit02", "male_casualsuit03", "male_casualsuit05", "male_casualsuit06",
             "male_elegantsuit01", "male_worksuit01", "Harvey_Sweater2", "short_tail_camo_tee"),
    "female": ("female_casualsuit01", "female_elegantsuit01", "female_sportsuit01", "Harvey_Sweater2",
               "Rolled_neck_blouse", "Sleeveless", "Coat", "F_Dress_04", "Tank_Top_01",
               "Asymmetric_Tunic_and_Sash", "Harvey_VestV1"),
}  # fmt: skip
_NEEDED = {"caucasian": 0.95, "asian": 0.95, "african": 1.3}  # light, by what a skin reflects
_FRAMES: tuple[Colour, ...] = ((0.01, 0.01, 0.01), (0.02, 0.012, 0.01), (0.1, 0.05, 0.03), (0.25, 0.25, 0.27),
                               (0.2, 0.02, 0.02), (0.02, 0.04, 0.15), (0.5, 0.4, 0.2))  # fmt: skip


@dataclass(frozen=True)
class Person:
    """What all pictures of a person have in common.

    Attributes:
        gender, age, race: words of the package's skins.
        targets: morph targets' weights.
        skin: which of the skins that fit, in [0, 1).
        tone: factors of its colour.
        eyes: their colour.
        hair: its style, empty for bald; `cut` is where it ends, in decimetres below the eyes.
        hair_colour, beard, brows, lashes, glasses: what they say; empty or None for none.
        mirrored: whether the pictures are, so that not all partings are on the same side.
    """

    gender: str
    age: str
    race: str
    targets: dict[str, float]
    skin: float
    tone: Colour
    eyes: str
    hair: str
    cut: float
    hair_colour: Colour
    beard: str
    brows: str
    lashes: str
    glasses: Colour | None
    mirrored: bool


@dataclass(frozen=True)
class View:
    """What one picture of a person has of its own.

    Attributes:
        expression: a word of the captions.
        targets: morph targets' weights.
        clothes, cloth: proxy, and factors of its colour; `dyed` where they replace it.
        hat: a proxy's name, or empty.
        wears_glasses: whether those who have them do.
        yaw, pitch, roll: of the head, in radians.
        gaze: how much of the way back to the camera the eyes turn.
        zoom: how much nearer than on average.
        at: where between the eyes is, x to the right and y downwards, in parts of the picture.
        distance: of the camera, in pictures' heights.
        light: directions and colours.
        shine: of the skin.
        brightness: the mean of a picture that is aimed at, in [0, 1].
        black_and_white: whether it is.
        seed: of the background.
    """

    expression: str
    targets: dict[str, float]
    clothes: str
    cloth: Colour
    dyed: bool
    hat: str
    wears_glasses: bool
    yaw: float
    pitch: float
    roll: float
    gaze: float
    zoom: float
    at: tuple[float, float]
    distance: float
    light: Light
    shine: float
    brightness: float
    black_and_white: bool
    seed: int


def person(number: int, names: Sequence[str]) -> Person:
    """The person of a number.

    Args:
        number: any; each gives another.
        names: targets of the package, in order.
    """
    random = np.random.default_rng([43, number])
    gender = ("female", "male")[int(random.random() < 0.5)]
    age, race = choose(random, AGES), choose(random, RACES)
    hair = _hair(random, gender, age, race)
    colour = _hair_colour(random, age, race)
    tone = np.clip(1 + random.normal(0, 0.07) + random.normal(0, 0.025, 3), 0.75, 1.2)
    eyes = choose(random, _EYES) if race == "caucasian" else choose(random, {"brown": 0.85, "brownlight": 0.15})
    beard = choose(random, {"": 0.62, "Full_beard": 0.25, "Moustache": 0.13}) if gender == "male" else ""
    return Person(
        gender, age, race, _identity(random, gender, age, race, names), float(random.random()), _colour(tone), eyes,
        hair, float(random.uniform(0.75, 1.3)) if hair in _CAN_BE_CUT and random.random() < 0.4 else 9.0, colour, beard,
        _BROWS[gender][random.integers(len(_BROWS[gender]))], choose(random, {"Eyelashes01": 1, "eyelashes04": 1}),
        _FRAMES[random.integers(len(_FRAMES))] if random.random() < GLASSES / 0.95 else None,
        bool(random.random() < 0.5),
    )  # fmt: skip


def view(number: int, which: int, who: Person) -> View:
    """View `which` of the person of a number."""
    random = np.random.default_rng([43, number, which])
    expression = choose(random, EXPRESSIONS)
    wear = _CLOTHES[who.gender]
    clothes = wear[random.integers(len(wear))]
    cloth = random.uniform(0.02, 0.75) * (1 + random.uniform(0, 0.9) * random.uniform(-1, 1, 3))
    yaw = float(np.clip(random.normal(0, 0.2), -0.56, 0.56))
    brightness = float(np.clip(random.normal(0.51, 0.16), 0.18, 0.8))
    return View(
        expression, _expression(random, expression, who.race), clothes, _colour(np.clip(cloth, 0.01, 0.9)),
        bool(random.random() < 0.7), choose(random, _HATS), bool(random.random() < 0.95), yaw,
        float(np.clip(random.normal(0.02, 0.06), -0.16, 0.18)), float(np.clip(random.normal(0, 0.012), -0.04, 0.04)),
        float(random.uniform(0.4, 1.0)), float(np.exp(np.clip(random.normal(0.01, 0.06), -0.14, 0.15))),
        (float(0.508 + random.normal(0, 0.012)), float(0.37 + np.clip(random.normal(0, 0.02), -0.05, 0.05))),
        float(random.uniform(3.5, 8)), _light(random, brightness * _NEEDED[who.race]),
        float(random.uniform(0.03, 0.12)), brightness, bool(random.random() < BLACK_AND_WHITE),
        int(random.integers(2**31)),
    )  # fmt: skip


def _identity(random: Random, gender: str, age: str, race: str, names: Sequence[str]) -> dict[str, float]:
    """The targets of a face: race, gender and age, and features that are its own."""
    old = {"young": random.uniform(0, 0.05), "middleage": random.uniform(0.2, 0.4), "old": random.uniform(0.65, 1)}[age]
    found: dict[str, float] = {}
    other = ("caucasian", "african", "asian")[random.integers(3)]
    mixed = random.uniform(0, 0.35)
    for which, part in ((race, 1 - mixed), (other, mixed)):
        for stage, share in (("young", 1 - old), ("old", old)):
            name = f"macrodetails/{which}-{gender}-{stage}"
            found[name] = found.get(name, 0.0) + part * share
    muscle = choose(random, {"min": 0.3, "average": 0.6, "max": 0.1 if gender == "female" else 0.3})
    weight = choose(random, {"min": 0.2, "average": 0.6, "max": 0.2})
    strength = random.uniform(0.2, 0.7)
    for stage, share in (("young", 1 - old), ("old", old)):
        body = f"macrodetails/universal-{gender}-{stage}"
        found[f"{body}-averagemuscle-averageweight"] = share * (1 - strength)
        name = f"{body}-{muscle}muscle-{weight}weight"
        found[name] = found.get(name, 0.0) + share * strength
    found |= {"young": {"head/head-age-less": random.uniform(0.2, 0.5)}, "middleage": {},
              "old": {"head/head-age-more": random.uniform(0.3, 0.7)}}[age]  # fmt: skip
    for name, most in _TYPICAL[gender].items():
        found[name] = random.uniform(0, most)
    shapes = _SHAPES[gender]
    found[f"head/head-{shapes[random.integers(len(shapes))]}"] = random.uniform(0.1, 0.45)
    features = sorted({_feature(name) for name in names if _feature(name)})
    for feature in features:
        value = float(np.clip(random.normal(0, _VARIATION[gender]), -0.5, 0.5)) * (random.random() < 0.5)
        for name in names:
            if value and _feature(name) == feature and (name.rsplit("-", 1)[1] in _OPPOSITES) == (value < 0):
                found[name] = found.get(name, 0.0) + abs(value)
    uneven = [name for name in names if name.startswith("asym/asym-")]
    for i in random.choice(len(uneven), min(5, len(uneven)), replace=False):
        found[uneven[i]] = abs(random.normal(0, 0.15))
    return {name: float(value) for name, value in found.items()}


def _feature(name: str) -> str:
    """What a target changes, the same for left and right and for both directions; empty if it is not to be used."""
    group, _, rest = name.partition("/")
    stem, _, end = rest.rpartition("-")
    if group not in _FEATURES or end not in (*_OPPOSITES, *_OPPOSITES.values()) or any(s in rest for s in _SKIPPED):
        return ""
    return f"{group}/{stem.removeprefix('l-').removeprefix('r-')}"


def _expression(random: Random, word: str, race: str) -> dict[str, float]:
    """The targets of an expression."""
    strength, found = random.uniform(0.8, 1.1), {}
    both = ("left", "right")
    if word == "smiling":
        found = {"mouth-corner-puller": (0.9 if race == "asian" else 1.1) * strength} | {
            f"eye-{side}-slit": 0.2 * strength for side in both
        }
        if random.random() < 0.7:
            found |= {"mouth-upward-retraction": random.uniform(0.45, 0.75), "mouth-parling": random.uniform(0.2, 0.6),
                      "mouth-open": 0.15 * random.random()}  # fmt: skip
    elif word == "surprised":
        found = {"mouth-open": 0.65 * strength, "mouth-protusion": 0.3}
        for side in both:
            found |= {f"eyebrows-{side}-up": 0.6 * strength, f"eyebrows-{side}-inner-up": 1.15 * strength,
                      f"eye-{side}-opened-up": 1.1 * strength}  # fmt: skip
    elif word == "serious":
        found = {"mouth-compression": 0.7 * strength, "mouth-depression": random.uniform(0.2, 0.6)}
        for side in both:
            found |= {f"eyebrows-{side}-down": 0.95 * strength, f"eye-{side}-slit": random.uniform(0.1, 0.3)}
    return {f"expression/units/{race}/{name}": float(value) for name, value in found.items()}


def _hair(random: Random, gender: str, age: str, race: str) -> str:
    styles = dict(_HAIR[gender])
    if race == "african":
        styles["afro01"] += 0.25
        for name in ("curly", "curly2", "Braid01"):
            if name in styles:
                styles[name] *= 1.5
    if age == "old":
        for name, factor in {"": 2.0, "short02": 3.0, "short04": 2.0, "long01": 0.4, "long_alpha7": 0.4}.items():
            if name in styles:
                styles[name] *= factor
    return choose(random, styles)


def _hair_colour(random: Random, age: str, race: str) -> Colour:
    natural = _NATURAL if race == "caucasian" else {"black": 0.7, "dark brown": 0.28, "brown": 0.02}
    name = choose(random, natural)
    if age == "old" and random.random() < 0.75:
        name = choose(random, {"grey": 0.55, "white": 0.45})
    return _colour(
        np.array(_HAIR_COLOURS[name])
        * (0.7 if race == "african" else 1.0)
        * np.exp(random.normal(0, 0.15))
        * (1 + random.normal(0, 0.02, 3))
    )


def _light(random: Random, brightness: float) -> Light:
    """A key light from somewhere before the face, a fill light, one from behind, and what comes from all around."""
    side, height = random.uniform(-0.95, 0.95), random.uniform(0.1, 0.75)
    key = np.array([np.sin(side) * np.cos(height), np.sin(height), np.cos(side) * np.cos(height)])
    warm, cool = random.normal(0, 0.08), random.normal(0, 0.08)
    warmth, coolness = np.array([1 + warm, 1, 1 - warm]), np.array([1 - cool, 1, 1 + cool])
    strength = np.exp(1.8 * (brightness - 0.45))
    around = strength * random.uniform(0.2, 0.5)
    across = random.uniform(0.6, 1.5) * -np.sign(side)
    behind = random.uniform(0.6, 1.4) * random.choice([-1, 1])
    return Light(
        key, strength * random.uniform(0.6, 1.2) * warmth,
        np.array([np.sin(across), 0.1, np.cos(across)]), strength * random.uniform(0.2, 0.5) * coolness,
        np.array([np.sin(behind), 0.35, -0.25]), random.uniform(0, 0.7) * coolness,
        around * coolness, 0.6 * around * warmth,
    )  # fmt: skip


def _colour(values: Any) -> Colour:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
