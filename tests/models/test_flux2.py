"""The transformer of FLUX.2-klein against diffusers', in float32, module by module."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel as TorchFlux2
from diffusers.models.embeddings import apply_rotary_emb
from flax import nnx

from hgdpo_jax.devices.sharding import batch_sharding, heads_sharding, partition_spec, tree_shardings
from hgdpo_jax.devices.transfer import place
from hgdpo_jax.models.attention import set_sharding
from hgdpo_jax.models.convert import abstract, from_torch, parameters, shapes, to_torch
from hgdpo_jax.models.flux2 import Flux2Transformer2DModel, rotated, rotation
from hgdpo_jax.models.lora import MODULES, add_lora, lora_layers, merge_lora, to_peft
from hgdpo_jax.run.errors import UserError
from tests import tiny
from tests.klein import TRANSFORMER as CONFIG
from tests.models.parity import deviations, numpy_weights, randomise
from tests.rounding import GRADIENT, NETWORK, assert_close

KLEIN = dict(
    num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
)
TOLERANCE = 1e-4  # of an output's deviation
TEXT, HEIGHT, WIDTH = 5, 3, 2
RNG = np.random.default_rng(0)
SAMPLE, SIGMA = RNG.standard_normal((4, HEIGHT, WIDTH, 16), np.float32), np.float32([0.003, 0.4, 0.71, 1.0])
CONTEXT = RNG.standard_normal((8, TEXT, 96), np.float32)
TEMB = RNG.standard_normal((2, 32), np.float32)
STREAMS = [RNG.standard_normal((2, n, 32), np.float32) for n in (TEXT, HEIGHT * WIDTH)]
HEADS = RNG.standard_normal((2, TEXT + HEIGHT * WIDTH, 2, 16), np.float32)
AROUND = [RNG.standard_normal((2, n, 32), np.float32) for n in (TEXT, HEIGHT * WIDTH)]  # gradients of the blocks


@pytest.fixture(scope="module")
def theirs() -> TorchFlux2:
    return randomise(TorchFlux2(**CONFIG))


def ported(theirs: TorchFlux2, dtype: Any = jnp.float32) -> Flux2Transformer2DModel:
    model = abstract(Flux2Transformer2DModel, dict(theirs.config), dtype)
    from_torch(numpy_weights(theirs), model)
    return model


def ids(text: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of text and image, as the pipeline makes them."""
    zero, one = torch.arange(1), torch.arange
    return torch.cartesian_prod(zero, zero, zero, one(text)), torch.cartesian_prod(zero, one(height), one(width), zero)


