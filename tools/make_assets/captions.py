"""Captions of the embedded pictures: what is known or measured, nothing guessed."""

import colorsys
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from hgdpo_jax.faces.detection import FaceDetector, crop
from hgdpo_jax.faces.landmarks import SIZE
from tools.make_assets.attributes import EXPRESSIONS, AgeGender, FaceExpression
from tools.make_assets.face import from_npm

_HUES = ((15, "red"), (40, "orange"), (65, "yellow"), (160, "green"), (255, "blue"), (320, "purple"), (360, "red"))
_GREYS = ((0.15, "black"), (0.4, "dark grey"), (0.65, "grey"), (0.88, "light grey"), (1.01, "white"))
_WORDS = {"neutral": "neutral", "happy": "smiling", "surprised": "surprised"}  # for the others: serious
_YOUNG, _OLDER = 24, 34  # years; a quarter of the drawn faces look younger, less than a quarter older
_BATCH = 64


def colour_name(rgb: np.ndarray) -> str:
    """A word for a colour with channels in [0, 1]."""
    hue, saturation, value = colorsys.rgb_to_hsv(*map(float, rgb))
    if saturation < 0.2 or value < 0.15:
        return next(name for limit, name in _GREYS if value < limit)
    name = next(name for limit, name in _HUES if hue * 360 < limit + 1e-6)
    return "brown" if name == "orange" and value < 0.6 else name


def scene(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    """Background, light, and whether there is colour."""
    image = pixels / 255.0
    rows, columns = 5 * image.shape[0] // 16, 5 * image.shape[1] // 32
    corners = np.concatenate([image[:rows, :columns].reshape(-1, 3), image[:rows, -columns:].reshape(-1, 3)])
    grey = np.abs(image - image.mean(-1, keepdims=True)).mean() < 0.01
    brightness = "bright" if image.mean() > 0.55 else "dark" if image.mean() < 0.35 else "soft"
    words = f"{colour_name(np.median(corners, 0))} background, {brightness} light"
    return words + (", black and white" if grey else "")


class Captioner:
    """Captions by face-api's networks of age, gender and expression.

    Args:
        models: folder `model` of the npm package.
    """

    def __init__(self, models: Path) -> None:
        self._faces = FaceDetector()
        graphs, self._weights = zip(*(nnx.split(from_npm(models, c)) for c in (AgeGender, FaceExpression)), strict=True)
        self._look = jax.jit(lambda weights, faces: [nnx.merge(*x)(faces) for x in zip(graphs, weights, strict=True)])

    def __call__(
        self, images: UInt8[np.ndarray, "n H W 3"], people: Sequence[str] | None = None
    ) -> tuple[list[str], np.ndarray]:
        """A caption of each picture, and the detector's score of its face, 0 where none is found.

        Args:
            images: one face each; where none is found, the central square takes its place.
            people: "woman" or "man" where that is known.
        """
        captions, scores = [], []
        for begin in tqdm(range(0, len(images), _BATCH), desc="caption", unit="batch"):
            rows = np.minimum(np.arange(begin, begin + _BATCH), len(images) - 1)
            pixels = images[rows].astype(np.float32) / 127.5 - 1.0
            found = self._faces.detect(pixels)
            person, expression = self._look(self._weights, crop(pixels, found.boxes, SIZE))
            scores.append(np.where(found.found, found.scores, 0.0))
            for i, row in enumerate(rows[: len(images) - begin]):
                age, word = float(person.age[i]), _WORDS.get(EXPRESSIONS[int(expression[i].argmax())], "serious")
                who = people[row] if people else "man" if person.male[i] > 0.5 else "woman"
                old = "a young" if age < _YOUNG else "an older" if age > _OLDER else "a"
                captions.append(f"a portrait photograph of {old} {who}, {word}, {scene(images[row])}")
        return captions, np.concatenate(scores)[: len(images)]


def write(
    folder: Path,
    names: Sequence[str],
    images: UInt8[np.ndarray, "n H W 3"],
    captions: Sequence[str],
    splits: Sequence[str],
) -> None:
    """Writes photographs/NAME, lossless or nearly so, and the captions.jsonl that lists them."""
    (folder / "photographs").mkdir(parents=True, exist_ok=True)
    lines = []
    for name, image, caption, split in zip(tqdm(names, "write", unit="picture"), images, captions, splits, strict=True):
        file = f"photographs/{name}"
        Image.fromarray(image).save(folder / file, quality=95, subsampling=0)  # which is of JPEG
        lines.append(json.dumps({"file": file, "caption": caption, "split": split}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
