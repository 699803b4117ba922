"""Pairs of pictures of an evaluated run, for a reader who does not know which is which.

python -m benchmarks.pictures W pairs base hard FOLDER      FOLDER/pairs.png, twenty of base and hard; FOLDER/key.json

Left and right of each pair are drawn by lot; key.json says in which half the second model's is. The reader gets
pairs.png alone.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

PAIRS, SCALE, COLUMNS, SPACE = 20, 3, 4, 24


def pictures(workdir: Path, model: str) -> list[Image.Image]:
    """What a model drew of the first people, each pixel a square."""
    drawn = np.load(workdir / "evaluation" / f"{model}.npz")["pictures"][:PAIRS]
    return [Image.fromarray(picture.repeat(SCALE, axis=0).repeat(SCALE, axis=1)) for picture in drawn]


def pairs(workdir: Path, first: str, second: str, out: Path) -> None:
    """Writes pairs of two models' pictures and their key."""
    drawn = list(zip(pictures(workdir, first), pictures(workdir, second), strict=True))
    width, height = drawn[0][0].size
    sheet = Image.new("RGB", (COLUMNS * 2 * (width + SPACE), -(-len(drawn) // COLUMNS) * (height + SPACE)), "white")
    key = {}
    for i, pair in enumerate(drawn):
        key[str(i + 1)] = half = random.SystemRandom().choice(["left", "right"])
        left, top = i % COLUMNS * 2 * (width + SPACE), i // COLUMNS * (height + SPACE)
        ImageDraw.Draw(sheet).text((left + 2, top + 4), str(i + 1), fill="black")
        for place, picture in enumerate(pair if half == "right" else pair[::-1]):
            sheet.paste(picture, (left + SPACE + place * width, top))
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / "pairs.png")
    (out / "key.json").write_text(json.dumps(key, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("what", choices=("pairs",))
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    pairs(given.workdir, given.first, given.second, given.out)


if __name__ == "__main__":
    main()
