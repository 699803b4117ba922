"""BLIP's image-grounded text encoder (Li et al. 2022), which ImageReward has: a ViT, and a BERT that attends to it.

Names are those of Salesforce's code, which ImageReward's file keeps. A head has 64 channels in both towers.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from hgdpo_jax.models.convert import abstract
from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.model_config import ModelConfig
from hgdpo_jax.models.weights import Weights, under
from hgdpo_jax.run.errors import UserError

_HEAD = 64
_BESIDE = r"^(vision|text)_proj\."  # what BLIP compares pictures and texts by
_VIT_EPS, _BERT_EPS = 1e-6, 1e-12


def _attend(
    q: Float[Array, "b n d"], k: Float[Array, "b m d"], v: Float[Array, "b m d"], seen: Bool[Array, "b m"] | None
) -> Float[Array, "b n d"]:
    """Multi-head attention to what is seen; None: to all."""
    q_heads, k_heads, v_heads = (x.reshape(*x.shape[:2], -1, _HEAD) for x in (q, k, v))
    mask = None if seen is None else seen[:, None, None]
    return jax.nn.dot_product_attention(q_heads, k_heads, v_heads, mask=mask).reshape(q.shape)


def _gelu(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    return jax.nn.gelu(x, approximate=False)


class Block(nnx.Module):
    """Of the ViT: attention and two linear layers, each after a LayerNorm and added to its input."""

    def __init__(self, width: int, hidden: int, make: Layers) -> None:
        self.norm1, self.norm2 = (make.layer_norm(width, _VIT_EPS) for _ in range(2))
        self.attn = nnx.Dict(qkv=make.linear(width, 3 * width), proj=make.linear(width, width))
        self.mlp = nnx.Dict(fc1=make.linear(width, hidden), fc2=make.linear(hidden, width))

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        q, k, v = jnp.split(self.attn["qkv"](self.norm1(x)), 3, axis=-1)
        x = x + self.attn["proj"](_attend(q, k, v, None))
        return x + self.mlp["fc2"](_gelu(self.mlp["fc1"](self.norm2(x))))


class VisualEncoder(nnx.Module):
    """The ViT."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        width, patch = config["width"], config["patch_size"]
        count = (config["image_size"] // patch) ** 2 + 1
        self.cls_token = make.normal((1, 1, width), 0.02)
        self.pos_embed = make.normal((1, count, width), 0.02)
        self.patch_embed = nnx.Dict(proj=make.conv(3, width, patch, stride=patch, padding="VALID"))
        self.blocks = nnx.List([Block(width, config["hidden"], make) for _ in range(config["layers"])])
        self.norm = make.layer_norm(width, _VIT_EPS)

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b n d"]:
        patches = self.patch_embed["proj"](pixels)
        patches = patches.reshape(len(pixels), -1, patches.shape[-1])
        first = jnp.broadcast_to(self.cls_token[...], (len(pixels), *self.cls_token.shape[1:]))
        x = jnp.concatenate([first, patches], axis=1) + self.pos_embed[...]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Attention(nnx.Module):
    """Of BERT: attention to `read`, added to its input, and a LayerNorm."""

    def __init__(self, width: int, read: int, make: Layers) -> None:
        inside = {
            "query": make.linear(width, width),
            "key": make.linear(read, width),
            "value": make.linear(read, width),
        }
        self.self = nnx.Dict(**inside)
        self.output = nnx.Dict(dense=make.linear(width, width), LayerNorm=make.layer_norm(width, _BERT_EPS))

    def __call__(
        self, x: Float[Array, "b n d"], read: Float[Array, "b m e"], seen: Bool[Array, "b m"] | None
    ) -> Float[Array, "b n d"]:
        inside = self.self
        found = _attend(inside["query"](x), inside["key"](read), inside["value"](read), seen)
        return self.output["LayerNorm"](x + self.output["dense"](found))


class Layer(nnx.Module):
    """Of BERT: it attends to the text and to the picture, then two linear layers."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        width, hidden = config["text_width"], config["text_hidden"]
        self.attention = Attention(width, width, make)
        self.crossattention = Attention(width, config["width"], make)
        self.intermediate = nnx.Dict(dense=make.linear(width, hidden))
        self.output = nnx.Dict(dense=make.linear(hidden, width), LayerNorm=make.layer_norm(width, _BERT_EPS))

    def __call__(
        self, x: Float[Array, "b n d"], seen: Bool[Array, "b n"], image: Float[Array, "b m e"]
    ) -> Float[Array, "b n d"]:
        x = self.crossattention(self.attention(x, x, seen), image, None)
        return self.output["LayerNorm"](x + self.output["dense"](_gelu(self.intermediate["dense"](x))))


class TextEncoder(nnx.Module):
    """The BERT."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        width = config["text_width"]
        self.embeddings = nnx.Dict(
            word_embeddings=make.embed(config["vocab_size"], width),
            position_embeddings=make.embed(config["positions"], width),
            LayerNorm=make.layer_norm(width, _BERT_EPS),
        )
        self.encoder = nnx.Dict(layer=nnx.List([Layer(config, make) for _ in range(config["text_layers"])]))

    def __call__(
        self, ids: Int[Array, "b n"], seen: Bool[Array, "b n"], image: Float[Array, "b m e"]
    ) -> Float[Array, "b n d"]:
        positions = self.embeddings["position_embeddings"](jnp.arange(ids.shape[1]))
        x = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](ids) + positions)
        for layer in self.encoder["layer"]:
            x = layer(x, seen, image)
        return x


