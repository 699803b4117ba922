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

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:  # type: ignore[override]  # no out_sharding
        low = product(x.astype(self.dtype or x.dtype), self.lora_A[...])
        return super().__call__(x) + self.scale * product(low, self.lora_B[...])


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
    over the mesh as it is.
    """
    dtype = layers[0].dtype or x.dtype
    x = x.astype(dtype)
    kernels = jnp.stack([layer.kernel[...].astype(dtype) for layer in layers], 1)
    biases = [layer.bias[...].astype(dtype) for layer in layers if layer.bias is not None]
    stacked = jnp.stack(biases) if biases else None
    loras = [layer for layer in layers if isinstance(layer, LoRALinear)]
    if loras:
        low = product(x, jnp.concatenate([layer.lora_A[...] for layer in loras], 1))
        up = jnp.stack([layer.scale * layer.lora_B[...] for layer in loras])
        # Block by block on a diagonal: each layer's correction comes from its own part of the rank.
        up = (jnp.eye(len(layers))[:, None, :, None] * up[:, :, None]).reshape(-1, *up.shape[::2])

    def outputs(which: int | slice) -> Array:
        out = jnp.tensordot(x, kernels[:, which], 1)
        if stacked is not None:
            out += stacked[which]
        return out + product(low, up[:, which]) if loras else out

    if platform == "tpu":
        return [outputs(i) for i in range(len(layers))]
    fused = outputs(slice(None))
    return [fused[..., i, :] for i in range(len(layers))]


def add_lora(model: nnx.Module, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
    """Gives every linear layer of the attention modules a LoRA, in place.

    Raises:
        UserError: the model has no such layer.
    """
    count = 0
    for _, module in list(nnx.iter_modules(model)):
        for name in TARGETS:
            layer = getattr(module, name, None)
            if isinstance(layer, nnx.List):
                layer[0] = LoRALinear(layer[0], rank, alpha, rngs)
            elif isinstance(layer, nnx.Linear):
                setattr(module, name, LoRALinear(layer, rank, alpha, rngs))
            count += layer is not None
    if not count:
        raise UserError(f"LoRA: {type(model).__name__} has none of the layers {', '.join(TARGETS)}")


def lora_layers(model: nnx.Module) -> dict[str, LoRALinear]:
    """Path, joined by dots → layer with a LoRA."""
    return {".".join(map(str, path)): m for path, m in nnx.iter_modules(model) if isinstance(m, LoRALinear)}


def merge_lora(model: nnx.Module) -> None:
    """Adds each LoRA to the kernel of its layer, in float32 and in place; B becomes zero."""
    for layer in lora_layers(model).values():
        layer.kernel[...] += layer.scale * (layer.lora_A[...] @ layer.lora_B[...])
        layer.lora_B[...] = jnp.zeros_like(layer.lora_B[...])


def to_peft(model: nnx.Module, prefix: str = "unet") -> dict[str, np.ndarray]:
    """`prefix.PATH.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank], as diffusers' loaders read them.

    PEFT scales by alpha / rank with alpha = rank unless told otherwise, so the model's scale is put into B.
    """
    weights = {}
    for path, layer in lora_layers(model).items():
        weights[f"{prefix}.{path}.lora_A.weight"] = _transposed(layer.lora_A[...])
        weights[f"{prefix}.{path}.lora_B.weight"] = _transposed(layer.scale * layer.lora_B[...])
    return weights


def to_kohya(model: nnx.Module, prefix: str, rename: Callable[[str], str] = lambda name: name) -> dict[str, np.ndarray]:
    """`prefix_PATH.lora_down.weight` [rank, in], `lora_up.weight` [out, rank] and `alpha`, dots in PATH as underscores.

    Args:
        model: with LoRA layers.
        prefix: `lora_unet`, `lora_te`; for XL's text encoders `lora_te1` and `lora_te2`.
        rename: path of a layer → the name by which kohya's scripts know it.
    """
    weights = {}
    for path, layer in lora_layers(model).items():
        name = f"{prefix}_{rename(path)}".replace(".", "_")
        weights[f"{name}.lora_down.weight"] = _transposed(layer.lora_A[...])
        weights[f"{name}.lora_up.weight"] = _transposed(layer.lora_B[...])
        weights[f"{name}.alpha"] = np.asarray(layer.scale * layer.lora_A.shape[1], np.float32)
    return weights


def _transposed(x: Float[Array, "i o"]) -> Float[np.ndarray, "o i"]:
    return np.ascontiguousarray(np.asarray(x).T)
