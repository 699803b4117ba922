"""How CLIP's vision towers want their images: cut, scaled and normalised as preprocessor_config.json says."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hgdpo_jax.models.model_config import read_json
from hgdpo_jax.run.errors import UserError

_LARGEST = 16  # times the side of what is cut out; people have a fourth more at most
_METHODS = {1: "lanczos3", 2: "linear", 3: "cubic"}  # Pillow's numbers


class Preprocessing(NamedTuple):
    """What is done to images before a tower reads them.

    Attributes:
        mean, std: of red, green and blue in [0, 1].
        short: the short side before the centre is cut out, in pixels; None: the side of what is cut out.
        method: of resizing.
        whole: nothing is cut off: the long side becomes what the tower reads, and black fills up the short one.
    """

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    short: int | None = None
    method: str = "cubic"
    whole: bool = False


CLIP = Preprocessing()  # where a folder does not tell


def read_preprocessing(folder: Path, size: int) -> Preprocessing:
    """What the folder of a CLIP model says; :data:`CLIP` where it holds no image processor.

    Args:
        folder: as transformers writes it, in processor_config.json or in preprocessor_config.json.
        size: side of the images that the tower reads.

    Raises:
        UserError: it asks for something that is not computed.
    """
    path, given = _read(folder)
    if not isinstance(given, Mapping):
        raise UserError(f"{path}: has no image processor that can be read")
    short, crop = _side(given.get("size", size), "shortest_edge"), _side(given.get("crop_size", size), "height")
    factor, method = given.get("rescale_factor", 1 / 255), given.get("resample", 3)
    computed = {name: given.get(name, True) is True for name in ("do_resize", "do_center_crop", "do_rescale")}
    computed |= {
        "rescale_factor": isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-3),
        "resample": method in tuple(_METHODS),
        "size": short is not None and size <= short <= _LARGEST * size,
        "crop_size": crop == size,
    }
    wrong = [key for key, fine in computed.items() if not fine]
    if wrong:
        raise UserError(f"{path}: {wrong[0]}={given.get(wrong[0])!r} is not supported; expected images in [0, 1], "
                        f"{size} pixels wide and high, cut from the centre of larger ones")  # fmt: skip
    mean, std = (given.get(f"image_{name}", known) for name, known in (("mean", CLIP.mean), ("std", CLIP.std)))
    if given.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if not (_three(mean) and _three(std) and min(std) > 0):
        raise UserError(f"{path}: has image_mean={mean!r} and image_std={std!r}; expected three numbers each")
    return Preprocessing(tuple(mean), tuple(std), None if short == size else short, _METHODS[method])


def _read(folder: Path) -> tuple[Path, Any]:
    """The file in which transformers looks for an image processor first, and what it says; {} without one."""
    path = folder / "processor_config.json"
    if path.is_file() and "image_processor" in (whole := read_json(path)):
        return path, whole["image_processor"]
    path = folder / "preprocessor_config.json"
    return path, read_json(path) if path.is_file() else {}


def _side(value: Any, name: str) -> int | None:
    """A size as a number or under a name, with `width` equal to `height`; None for any other."""
    if isinstance(value, Mapping):
        value = value.get(name) if value.get("width", value.get(name)) == value.get(name) else None
    return value if isinstance(value, int) else None


def _three(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(_is_number(x) for x in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def clip_pixels(
    images: Float[Array, "b H W 3"], size: int, how: Preprocessing = CLIP
) -> Float[Array, "b {size} {size} 3"]:
    """Images in [-1, 1] as a tower reads them: resized to the short side, cut from the centre, normalised.

    With `how.whole` they are resized to the long side, and black is put around them.
    """
    _, height, width, _ = images.shape
    if how.whole:
        long = max(height, width)
        new = (round(height * size / long), round(width * size / long))
        images = _resized(images, new, how.method)
        around = [((size - side) // 2, size - side - (size - side) // 2) for side in new]
        return clip_normalised(jnp.pad(images, ((0, 0), *around, (0, 0)), constant_values=-1.0), how)
    short, to = min(height, width), how.short or size
    new = (int(height * to / short), int(width * to / short))  # rounded down, as the image processor does
    images = _resized(images, new, how.method)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return clip_normalised(images[:, top : top + size, left : left + size], how)


def _resized(images: Float[Array, "b H W 3"], size: tuple[int, int], method: str) -> Float[Array, "b h w 3"]:
    if images.shape[1:3] == size:
        return images
    return jnp.clip(jax.image.resize(images, (len(images), *size, 3), method), -1.0, 1.0)


def clip_normalised(images: Float[Array, "*b 3"], how: Preprocessing = CLIP) -> Float[Array, "*b 3"]:
    """Images in [-1, 1] in the units that a vision tower was trained on."""
    return (0.5 * (images + 1.0) - jnp.asarray(how.mean)) / jnp.asarray(how.std)
