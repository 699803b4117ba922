"""Trains the embedded preference scorer, which chooses winners and losers.

python -m tools.make_assets.scorer PORTRAITS PEOPLE MODEL_FOLDER      writes PORTRAITS/scorer

Nobody has said which of two pictures they prefer; face-api's landmarks stand in. If they stay in place when the picture
is framed otherwise or mirrored, the face is well formed and plain to see. The scorer, a CLIPModel, learns that from
made people (the folder PEOPLE), photographs, and SDRecon's reconstructions of both; that a picture is better than a
blurred copy, as people prefer detail; and that its own caption is better than another. It never compares a photograph
with a made person: drawn faces have the steadier landmarks, and it would learn to prefer them. All pictures pass
through the VAE, or it would learn to recognise the VAE.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from scipy.ndimage import gaussian_filter

from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.devices.start import start
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.faces.landmarks import FaceLandmarks
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import save_model
from hgdpo_jax.run import command
from hgdpo_jax.scoring.preference import judge
from tools.make_assets.clip import Task, config, fit
from tools.make_assets.face import from_npm
from tools.make_assets.photographs import SIZE

STRENGTHS = (3, 5, 7, 9)  # of the reconstructions
SHARPNESS = 8.0  # how sure a preference is: the logit of a difference of 1 in the logarithm of the unsteadiness
_FRAMES = ((78, 0, 3), (84, 3, 0), (72, -3, 6))  # side, and how far the centre lies to the right and below, pixels
_BLUR = 0.3, 1.5  # standard deviation, pixels
_BATCH = 64
# The landmark that is where another was, in a mirror: iBUG's order.
_MIRRORED = np.r_[
    16:-1:-1, 26:16:-1, 27:31, 35:30:-1, 45:41:-1, 47, 46, 39:35:-1, 41, 40, 54:47:-1, 59:54:-1, 64:59:-1, 67:64:-1
]
Images = Float[np.ndarray, "n 96 96 3"]


class Steadiness:
    """How steady landmarks are: −log of how many pixels they move between framings of a picture and its mirror image.

    Args:
        models: folder `model` of the npm package @vladmandic/face-api.
    """

    def __init__(self, models: Path) -> None:
        graph, self._weights = nnx.split(from_npm(models, FaceLandmarks))

        @jax.jit
        def unsteadiness(weights: nnx.State, images: Float[Array, "n 96 96 3"]) -> Float[Array, "n"]:
            network, seen = nnx.merge(graph, weights), []
            for side, x, y in _FRAMES:
                left, top = (SIZE - side) // 2 + x, (SIZE - side) // 2 + y
                frame, corner = np.s_[:, top : top + side, left : left + side], np.array([left, top])
                seen.append(network(images[frame]) * side + corner)
                mirrored = (network(images[:, :, ::-1][frame]) * side + corner)[:, _MIRRORED]
                seen.append(mirrored * np.array([-1, 1]) + np.array([SIZE, 0]))
            return jnp.sqrt(jnp.square(jnp.stack(seen).std(0)).sum(-1).mean(-1))

        self._unsteadiness = unsteadiness

    def __call__(self, images: Images) -> Float[np.ndarray, "n"]:
        """The steadiness of pictures in [-1, 1]."""
        found = []
        for begin in range(0, len(images), _BATCH):
            rows = np.minimum(np.arange(begin, begin + _BATCH), len(images) - 1)
            found.append(np.asarray(self._unsteadiness(self._weights, images[rows].astype(np.float32))))
        return -np.log(np.concatenate(found)[: len(images)])


def loss(
    model: CLIPModel, images: Array, blurred: Array, ids: Array, steadiness: Array, photograph: Array
) -> tuple[Array, Array]:
    """Cross-entropy of the preference of every pair of one kind (Bradley and Terry 1952), the softer the smaller the
    difference, and −log σ of a picture against its blurred copy and of a caption against another. The correlation of
    scores with steadiness, and how often the sharper picture and the right caption are preferred."""
    score, other = judge(model, images, ids).score, jnp.roll(ids, 1, 0)
    difference = score[:, None] - score
    pairs = (photograph[:, None] == photograph) - jnp.eye(len(score))
    wanted = jax.nn.sigmoid(SHARPNESS * (steadiness[:, None] - steadiness))
    preference = wanted * jax.nn.log_sigmoid(difference) + (1.0 - wanted) * jax.nn.log_sigmoid(-difference)
    detail = score - judge(model, blurred, ids).score
    text, differ = score - judge(model, images, other).score, (ids != other).any(-1)
    right = ((text > 0) * differ).sum() / jnp.maximum(differ.sum(), 1)
    total = -(preference * pairs).sum() / pairs.sum() - 0.5 * jax.nn.log_sigmoid(detail).mean()
    total -= 0.25 * (differ * jax.nn.log_sigmoid(text)).mean()
    return total, jnp.array([jnp.corrcoef(score, steadiness)[0, 1], (detail > 0).mean(), right])


def blurred(images: Images, rng: np.random.Generator) -> Images:
    """Copies without fine detail."""
    widths = rng.uniform(*_BLUR, len(images))
    return np.stack([gaussian_filter(x, (width, width, 0)) for x, width in zip(images, widths, strict=True)])


def altered(images: Images, rng: np.random.Generator) -> Images:
    """Mirrored by chance, moved by up to four pixels, with other light and colours: none of these is to count."""
    n = len(images)
    mirrored = np.where(rng.random((n, 1, 1, 1)) < 0.5, images, images[:, :, ::-1])
    gain = np.exp(rng.normal(0.0, 0.2, (n, 1, 1, 1)) + rng.normal(0.0, 0.08, (n, 1, 1, 3)))
    offset = rng.normal(0.0, 0.1, (n, 1, 1, 1)) + rng.normal(0.0, 0.08, (n, 1, 1, 3))
    moved = np.roll(mirrored, rng.integers(-4, 5, 2), (1, 2))
    return (moved * gain + offset).clip(-1.0, 1.0).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portraits", type=Path)
    parser.add_argument("people", type=Path, help="the folder of made people")
    parser.add_argument("models", type=Path, metavar="MODEL_FOLDER", help="package/model of @vladmandic/face-api")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--faces", type=int, default=3000, help="made ones")
    parser.add_argument("--redrawn", type=int, default=1000, help="how many of them are reconstructed too")
    arguments = parser.parse_args()
    start()
    mesh, pipeline = local_mesh(), pipelines.load_pipeline(arguments.portraits / "base")
    sampler = Sampler(pipeline, mesh, solver="ddpm", steps=20, guidance=1.0, batch=_BATCH, seed=0)
    listed, made = (list_photographs(*place) for place in ((arguments.portraits, "train"), (arguments.people, "base")))
    listed += made[:: len(made) // arguments.faces][: arguments.faces]
    photographs, pixels = load_images(listed, (SIZE, SIZE))
    ids = pipeline.tokenize([p.caption for p in photographs])
    latents, few = sampler.encode(pixels, "encode"), len(photographs) - arguments.faces + arguments.redrawn
    names = [p.id for p in photographs[:few]]
    parts, numbers = [latents], [np.arange(len(photographs))]
    for strength in STRENGTHS:
        keys = sampler.keys("scorer", names, [strength] * few)
        parts.append(sampler.reconstruct(latents[:few], ids[:few], keys, strength, f"SDRecon t{strength}"))
        numbers.append(np.arange(few))
    images = np.concatenate([sampler.decode(part, "decode").astype(np.float16) for part in parts])
    number, steadiness = np.concatenate(numbers), Steadiness(arguments.models)(images)
    photograph = number < len(photographs) - arguments.faces
    heldout = number % 20 == 0  # all pictures of one face

    def halves(among: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Numbers of as many pictures of photographs as of made people."""
        return np.concatenate([rng.choice(np.flatnonzero(among & kind), count) for kind in (photograph, ~photograph)])

    def arrays(pick: np.ndarray, pictures: Images, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        known = ids[number[pick]], steadiness[pick].astype(np.float32), photograph[pick]
        return pictures, blurred(pictures, rng), *known

    def batch(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        pick = halves(~heldout, arguments.batch // 2, rng)
        return arrays(pick, altered(images[pick], rng), rng)

    rng = np.random.default_rng(1)
    pick = halves(heldout, 256, rng)
    task = Task("scorer", config(64, 4, 8), loss, batch, arrays(pick, images[pick].astype(np.float32), rng))
    model, (correlation, detail, caption) = fit(task, arguments.steps, seed=0)
    print(f"held-out: correlation with steadiness {correlation:.3f}, prefers the sharper picture in {detail:.1%}, the "
          f"right caption in {caption:.1%}")  # fmt: skip
    save_model(model, arguments.portraits / "scorer", dtype=np.float16)


if __name__ == "__main__":
    command.run(main)
