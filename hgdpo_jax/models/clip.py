"""CLIP's text and vision towers, driven by the config.json that transformers writes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from hgdpo_jax.models.attend import xla
from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.lora import fused_linear
from hgdpo_jax.models.model_config import ModelConfig, check_only
from hgdpo_jax.run.errors import UserError

_ONLY: dict[str, tuple[Any, ...]] = {"attention_dropout": (0.0, 0), "dropout": (0.0, 0), "num_channels": (3,)}
# What transformers takes for keys that config.json leaves out: those of a model's towers are written where they differ.
_TOWER: dict[str, Any] = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
_TEXT = _TOWER | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_TEXT |= {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
_VISION = _TOWER | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_VISION |= {"image_size": 224, "patch_size": 32}
_PROJECTION = 512
_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class CLIPOutput(NamedTuple):
    """What a tower gives. `hidden_states[-2]` is the penultimate layer, which SDXL and IP-Adapter-Plus read."""

    last_hidden_state: Float[Array, "b n d"]
    pooled: Float[Array, "b p"]
    hidden_states: tuple[Float[Array, "b n d"], ...]


class CLIPAttention(nnx.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, width: int, heads: int, make: Layers) -> None:
        if width % heads:
            raise UserError(f"CLIP config num_attention_heads={heads}: does not divide hidden_size={width}")
        self.heads = heads
        self.k_proj = make.linear(width, width)
        self.v_proj = make.linear(width, width)
        self.q_proj = make.linear(width, width)
        self.out_proj = make.linear(width, width)

    def __call__(self, x: Float[Array, "b n d"], causal: bool) -> Float[Array, "b n d"]:
        """Each token sees all, or with `causal` those up to itself."""
        projected = fused_linear([self.q_proj, self.k_proj, self.v_proj], x)
        q, k, v = (y.reshape(*x.shape[:2], self.heads, -1) for y in projected)
        return self.out_proj(xla(q, k, v, causal).reshape(x.shape))


class CLIPMLP(nnx.Module):
    """Two linear layers around the activation."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        width, hidden = config["hidden_size"], config["intermediate_size"]
        self.activation = config["hidden_act"]
        if self.activation not in _ACTIVATIONS:
            raise UserError(f"CLIP config hidden_act={self.activation!r}: expects one of {', '.join(_ACTIVATIONS)}")
        self.fc1 = make.linear(width, hidden)
        self.fc2 = make.linear(hidden, width)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x)))


def _norm(config: Mapping[str, Any], make: Layers) -> nnx.LayerNorm:
    return make.layer_norm(config["hidden_size"], float(config["layer_norm_eps"]))


