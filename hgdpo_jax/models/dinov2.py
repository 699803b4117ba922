"""DINOv2 (Oquab et al. 2023), driven by the config.json that transformers writes: a picture → its class token."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hgdpo_jax.models.attend import xla
from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.lora import fused_linear
from hgdpo_jax.models.model_config import ModelConfig, check_only
from hgdpo_jax.run.errors import UserError

SIDE = 224  # of the pictures that it reads here, as dgm-eval's
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("dinov2",),
    "hidden_act": ("gelu",),
    "num_channels": (3,),
    "qkv_bias": (True,),
    "use_mask_token": (True,),
    "use_swiglu_ffn": (False,),
}


def dinov2_pixels(images: Float[Array, "b H W 3"]) -> Float[Array, "b 224 224 3"]:
    """Images in [-1, 1] as dgm-eval with `--clean_resize` gives them to the network (Stein et al. 2023): squashed to a
    square, bicubic, normalised with the colours of ImageNet. Without it dgm-eval also rounds to whole levels."""
    unit = jax.image.resize(0.5 * (images + 1.0), (len(images), SIDE, SIDE, 3), "cubic")
    return (jnp.clip(unit, 0.0, 1.0) - jnp.asarray(_MEAN)) / jnp.asarray(_STD)


class _Patches(nnx.Module):
    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        patch = config["patch_size"]
        self.projection = make.conv(3, config["hidden_size"], patch, stride=patch, padding="VALID")


class _Embeddings(nnx.Module):
    """Patches and the class token, plus positions, which are stretched to the picture."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        width, self.grid = config["hidden_size"], config["image_size"] // config["patch_size"]
        self.cls_token, self.mask_token = make.normal((1, 1, width), 0.02), make.normal((1, width), 0.02)
        self.position_embeddings = make.normal((1, self.grid**2 + 1, width), 0.02)
        self.patch_embeddings = _Patches(config, make)

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b n d"]:
        patches = self.patch_embeddings.projection(pixels)
        b, height, width, d = patches.shape
        first, places = self.position_embeddings[...][:, :1], self.position_embeddings[...][0, 1:]
        stretched = jnp.einsum(
            "ih,jw,hwd->ijd",
            bicubic(self.grid, height),
            bicubic(self.grid, width),
            places.reshape(self.grid, self.grid, d),
        )
        token = jnp.broadcast_to(self.cls_token[...] + first, (b, 1, d))
        return jnp.concatenate([token, (patches + stretched).reshape(b, -1, d)], axis=1)


def bicubic(count: int, to: int) -> Float[np.ndarray, "{to} {count}"]:
    """Weights of `count` places for each of `to`, as PyTorch's bicubic interpolation (a = −0.75, the border repeated):
    other than JAX's and Pillow's, whose a is −0.5."""
    if count == to:
        return np.eye(count, dtype=np.float32)
    found, a = np.zeros((to, count), np.float32), -0.75
    for i in range(to):
        at = (i + 0.5) * count / to - 0.5
        for place in range(math.floor(at) - 1, math.floor(at) + 3):
            t = abs(at - place)
            near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((t - 5) * t + 8) * a * t - 4 * a
            found[i, min(max(place, 0), count - 1)] += near if t <= 1 else far
    return found


class _Attention(nnx.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, width: int, heads: int, make: Layers) -> None:
        if width % heads:
            raise UserError(f"DINOv2 config num_attention_heads={heads}: does not divide hidden_size={width}")
        self.heads = heads
        self.q_proj, self.k_proj = make.linear(width, width), make.linear(width, width)
        self.v_proj, self.o_proj = make.linear(width, width), make.linear(width, width)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        projected = fused_linear([self.q_proj, self.k_proj, self.v_proj], x)
        q, k, v = (y.reshape(*x.shape[:2], self.heads, -1) for y in projected)
        return self.o_proj(xla(q, k, v, False).reshape(x.shape))


class _Scale(nnx.Module):
    def __init__(self, width: int, make: Layers) -> None:
        self.lambda1 = make.normal((width,), 1.0)


class _MLP(nnx.Module):
    def __init__(self, width: int, hidden: int, make: Layers) -> None:
        self.fc1, self.fc2 = make.linear(width, hidden), make.linear(hidden, width)


class _Layer(nnx.Module):
    """Attention and MLP, each after a LayerNorm, scaled and added to its input."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        width, eps = config["hidden_size"], float(config.get("layer_norm_eps", 1e-6))
        self.norm1, self.norm2 = make.layer_norm(width, eps), make.layer_norm(width, eps)
        self.attention = _Attention(width, config["num_attention_heads"], make)
        self.mlp = _MLP(width, int(width * config.get("mlp_ratio", 4)), make)
        self.layer_scale1, self.layer_scale2 = _Scale(width, make), _Scale(width, make)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = x + self.attention(self.norm1(x)) * self.layer_scale1.lambda1[...]
        hidden = jax.nn.gelu(self.mlp.fc1(self.norm2(x)), approximate=False)
        return x + self.mlp.fc2(hidden) * self.layer_scale2.lambda1[...]


class _Encoder(nnx.Module):
    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        self.layer = nnx.List([_Layer(config, make) for _ in range(config["num_hidden_layers"])])


class Dinov2Model(nnx.Module):
    """Arguments as for every model: parsed config.json, rngs, compute dtype."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        check_only(config, _ONLY, "DINOv2")
        if SIDE % config["patch_size"]:
            raise UserError(f"DINOv2 config patch_size={config['patch_size']}: does not divide {SIDE}")
        self.config, make = ModelConfig(config), Layers(rngs, dtype)
        self.embeddings, self.encoder = _Embeddings(config, make), _Encoder(config, make)
        self.layernorm = make.layer_norm(config["hidden_size"], float(config.get("layer_norm_eps", 1e-6)))

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b d"]:
        """The class token after the last LayerNorm, float32, of normalised pixels."""
        x = self.embeddings(pixels)
        for layer in self.encoder.layer:
            x = layer(x)
        return self.layernorm(x)[:, 0].astype(jnp.float32)
