"""LoRA (Hu et al. 2021) on linear layers and convolutions, and its file formats: PEFT's and kohya's."""

import math
import re
from collections.abc import Iterable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from hgdpo_jax.models.int8 import with_kernels
from hgdpo_jax.models.layers import Conv, Linear
from hgdpo_jax.models.ldm import Translate
from hgdpo_jax.run.errors import UserError

# The layers of `train.lora_modules`, by the ends of their paths. kohya's scripts train the first two kinds unless told.
MODULES = {
    "attention": r"(to_q|to_k|to_v|to_out\.0|q_proj|k_proj|v_proj|out_proj|o_proj"
    r"|to_add_out|to_qkv_mlp_proj|attn\.to_out)$",
    "feed_forward": r"(ff\.net\.0\.proj|ff\.net\.2|\.proj_in|\.proj_out|fc1|fc2|linear_in|linear_out"
    r"|gate_proj|up_proj|down_proj)$",
    "convolutions": r"resnets\.\d+\.\w+$|(down|up)samplers\.0\.conv$",
}


class _Branch(nnx.Module):
    """What LoRA's layers have in common.

    Attributes:
        scale: alpha / rank.
        dropout: share of the input's numbers that LoRA, and not the layer itself, does without; see :func:`drop`.
        keys: of the examples, while it does.
    """

    scale: float
    dropout: float = 0.0
    keys: Key[Array, "b"] | None = None

    def dropped(self, x: Float[Array, "b *n"]) -> Float[Array, "b *n"]:
        """x where nothing is dropped; else the numbers that are left, divided by their share (Srivastava et al. 2014).

        Each row has a mask of its own, from the key of its example, whose rows follow each other: neither the devices
        nor the other rows change it.
        """
        if self.keys is None:
            return x
        repeats = len(x) // len(self.keys)
        keys = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(repeats)))(self.keys)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.dropout, x.shape[1:]))(keys.reshape(-1))
        return jnp.where(keep, x / (1.0 - self.dropout), 0.0).astype(x.dtype)


class LoRALinear(_Branch, Linear):
    """A Linear plus (alpha / rank) · x A B; its own kernel and bias stay where they were.

    A is [in, rank] and uniform, B is [rank, out] and zero, so that a fresh LoRA changes nothing. Both are float32
    parameters; the products run in the layer's compute dtype, see :func:`product`.
    """

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
        for name, value in vars(base).items():
            if not name.startswith("_pytree"):
                setattr(self, name, value)
        self.scale = alpha / rank
        bound = 1.0 / math.sqrt(base.in_features)
        self.lora_A = nnx.LoRAParam(
            jax.random.uniform(rngs.params(), (base.in_features, rank), jnp.float32, -bound, bound)
        )
        self.lora_B = nnx.LoRAParam(jnp.zeros((rank, base.out_features), jnp.float32))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:  # type: ignore[override]  # no out_sharding
        low = product(self.dropped(x).astype(self.dtype or x.dtype), self.lora_A[...])
        return super().__call__(x) + self.scale * product(low, self.lora_B[...])