class CLIPEncoderLayer(nnx.Module):
    """Attention and MLP, each after a LayerNorm and added to its input."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        self.self_attn = CLIPAttention(config["hidden_size"], config["num_attention_heads"], make)
        self.layer_norm1 = _norm(config, make)
        self.mlp = CLIPMLP(config, make)
        self.layer_norm2 = _norm(config, make)

    def __call__(self, x: Float[Array, "b n d"], causal: bool) -> Float[Array, "b n d"]:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    """A stack of layers."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        self.layers = nnx.List([CLIPEncoderLayer(config, make) for _ in range(config["num_hidden_layers"])])

    def __call__(self, x: Float[Array, "b n d"], causal: bool) -> tuple[Float[Array, "b n d"], ...]:
        """The input and the output of every layer."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], causal))
        return tuple(states)


class CLIPTextEmbeddings(nnx.Module):
    """Token plus position embeddings."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        width = config["hidden_size"]
        self.token_embedding = make.embed(config["vocab_size"], width)
        self.position_embedding = make.embed(config["max_position_embeddings"], width)

    def __call__(self, ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class CLIPTextModel(nnx.Module):
    """The text encoder. Arguments as for every model: parsed config.json, rngs, compute dtype."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        check_only(config, _ONLY | {"model_type": ("clip_text_model",)}, "CLIP text")
        self.config, make = ModelConfig(config), Layers(rngs, dtype)
        config = _TEXT | dict(config)
        # Configs from before transformers 4.31 say 2; there the highest id ends the text, as in OpenAI's code.
        self.eos = int(config["eos_token_id"])
        self.embeddings = CLIPTextEmbeddings(config, make)
        self.encoder = CLIPEncoder(config, make)
        self.final_layer_norm = _norm(config, make)

    def __call__(self, input_ids: Int[Array, "b s"]) -> CLIPOutput:
        """Token ids, s ≤ 77. Pooled is the last state at the first end-of-text token."""
        states = self.encoder(self.embeddings(input_ids), causal=True)
        last = self.final_layer_norm(states[-1])
        end = input_ids if self.eos == 2 else (input_ids == self.eos).astype(jnp.int32)
        pooled = jax.vmap(lambda states, place: states[place])(last, end.argmax(-1))  # each device its own rows
        return CLIPOutput(last, pooled, states)


class CLIPTextModelWithProjection(nnx.Module):
    """The text encoder with a projection of the pooled state: SDXL's second encoder."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config = ModelConfig(config)
        self.text_model = CLIPTextModel(config, rngs=rngs, dtype=dtype)
        width, out = config.get("hidden_size", _TEXT["hidden_size"]), config.get("projection_dim", _PROJECTION)
        self.text_projection = Layers(rngs, dtype).linear(width, out, bias=False)

    def __call__(self, input_ids: Int[Array, "b s"]) -> CLIPOutput:
        """As CLIPTextModel, with `pooled` projected to [b, projection_dim]."""
        output = self.text_model(input_ids)
        return output._replace(pooled=self.text_projection(output.pooled))


def _tower(config: Mapping[str, Any], name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a tower in a CLIPModel's. Older files may have a second one, which then counts."""
    older = config.get(f"{name}_config_dict")
    given = config[f"{name}_config"] if older is None else config.get(f"{name}_config")
    return {**known, **(given or {})} if older is None else {**(given or {}), **known, **older}


class CLIPVisionEmbeddings(nnx.Module):
    """Patches and the class token, plus positions."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        width, patch = config["hidden_size"], config["patch_size"]
        count = (config["image_size"] // patch) ** 2 + 1
        self.class_embedding = make.normal((width,), width**-0.5)
        self.patch_embedding = make.conv(3, width, patch, stride=patch, padding="VALID", bias=False)
        self.position_embedding = make.embed(count, width)

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b n d"]:
        """The class token comes first."""
        patches = self.patch_embedding(pixels)
        b, _, _, d = patches.shape
        first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (b, 1, d))
        tokens = jnp.concatenate([first, patches.reshape(b, -1, d)], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class CLIPVisionModel(nnx.Module):
    """The image encoder; its pooled output is the normalised class token."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        check_only(config, _ONLY | {"model_type": ("clip_vision_model",)}, "CLIP vision")
        config = _VISION | dict(config)
        self.config, make = ModelConfig(config), Layers(rngs, dtype)
        self.embeddings = CLIPVisionEmbeddings(config, make)
        self.pre_layrnorm = _norm(config, make)  # upstream's spelling
        self.encoder = CLIPEncoder(config, make)
        self.post_layernorm = _norm(config, make)

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> CLIPOutput:
        """CLIP-normalised pixels at the config's image_size. Only `pooled` is after the last LayerNorm."""
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), causal=False)
        return CLIPOutput(states[-1], self.post_layernorm(states[-1][:, 0]), states)


class CLIPVisionModelWithProjection(nnx.Module):
    """The image encoder with a projection of the pooled state: what IP-Adapters read images with."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.vision_model = CLIPVisionModel(config, rngs=rngs, dtype=dtype)
        self.config = self.vision_model.config
        width, out = self.config["hidden_size"], config.get("projection_dim", _PROJECTION)
        self.visual_projection = Layers(rngs, dtype).linear(width, out, bias=False)

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> CLIPOutput:
        """As CLIPVisionModel, with `pooled` projected to [b, projection_dim]."""
        output = self.vision_model(pixels)
        return output._replace(pooled=self.visual_projection(output.pooled))


class CLIPModel(nnx.Module):
    """Both towers and their projections: the shape of PickScore, HPS v2 and the embedded scorer."""

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        check_only(config, {"model_type": ("clip",)}, "CLIP")
        text, vision = (_tower(config, name, known) for name, known in (("text", _TEXT), ("vision", _VISION)))
        self.config = ModelConfig({**config, "text_config": text, "vision_config": vision})
        out = config.get("projection_dim", _PROJECTION)
        self.text_model = CLIPTextModel(text, rngs=rngs, dtype=dtype)
        self.vision_model = CLIPVisionModel(vision, rngs=rngs, dtype=dtype)
        self.visual_projection = Layers(rngs, dtype).linear(vision["hidden_size"], out, bias=False)
        self.text_projection = Layers(rngs, dtype).linear(text["hidden_size"], out, bias=False)
        self.logit_scale = nnx.Param(jnp.asarray(config.get("logit_scale_init_value", 2.6592), jnp.float32))

    def image_embeds(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b p"]:
        """Projected image embeddings, not normalised, float32; pixels are CLIP-normalised."""
        return self.visual_projection(self.vision_model(pixels).pooled).astype(jnp.float32)

    def text_embeds(self, input_ids: Int[Array, "b s"]) -> Float[Array, "b p"]:
        """Projected text embeddings, not normalised, float32."""
        return self.text_projection(self.text_model(input_ids).pooled).astype(jnp.float32)