def torch_rotation(theirs: TorchFlux2, *sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(map(torch.cat, zip(*map(theirs.pos_embed, ids(*sizes)), strict=True)))


def predicted(theirs: TorchFlux2, repeats: int = 2) -> torch.Tensor:
    """Of SAMPLE, as often as there are texts."""
    sample, sigma = (torch.tensor(x.repeat(repeats, axis=0)) for x in (SAMPLE, SIGMA))
    text, image = ids(TEXT, HEIGHT, WIDTH)
    with torch.no_grad():
        found = theirs(sample.flatten(1, 2), torch.tensor(CONTEXT[: len(sample)]), sigma, image, text).sample
    return found.reshape(sample.shape)


@nnx.jit
def predict(model: Flux2Transformer2DModel, *inputs: jax.Array) -> jax.Array:
    sample, sigma, text = inputs
    return model(sample, sigma, model.read_text(text))


def test_each_part_and_the_whole_are_diffusers(theirs: TorchFlux2) -> None:
    """Two texts of a sample are two samples; the grid is not a square."""
    ours, by = ported(theirs), torch_rotation(theirs, TEXT, HEIGHT, WIDTH)
    temb, text, image, heads = map(torch.tensor, (TEMB, *STREAMS, HEADS))
    with torch.no_grad():
        mod_text, mod_image = theirs.double_stream_modulation_txt(temb), theirs.double_stream_modulation_img(temb)
        mod = theirs.single_stream_modulation(temb)
        expected = {
            "timestep": theirs.time_guidance_embed(torch.tensor(SIGMA) * 1000, None),
            "modulation": torch.cat([mod_text, mod_image, mod], 1)[:, None],
            "rotation": torch.stack(torch_rotation(theirs, 512, 9, 68)),
            "rotated": apply_rotary_emb(heads, by, sequence_dim=1),
            "double": torch.cat(theirs.transformer_blocks[0](image, text, mod_image, mod_text, by), 1),
            "single": theirs.single_transformer_blocks[1](image, text, mod, by),
            "norm_out": theirs.norm_out(image, temb),
        }

    @nnx.jit
    def parts(model: Flux2Transformer2DModel, sigma: jax.Array, temb: jax.Array, *streams: jax.Array) -> dict[str, Any]:
        by = rotation(TEXT, HEIGHT, WIDTH, model.axes, model.theta)
        mods = [model.double_stream_modulation_txt(temb), model.double_stream_modulation_img(temb)]
        mod, both = model.single_stream_modulation(temb), jnp.concatenate(streams, 1)
        return {
            "timestep": model.time_guidance_embed(sigma, jnp.float32),
            "modulation": jnp.concatenate([*mods, mod], -1),
            "rotation": jnp.stack(rotation(512, 9, 68, model.axes, model.theta)),
            "rotated": rotated(jnp.asarray(HEADS), by),
            "double": jnp.concatenate(model.transformer_blocks[0](streams, tuple(mods), by), 1),
            "single": model.single_transformer_blocks[1](both, mod, by),
            "norm_out": model.norm_out(streams[1], temb),
        }

    found = parts(ours, SIGMA, TEMB, *STREAMS)
    errors = {name: deviations(found[name], value) for name, value in expected.items()}
    errors["whole"] = deviations(predict(ours, SAMPLE, SIGMA, CONTEXT), predicted(theirs))
    assert max(errors.values()) <= TOLERANCE, errors


def test_gradients_of_the_blocks_are_pytorchs(theirs: TorchFlux2) -> None:
    """With respect to all weights and inputs."""
    given = [RNG.standard_normal((2, 1, size), np.float32) for size in (192, 192, 96)]  # modulation of each stream
    inputs = [torch.tensor(x).requires_grad_() for x in (*STREAMS, *given)]
    by = torch_rotation(theirs, TEXT, HEIGHT, WIDTH)
    double, single = theirs.transformer_blocks[0], theirs.single_transformer_blocks[0]
    text, image, *mods = inputs
    both = torch.cat(double(image, text, mods[1][:, 0], mods[0][:, 0], by), 1)
    out = single(both, None, mods[2][:, 0], by)
    weights = {f"{name}.{key}": value for name, block in (("double", double), ("single", single))
               for key, value in block.named_parameters()}  # fmt: skip
    expected = torch.autograd.grad(out, [*inputs, *weights.values()], torch.tensor(np.concatenate(AROUND, 1)))

    class Blocks(nnx.Module):
        def __init__(self, model: Flux2Transformer2DModel) -> None:
            self.double, self.single = model.transformer_blocks[0], model.single_transformer_blocks[0]

    graph, state = nnx.split(Blocks(ported(theirs)))

    @jax.jit
    def gradients(state: Any, inputs: list[jax.Array]) -> Any:
        def run(state: Any, inputs: list[jax.Array]) -> jax.Array:
            blocks, (text, image, *mods) = nnx.merge(graph, state), inputs
            by = rotation(TEXT, HEIGHT, WIDTH, (4, 4, 4, 4), 2000.0)
            both = jnp.concatenate(blocks.double((text, image), (mods[0], mods[1]), by), 1)
            return (blocks.single(both, mods[2], by) * np.concatenate(AROUND, 1)).sum()

        return jax.grad(run, (0, 1))(state, inputs)

    of_weights, of_inputs = gradients(state, [jnp.asarray(x.detach().numpy()) for x in inputs])
    found = to_torch(nnx.merge(graph, of_weights))
    assert found.keys() == weights.keys() and len(found) == 20
    errors = map(deviations, [*of_inputs, *(found[key] for key in weights)], expected)
    assert max(errors) <= TOLERANCE


def fill(model: nnx.Module) -> None:
    """A LoRA that does something."""
    rng = np.random.default_rng(1)
    for layer in lora_layers(model).values():
        layer.lora_B[...] = jnp.asarray(0.1 * rng.standard_normal(layer.lora_B.shape), jnp.float32)


OF_ATTENTION = r"\.(to_[qkv]|to_out|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)"


def test_lora_is_diffusers_and_a_mesh_with_checkpoints_computes_what_one_device_does() -> None:
    theirs = randomise(TorchFlux2(**CONFIG | {"num_single_layers": 1}))
    ours, before = ported(theirs), predicted(theirs)
    names = {key.removesuffix(".weight") for key in to_torch(ours)}
    add_lora(ours, 4, 8.0, nnx.Rngs(0), ("attention", "feed_forward"))
    wanted = {name for name in names if re.search(rf"{OF_ATTENTION}$|\.ff(_context)?\.linear_(in|out)$", name)}
    assert lora_layers(ours).keys() == wanted and len(wanted) == 8 + 4 + 2
    fill(ours)
    theirs.load_lora_adapter({k: torch.tensor(x) for k, x in to_peft(ours, "transformer").items()}, "transformer")
    expected = predicted(theirs)
    assert deviations(expected.numpy(), before) > 0.01
    graph, lora, frozen = nnx.split(ours, nnx.LoRAParam, ...)

    def on(mesh: jax.sharding.Mesh | None) -> Any:
        """A mesh's prediction, and gradient of LoRA."""

        def loss(lora: Any, frozen: Any, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graph, lora, frozen)
            if mesh is not None:
                model.checkpoint("blocks")
                set_sharding(model, heads_sharding(mesh))
            found = model(*inputs[:2], model.read_text(inputs[2]))
            return jnp.square(found).mean(), found

        return jax.jit(jax.grad(loss, has_aux=True))

    inputs, mesh = [jnp.asarray(x) for x in (SAMPLE, SIGMA, CONTEXT)], tiny.mesh(2, 2, 2)
    on_one = on(None)
    gradient, found = on_one(lora, frozen, *inputs)
    assert deviations(found, expected) <= TOLERANCE
    held = [place(state, tree_shardings(state, mesh)) for state in (lora, frozen)]
    assert held[1]["transformer_blocks"][0]["attn"]["to_q"]["kernel"][...].addressable_data(0).shape == (16, 16)
    of_mesh, on_mesh = on(mesh)(*held, *(place(x, batch_sharding(mesh)) for x in inputs))
    assert_close(on_mesh, found, NETWORK)
    for one, other in zip(jax.tree.leaves(of_mesh), jax.tree.leaves(gradient), strict=True):
        assert_close(one, other, GRADIENT)
    merge_lora(ours)
    assert_close(on_one(*nnx.split(ours, nnx.LoRAParam, ...)[1:], *inputs)[1], found, NETWORK)


def test_weights_go_there_and_back_bit_for_bit_and_bfloat16_is_near(theirs: TorchFlux2) -> None:
    """Also near is what σ becomes, which bfloat16 itself would move by up to two timesteps."""
    weights, half, whole = numpy_weights(theirs), ported(theirs, jnp.bfloat16), ported(theirs)
    back = to_torch(whole)
    assert back.keys() == weights.keys()
    assert all(back[key].shape == x.shape and np.array_equal(back[key], x) for key, x in weights.items())
    found, expected = predict(half, SAMPLE, SIGMA, CONTEXT), predicted(theirs)
    assert found.dtype == jnp.float32 and TOLERANCE < deviations(found, expected) < 0.1
    sigma = jnp.asarray([0.701, 0.9987])
    near, right = (m.time_guidance_embed(sigma, m.dtype).astype(jnp.float32) for m in (half, whole))
    assert_close(near, right, 0.02)
    moved = whole.time_guidance_embed(sigma.astype(jnp.bfloat16).astype(jnp.float32), jnp.float32)
    assert np.abs(moved - right).max() > 0.1 * np.abs(right).max()


def test_klein_has_diffusers_names_and_shapes_and_a_mesh_divides_its_weights() -> None:
    model = abstract(Flux2Transformer2DModel, KLEIN)
    with torch.device("meta"):
        theirs = TorchFlux2(**KLEIN)
    assert shapes(model) == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    leaves = {".".join(map(str, path)): leaf.shape for path, leaf in parameters(model).items()}
    assert sum(map(math.prod, leaves.values())) == 3_875_544_576
    for sizes, most in (((1, 8, 1), 0.1251), ((1, 4, 2), 0.1355), ((2, 2, 2), 0.271)):
        mesh = tiny.mesh(*sizes)
        placed = {name: jax.NamedSharding(mesh, partition_spec(name, shape, mesh)) for name, shape in leaves.items()}
        held = sum(math.prod(placed[name].shard_shape(shape)) for name, shape in leaves.items())
        assert held / 3_875_544_576 <= most
    each = {kind: sum(sum(shape) for name, shape in leaves.items() if re.search(pattern, name.removesuffix(".kernel")))
            for kind, pattern in MODULES.items()}  # fmt: skip
    assert each == {"attention": 1_167_360, "feed_forward": 1_505_280 - 1_167_360, "convolutions": 0}


def test_checkpointing_is_switched_on_in_every_block() -> None:
    model, counts = abstract(Flux2Transformer2DModel, CONFIG | {"num_layers": 2, "num_single_layers": 9}), {}
    for policy in ("blocks", "everything", "none"):
        model.checkpoint(policy)
        graph, weights = nnx.split(model)
        run = jax.make_jaxpr(lambda weights, *inputs, graph=graph: nnx.merge(graph, weights)(*inputs))
        program = str(run(weights, SAMPLE[:1], SIGMA[:1], CONTEXT[:1, :, :32]))
        counts[policy] = program.count("checkpoint[") + program.count("remat2[")
    assert counts["none"] == 0 and counts["blocks"] == 2 + 9
    assert counts["everything"] == 2 + 9 + 2 + 3  # two groups of one double block each, three of three single blocks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_embeds": True}, "guidance_embeds=True"),
        ({"patch_size": 2}, "patch_size=2"),
        ({"out_channels": 32}, "out_channels=32"),
        (
            {"axes_dims_rope": [8, 8]},
            r"axes_dims_rope=\[8, 8\]: expects 4 even numbers, together attention_head_dim=16",
        ),
        ({"axes_dims_rope": [5, 3, 4, 4]}, "axes_dims_rope"),
    ],
)
def test_a_config_value_that_is_not_implemented_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        abstract(Flux2Transformer2DModel, CONFIG | change)
    without = {key: value for key, value in CONFIG.items() if key != "guidance_embeds"}
    with pytest.raises(UserError, match="guidance_embeds=True"):  # as diffusers reads it
        abstract(Flux2Transformer2DModel, without)