class BLIP(nnx.Module):
    """Both. Arguments as for every model.

    The config holds `width`, `hidden`, `layers`, `patch_size` and `image_size` of the ViT, `text_width`, `text_hidden`,
    `text_layers`, `vocab_size` and `positions` of the BERT.
    """

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config, make = ModelConfig(config), Layers(rngs, dtype)
        self.visual_encoder = VisualEncoder(config, make)
        self.text_encoder = TextEncoder(config, make)

    def __call__(self, pixels: Float[Array, "b H W 3"], ids: Int[Array, "b n"], pad: int = 0) -> Float[Array, "b d"]:
        """The last state at the first token, float32, of CLIP-normalised pixels and BERT's token ids with padding."""
        return self.text_encoder(ids, ids != pad, self.visual_encoder(pixels))[:, 0].astype(jnp.float32)


def read_blip(weights: Weights, prefix: str) -> tuple[BLIP, Mapping[str, np.ndarray]]:
    """The networks of a file, still without numbers, and those that fill them; the sizes are read off its tensors.

    Args:
        weights: the file.
        prefix: before the names of its BLIP.

    Raises:
        UserError: it holds none.
    """

    def size(key: str, axis: int = 0) -> int:
        if f"{prefix}{key}" not in weights:
            raise UserError(f"{weights.files[0]}: weight {prefix}{key} is missing; expected ImageReward's file")
        return weights.size(f"{prefix}{key}", axis)

    def count(list_: str) -> int:
        begin = f"{prefix}{list_}."
        return len({key.removeprefix(begin).partition(".")[0] for key in weights if key.startswith(begin)})

    patch = size("visual_encoder.patch_embed.proj.weight", 2)
    words = "text_encoder.embeddings.word_embeddings.weight"
    config = {
        "width": size("visual_encoder.cls_token", 2),
        "hidden": size("visual_encoder.blocks.0.mlp.fc1.weight"),
        "layers": count("visual_encoder.blocks"),
        "patch_size": patch,
        "image_size": math.isqrt(size("visual_encoder.pos_embed", 1) - 1) * patch,
        "text_width": size(words, 1),
        "text_hidden": size("text_encoder.encoder.layer.0.intermediate.dense.weight"),
        "text_layers": count("text_encoder.encoder.layer"),
        "vocab_size": size(words),
        "positions": size("text_encoder.embeddings.position_embeddings.weight"),
    }
    model = abstract(BLIP, config)
    return model, under(weights, prefix, _BESIDE)
