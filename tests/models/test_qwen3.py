"""Qwen3 against transformers'."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from hgdpo_jax.devices.mesh import make_mesh
from hgdpo_jax.devices.sharding import parameter_placer
from hgdpo_jax.devices.transfer import to_devices
from hgdpo_jax.models.convert import abstract, from_torch, require_fit, to_torch
from hgdpo_jax.models.lora import add_lora, lora_layers
from hgdpo_jax.models.model_config import read_config
from hgdpo_jax.models.qwen3 import Qwen3Model
from hgdpo_jax.models.text import FluxText, before_padding
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import write_json
from tests.models.parity import numpy_weights, randomise
from tests.rounding import GRADIENT, NETWORK, assert_close

PAD = 7
CONFIG: dict[str, Any] = transformers.Qwen3Config(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
).to_dict()
READ = (1, 2, 4)
IDS = np.random.default_rng(0).integers(8, 60, (2, 24), dtype=np.int32)
IDS[0, 15:], IDS[0, 4], IDS[1, 22:] = PAD, PAD, PAD  # of the padding's token one stands in the text
small, one_layer = partial(Qwen3Model, read=READ), partial(Qwen3Model, read=(1,))


@nnx.jit
def run(model: Qwen3Model, ids: Any, pad: int = PAD) -> Any:
    """The states, with padding found in the ids."""
    return model(ids, before_padding(ids, pad))


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    return randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**CONFIG)))


def their_states(model: torch.nn.Module, read: tuple[int, ...]) -> torch.Tensor:
    mask = torch.tensor([[1] * 15 + [0] * 9, [1] * 22 + [0] * 2])
    found = model(input_ids=torch.tensor(IDS), attention_mask=mask, output_hidden_states=True).hidden_states
    return torch.cat([found[i] for i in read], dim=-1)


def test_the_states_of_text_and_padding_are_transformers(theirs: torch.nn.Module) -> None:
    """On one device and on a mesh."""
    weights = numpy_weights(theirs)
    ours = abstract(small, CONFIG)
    from_torch(weights, ours)
    with torch.no_grad():
        expected = their_states(theirs, READ).numpy()
    found = run(ours, IDS)
    assert found.shape == (2, 24, 3 * 32)
    for states, right in zip(np.split(found, 3, -1), np.split(expected, 3, -1), strict=True):
        assert_close(states, right, NETWORK, size=right.std())
    mesh = make_mesh(ConfigDict({"data": 1, "fsdp": 2, "tensor": 4}))  # more parts than heads of keys
    split = abstract(small, CONFIG)
    from_torch(weights, split, place=parameter_placer(mesh))
    assert split.layers[0].mlp.down_proj.kernel[...].sharding.spec == P("tensor", "fsdp")
    assert_close(run(split, to_devices({"ids": IDS}, mesh)["ids"]), expected, NETWORK)


def test_in_bfloat16_it_rounds_as_transformers(theirs: torch.nn.Module) -> None:
    """It is about as far from float32. Norms' weights multiply what was rounded: else a quarter would differ."""
    ours, rounded = abstract(small, CONFIG, jnp.bfloat16), copy.deepcopy(theirs).bfloat16()
    from_torch(numpy_weights(theirs), ours, dtype=jnp.bfloat16)
    x = np.random.default_rng(2).standard_normal((24, 32)).astype(jnp.bfloat16)
    with torch.no_grad():
        exact, right = their_states(theirs, READ).numpy(), their_states(rounded, READ).float().numpy()
        norm = rounded.model.layers[0].input_layernorm(torch.tensor(x.astype(np.float32)).bfloat16()).float().numpy()
    found = run(ours, IDS)
    assert found.dtype == jnp.bfloat16
    assert 0 < (found - exact).std() <= 1.5 * (right - exact).std() <= 0.05 * exact.std()
    assert (ours.layers[0].input_layernorm(jnp.asarray(x)).astype(np.float32) != norm).mean() <= 0.01


def test_gradients_of_a_layer_are_pytorchs(theirs: torch.nn.Module) -> None:
    factors = np.random.default_rng(1).standard_normal((2, 24, 32)).astype(np.float32)
    theirs.zero_grad()
    (their_states(theirs, (1,)) * torch.tensor(factors)).sum().backward()
    expected = {key: value.grad.numpy() for key, value in theirs.named_parameters() if value.grad is not None}
    model = abstract(one_layer, CONFIG)
    from_torch(numpy_weights(theirs), model)
    gradient = nnx.jit(nnx.grad(lambda model: (run(model, IDS) * factors).sum()))(model)
    nnx.update(model, gradient)
    found = to_torch(model)
    assert {f"model.{key}" for key in found} == expected.keys()
    for key, value in found.items():
        assert_close(value, expected[f"model.{key}"], GRADIENT, name=key)


