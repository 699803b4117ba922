"""Qwen3 (Yang et al. 2025) as FLUX.2 klein reads text with it, driven by the config.json that transformers writes.

klein's transformer reads the states after some layers, side by side. The layers after the last of these, the last norm
and the output layer are no part of the model here: they are neither computed nor loaded. A file has them too, see
:attr:`Qwen3Model.unused`. An export copies the files of the text encoder as they are: nothing trains it.

Legend: `b` captions, `s` tokens, `d` width, `h` heads of queries, `g` of keys and values, `e` width of a head.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from hgdpo_jax.models.attend import xla
from hgdpo_jax.models.convert import keys
from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.model_config import ModelConfig, check_only
from hgdpo_jax.run.errors import UserError

_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3",),
    "attention_bias": (False,),
    "attention_dropout": (0.0, 0),
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "use_sliding_window": (False,),
}
_Rotation = tuple[Float[Array, "s e_2"], Float[Array, "s e_2"]]  # cosine and sine of a token's angles


class Qwen3RMSNorm(nnx.Module):
    """x / √(mean x² + ε) over the last axis, in float32; the weight multiplies what was rounded to the dtype of x."""

    def __init__(self, width: int, eps: float, make: Layers) -> None:
        self.scale, self.eps = make.ones((width,)), eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(jnp.float32)
        unit = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * unit.astype(x.dtype)


class Qwen3Attention(nnx.Module):
    """Causal self-attention; each head of keys and values serves h / g heads of queries, one after the other."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        width, heads, self.head_dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
        groups, eps = config["num_key_value_heads"], float(config["rms_norm_eps"])
        if heads % groups or self.head_dim % 2:
            raise UserError(f"Qwen3 config num_attention_heads={heads}, num_key_value_heads={groups}, "
                            f"head_dim={self.head_dim}: the second has to divide the first, 2 the third")  # fmt: skip
        self.q_proj = make.linear(width, heads * self.head_dim, bias=False)
        self.k_proj = make.linear(width, groups * self.head_dim, bias=False)
        self.v_proj = make.linear(width, groups * self.head_dim, bias=False)
        self.o_proj = make.linear(heads * self.head_dim, width, bias=False)
        self.q_norm, self.k_norm = (Qwen3RMSNorm(self.head_dim, eps, make) for _ in range(2))

    def __call__(
        self, x: Float[Array, "b s d"], rotation: _Rotation, mask: Bool[Array, "b s"]
    ) -> Float[Array, "b s d"]:
        """Each token sees those up to itself that `mask` shows."""
        q, k, v = (
            project(x).reshape(*x.shape[:2], -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotated(self.q_norm(q), *rotation), _rotated(self.k_norm(k), *rotation)
        # Not `attend`, whose kernels know neither mask nor groups: of 512 tokens attention is 4 % of the operations.
        return self.o_proj(xla(q, k, v, is_causal=True, mask=mask).reshape(*x.shape[:2], -1))


class Qwen3MLP(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        width, hidden = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = make.linear(width, hidden, bias=False)
        self.up_proj = make.linear(width, hidden, bias=False)
        self.down_proj = make.linear(hidden, width, bias=False)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Qwen3DecoderLayer(nnx.Module):
    """Attention and MLP, each after a norm and added to its input."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        width, eps = config["hidden_size"], float(config["rms_norm_eps"])
        self.self_attn, self.mlp = Qwen3Attention(config, make), Qwen3MLP(config, make)
        self.input_layernorm = Qwen3RMSNorm(width, eps, make)
        self.post_attention_layernorm = Qwen3RMSNorm(width, eps, make)

    def __call__(
        self, x: Float[Array, "b s d"], rotation: _Rotation, mask: Bool[Array, "b s"]
    ) -> Float[Array, "b s d"]:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Model(nnx.Module):
    """The text encoder of klein: a Qwen3ForCausalLM up to the last layer that is read.

    Args:
        config, rngs, dtype: as for every model: parsed config.json, for the initial weights, of the computation.
        read: the states that it gives, by the number of layers before them; 0 is the embeddings. Unless given those
            after a quarter, a half and three quarters of the layers, which are klein's 9, 18 and 27 of 36.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        read: tuple[int, ...] = (),
    ) -> None:
        count = config["num_hidden_layers"]
        read = read or tuple(count * quarter // 4 for quarter in (1, 2, 3))
        check_only(config, _ONLY | {"layer_types": (None, ["full_attention"] * count)}, "Qwen3")
        if max(read) >= count:  # where transformers gives the state after the last norm
            raise UserError(f"Qwen3 config num_hidden_layers={count}: expected more than {max(read)}, the last layer "
                            "whose output is read")  # fmt: skip
        self.config, make, self.read, self.theta = ModelConfig(config), Layers(rngs, dtype), read, _theta(config)
        self.embed_tokens = make.embed(config["vocab_size"], config["hidden_size"])
        self.layers = nnx.List([Qwen3DecoderLayer(config, make) for _ in range(max(read))])

    @property
    def unused(self) -> set[str]:
        """The torch keys of what a file of the whole language model has beside the parameters here."""
        of_layer = [key.removeprefix("layers.0.") for key in keys(self) if key.startswith("layers.0.")]
        later = range(len(self.layers), self.config["num_hidden_layers"])
        return {f"layers.{i}.{key}" for i in later for key in of_layer} | {"norm.weight", "lm_head.weight"}

    def __call__(self, input_ids: Int[Array, "b s"], mask: Bool[Array, "b s"]) -> Float[Array, "b s r_d"]:
        """The states that are read, side by side for each token, in the order of `read`, in the computation's dtype.

        Args:
            input_ids: token ids.
            mask: False of padding, which no other token sees. Its own states are computed all the same: it sees the
                text, and klein reads it.
        """
        states = [self.embed_tokens(input_ids)]
        rotation = _rotation(input_ids.shape[1], self.config["head_dim"], self.theta, states[0].dtype)
        for layer in self.layers:
            states.append(layer(states[-1], rotation, mask))
        return jnp.concatenate([states[i] for i in self.read], axis=-1)


def _theta(config: Mapping[str, Any]) -> float:
    """RoPE's base: where transformers 5 writes it, or where those before it did."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    check_only({"rope_type": rope.get("type", "default")} | rope, {"rope_type": ("default",)}, "Qwen3 rope_parameters")
    return float(rope.get("rope_theta") or config["rope_theta"])


def _rotation(count: int, width: int, theta: float, dtype: DTypeLike) -> _Rotation:
    """Cosine and sine of RoPE's angles (Su et al. 2021) for the tokens 0 … count − 1 and the pairs of a head's numbers.

    Angles are float32, and rounded where transformers rounds them: the last of 512 tokens multiplies each difference.
    """
    periods = (theta ** (np.arange(0, width, 2) / width)).astype(np.float32)
    angles = jnp.arange(count, dtype=jnp.float32)[:, None] * (1 / periods)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def _rotated(
    x: Float[Array, "b s h e"], cos: Float[Array, "s e_2"], sin: Float[Array, "s e_2"]
) -> Float[Array, "b s h e"]:
    """Each pair of numbers, half a head apart, rotated by its angle."""
    (first, second), cos, sin = jnp.split(x, 2, axis=-1), cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
