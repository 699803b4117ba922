"""LoRA changes nothing when fresh, and the same in diffusers when not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx
from peft import LoraConfig, inject_adapter_in_model

from hgdpo_jax.devices.sharding import batch_sharding, replicated
from hgdpo_jax.devices.transfer import place
from hgdpo_jax.models import attention
from hgdpo_jax.models.convert import to_torch
from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.lora import LoRAConv, LoRALinear, add_lora, drop, lora_layers, merge_lora, product, to_peft
from hgdpo_jax.models.unet import UNet2DConditionModel
from tests import tiny
from tests.models.parity import ported, randomise, relative_error
from tests.rounding import EPS, GRADIENT, NETWORK, assert_close

RNG = np.random.default_rng(0)
X, CONTEXT = RNG.standard_normal((2, 4, 4, 8), np.float32), RNG.standard_normal((2, 5, 8), np.float32)
T = np.array([1, 700], np.int32)


@pytest.fixture
def models() -> tuple[TorchUNet, UNet2DConditionModel]:
    theirs = randomise(TorchUNet.from_config(tiny.TINY_UNET))
    return theirs, ported(UNet2DConditionModel, dict(theirs.config), theirs)


@nnx.jit
def predict(model: UNet2DConditionModel) -> jax.Array:
    return model(*map(jnp.asarray, (X, T, CONTEXT)))


def fill(model: nnx.Module) -> None:
    """A LoRA that does something."""
    rng = np.random.default_rng(1)
    for layer in lora_layers(model).values():
        layer.lora_B[...] = jnp.asarray(0.3 * rng.standard_normal(layer.lora_B.shape), jnp.float32)


OF_ATTENTION = r"(to_[qkv]|to_out\.0)\.weight"
OF_TRANSFORMERS = r"attentions\..*(to_[qkv]|to_out\.0|ff\.net\.\d(\.proj)?|proj_in|proj_out)\.weight"
# All weights that are multiplied, but of the first and the last layer and what makes the time's embedding.
OF_ALL = r"^(?!time_embedding|conv_in|conv_out|.*norm).*\.weight"


@pytest.mark.parametrize(
    ("modules", "pattern"),
    [
        (("attention",), OF_ATTENTION),
        (("attention", "feed_forward"), OF_TRANSFORMERS),
        (("attention", "feed_forward", "convolutions"), OF_ALL),
    ],
)
def test_a_fresh_one_changes_nothing_and_a_trained_one_is_diffusers_and_can_be_merged(models, modules, pattern) -> None:
    theirs, ours = models
    before, names = predict(ours), set(to_torch(ours))
    add_lora(ours, 4, 8.0, nnx.Rngs(0), modules)
    layers = lora_layers(ours)
    wanted = {name.removesuffix(".weight") for name in names if re.search(f"{pattern}$", name)}
    assert layers.keys() == wanted and len(wanted) > 3
    assert set(to_torch(ours)) == names and {layer.scale for layer in layers.values()} == {8.0 / 4}
    assert not any(layer.lora_B[...].any() for layer in layers.values())
    assert_close(predict(ours), before, NETWORK)
    fill(ours)
    weights = {key: torch.tensor(value) for key, value in to_peft(ours).items()}
    theirs.load_lora_adapter(weights, prefix="unet")
    with torch.no_grad():
        expected = theirs(torch.tensor(X.transpose(0, 3, 1, 2)), torch.tensor(T), torch.tensor(CONTEXT)).sample
    found = predict(ours)
    assert relative_error(found, expected) <= NETWORK
    assert np.abs(found - before).max() > 1e-2
    merge_lora(ours)
    assert not any(layer.lora_B[...].any() for layer in layers.values())
    assert_close(predict(ours), found, NETWORK)


class Masked(torch.nn.Module):
    """In place of a torch Dropout, whose mask is drawn: one that is given, of zeros and 1 / share."""

    def __init__(self, mask: np.ndarray) -> None:
        super().__init__()
        self.mask = torch.tensor(mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_lora_reads_what_dropout_leaves_as_in_peft(kind: str) -> None:
    """Of each example by its own key, whatever its batch, and on average all."""
    make, share, keys = Layers(nnx.Rngs(0), jnp.float32), 0.75, jax.random.split(jax.random.key(0), 3)
    if kind == "linear":
        ours, theirs = LoRALinear(make.linear(8, 5), 2, 4.0, nnx.Rngs(1)), torch.nn.Linear(8, 5)
    else:
        ours, theirs = LoRAConv(make.conv(8, 5, 3), 2, 4.0, nnx.Rngs(1)), torch.nn.Conv2d(8, 5, 3, padding=1)
    fill(ours)
    x = jnp.asarray(RNG.standard_normal((6, 4, 4, 8)), jnp.float32)
    theirs.load_state_dict({name: torch.tensor(value) for name, value in to_torch(ours).items()})
    config = LoraConfig(r=2, lora_alpha=2, lora_dropout=1 - share, target_modules=["0"])
    layer = inject_adapter_in_model(config, torch.nn.Sequential(theirs))[0]
    weights = (torch.tensor(value) for value in to_peft(ours).values())
    with torch.no_grad():
        for own, given in zip((layer.lora_A["default"], layer.lora_B["default"]), weights, strict=True):
            own.weight.copy_(given)
    last = (lambda a: a) if kind == "linear" else (lambda a: a.transpose(0, 3, 1, 2))
    with torch.no_grad():
        assert_close(last(np.asarray(ours(x))), layer.eval()(torch.tensor(last(np.asarray(x)))), NETWORK)
        ours.dropout = 1 - share
        drop([ours], keys)
        mask = np.asarray(ours.dropped(jnp.ones_like(x)))
        layer.lora_dropout["default"] = Masked(last(mask))
        assert_close(last(np.asarray(ours(x))), layer(torch.tensor(last(np.asarray(x)))), NETWORK)
    assert {*np.unique(mask)} == {0.0, np.float32(1 / share)} and len(np.unique(mask, axis=0)) == 6
    assert abs(mask.mean() - 1.0) < 4 * np.sqrt((1 - share) / share / mask.size)  # four deviations
    if kind == "convolution":
        assert_close(ours(x[..., :3], x[..., 3:]), ours(x), NETWORK)
    drop([ours], keys[1:2])
    np.testing.assert_array_equal(ours.dropped(x[2:4]), (x * mask)[2:4])


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
    class Holder(nnx.Module):
        def __init__(self) -> None:
            self.attn = attention.Attention(16, 16, 4, Layers(nnx.Rngs(0), jnp.float32), bias)

    model = Holder()
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
        if bias and lora:
            found[device] = jax.jit(jax.value_and_grad(loss, (0, 1)))(parameters, x)
    assert products["tpu"] == products["cpu"] + 2 + 2 * lora
    if not found:
        return
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
