"""Portraits of the npm package @tabler/preview → 64×64 photographs with captions, split into base, train and held-out.

python -m hgdpo_jax.assets.photographs AVATARS OUT
"""

import argparse
import colorsys
import json
from pathlib import Path

import numpy as np
from PIL import Image

from hgdpo_jax import command

SIZE = 64
HELDOUT_OF_EACH = 10
_HUES = ((15, "red"), (40, "orange"), (65, "yellow"), (160, "green"), (255, "blue"), (320, "purple"), (360, "red"))
_GREYS = ((0.15, "black"), (0.4, "dark grey"), (0.65, "grey"), (0.88, "light grey"), (1.01, "white"))


def square(image: Image.Image) -> np.ndarray:
    """The centre of an image, uint8 [64, 64, 3]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box))


def colour_name(rgb: np.ndarray) -> str:
    """A word for a colour with channels in [0, 1]."""
    hue, saturation, value = colorsys.rgb_to_hsv(*map(float, rgb))
    if saturation < 0.2 or value < 0.15:
        return next(name for limit, name in _GREYS if value < limit)
    name = next(name for limit, name in _HUES if hue * 360 < limit + 1e-6)
    return "brown" if name == "orange" and value < 0.6 else name


def caption(pixels: np.ndarray, person: str) -> str:
    """What is known or measured, nothing guessed: f/m of the file name, background, brightness, colour or not."""
    image = pixels / 255.0
    corners = np.concatenate([image[:20, :10].reshape(-1, 3), image[:20, -10:].reshape(-1, 3)])
    grey = np.abs(image - image.mean(-1, keepdims=True)).mean() < 0.01
    brightness = "bright" if image.mean() > 0.55 else "dark" if image.mean() < 0.35 else "soft"
    words = f"a portrait photograph of a {person}, {colour_name(np.median(corners, 0))} background, {brightness} light"
    return words + (", black and white" if grey else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("avatars", type=Path, help="package/dist/static/avatars")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    files = sorted(arguments.avatars.glob("*.jpg"))
    pixels = {file.name: square(Image.open(file)) for file in files}
    # A photograph that occurs twice is not fit to be held out.
    small = np.stack([p.reshape(8, 8, 8, 8, 3).mean((1, 3)).ravel() for p in pixels.values()])
    distance = np.abs(small[:, None] - small[None]).mean(-1) + 255.0 * np.eye(len(small))
    twice = {file.name for file, nearest in zip(files, distance.min(1), strict=True) if nearest < 8.0}
    heldout: set[str] = set()
    for letter in "fm":
        single = [name for name in pixels if name[-5] == letter and name not in twice]
        heldout |= {single[i] for i in np.linspace(0, len(single) - 1, HELDOUT_OF_EACH).round().astype(int)}
    # What the base was trained on it knows by heart, and a winner that it knows by heart teaches it nothing. So half of
    # the rest is for the base, with all that occur twice; the other half is for the curriculum.
    rest = sorted(set(pixels) - heldout, key=lambda name: (name not in twice, name[-5], name))
    base = {*rest[: len(twice)], *rest[len(twice) :: 2][: len(rest) // 2 - len(twice)]}
    folder = arguments.out / "photographs"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, image in pixels.items():
        Image.fromarray(image).save(folder / name, quality=95, subsampling=0)
        text = caption(image, {"f": "woman", "m": "man"}[name[-5]])
        split = "heldout" if name in heldout else "base" if name in base else "train"
        lines.append(json.dumps({"file": f"photographs/{name}", "caption": text, "split": split}))
    (arguments.out / "captions.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} photographs in {folder}, {len(heldout)} of them held out, {len(twice)} occur twice")


if __name__ == "__main__":
    command.run(main)
