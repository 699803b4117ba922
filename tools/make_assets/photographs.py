"""Portraits of the npm package @tabler/preview → 96×96 photographs of faces with captions, for the curriculum.

python -m tools.make_assets.photographs AVATARS MODEL_FOLDER PORTRAITS

Each is turned and cut so that the eyes lie where those of the made people do, from whom the base learns.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from hgdpo_jax.devices.start import start
from hgdpo_jax.faces.detection import FaceDetector
from hgdpo_jax.run import command
from tools.make_assets.captions import Captioner, write

SIZE = 96
HELDOUT_OF_EACH = 20
_EYES = 0.37  # of the square's height, their middle lies below its upper edge; from left to right it is in the middle
_APART, _TO_MOUTH = 0.305, 0.325  # of the square's side at most: from eye to eye, and from their middle to the mouth
_SEEN = 256  # pixels a side of what the detector sees
_FINE = 4  # times as large is cut first, so that it is scaled down with all its pixels


class Place(NamedTuple):
    """Where a face lies in an image: centre and side of its square in pixels, and its tilt in radians, clockwise."""

    x: float
    y: float
    side: float
    tilt: float


def place(image: Image.Image, faces: FaceDetector) -> Place:
    """The square around the best face of an image."""
    scale = max(image.size) / _SEEN
    seen = Image.new("RGB", (_SEEN, _SEEN))
    seen.paste(image.resize((round(image.width / scale), round(image.height / scale)), Image.Resampling.LANCZOS))
    pixels = np.asarray(seen, np.float32)[None] / 127.5 - 1.0
    points = np.asarray(faces.points(pixels, faces.detect(pixels).boxes)[0]) * scale
    left, right, mouth = points[0], points[1], points[3:].mean(0)
    middle, (across, down) = 0.5 * (left + right), right - left
    tilt = float(np.arctan2(down, across))
    side = max(float(np.hypot(across, down)) / _APART, float(np.linalg.norm(mouth - middle)) / _TO_MOUTH)
    side = min(side, *image.size)  # moved inside, and made smaller if it has to be
    x, y = middle + (0.5 - _EYES) * side * np.array([-np.sin(tilt), np.cos(tilt)])
    return Place(
        float(np.clip(x, side / 2, image.width - side / 2)),
        float(np.clip(y, side / 2, image.height - side / 2)),
        side,
        tilt,
    )


def cut(image: Image.Image, at: Place) -> UInt8[np.ndarray, "96 96 3"]:
    """The square, turned level. Corners beyond the image repeat its edge."""
    margin = int(at.side)
    padded = Image.fromarray(np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), mode="edge"))
    step = at.side / (_FINE * SIZE)
    a, b = step * np.cos(at.tilt), step * np.sin(at.tilt)
    half = _FINE * SIZE / 2
    x, y = at.x + margin, at.y + margin
    data = (a, -b, x - half * (a - b), b, a, y - half * (a + b))
    turned = padded.transform((_FINE * SIZE,) * 2, Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
    return np.asarray(turned.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def heldout(pixels: dict[str, np.ndarray], faces: FaceDetector) -> tuple[set[str], int]:
    """The names of those to hold out, as many women as men, and how many photographs occur twice: they are not fit, and
    neither are those in which, as they are cut or mirrored, no face is found."""
    small = np.stack([p.reshape(8, SIZE // 8, 8, SIZE // 8, 3).mean((1, 3)).ravel() for p in pixels.values()])
    distance = np.abs(small[:, None] - small[None]).mean(-1) + 255.0 * np.eye(len(small))
    twice = {name for name, nearest in zip(pixels, distance.min(1), strict=True) if nearest < 8.0}
    cuts = np.stack(list(pixels.values())).astype(np.float32) / 127.5 - 1.0
    plain = np.asarray(faces.detect(cuts).found) & np.asarray(faces.detect(cuts[:, :, ::-1]).found)
    unfit = twice | {name for name, seen in zip(pixels, plain, strict=True) if not seen}
    found: set[str] = set()
    for letter in "fm":
        single = [name for name in pixels if name[-5] == letter and name not in unfit]
        found |= {single[i] for i in np.linspace(0, len(single) - 1, HELDOUT_OF_EACH).round().astype(int)}
    return found, len(twice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("avatars", type=Path, help="package/dist/static/avatars of @tabler/preview")
    parser.add_argument("models", type=Path, metavar="MODEL_FOLDER", help="package/model of @vladmandic/face-api")
    parser.add_argument("portraits", type=Path)
    arguments = parser.parse_args()
    start()
    faces, pixels = FaceDetector(), {}
    for file in sorted(arguments.avatars.glob("*.jpg")):
        image = Image.open(file).convert("RGB")
        pixels[file.name] = cut(image, place(image, faces))
    chosen, twice = heldout(pixels, faces)
    people = [{"f": "woman", "m": "man"}[name[-5]] for name in pixels]
    images = np.stack(list(pixels.values()))
    captions, scores = Captioner(arguments.models)(images, people)
    splits = ["heldout" if name in chosen else "train" for name in pixels]
    write(arguments.portraits, list(pixels), images, captions, splits)
    print(f"{len(pixels)} photographs, {(scores > 0).sum()} with a face that is found, {twice} occur twice")


if __name__ == "__main__":
    command.run(main)
