"""Who a computer-made person is, and how each of his or her pictures differs: all that chance decides.

A person and each view have a random stream of their own, so that any order of work draws the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.make_assets.people.backgrounds import Random, choose
from tools.make_assets.people.hair import DYED, TIED, Beard, Colour, Hair, as_colour, beard_of, hair_colour, hair_of
from tools.make_assets.people.rendering import Light

AGES = {"young": 0.3, "middleage": 0.45, "old": 0.25}
RACES = {"caucasian": 0.5, "african": 0.25, "asian": 0.25}
EXPRESSIONS = {"neutral": 0.35, "smiling": 0.40, "surprised": 0.08, "serious": 0.17}
GLASSES, BLACK_AND_WHITE = 0.15, 0.06
HATS = {"": 0.945, "fedora": 0.015, "fedora_cocked": 0.01, "cap": 0.02, "headband": 0.01}

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
               "chin/chin-width-min": 0.6, "chin/chin-bones-in": 0.4, "eyebrows/eyebrows-trans-depth-less": 0.5,
               "chin/chin-jaw-drop-less": 0.4, "nose/nose-scale-vert-decr": 0.3},
}  # fmt: skip
_VARIATION = {"male": 0.27, "female": 0.19}  # standard deviation of a feature's weight

_EYES = {"brown": 0.22, "brownlight": 0.2, "blue": 0.14, "deepblue": 0.08, "lightblue": 0.08, "green": 0.12,
         "bluegreen": 0.06, "grey": 0.1}  # fmt: skip
# What is worn are assets of MakeHuman's own (CC0 since September 2020), glasses apart (by punkduck, CC BY 3.0).
_BROWS = {
    "male": ("eyebrow001", "eyebrow008", "eyebrow009", "eyebrow010", "eyebrow012"),
    "female": ("eyebrow001", "eyebrow006", "eyebrow010", "eyebrow012"),
}  # the others look angry
_SUITS = tuple(f"male_casualsuit0{i}" for i in (1, 2, 3, 5, 6))
_CLOTHES: dict[str, tuple[str, ...]] = {
    "male": (*_SUITS, "male_elegantsuit01", "male_worksuit01"),
    "female": (*_SUITS, "female_casualsuit01", "female_elegantsuit01", "female_sportsuit01", "female_sportsuit01"),
}
_TONES = {"caucasian": 0.93, "asian": 0.93, "african": 1.12}  # means of what skins reflect, their textures' being 1
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
        hair, beard, brows, lashes, glasses: what they say; no glasses if None.
        natural: the colour of brows and beard.
        lips: factors of their colour.
        mirrored: whether the pictures are, so that not all partings are on the same side.
    """

    gender: str
    age: str
    race: str
    targets: dict[str, float]
    skin: float
    tone: Colour
    eyes: str
    hair: Hair
    beard: Beard
    brows: str
    lashes: str
    natural: Colour
    lips: Colour
    glasses: Colour | None
    mirrored: bool


