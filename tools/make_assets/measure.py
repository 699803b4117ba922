"""Measures the embedded base: does it draw faces, and what the caption says?

python -m tools.make_assets.measure PORTRAITS PEOPLE

Draws for captions of made people whom it has not seen, as `evaluate` draws. The colour of the background is read as
for photographs; women and men are told apart by a small CLIPModel that has learnt it from made people.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from configs import common
from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.devices.start import start
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.faces.detection import FaceDetector
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.pictures.write import to_uint8
from hgdpo_jax.run import command
from hgdpo_jax.scoring.preference import judge
from tools.make_assets.captions import scene
from tools.make_assets.clip import Task, config, fit
from tools.make_assets.photographs import SIZE

_SHOWN = 8000  # made people that the small CLIPModel learns from


def swapped(caption: str) -> str:
    """The caption of a man where it was a woman's, and the other way round."""
    return caption.replace("woman", "man") if "woman" in caption else caption.replace(" man", " woman")


def loss(model: CLIPModel, images: Array, ids: Array, others: Array) -> tuple[Array, Array]:
    """−log σ of the true caption's score less the other's, and how often the true one is preferred."""
    difference = judge(model, images, ids).score - judge(model, images, others).score
    return -jax.nn.log_sigmoid(difference).mean(), jnp.array([(difference > 0).mean()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portraits", type=Path)
    parser.add_argument("people", type=Path, help="the folder of made people")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--count", type=int, default=400, help="drawings")
    arguments = parser.parse_args()
    start()
    pipeline, settings = pipelines.load_pipeline(arguments.portraits / "base"), common.base("portraits").evaluate
    listed = list_photographs(arguments.people, "base")
    learnt = listed[:: -(-len(listed) // _SHOWN)]
    held = list_photographs(arguments.people, "heldout")[: arguments.count]

    def arrays(photographs: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        photographs, images = load_images(photographs, (SIZE, SIZE))
        captions = [p.caption for p in photographs]
        return images, pipeline.tokenize(captions), pipeline.tokenize([swapped(c) for c in captions])

    shown = arrays(learnt)

    def batch(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        pick, flip = rng.integers(len(learnt), size=64), rng.choice([-1, 1])
        images, ids, others = (x[pick] for x in shown)
        return images[:, :, ::flip], ids, others

    _, held_ids, held_others = held_arrays = arrays(held)
    reader, (right,) = fit(Task("reader", config(48, 4, 8), loss, batch, held_arrays), arguments.steps, seed=3)
    sampler = Sampler.from_config(pipeline, local_mesh(), settings, seed=0)
    keys = sampler.keys("measure", [p.id for p in held], [0] * len(held))
    images = sampler.decode(sampler.generate(held_ids, keys, (SIZE, SIZE), "draw"), "decode").astype(np.float32)
    found = np.concatenate([FaceDetector().detect(part).found for part in np.array_split(images, 8)])
    wanted = [p.caption.split(", ") for p in held]
    # In black and white a colour is a grey, and is captioned as such.
    seen = [scene(x).split(", ") for x in to_uint8(images)]
    colour = np.mean([a[2] == b[0] for a, b in zip(wanted, seen, strict=True)])
    light = np.mean([a[3] == b[1] for a, b in zip(wanted, seen, strict=True)])
    people = float(loss(reader, *map(jnp.asarray, (images, held_ids, held_others)))[1][0])
    print(f"{len(held)} drawings: a face found in {found.mean():.1%}, background right in {colour:.1%}, light in "
          f"{light:.1%}, woman or man in {people:.1%} (in made people that it had not seen {right:.1%})")  # fmt: skip


if __name__ == "__main__":
    command.run(main)
