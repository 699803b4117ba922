"""Portraits of the npm package @tabler/preview → 64×64 photographs with captions, split into base, train and held-out.

python -m hgdpo_jax.assets.photographs AVATARS PORTRAITS                   the embedded photographs
python -m hgdpo_jax.assets.photographs AVATARS PORTRAITS --views base FOLDER     those that the base is trained on
python -m hgdpo_jax.assets.photographs AVATARS PORTRAITS --views train FOLDER    those that the adapter is trained on
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
VIEWS = 24
_HUES = ((15, "red"), (40, "orange"), (65, "yellow"), (160, "green"), (255, "blue"), (320, "purple"), (360, "red"))
_GREYS = ((0.15, "black"), (0.4, "dark grey"), (0.65, "grey"), (0.88, "light grey"), (1.01, "white"))


def square(image: Image.Image, width: float = 1.0, height: float = 1.0, x: float = 0.5, y: float = 0.5) -> np.ndarray:
    """A part of the central square of an image, uint8 [64, 64, 3].

    Args:
        width, height: of the part, in sides of the square, (0, 1].
        x, y: where it lies, from 0 (left, top) to 1 (right, bottom).
    """
    side = min(image.size)
    left = (image.width - side) // 2 + x * (1.0 - width) * side
    top = (image.height - side) // 2 + y * (1.0 - height) * side
    box = (left, top, left + width * side, top + height * side)
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


def split_names(pixels: dict[str, np.ndarray]) -> tuple[dict[str, str], int]:
    """File name → split, and how many photographs occur twice.

    A photograph that occurs twice is not fit to be held out. What the base was trained on it knows by heart, and a
    winner that it knows by heart teaches it nothing: so half of the rest is for the base, with all that occur twice,
    and the other half for the curriculum.
    """
    small = np.stack([p.reshape(8, 8, 8, 8, 3).mean((1, 3)).ravel() for p in pixels.values()])
    distance = np.abs(small[:, None] - small[None]).mean(-1) + 255.0 * np.eye(len(small))
    twice = {name for name, nearest in zip(pixels, distance.min(1), strict=True) if nearest < 8.0}
    heldout: set[str] = set()
    for letter in "fm":
        single = [name for name in pixels if name[-5] == letter and name not in twice]
        heldout |= {single[i] for i in np.linspace(0, len(single) - 1, HELDOUT_OF_EACH).round().astype(int)}
    rest = sorted(set(pixels) - heldout, key=lambda name: (name not in twice, name[-5], name))
    base = {*rest[: len(twice)], *rest[len(twice) :: 2][: len(rest) // 2 - len(twice)]}
    places = {name: "heldout" if name in heldout else "base" if name in base else "train" for name in pixels}
    return places, len(twice)


def write_folder(out: Path, entries: list[tuple[str, np.ndarray, str, str]]) -> None:
    """(file name, pixels, caption, split) → photographs/*.jpg and captions.jsonl."""
    (out / "photographs").mkdir(parents=True, exist_ok=True)
    lines = []
    for name, image, text, split in entries:
        Image.fromarray(image).save(out / "photographs" / name, quality=95, subsampling=0)
        lines.append(json.dumps({"file": f"photographs/{name}", "caption": text, "split": split}))
    (out / "captions.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("avatars", type=Path, help="package/dist/static/avatars")
    parser.add_argument("portraits", type=Path)
    parser.add_argument("--views", nargs=2, help="write views of a split's photographs, and the held-out ones, here")
    arguments = parser.parse_args()
    files = {file.name: Image.open(file) for file in sorted(arguments.avatars.glob("*.jpg"))}
    pixels = {name: square(image) for name, image in files.items()}
    places, twice = split_names(pixels)
    texts = {name: caption(image, {"f": "woman", "m": "man"}[name[-5]]) for name, image in pixels.items()}
    if arguments.views is None:
        write_folder(arguments.portraits, [(name, pixels[name], texts[name], places[name]) for name in pixels])
        print(f"{len(pixels)} photographs in {arguments.portraits}, {twice} of them occur twice")
        return
    # Cut anew from the originals, so that no view is more blurred than a photograph.
    random = np.random.default_rng(0)
    entries = [(name, pixels[name], texts[name], "heldout") for name in pixels if places[name] == "heldout"]
    split, out = arguments.views
    for name in (name for name in pixels if places[name] == split):
        for number in range(VIEWS):
            size, aspect = random.uniform(0.76, 1.0), random.uniform(0.95, 1.0, 2)
            view = square(files[name], *(size * aspect), *random.uniform(0.0, 1.0, 2))
            entries.append((f"{number}-{name}", view, texts[name], split))
    write_folder(Path(out), entries)
    print(f"{len(entries)} photographs in {out}")


if __name__ == "__main__":
    command.run(main)
