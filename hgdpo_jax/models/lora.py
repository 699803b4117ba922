"""LoRA (Hu et al. 2021) on the linear layers of the attention modules, and its file formats: PEFT's and kohya's."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from hgdpo_jax.run.errors import UserError

TARGETS = ("to_q", "to_k", "to_v", "to_out", "q_proj", "k_proj", "v_proj", "out_proj")


class LoRALinear(nnx.Linear):
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

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """The base layer and its low-rank correction."""
        low = product(x.astype(self.dtype or x.dtype), self.lora_A[...])
        return super().__call__(x) + self.scale * product(low, self.lora_B[...])


@jax.custom_vjp
def product(x: Float[Array, "*b i"], weight: Float[Array, "i ..."]) -> Array:
    """x W, [*b *o], in the dtype of x; the gradient of W in W's own.

    That is a sum over all tokens of all devices. Of a plain product it is rounded to the dtype of x on each device,
    and added up over the devices in that.
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
    # A processor has no such products of bfloat16 with float32 sums.
    of_rows = jax.lax.platform_dependent(x, gradient, cpu=wide, default=by_rows)
    # Both or neither: compilers else put off the small product until the sum over devices, which comes last, and keep
    # both of its large factors. Behind the barrier that sum is not waited for.
    of_x, of_rows = jax.lax.optimization_barrier((of_x, of_rows))
    return of_x, of_rows.sum(0)


product.defvjp(_forward, _backward)


def fused_linear(
    layers: Sequence[nnx.Linear], x: Float[Array, "*b i"], platform: str = ""
) -> list[Float[Array, "*b o"]]:
    """What each of some layers of one size and dtype makes of x, in one product, and with LoRA in two more.

    For a `platform` of TPUs only what LoRA reads of x is one product: the others come one by one, each written in the
    order in which it is read next. Kernels are stacked between their two dimensions, so that each stays split over the
    mesh as it is.
    """
    first = layers[0]
    dtype = first.dtype or x.dtype
    x = x.astype(dtype)
    kernels = jnp.stack([layer.kernel[...].astype(dtype) for layer in layers], 1)
    if first.use_bias:
        biases = jnp.stack([layer.bias[...].astype(dtype) for layer in layers])
    if isinstance(first, LoRALinear):
        low = product(x, jnp.concatenate([layer.lora_A[...] for layer in layers], 1))
        up = jnp.stack([layer.scale * layer.lora_B[...] for layer in layers])
        # Block by block on a diagonal: each layer's correction comes from its own part of the rank.
        up = (jnp.eye(len(layers))[:, None, :, None] * up[:, :, None]).reshape(-1, *up.shape[::2])

    def found(which: int | slice) -> Array:
        out = jnp.tensordot(x, kernels[:, which], 1)
        if first.use_bias:
            out += biases[which]
        if isinstance(first, LoRALinear):
            out += product(low, up[:, which])
        return out

    if platform == "tpu":
        return [found(i) for i in range(len(layers))]
    out = found(slice(None))
    return [out[..., i, :] for i in range(len(layers))]


def add_lora(model: nnx.Module, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
    """Gives every linear layer of the attention modules a LoRA, in place.

    Raises:
        UserError: the model has no such layer.
    """
    found = 0
    for _, module in list(nnx.iter_modules(model)):
        for name in TARGETS:
            layer = getattr(module, name, None)
            if isinstance(layer, nnx.List):
                layer[0] = LoRALinear(layer[0], rank, alpha, rngs)
            elif isinstance(layer, nnx.Linear):
                setattr(module, name, LoRALinear(layer, rank, alpha, rngs))
            found += layer is not None
    if not found:
        raise UserError(f"LoRA: {type(model).__name__} has none of the layers {', '.join(TARGETS)}")


def merge_lora(model: nnx.Module) -> None:
    """Adds each LoRA to the kernel of its layer, in float32 and in place; B becomes zero."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LoRALinear):
            module.kernel[...] += module.scale * (module.lora_A[...] @ module.lora_B[...])
            module.lora_B[...] = jnp.zeros_like(module.lora_B[...])


def to_peft(model: nnx.Module, prefix: str = "unet") -> dict[str, np.ndarray]:
    """`prefix.PATH.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank], as diffusers' loaders read them.

    PEFT scales by alpha / rank with alpha = rank unless told otherwise, so the model's scale is put into B.
    """
    weights = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, LoRALinear):
            name = ".".join([prefix, *map(str, path)])
            weights[f"{name}.lora_A.weight"] = np.ascontiguousarray(np.asarray(module.lora_A[...]).T)
            weights[f"{name}.lora_B.weight"] = np.ascontiguousarray(np.asarray(module.scale * module.lora_B[...]).T)
    return weights


def to_kohya(model: nnx.Module, prefix: str, rename: Callable[[str], str] = lambda name: name) -> dict[str, np.ndarray]:
    """`prefix_PATH.lora_down.weight` [rank, in], `lora_up.weight` [out, rank] and `alpha`, dots in PATH as underscores.

    Args:
        model: with LoRA layers.
        prefix: `lora_unet`, `lora_te`; for XL's text encoders `lora_te1` and `lora_te2`.
        rename: from the layer's path to the name that kohya's scripts know it by.
    """
    weights = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, LoRALinear):
            name = f"{prefix}_{rename('.'.join(map(str, path)))}".replace(".", "_")
            weights[f"{name}.lora_down.weight"] = np.ascontiguousarray(np.asarray(module.lora_A[...]).T)
            weights[f"{name}.lora_up.weight"] = np.ascontiguousarray(np.asarray(module.lora_B[...]).T)
            weights[f"{name}.alpha"] = np.float32(module.scale * module.lora_A.shape[1])
    return {key: np.asarray(value) for key, value in weights.items()}