@dataclass(frozen=True)
class View:
    """What one picture of a person has of its own.

    Attributes:
        expression: a word of the captions.
        targets: morph targets' weights.
        clothes, cloth: proxy, and factors of its colour; `dyed` where they replace it.
        hat: a proxy's name, cap, headband, or empty; `hat_colours` are those of caps and headbands, and of stripes, of
            which there are `stripes` in two decimetres.
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
    hat_colours: tuple[Colour, Colour]
    stripes: float
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
    tone = _TONES[race] * np.clip(1 + random.normal(0, 0.08) + random.normal((0.03, 0, -0.03), 0.025), 0.75, 1.2)
    eyes = choose(random, _EYES) if race == "caucasian" else choose(random, {"brown": 0.85, "brownlight": 0.15})
    natural = hair_colour(random, age, race)
    dyed = DYED[random.integers(len(DYED))] if random.random() < 0.02 else natural
    hair = hair_of(random, gender, age, race, dyed)
    lips = (0.95, 0.9, 0.9)
    if gender == "female":
        lips = as_colour((1 - random.beta(1.2, 2.5) * np.array([0.15, 0.6, 0.5])) * 0.97)
    return Person(
        gender, age, race, _identity(random, gender, age, race, names), float(random.random()), as_colour(tone), eyes,
        hair, beard_of(random, gender), _BROWS[gender][random.integers(len(_BROWS[gender]))],
        choose(random, {"Eyelashes01": 1, "eyelashes04": 1}), natural, lips,
        _FRAMES[random.integers(len(_FRAMES))] if random.random() < GLASSES / 0.95 else None,
        bool(random.random() < 0.5),
    )  # fmt: skip


def view(number: int, which: int, who: Person) -> View:
    """View `which` of the person of a number."""
    random = np.random.default_rng([43, number, which])
    expression, hat = choose(random, EXPRESSIONS), choose(random, HATS)
    if hat == "headband" and who.hair.style not in TIED:
        hat = "cap"
    wear = _CLOTHES[who.gender]
    clothes = wear[random.integers(len(wear))]
    yaw = float(np.clip(random.normal(0, 0.18), -0.5, 0.5))
    brightness = float(np.clip(random.normal(0.485, 0.145), 0.18, 0.78))
    return View(
        expression, _expression(random, expression, who.race), clothes, _cloth(random),
        bool(random.random() < 0.7), hat, (_cloth(random), _cloth(random)),
        float(random.choice([0.0, 0.0, 9.0, 14.0])), bool(random.random() < 0.95), yaw,
        float(np.clip(random.normal(0.02, 0.06), -0.16, 0.18)), float(np.clip(random.normal(0, 0.012), -0.04, 0.04)),
        float(random.uniform(0.4, 1.0)), float(np.exp(np.clip(random.normal(0.0, 0.02), -0.05, 0.05))),
        (float(0.5 + random.normal(0, 0.005)), float(0.37 + random.normal(0, 0.005))),
        float(random.uniform(3.5, 8)), _light(random, brightness * _NEEDED[who.race]),
        float(random.uniform(0.03, 0.12)), brightness, bool(random.random() < BLACK_AND_WHITE),
        int(random.integers(2**31)),
    )  # fmt: skip


def _identity(random: Random, gender: str, age: str, race: str, names: Sequence[str]) -> dict[str, float]:
    """The targets of a face: race, gender and age, and features that are its own."""
    old = {
        "young": random.uniform(0, 0.05),
        "middleage": random.uniform(0.2, 0.4),
        "old": random.uniform(0.65, 1) * (0.75 if gender == "female" else 1.0),
    }[age]
    found: dict[str, float] = {}
    other = ("caucasian", "african", "asian")[random.integers(3)]
    mixed = random.uniform(0, 0.35)
    for which, part in ((race, 1 - mixed), (other, mixed)):
        for stage, share in (("young", 1 - old), ("old", old)):
            name = f"macrodetails/{which}-{gender}-{stage}"
            found[name] = found.get(name, 0.0) + part * share
    muscle = choose(random, {"min": 0.3, "average": 0.6, "max": 0.02 if gender == "female" else 0.3})
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
        found[name] = random.uniform(0.3 if gender == "female" else 0.0, 1.0) * most
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


def _cloth(random: Random) -> Colour:
    cloth = random.uniform(0.02, 0.75) * (1 + random.uniform(0, 0.9) * random.uniform(-1, 1, 3))
    return as_colour(np.clip(cloth, 0.01, 0.9))


def _light(random: Random, brightness: float) -> Light:
    """A key light from somewhere before the face, a fill light, one from behind, and what comes from all around."""
    side, height = random.uniform(-0.95, 0.95), random.uniform(0.1, 0.75)
    key = np.array([np.sin(side) * np.cos(height), np.sin(height), np.cos(side) * np.cos(height)])
    warm, cool = random.normal(0.03, 0.06), random.normal(0.0, 0.05)
    warmth, coolness = np.array([1 + warm, 1, 1 - warm]), np.array([1 - cool, 1, 1 + cool])
    strength = np.exp(1.5 * (brightness - 0.45))
    around = strength * random.uniform(0.2, 0.5)
    across = random.uniform(0.6, 1.5) * -np.sign(side)
    behind = random.uniform(0.6, 1.4) * random.choice([-1, 1])
    return Light(
        key, strength * random.uniform(0.6, 1.2) * warmth,
        np.array([np.sin(across), 0.1, np.cos(across)]), strength * random.uniform(0.2, 0.5) * coolness,
        np.array([np.sin(behind), 0.35, -0.25]), random.uniform(0, 0.7) * coolness,
        around * coolness, 0.6 * around * warmth,
    )  # fmt: skip
