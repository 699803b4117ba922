"""FLUX.2 klein's text encoder, Qwen3-4B, at full size against transformers, float32: `bash launch/test.sh --full`.

One layer takes about 4 GB of memory, and on two cores half a minute.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import Qwen3Config, Qwen3ForCausalLM

from hgdpo_jax.models.convert import abstract, shapes, to_torch
from hgdpo_jax.models.qwen3 import Qwen3Model
from tests.models.parity import ported, randomise
from tests.rounding import GRADIENT

# As its config.json says.
QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_the_model_has_the_names_and_shapes_of_transformers() -> None:
    with torch.device("meta"):
        theirs = Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B))
    expected = {key.removeprefix("model."): tuple(x.shape) for key, x in theirs.state_dict().items()}
    ours = abstract(Qwen3Model, QWEN3_4B)
    found = shapes(ours)
    assert found == {key: shape for key, shape in expected.items() if key not in ours.unused}
    assert ours.unused == expected.keys() - found.keys()
    count = sum(int(np.prod(shape)) for shape in found.values())
    print(f"\nQwen3-4B: {len(found)} of {len(expected)} weights, {count:,} numbers are read")


def test_one_layer_computes_what_transformers_does() -> None:
    """Of 512 tokens, the last 300 of one row padding; with the gradients of its weights."""
    config = QWEN3_4B | {"vocab_size": 1024, "num_hidden_layers": 2}
    theirs = randomise(Qwen3ForCausalLM(Qwen3Config(**config)))
    ours = ported(partial(Qwen3Model, read=(1,)), config, theirs)
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 1024, (2, 512), dtype=np.int32), np.ones((2, 512), bool)
    ids[0, 212:], mask[0, 212:] = 7, False
    factors = rng.standard_normal((2, 512, 2560)).astype(np.float32)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask, dtype=torch.long)}
    states = theirs(**inputs, output_hidden_states=True).hidden_states[1]
    (states * torch.tensor(factors)).sum().backward()
    expected = states.detach().numpy()

    @nnx.jit
    @partial(nnx.value_and_grad, has_aux=True)
    def run(model: Qwen3Model) -> Any:
        found = model(jnp.asarray(ids), jnp.asarray(mask))
        return (found * factors).sum(), found

    (_, found), gradient = run(ours)
    nnx.update(ours, gradient)
    for rows, chosen in (("text", mask), ("padding", ~mask)):
        error = float(np.abs(found - expected)[chosen].max() / expected.std())
        print(f"\nQwen3-4B, one layer, {rows}: largest error {error:.2e} standard deviations")
        assert error <= 1e-4
    # Their largest value is up to 84 deviations: PyTorch in float32 is 1.5e-4 of a deviation from PyTorch in float64.
    right = {key.removeprefix("model."): x.grad.numpy() for key, x in theirs.named_parameters() if x.grad is not None}
    gradients = to_torch(ours)
    errors = {key: np.abs(x - right[key]).max() / np.abs(right[key]).max() for key, x in gradients.items()}
    print(f"gradients of {len(errors)} weights: largest error {max(errors.values()):.2e} of the largest value")
    assert max(errors.values()) <= GRADIENT
