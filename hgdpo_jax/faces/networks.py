"""The face networks of @vladmandic/face-api 1.7.15: dlib's recognition ResNet and a small YOLOv2 detector.

Images are [b, H, W, 3] in [-1, 1]; names are those of face-api, whose affine layers are folded into the convolutions.
"""

from collections.abc import Mapping
from functools import reduce
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.model_config import ModelConfig

# (width, blocks after the one that halves the size); the first width follows the stem, which halves it twice.
_STAGES = ((32, 3), (64, 3), (128, 2), (256, 2))
_EMBEDDING = 128
MEAN = (122.782, 117.001, 104.298)  # of red, green and blue, for all networks but the detector
_DETECTION_MEAN = (117.001, 114.697, 97.404)
_DETECTION_WIDTHS = (16, 32, 64, 128, 256, 512)
# Width and height of the anchors, in cells.
_ANCHORS = (
    (1.603231, 2.094468),
    (6.041143, 7.080126),
    (2.882459, 3.518061),
    (4.266906, 5.178857),
    (9.041765, 10.66308),
)


def pixels(images: Float[Array, "b H W 3"], size: int, mean: tuple[float, ...]) -> Float[Array, "b size size 3"]:
    """Resized bilinearly to size x size, without aliasing, then [0, 255] less the mean, over 255."""
    if images.shape[1:3] != (size, size):
        images = jax.image.resize(images, (images.shape[0], size, size, 3), "linear")
    return ((images + 1.0) * 127.5 - jnp.asarray(mean)) / 255.0


def max_pool(x: Float[Array, "b h w c"], size: int, stride: int, beyond: int = 0) -> Float[Array, "b h2 w2 c"]:
    """The maximum of each square of size x size; the image is extended by `beyond` pixels on the right and below.

    A maximum of slices is much faster on CPU than a reduction of windows."""
    x = jnp.pad(x, ((0, 0), (0, beyond), (0, beyond), (0, 0)), constant_values=-jnp.inf)
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
    slices = [x[:, i : i + height : stride, j : j + width : stride] for i in range(size) for j in range(size)]
    return reduce(jnp.maximum, slices)


class Residual(nnx.Module):
    """Two 3x3 convolutions added to their input. `down` halves the size; new channels of the shortcut are zero."""

    def __init__(self, inputs: int, outputs: int, make: Layers, down: bool = False) -> None:
        self.down = down
        self.conv1 = make.conv(inputs, outputs, 3, stride=2 if down else 1, padding="VALID" if down else 1)
        self.conv2 = make.conv(outputs, outputs, 3)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """The pooled shortcut may be one row and column larger: zeros fill them up."""
        h = self.conv2(jax.nn.relu(self.conv1(x)))
        if self.down:
            x = nnx.avg_pool(x, (2, 2), (2, 2))
            h = jnp.pad(h, ((0, 0), (0, x.shape[1] - h.shape[1]), (0, x.shape[2] - h.shape[2]), (0, 0)))
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, h.shape[3] - x.shape[3])))
        return jax.nn.relu(x + h)