class LoRAConv(_Branch, Conv):
    """A Conv plus (alpha / rank) times a convolution with A and a product with B, as PEFT's and kohya's.

    A is [height, width, in, rank], of the layer's own size, strides and padding; B is [rank, out]. Otherwise as
    :class:`LoRALinear`.
    """

    def __init__(self, base: Conv, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
        for name, value in vars(base).items():
            if not name.startswith("_pytree"):
                setattr(self, name, value)
        self.scale = alpha / rank
        height, width = self.kernel_size
        bound = 1.0 / math.sqrt(height * width * base.in_features)
        shape = (height, width, base.in_features, rank)
        self.lora_A = nnx.LoRAParam(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))
        self.lora_B = nnx.LoRAParam(jnp.zeros((rank, base.out_features), jnp.float32))

    def __call__(
        self, x: Float[Array, "b h w i"], beside: Float[Array, "b h w j"] | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        low = self.apply(self.lora_A[...], *self._dropped_beside(x, beside))
        return super().__call__(x, beside) + self.scale * product(low, self.lora_B[...])

    def doubled(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        low = self.apply_doubled(self.lora_A[...], self.dropped(x))
        return super().doubled(x) + self.scale * product(low, self.lora_B[...])

    def _dropped_beside(self, x: Array, beside: Array | None) -> tuple[Array, Array | None]:
        """Both with one mask for all of their channels."""
        if self.keys is None or beside is None:
            return self.dropped(x), beside
        both = self.dropped(jnp.concatenate([x, beside], -1))
        return both[..., : x.shape[-1]], both[..., x.shape[-1] :]


@jax.custom_vjp
def product(x: Float[Array, "*b i"], weight: Float[Array, "i ..."]) -> Float[Array, "..."]:
    """x W, [*b *o], in the dtype of x; the gradient of W has W's own dtype.

    That gradient is a sum over all tokens of all devices. A plain product would round it to the dtype of x on each
    device, and add it up over the devices in that dtype.
    """
    return jnp.tensordot(x, weight.astype(x.dtype), 1)


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, weight), (x, weight)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = kept
    tokens, outputs = tuple(range(1, x.ndim - 1)), tuple(range(1 - weight.ndim, 0))
    by_rows = partial(
        jax.lax.dot_general,
        dimension_numbers=((tokens, tokens), ((0,), (0,))),
        preferred_element_type=weight.dtype,
    )

    def wide(*inputs: Array) -> Array:
        return by_rows(*(x.astype(weight.dtype) for x in inputs))

    of_x = jnp.tensordot(gradient, weight.astype(x.dtype), (outputs, outputs))
    # A processor has no products of bfloat16 with float32 sums.
    of_rows = jax.lax.platform_dependent(x, gradient, cpu=wide, default=by_rows)
    # Both products or neither: compilers would put off the small one until the sum over devices, which comes last, and
    # keep both of its large factors. The sum itself stands behind the barrier, and nothing waits for it.
    of_x, of_rows = jax.lax.optimization_barrier((of_x, of_rows))
    return of_x, of_rows.sum(0)


product.defvjp(_forward, _backward)


def fused_linear(
    layers: Sequence[nnx.Linear], x: Float[Array, "*b i"], platform: str = ""
) -> list[Float[Array, "*b o"]]:
    """The output of each layer, in one product, and with LoRA in two more; all layers are of one size and dtype.

    On a `platform` of TPUs only A of the LoRAs is fused: the other products come one by one, and each writes its output
    in the order in which it is read next. Kernels are stacked between their two dimensions, so that each stays split
    over the mesh as it is. Dropout drops the same numbers for all, which PEFT draws for each of them.
    """
    dtype = layers[0].dtype or x.dtype
    x = x.astype(dtype)
    biases = [layer.bias[...].astype(dtype) for layer in layers if layer.bias is not None]
    stacked = jnp.stack(biases) if biases else None
    loras = [layer for layer in layers if isinstance(layer, LoRALinear)]
    if loras:
        low = product(loras[0].dropped(x), jnp.concatenate([layer.lora_A[...] for layer in loras], 1))
        up = jnp.stack([layer.scale * layer.lora_B[...] for layer in loras])
        # Block by block on a diagonal: each layer's correction comes from its own part of the rank.
        up = (jnp.eye(len(layers))[:, None, :, None] * up[:, :, None]).reshape(-1, *up.shape[::2])

    def outputs(which: int | slice) -> Array:
        out = with_kernels(layers, dtype, partial(_fused, which), x)
        if stacked is not None:
            out += stacked[which]
        return out + product(low, up[:, which]) if loras else out

    if platform == "tpu":
        return [outputs(i) for i in range(len(layers))]
    fused = outputs(slice(None))
    return [fused[..., i, :] for i in range(len(layers))]


def _fused(which: int | slice, kernels: list[Array], x: Array) -> Array:
    """x times one of some kernels, or times all."""
    return jnp.tensordot(x, jnp.stack([kernel.astype(x.dtype) for kernel in kernels], 1)[:, which], 1)


def add_lora(
    model: nnx.Module, rank: int, alpha: float, rngs: nnx.Rngs, modules: Sequence[str] = ("attention",)
) -> None:
    """Gives every layer of some kinds of :data:`MODULES` a LoRA, in place.

    Raises:
        UserError: the model has no such layer.
    """
    wanted = "|".join(MODULES[name] for name in modules)
    layers = [
        (path, layer)
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, nnx.Linear | Conv) and re.search(wanted, ".".join(map(str, path)))
    ]
    if not layers:
        raise UserError(f"config key train.lora_modules={','.join(modules)}: {type(model).__name__} has no such layers")
    for path, layer in layers:
        added: nnx.Module
        if isinstance(layer, nnx.Linear):
            added = LoRALinear(layer, rank, alpha, rngs)
        else:
            added = LoRAConv(layer, rank, alpha, rngs)
        name: Any
        *place, name = path
        holder: Any = reduce(_inside, place, model)
        if isinstance(holder, nnx.List):
            holder[name] = added
        else:
            setattr(holder, name, added)