def test_the_weights_that_are_read_stay_as_they_are(theirs: torch.nn.Module) -> None:
    """With and without the prefix of the whole model, its output layer, and what comes after the last layer read."""
    whole = numpy_weights(theirs)
    bare = {key.removeprefix("model."): value for key, value in whole.items()}
    for weights in (whole, bare, {key: value for key, value in whole.items() if key != "lm_head.weight"}):
        model = abstract(small, CONFIG)
        from_torch(weights, model)
        back = to_torch(model)
        assert back.keys() == bare.keys() - model.unused and len(back) == 1 + 4 * 11
        assert all(np.array_equal(back[key], bare[key]) for key in back)
    assert model.unused == bare.keys() - back.keys()


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("model.layers.5.mlp.up_proj.weight", "superfluous"),
        ("model.layers.4.mlp.up_proj.bias", "superfluous"),
        ("model.layers.3.self_attn.q_norm.weight", "missing"),
    ],
)
def test_a_file_of_another_model_is_refused(theirs: torch.nn.Module, key: str, fault: str) -> None:
    weights = numpy_weights(theirs)
    if weights.pop(key, None) is None:
        weights[key] = np.zeros(3, np.float32)
    with pytest.raises(UserError, match=f"weight {key.removeprefix('model.')} is {fault}"):
        require_fit(weights, abstract(small, CONFIG), "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2': not supported, only 'qwen3' is"),
        ({"attention_bias": True}, "attention_bias=True: not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True: not supported"),
        ({"layer_types": ["sliding_attention"] * 5}, "layer_types=.* not supported"),
        ({"quantization_config": {"bits": 8}}, "quantization_config=.* not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type='yarn': not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear': not supported"),
        ({"num_hidden_layers": 4, "layer_types": None}, "num_hidden_layers=4: expected more than 4, the last layer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3, head_dim=16: the second has to divide the first"),
        ({"rope_parameters": None}, "has no rope_theta"),
        ({"rope_parameters": "default"}, "rope_parameters='default'; expected an object"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0; expected a number above 0"),
    ],
)
def test_a_config_that_is_not_computed_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_json(tmp_path / "config.json", CONFIG | change)
    with pytest.raises(UserError, match=f"config.json: .*{message}") as error:
        abstract(small, read_config(tmp_path))
    assert "\n" not in str(error.value)


def test_the_base_of_the_angles_is_found_where_either_transformers_writes_it() -> None:
    older = {key: value for key, value in CONFIG.items() if key != "rope_parameters"}
    older |= {"rope_theta": 5e5, "rope_scaling": None}
    assert abstract(small, older).theta == transformers.Qwen3Config(**older).rope_parameters["rope_theta"] == 5e5


def test_padding_is_what_follows_the_text() -> None:
    assert before_padding(jnp.asarray([[9, PAD, 8, PAD, PAD], [9, 9, 9, 9, 9]]), PAD).tolist() == [
        [True, True, True, False, False],
        [True] * 5,
    ]


def test_the_empty_prompt_and_a_negative_one_stand_for_all_images(theirs: torch.nn.Module) -> None:
    model = abstract(one_layer, CONFIG)
    from_torch(numpy_weights(theirs), model)
    text = FluxText(model, empty_ids=tuple(IDS[0].tolist()), padding=PAD)
    ids, size = jnp.asarray(IDS), (64, 64)
    both, empty, negative = nnx.jit(lambda m: (m(ids, size), m.empty(3, size), m.empty(1, size, ids[1:])))(text)
    assert empty.added_cond is None and empty.encoder_hidden_states.shape == (3, 24, 32)
    assert_close(empty.encoder_hidden_states, both.encoder_hidden_states[np.zeros(3, int)], NETWORK)
    assert_close(negative.encoder_hidden_states, both.encoder_hidden_states[1:], NETWORK)


def test_its_layers_get_a_lora() -> None:
    model = abstract(one_layer, CONFIG)
    add_lora(model, 2, 2.0, nnx.Rngs(1), ("attention", "feed_forward"))
    attention = {f"layers.0.self_attn.{name}_proj" for name in "qkvo"}
    assert lora_layers(model).keys() == attention | {f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
