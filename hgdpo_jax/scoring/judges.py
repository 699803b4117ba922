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
from hgdpo_jax.scoring.preference import Images, Scorer, TokenIds

VIEWS = 12  # of each photograph, for distances between sets
_NEAREST = 0.85  # side of the smallest view, in sides of the photograph


class Judges:
    """Compiled judges of pictures on a mesh.

    Args:
        scorer: folder of the CLIPModel that chose the winners; empty where none did.
        second, third: folders of two that did not; empty for none.
        mesh: where the pictures lie.

    Raises:
        UserError: no such folder, or weights that do not fit its config.json.
    """

    def __init__(self, scorer: str, second: str, third: str, mesh: Mesh) -> None:
        self._scorer = Scorer(scorer, mesh) if scorer else None
        folders = {"second_score": second, "third_score": third}
        self._others = {name: Scorer(folder, mesh) for name, folder in folders.items() if folder}
        self._identity = FaceEmbedder()
        self._appearance = jax.jit(lambda images: {"sharpness": sharpness(images), "hue": hue_vector(images)})

    def __call__(self, images: Images, input_ids: TokenIds) -> dict[str, PyTree[Array]]:
        """What the judges see in pictures in [-1, 1] of these captions, arrays of b rows.

        `score` and `embedding` are the choosing scorer's, `second_score` and `third_score` the others'. `face_found` is
        0 or 1, `face_score` the detector's best score in [0, 1], `face_embedding` of the best face, or of the central
        square. `sharpness` and `hue` are those of :mod:`hgdpo_jax.scoring.appearance`.
        """
        seen, faces = self._appearance(images), self._identity.embed(images)
        if self._scorer:
            seen |= self._scorer(images, input_ids)._asdict()
        seen |= {name: scorer(images, input_ids).score for name, scorer in self._others.items()}
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