class FaceRecognition(nnx.Module):
    """dlib's face recognition ResNet (dlib_face_recognition_resnet_model_v1). Arguments as for every model."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config, make = ModelConfig(config), Layers(rngs, dtype)
        width = _STAGES[0][0]
        self.conv32_down = make.conv(3, width, 7, stride=2, padding="VALID")
        blocks: dict[str, Residual] = {}
        for outputs, count in _STAGES:
            if outputs != width:
                blocks[f"conv{outputs}_down"] = Residual(width, outputs, make, down=True)
            blocks |= {f"conv{outputs}_{i}": Residual(outputs, outputs, make) for i in range(1, count + 1)}
            width = outputs
        blocks[f"conv{width}_down_out"] = Residual(width, width, make, down=True)
        self._blocks = list(blocks)
        for name, block in blocks.items():
            setattr(self, name, block)
        self.fc = make.linear(width, _EMBEDDING, bias=False)

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b 128"]:
        """Embeddings of square pictures of one face each, float32; two of the same person are closer than 0.6."""
        x = pixels(images, self.config["image_size"], MEAN)
        x = max_pool(jax.nn.relu(self.conv32_down(x)), 3, 2)
        for name in self._blocks:
            x = getattr(self, name)(x)
        return self.fc(x.mean((1, 2))).astype(jnp.float32)


class DepthwiseConv(nnx.Module):
    """A 3x3 convolution of each channel, as nine products: on CPU much faster than a convolution in groups.

    Zeros are added as TensorFlow's `same` adds them: stride 1 keeps the size, stride 2 halves an even size.
    """

    def __init__(self, channels: int, make: Layers, stride: int = 1) -> None:
        self.stride, self.dtype = stride, make.dtype
        self.kernel = make.normal((3, 3, 1, channels), 1.0 / 3.0)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Height and width are multiples of the stride."""
        _, height, width, _ = x.shape
        border, step = (2 - self.stride, 1), self.stride  # stride 2 leaves the first row and column without zeros
        kernel, x = self.kernel[...].astype(self.dtype), jnp.pad(x, ((0, 0), border, border, (0, 0)))
        places = [(i, j) for i in range(3) for j in range(3)]
        return jnp.asarray(sum(x[:, i : i + height : step, j : j + width : step] * kernel[i, j, 0] for i, j in places))


class SeparableConv(nnx.Module):
    """A convolution of each channel, then a 1x1 one across them; the stride is that of the first."""

    def __init__(self, inputs: int, outputs: int, make: Layers, stride: int = 1) -> None:
        self.depthwise = DepthwiseConv(inputs, make, stride)
        self.pointwise = make.conv(inputs, outputs, 1)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Height and width are multiples of the stride."""
        return self.pointwise(self.depthwise(x))


class TinyFaceDetector(nnx.Module):
    """A YOLOv2 (Redmon and Farhadi 2016) of separable convolutions. Arguments as for every model."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config, make = ModelConfig(config), Layers(rngs, dtype)
        self.conv0 = make.conv(3, _DETECTION_WIDTHS[0], 3, padding="VALID")
        for i, (inputs, outputs) in enumerate(pairwise(_DETECTION_WIDTHS), start=1):
            setattr(self, f"conv{i}", SeparableConv(inputs, outputs, make))
        self.conv8 = make.conv(_DETECTION_WIDTHS[-1], 5 * len(_ANCHORS), 1)

    def __call__(self, images: Float[Array, "b H W 3"], size: int) -> tuple[Float[Array, "b n 4"], Float[Array, "b n"]]:
        """(left, top, right, bottom) in pixels of the image, and the score in [0, 1], for every anchor in every cell.

        Images are filled up to a square with black, below or on the right, and scaled to size x size. There are
        size / 32 cells a side, and the smallest anchor is 1.6 cells wide: smaller faces need a larger `size`.
        """
        b, height, width, _ = images.shape
        side = max(height, width)
        images = jnp.pad(images, ((0, 0), (0, side - height), (0, side - width), (0, 0)), constant_values=-1.0)
        x = self.conv0(pixels(images, size, _DETECTION_MEAN))
        last = len(_DETECTION_WIDTHS) - 1
        for i in range(1, last + 1):
            x = max_pool(jax.nn.leaky_relu(x, 0.1), 2, 2, beyond=1)
            x = getattr(self, f"conv{i}")(x)
        x = self.conv8(max_pool(jax.nn.leaky_relu(x, 0.1), 2, 1, beyond=1)).astype(jnp.float32)

        cells = x.shape[1]
        x = x.reshape(b, cells, cells, len(_ANCHORS), 5)
        rows, columns = jnp.meshgrid(jnp.arange(cells), jnp.arange(cells), indexing="ij")
        corner = jnp.stack([columns, rows], axis=-1)[:, :, None]
        centre = corner + jax.nn.sigmoid(x[..., :2])
        half = 0.5 * jnp.exp(x[..., 2:4]) * jnp.asarray(_ANCHORS)
        boxes = jnp.concatenate([centre - half, centre + half], axis=-1) * (side / cells)
        return boxes.reshape(b, -1, 4), jax.nn.sigmoid(x[..., 4]).reshape(b, -1)