def _inside(holder: Any, name: Any) -> Any:
    return holder[name] if isinstance(holder, nnx.List) else getattr(holder, name)


def lora_layers(model: nnx.Module) -> dict[str, LoRALinear | LoRAConv]:
    """Path, joined by dots → layer with a LoRA."""
    layers = ((".".join(map(str, path)), m) for path, m in nnx.iter_modules(model))
    return {path: m for path, m in layers if isinstance(m, LoRALinear | LoRAConv)}


def drop(models: Iterable[nnx.Module], keys: Key[Array, "b"]) -> None:
    """From now on every LoRA of `dropout` above 0 drops numbers of its input, as PEFT's do while they learn.

    Args:
        models: changed in place.
        keys: of the examples; a layer's input has one row for each of them, or the same number of rows, one after the
            other.
    """
    for number, layer in enumerate(layer for model in models for layer in lora_layers(model).values()):
        if layer.dropout:
            layer.keys = jax.vmap(lambda key, number=number: jax.random.fold_in(key, number))(keys)


def merge_lora(model: nnx.Module) -> None:
    """Adds each LoRA to the kernel of its layer, in float32 and in place; B becomes zero."""
    for layer in lora_layers(model).values():
        layer.kernel[...] += layer.scale * (layer.lora_A[...] @ layer.lora_B[...])
        layer.lora_B[...] = jnp.zeros_like(layer.lora_B[...])


def to_peft(model: nnx.Module, prefix: str = "unet") -> dict[str, np.ndarray]:
    """`prefix.PATH.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank], as diffusers' loaders read them; of a
    convolution [rank, in, height, width] and [out, rank, 1, 1].

    PEFT scales by alpha / rank with alpha = rank unless told otherwise, so the model's scale is put into B.
    """
    weights = {}
    for path, layer in lora_layers(model).items():
        down, up = _as_torch(layer)
        weights[f"{prefix}.{path}.lora_A.weight"] = down
        weights[f"{prefix}.{path}.lora_B.weight"] = layer.scale * up
    return weights


def to_kohya(model: nnx.Module, prefix: str, module: Translate) -> dict[str, np.ndarray]:
    """`prefix_NAME.lora_down.weight`, `lora_up.weight`, shaped as PEFT's, and `alpha`, dots in NAME as underscores.

    Three layers that are one there become one of three times the rank, whose B is theirs on a diagonal.

    Args:
        model: with LoRA layers.
        prefix: `lora_unet`, `lora_te`; for XL's text encoders `lora_te1` and `lora_te2`.
        module: path of a layer → the name by which kohya's scripts know it.
    """
    fused: dict[str, dict[int | None, LoRALinear | LoRAConv]] = {}
    for path, layer in lora_layers(model).items():
        where = module(path, model.config)  # type: ignore[attr-defined]  # all models have one
        fused.setdefault(f"{prefix}_{where.key}".replace(".", "_"), {})[where.third] = layer
    weights = {}
    for name, thirds in fused.items():
        layers = [thirds[None]] if None in thirds else [thirds[i] for i in range(3)]
        downs, ups = zip(*map(_as_torch, layers), strict=True)
        weights[f"{name}.lora_down.weight"] = np.concatenate(downs)
        diagonal = [[up * (i == j) for j in range(len(ups))] for i, up in enumerate(ups)]
        weights[f"{name}.lora_up.weight"] = ups[0] if len(ups) == 1 else np.block(diagonal)
        weights[f"{name}.alpha"] = np.asarray(layers[0].scale * len(weights[f"{name}.lora_down.weight"]), np.float32)
    return weights


def _as_torch(layer: LoRALinear | LoRAConv) -> tuple[np.ndarray, np.ndarray]:
    """A and B as PyTorch's layers of the same kind hold them."""
    down, up = (np.asarray(x[...]) for x in (layer.lora_A, layer.lora_B))
    if down.ndim == 2:
        return np.ascontiguousarray(down.T), np.ascontiguousarray(up.T)
    return np.ascontiguousarray(down.transpose(3, 2, 0, 1)), np.ascontiguousarray(up.T[:, :, None, None])
