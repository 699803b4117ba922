"""Judges of pictures: the scorer that chose the winners, and judges that chose nothing.

The latter are the embedded face detector and recognition network, and a second and a third scorer, trained on other
data. A policy can learn to please the scorer that chooses; the others' opinion is evidence.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree
from PIL import Image

from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.faces.embedding import FaceEmbedder
from hgdpo_jax.scoring.appearance import hue_vector, sharpness
from hgdpo_jax.scoring.comparison import SCORED, columns
from hgdpo_jax.scoring.preference import Images, TokenIds
from hgdpo_jax.scoring.scorers import listed, open_scorer

VIEWS = 12  # of each photograph, for distances between sets
_NEAREST = 0.85  # side of the smallest view, in sides of the photograph


class Judges:
    """Compiled judges of pictures on a mesh.

    Args:
        scorer: the scorer that chose the winners, see :mod:`hgdpo_jax.scoring.scorers`; empty where none did. Of
            several the first.
        second, third: two that did not; empty for none.
        more: further scorers, each under its own name.
        mesh: where the pictures lie.

    Raises:
        UserError: no such file or folder, or it does not hold what its scorer is made of.
    """

    def __init__(self, scorer: str, second: str, third: str, more: str, mesh: Mesh) -> None:
        self._scorer = next((open_scorer(place, mesh) for place in listed(scorer)), None)
        places = {"second_score": listed(second), "third_score": listed(third)}
        places |= {SCORED + place.name: [place] for place in columns(more)}
        self._others = {key: open_scorer(place, mesh) for key, found in places.items() for place in found}
        self._identity = FaceEmbedder()
        self._appearance = jax.jit(lambda images: {"sharpness": sharpness(images), "hue": hue_vector(images)})

    def __call__(self, images: Images, input_ids: TokenIds) -> dict[str, PyTree[Array]]:
        """What the judges see in pictures in [-1, 1] of these captions, arrays of b rows.

        `score` and `embedding` are the choosing scorer's, `second_score` and `third_score` the judges', `scored_NAME`
        those of each further scorer. `face_found` is 0 or 1, `face_score` the detector's best score in [0, 1],
        `face_embedding` of the best face, or of the central square. `sharpness` and `hue` are those of
        :mod:`hgdpo_jax.scoring.appearance`.
        """
        seen, faces = self._appearance(images), self._identity.embed(images)
        if self._scorer:
            judged = self._scorer.judge(images, input_ids)
            seen |= {name: value for name, value in judged._asdict().items() if value is not None}
        seen |= {name: scorer.score(images, input_ids) for name, scorer in self._others.items()}
        found = faces.found.astype(np.float32)
        return seen | {"face_found": found, "face_score": faces.scores, "face_embedding": faces.embedding}


def views(photographs: Sequence[Photograph], images: Float[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n v H W 3"]:
    """Each photograph as it is, and cut a little nearer and beside the centre, every other cut mirrored.

    Few people are held out, and one photograph of each says little about the distribution of such photographs.
    """
    found = []
    for photograph, image in zip(photographs, images, strict=True):
        # The id alone decides: a photograph has the same views whoever else is held out.
        random = np.random.default_rng(list(photograph.id.encode()))
        height, width, _ = image.shape
        picture = Image.fromarray(np.round((image + 1.0) * 127.5).astype(np.uint8))
        cuts = [image]
        for number in range(1, VIEWS):
            side, (x, y) = random.uniform(_NEAREST, 1.0), random.uniform(0.0, 1.0, 2)
            left, top = x * (1.0 - side) * width, y * (1.0 - side) * height
            box = (left, top, left + side * width, top + side * height)
            view = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box), np.float32)
            cuts.append((view[:, ::-1] if number % 2 else view) / 127.5 - 1.0)
        found.append(np.stack(cuts))
    return np.stack(found)
