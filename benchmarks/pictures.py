"""Pictures of an evaluated run: the README's grid, and pairs for a reader who does not know which is which.

python -m benchmarks.pictures W grid docs/grid.png      rows base, easy, normal, hard, naive; the held-out photographs
python -m benchmarks.pictures W pairs FOLDER            FOLDER/pairs.png, twenty of base and hard, and FOLDER/key.json

Left and right of each pair are drawn by lot; key.json says in which half `hard` is. The reader gets pairs.png alone.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hgdpo_jax.config import ASSETS
from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.pictures.write import to_uint8

ROWS, COLUMNS, SCALE = ("base", "easy", "normal", "hard", "naive"), 10, 2
PAIRS, PAIR_SCALE = 20, 3


def pictures(workdir: Path, model: str) -> np.ndarray:
    """What a model drew of the first people, uint8."""
    return np.load(workdir / "evaluation" / f"{model}.npz")["pictures"]


def enlarged(rows: np.ndarray, scale: int) -> np.ndarray:
    """Pictures [rows, columns, H, W, 3] side by side, each pixel a square."""
    joined = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    return joined.repeat(scale, axis=0).repeat(scale, axis=1)


def grid(workdir: Path, out: Path) -> None:
    """Writes the grid."""
    rows = [pictures(workdir, name)[:COLUMNS] for name in ROWS]
    held = list_photographs(ASSETS / "portraits", "heldout")[:COLUMNS]
    rows.append(to_uint8(load_images(held, rows[0].shape[1:3])[1]))
    Image.fromarray(enlarged(np.stack(rows), SCALE)).save(out)


def pairs(workdir: Path, out: Path) -> None:
    """Writes the pairs and their key."""
    base, hard = pictures(workdir, "base"), pictures(workdir, "hard")
    out.mkdir(parents=True, exist_ok=True)
    lots = [random.SystemRandom().choice(["left", "right"]) for _ in range(PAIRS)]
    side, space, columns = base.shape[1] * PAIR_SCALE, 24, 4
    sheet = Image.new("RGB", (columns * (2 * side + 2 * space), PAIRS // columns * (side + space)), "white")
    for i, lot in enumerate(lots):
        pair = [base[i], hard[i]] if lot == "right" else [hard[i], base[i]]
        left, top = i % columns * (2 * side + 2 * space), i // columns * (side + space)
        ImageDraw.Draw(sheet).text((left + 2, top + 4), str(i + 1), fill="black")
        sheet.paste(Image.fromarray(enlarged(np.stack([pair]), PAIR_SCALE)), (left + space, top))
    sheet.save(out / "pairs.png")
    (out / "key.json").write_text(json.dumps({str(i + 1): lot for i, lot in enumerate(lots)}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("what", choices=("grid", "pairs"))
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    {"grid": grid, "pairs": pairs}[given.what](given.workdir, given.out)


if __name__ == "__main__":
    main()
