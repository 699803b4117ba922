"""What the base learns from: made people and, a small share, photographs, as the paper's base has seen both.

python -m tools.make_assets.mixture AVATARS PORTRAITS PEOPLE      writes PEOPLE/framings and PEOPLE/base.jsonl

The photographs are the 108 of the split `train`, each framed many times, half of them mirrored; none is held out.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from hgdpo_jax.data.photographs import Photograph, list_photographs
from hgdpo_jax.devices.start import start
from hgdpo_jax.faces.detection import FaceDetector
from hgdpo_jax.run import command
from hgdpo_jax.run.files import atomic_path
from tools.make_assets.photographs import Place, cut, place

SHARE = 0.1  # photographs among all pictures
NAME, FRAMINGS = "base.jsonl", "framings"


def framed(at: Place, image: Image.Image, random: np.random.Generator) -> Place:
    """Another square around the same face: nearer or farther, beside it, and turned a little."""
    side = min(at.side * random.uniform(0.95, 1.05), *image.size)
    x, y = np.array([at.x, at.y]) + random.uniform(-0.015, 0.015, 2) * side
    half = side / 2
    return Place(
        float(np.clip(x, half, image.width - half)),
        float(np.clip(y, half, image.height - half)),
        side,
        at.tilt + random.normal(0.0, 0.02),
    )


def framings(avatars: Path, photographs: list[Photograph], count: int, out: Path) -> list[dict[str, str]]:
    """Writes `count` framings, of all photographs in turn, and gives a line of captions.jsonl for each."""
    faces, lines = FaceDetector(), []
    images = [Image.open(avatars / Path(p.id).name).convert("RGB") for p in photographs]
    places = [place(image, faces) for image in images]
    out.mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(count), "framings", unit="picture"):
        turn, which = divmod(number, len(photographs))
        random = np.random.default_rng([which, turn])
        pixels = cut(images[which], framed(places[which], images[which], random))
        name = f"{Path(photographs[which].id).stem}_{turn:03d}.png"
        with atomic_path(out / name) as temporary:
            Image.fromarray(pixels[:, :: random.choice([-1, 1])]).save(temporary, "png")
        lines.append({"file": f"{out.name}/{name}", "caption": photographs[which].caption, "split": "base"})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("avatars", type=Path, help="package/dist/static/avatars of @tabler/preview")
    parser.add_argument("portraits", type=Path)
    parser.add_argument("people", type=Path, help="the folder of made people")
    parser.add_argument("--share", type=float, default=SHARE, help="photographs among all pictures (%(default)s)")
    arguments = parser.parse_args()
    start()
    made = (arguments.people / "captions.jsonl").read_text().splitlines()
    count = round(len(made) * arguments.share / (1.0 - arguments.share))
    photographs = list_photographs(arguments.portraits, "train")
    lines = framings(arguments.avatars, photographs, count, arguments.people / FRAMINGS) if count else []
    with atomic_path(arguments.people / NAME) as temporary:
        temporary.write_text("\n".join([*made, *map(json.dumps, lines)]) + "\n")
    print(
        f"{len(made)} made people and {count} framings of {len(photographs)} photographs in {arguments.people / NAME}"
    )


if __name__ == "__main__":
    command.run(main)
