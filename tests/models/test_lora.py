"""LoRA changes nothing when fresh, and the same in diffusers when not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx

from hgdpo_jax.devices.sharding import batch_sharding, replicated
from hgdpo_jax.devices.transfer import place
from hgdpo_jax.models import attention
from hgdpo_jax.models.convert import to_torch
from hgdpo_jax.models.lora import LoRALinear, add_lora, merge_lora, product, to_peft
from hgdpo_jax.models.unet import UNet2DConditionModel
from tests import tiny
from tests.models.parity import ported, randomise, relative_error
from tests.rounding import EPS, GRADIENT, NETWORK, assert_close

CONFIG = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=4,
    norm_num_groups=4,
)
RNG = np.random.default_rng(0)
X, CONTEXT = RNG.standard_normal((2, 8, 8, 4), np.float32), RNG.standard_normal((2, 5, 12), np.float32)
T = np.array([1, 700], np.int32)


@pytest.fixture
def models() -> tuple[TorchUNet, UNet2DConditionModel]:
    theirs = randomise(TorchUNet(**CONFIG))
    return theirs, ported(UNet2DConditionModel, dict(theirs.config), theirs)


@nnx.jit
def predict(model: UNet2DConditionModel) -> jax.Array:
    return model(X, T, CONTEXT)


def fill(model: nnx.Module) -> None:
    """A LoRA that does something."""
    for i, (_, module) in enumerate(nnx.iter_modules(model)):
        if isinstance(module, LoRALinear):
            module.lora_B[...] = 0.3 * jax.random.normal(jax.random.key(i), module.lora_B.shape)


def test_every_attention_projection_has_one_and_a_fresh_one_changes_nothing(models) -> None:
    _, ours = models
    before, names = predict(ours), set(to_torch(ours))
    add_lora(ours, 4, 8.0, nnx.Rngs(0))
    count = sum(isinstance(module, LoRALinear) for _, module in nnx.iter_modules(ours))
    attentions = sum(name.endswith("to_q.weight") for name in names)
    assert count == 4 * attentions > 0
    assert set(to_torch(ours)) == names
    assert not any(module.lora_B[...].any() for _, module in nnx.iter_modules(ours) if isinstance(module, LoRALinear))
    assert_close(predict(ours), before, NETWORK)


def test_the_peft_file_gives_the_same_in_diffusers(models) -> None:
    theirs, ours = models
    base = predict(ours)
    add_lora(ours, 4, 8.0, nnx.Rngs(0))
    fill(ours)
    weights = {key: torch.tensor(value) for key, value in to_peft(ours).items()}
    theirs.load_lora_adapter(weights, prefix="unet")
    with torch.no_grad():
        expected = theirs(torch.tensor(X.transpose(0, 3, 1, 2)), torch.tensor(T), torch.tensor(CONTEXT)).sample
    found = predict(ours)
    assert relative_error(found, expected) <= NETWORK
    assert np.abs(found - base).max() > 1e-2


def test_merging_keeps_the_output(models) -> None:
    _, ours = models
    add_lora(ours, 4, 8.0, nnx.Rngs(0))
    fill(ours)
    before = predict(ours)
    merge_lora(ours)
    assert_close(predict(ours), before, NETWORK)


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 24), ("float16", 11), ("bfloat16", 8)])
def test_gradients_of_lora_are_sums_in_float32_over_devices_too(dtype: str, bits: int) -> None:
    """The rest is as fine as the dtype is."""
    mesh, shapes = tiny.mesh(8, 1, 1), {"x": (8, 32, 16), "weight": (16, 3, 4), "gradient": (8, 32, 3, 4)}
    x, weight, gradient = (jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in shapes.values())
    x, gradient = (place(y.astype(dtype), batch_sharding(mesh)) for y in (x, gradient))
    weight = place(weight, replicated(mesh))
    out, (of_x, of_weight) = jax.jit(lambda x, w, g: (lambda y, back: (y, back(g)))(*jax.vjp(product, x, w)))(
        x, weight, gradient
    )
    assert (out.dtype, of_x.dtype, of_weight.dtype) == (x.dtype, x.dtype, jnp.float32)
    x, gradient, used = (np.asarray(y, np.float64) for y in (x, gradient, weight.astype(dtype)))
    assert_close(of_weight, np.einsum("bni,bnjo->ijo", x, gradient), 16 * EPS)  # √256 at random
    assert_close(out, np.einsum("bni,ijo->bnjo", x, used), 2.0**-bits + 16 * EPS)
    assert_close(of_x, np.einsum("bnjo,ijo->bni", gradient, used), 2.0**-bits + 16 * EPS)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_products_of_a_tpu_give_the_same(bias: bool, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Layers(nnx.Module):
        def __init__(self) -> None:
            self.attn = attention.Attention(16, 16, 4, bias=bias, rngs=nnx.Rngs(0), dtype=jnp.float32)

    model = Layers()
    if lora:
        add_lora(model, 4, 8.0, nnx.Rngs(2))
        fill(model)
    graph, parameters = nnx.split(model)
    parameters = jax.tree.map(lambda p: p + 0.1, parameters)  # biases are zero

    def loss(parameters: nnx.State, x: jax.Array) -> jax.Array:
        return jnp.sin(nnx.merge(graph, parameters).attn(x)).sum()

    x, found, products = jnp.asarray(RNG.standard_normal((2, 6, 16)), jnp.float32), {}, {}
    for device in ("cpu", "tpu"):
        monkeypatch.setattr(attention, "platform", lambda _, device=device: device)
        products[device] = str(jax.make_jaxpr(lambda *inputs: loss(*inputs))(parameters, x)).count("dot_general")
        found[device] = jax.value_and_grad(loss, (0, 1))(parameters, x)
    assert products["tpu"] == products["cpu"] + 2 + 2 * lora
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found["cpu"]))
    for one, other in zip(*map(jax.tree.leaves, found.values()), strict=True):
        assert_close(one, other, GRADIENT, largest)  # the gradient of the keys' bias is nothing but rounding


def test_the_gradients_of_a_product_come_together_before_the_sum_over_devices() -> None:
    """A compiler that may put off that of the weight keeps x and the gradient, both large; a way back that waits for
    each layer's sum over devices is slow."""
    mesh, gradients = tiny.mesh(8, 1, 1), jax.jit(jax.grad(lambda x, w: product(x, w).sum(), (0, 1)))
    x, weight = place(jnp.ones((8, 6, 4)), batch_sharding(mesh)), jnp.ones((4, 2))
    lowered = gradients.lower(x, place(weight, replicated(mesh)))
    (barrier,) = (line for line in lowered.as_text().splitlines() if "optimization_barrier" in line)
    assert re.findall("tensor<(.*?)xf32>", barrier) == ["8x6x4", "8x4x2"]  # rows apart, as devices have them
    assert lowered.compile().as_text().count(" all-reduce(") == 1
