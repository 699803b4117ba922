"""A face turned and scaled so that its five points lie where networks for recognition expect them.

Positions as in :mod:`hgdpo_jax.faces.detection`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hgdpo_jax.faces.detection import Images

# Networks trained with insightface expect the five points here, in a crop of 112x112 pixels whose centres are integers,
# as in OpenCV.
ALIGNED_SIZE = 112
_TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))


def similarity(sources: Float[Array, "n k 2"], targets: Float[Array, "k 2"]) -> Float[Array, "n 2 3"]:
    """[A | t], the rotation and scaling A and the shift t with the least squares of A x + t - target (Umeyama 1991).

    The plane needs no singular values: as complex numbers without their means, A is the sum of conj(source) * target
    over that of |source|^2. Sources that are all the same point give NaN.
    """
    centre, goal = sources.mean(1), targets.mean(0)
    x, y = jnp.moveaxis(sources - centre[:, None], -1, 0)
    u, v = (targets - goal).T
    real, imaginary = jnp.stack([x * u + y * v, x * v - y * u]).sum(-1) / (x * x + y * y).sum(-1)
    turn = jnp.stack([real, -imaginary, imaginary, real], axis=-1).reshape(-1, 2, 2)
    shift = goal - jnp.einsum("nij,nj->ni", turn, centre, precision="highest")
    return jnp.concatenate([turn, shift[..., None]], axis=-1)


@jax.jit
def align(images: Images, points: Float[Array, "n 5 2"]) -> Float[Array, "n 112 112 3"]:
    """The image turned, scaled and moved so that its five points come nearest to insightface's; bilinear.

    Beyond the image the crop is black, as in the training of these networks.
    """
    turn, shift = jnp.split(similarity(points, jnp.asarray(_TEMPLATE) + 0.5), [2], axis=-1)
    back = turn.mT / jnp.square(turn[:, :1]).sum(-1, keepdims=True)  # the inverse: transposed, over the scale squared
    place = jnp.arange(ALIGNED_SIZE) + 0.5
    places = jnp.stack(jnp.meshgrid(place, place)).reshape(2, -1)

    def cut(
        image: Float[Array, "H W 3"], back: Float[Array, "2 2"], shift: Float[Array, "2 1"]
    ) -> Float[Array, "s s 3"]:
        x, y = jnp.matmul(back, places - shift, precision="highest") - 0.5
        one = partial(jax.scipy.ndimage.map_coordinates, coordinates=[y, x], order=1, mode="constant", cval=-1.0)
        return jax.vmap(one, in_axes=-1, out_axes=-1)(image).reshape(ALIGNED_SIZE, ALIGNED_SIZE, 3)

    return jax.vmap(cut)(jnp.asarray(images), back, shift)
