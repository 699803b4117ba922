"""What is behind a drawn person: plain walls, shades, soft shapes, rooms, lights, leaves. Of one colour in the main."""

import colorsys

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFilter

Picture = Float[np.ndarray, "s s 3"]
Random = np.random.Generator

# Words of captions.colour_name: how frequent, and ranges of hue in degrees, saturation, value.
COLOURS: dict[str, tuple[float, tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "white": (0.15, (0, 360), (0, 0.08), (0.93, 1.0)),
    "light grey": (0.13, (0, 360), (0, 0.12), (0.7, 0.83)),
    "grey": (0.11, (0, 360), (0, 0.12), (0.46, 0.6)),
    "dark grey": (0.08, (0, 360), (0, 0.12), (0.21, 0.35)),
    "black": (0.08, (0, 360), (0, 0.3), (0.02, 0.1)),
    "brown": (0.09, (18, 37), (0.3, 0.65), (0.28, 0.52)),
    "red": (0.08, (-30, 11), (0.35, 0.85), (0.4, 0.9)),
    "orange": (0.07, (19, 36), (0.4, 0.85), (0.72, 1.0)),
    "yellow": (0.07, (45, 61), (0.4, 0.85), (0.6, 1.0)),
    "green": (0.06, (75, 150), (0.3, 0.75), (0.3, 0.85)),
    "blue": (0.07, (180, 245), (0.3, 0.8), (0.35, 0.95)),
    "purple": (0.05, (263, 312), (0.3, 0.75), (0.35, 0.9)),
}
_LIGHTER = 6.0  # exponent of how much more frequent light colours are in bright pictures
KINDS = {"plain": 0.18, "shade": 0.2, "blobs": 0.18, "room": 0.22, "lights": 0.1, "leaves": 0.12}


def choose(random: Random, options: dict[str, float]) -> str:
    """One of some names, by weight."""
    weights = np.array(list(options.values()), float)
    return list(options)[int(random.choice(len(options), p=weights / weights.sum()))]


def background(random: Random, size: int, brightness: float = 0.5) -> Picture:
    """A picture of size² pixels, with values in [0, 1]: the lighter, the brighter the whole is meant to be."""
    lighter = _LIGHTER * (brightness - 0.5)
    frequent = {name: share * np.exp(lighter * (sum(value) / 2 - 0.6)) for name, (share, *_, value) in COLOURS.items()}
    _, hue, saturation, value = COLOURS[choose(random, frequent)]
    colour = colorsys.hsv_to_rgb(random.uniform(*hue) / 360 % 1.0, random.uniform(*saturation), random.uniform(*value))
    flat = np.broadcast_to(np.array(colour), (size, size, 3))
    kind = choose(random, KINDS)
    found = _DRAW[kind](random, flat) if kind in _DRAW else flat
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle, strength = random.uniform(0, 2 * np.pi), random.normal(0, 0.3 if kind == "shade" else 0.1)
    corner = random.uniform(0, 0.5) if kind == "shade" else 0.0  # darker towards the corners
    shade = 1.0 + strength * (np.cos(angle) * x + np.sin(angle) * y) - corner * (x**2 + y**2)
    return np.clip(found * shade[..., None], 0.0, 1.0)


def _blobs(random: Random, flat: Picture) -> Picture:
    size, few = len(flat), int(random.integers(3, 7))
    noise = 0.5 + random.normal(0, random.uniform(0.03, 0.14), (few, few, 1)) + random.normal(0, 0.02, (few, few, 3))
    soft = Image.fromarray((np.clip(noise, 0, 1) * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return flat * (0.4 + 1.2 * np.asarray(soft) / 255.0)


def _room(random: Random, flat: Picture) -> Picture:
    """Walls, shelves, frames, a window perhaps, out of focus."""
    size = len(flat)
    image = Image.fromarray((flat * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(random.integers(2, 6)):  # bars from edge to edge
        at, wide = random.uniform(0, size), random.uniform(0.02, 0.14) * size
        upright = random.random() < 0.65
        box = (at, 0, at + wide, size) if upright else (0, at, size, at + wide)
        draw.rectangle(box, fill=_shade(random, flat[0, 0], 0.35))
    for _ in range(random.integers(0, 4)):  # pictures, doors
        x, y, w, h = random.uniform((-0.1, -0.1, 0.1, 0.1), (0.9, 0.9, 0.3, 0.5)) * size
        draw.rectangle((x, y, x + w, y + h), fill=_shade(random, flat[0, 0], 0.5))
    if random.random() < 0.35:
        x = random.choice([random.uniform(-0.1, 0.08), random.uniform(0.75, 0.9)]) * size
        y, w, h = random.uniform((0, 0.12, 0.25), (0.3, 0.25, 0.6)) * size
        glass = tuple(int(v) for v in random.uniform((215, 220, 225), (255, 255, 255)))
        draw.rectangle((x, y, x + w, y + h), fill=glass)
        for part in (0.33, 0.66):
            draw.line((x, y + h * part, x + w, y + h * part), fill=_shade(random, flat[0, 0], 0.3), width=2)
    return _blurred(image, random.uniform(0.008, 0.04) * size)


def _lights(random: Random, flat: Picture) -> Picture:
    """Discs, as lamps look that are out of focus."""
    size = len(flat)
    image = Image.fromarray((flat * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(random.integers(8, 22)):
        x, y, radius = random.uniform((0, 0, 0.025), (1, 1, 0.1)) * size
        colour = _shade(random, flat[0, 0], 0.6, lighter=True)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*colour, int(random.uniform(50, 150))))
    return _blurred(image, random.uniform(0.004, 0.015) * size)


def _leaves(random: Random, flat: Picture) -> Picture:
    """Noise of several sizes, as of leaves, stones or clouds."""
    size, total = len(flat), np.zeros((len(flat), len(flat)))
    for few, weight in ((5, 0.4), (11, 0.35), (23, 0.3)):
        noise = Image.fromarray(random.normal(0, 1, (few, few)).astype(np.float32))
        total += weight * np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
    contrast = random.uniform(0.12, 0.4)
    tinted = random.normal(0, 0.06, 3)
    return np.clip(flat * (1.0 + contrast * total[..., None] * (1.0 + tinted)), 0.0, 1.0)


def _shade(random: Random, colour: np.ndarray, most: float, lighter: bool = False) -> tuple[int, int, int]:
    """A colour like another, lighter or darker."""
    change = random.uniform(0.1 if lighter else -most, most)
    found = colour + (1.0 - colour) * change if change > 0 else colour * (1.0 + change)
    red, green, blue = (np.clip(found + random.normal(0, 0.02, 3), 0, 1) * 255).astype(int)
    return int(red), int(green), int(blue)


def _blurred(image: Image.Image, radius: float) -> Picture:
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius))) / 255.0


_DRAW = {"blobs": _blobs, "room": _room, "lights": _lights, "leaves": _leaves}
