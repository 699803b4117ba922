"""LoRA changes nothing when fresh, and the same in diffusers when not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx

from hgdpo_jax.errors import UserError
from hgdpo_jax.models import attention
from hgdpo_jax.models.convert import to_torch
from hgdpo_jax.models.lora import LoRALinear, add_lora, from_peft, merge_lora, to_peft
from hgdpo_jax.models.unet import UNet2DConditionModel
from tests.models.parity import ported, randomise, relative_error
from tests.rounding import GRADIENT, NETWORK, assert_close

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


def test_a_peft_file_is_read_back_and_a_wrong_one_is_named(models) -> None:
    _, ours = models
    add_lora(ours, 4, 8.0, nnx.Rngs(0))
    fill(ours)
    weights = to_peft(ours)
    before = predict(ours)
    fill_zero = {key: np.zeros_like(value) for key, value in weights.items()}
    from_peft(fill_zero, ours)
    assert not np.array_equal(predict(ours), before)
    from_peft(weights, ours)
    assert np.array_equal(predict(ours), before)
    first = sorted(weights)[0]
    with pytest.raises(UserError, match=f"{first} is missing"):
        from_peft({key: value for key, value in weights.items() if key != first}, ours)
    with pytest.raises(UserError, match="unet.extra is superfluous"):
        from_peft(weights | {"unet.extra": np.zeros(1)}, ours)
    with pytest.raises(UserError, match=first):
        from_peft(weights | {first: np.zeros((9, 9), np.float32)}, ours)


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
