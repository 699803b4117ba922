"""Mesh, sharding table and named random streams."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from hgdpo_jax.devices.mesh import make_mesh, require_divisible
from hgdpo_jax.devices.random import stream_key, stream_keys
from hgdpo_jax.devices.sharding import batch_sharding, heads_sharding, partition_spec, row_axes, tree_shardings
from hgdpo_jax.devices.transfer import local_rows, place, to_devices
from hgdpo_jax.devices.xla import settle_dtype, xla_flags
from hgdpo_jax.models.attention import set_sharding
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.run.errors import UserError
from tests import tiny


def mesh(data: int = -1, fsdp: int = 2, tensor: int = 2) -> jax.sharding.Mesh:
    return make_mesh(ConfigDict(dict(data=data, fsdp=fsdp, tensor=tensor)))


def test_one_axis_takes_the_devices_that_are_left() -> None:
    assert dict(mesh().shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_a_mesh_that_does_not_fit_the_devices_is_refused() -> None:
    with pytest.raises(UserError, match="3 x 2 x 2 does not make the 8 devices"):
        mesh(data=3)


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.kernel", (8, 8), P("fsdp", "tensor")),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.kernel", (8, 8), P("tensor", "fsdp")),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A", (8, 4), P()),
        ("unet.down_blocks.0.resnets.0.conv1.kernel", (3, 3, 8, 8), P(None, None, None, "fsdp")),
        ("unet.down_blocks.0.attentions.0.proj_in.kernel", (1, 1, 8, 8), P(None, None, "tensor", "fsdp")),
        ("unet.down_blocks.0.resnets.0.norm1.scale", (8,), P()),
        ("text.text_encoder.layers.0.self_attn.k_proj.kernel", (8, 4), P("fsdp", "tensor")),
        ("text.text_encoder.layers.0.self_attn.o_proj.kernel", (8, 8), P("tensor", "fsdp")),
        ("text.text_encoder.layers.0.mlp.gate_proj.kernel", (8, 8), P("fsdp", "tensor")),
        ("text.text_encoder.layers.0.mlp.down_proj.kernel", (8, 8), P("tensor", "fsdp")),
        ("text.text_encoder.layers.0.self_attn.q_norm.scale", (8,), P()),
        ("text.text_encoder.layers.0.self_attn.out_proj.kernel", (8, 8), P("fsdp", "tensor")),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.kernel", (8, 8), P("fsdp", "tensor")),
        ("unet.down_blocks.0.resnets.0.time_emb_proj.kernel", (8, 8), P("fsdp", "tensor")),
        ("unet.adapter.image_proj.proj.kernel", (8, 8), P("fsdp", "tensor")),
        ("unet.adapter.image_proj.proj_in.kernel", (8, 8), P("tensor", "fsdp")),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k_ip.kernel", (8, 8), P("fsdp", "tensor")),
        ("scorer.visual_encoder.blocks.0.attn.proj.kernel", (8, 8), P("tensor", "fsdp")),
        ("scorer.attnpool.c_proj.kernel", (8, 8), P("tensor", "fsdp")),
        ("unet.some_to_q.kernel", (8, 8), P()),  # a pattern is of whole names
        ("text.text_encoder.embed_tokens.embedding", (8, 8), P("fsdp", None)),
        ("unet.conv_out.kernel", (3, 3, 8, 3), P(None, None, None, None)),
        ("unet.transformer_blocks.0.attn.add_q_proj.kernel", (8, 8), P("fsdp", "tensor")),
        ("unet.transformer_blocks.0.attn.to_add_out.kernel", (8, 8), P("tensor", "fsdp")),
        ("unet.transformer_blocks.0.ff_context.linear_in.kernel", (8, 48), P("fsdp", "tensor")),
        ("unet.transformer_blocks.0.ff.linear_out.kernel", (24, 8), P("tensor", "fsdp")),
        ("unet.transformer_blocks.0.attn.norm_added_q.scale", (4,), P()),
        ("unet.single_transformer_blocks.0.attn.to_qkv_mlp_proj.kernel", (8, 72), P("fsdp", "tensor")),
        ("unet.single_transformer_blocks.0.attn.to_out.kernel", (32, 8), P("tensor", "fsdp")),
        ("unet.double_stream_modulation_txt.linear.kernel", (8, 48), P("fsdp", None)),
        ("unet.norm_out.linear.kernel", (8, 16), P("fsdp", None)),
        ("unet.context_embedder.kernel", (24, 8), P(None, "fsdp")),
        ("vae.bn.running_var", (16,), P()),
    ],
)
def test_the_table_decides_by_path_and_leaves_out_what_does_not_divide(name: str, shape: tuple, spec: P) -> None:
    assert partition_spec(name, shape, mesh()) == spec


def test_a_product_over_three_axes_keeps_its_rows_apart() -> None:
    """XLA mixes them up where data splits the rows before fsdp, see :func:`row_axes`."""
    rows = row_axes(mesh())
    across = NamedSharding(mesh(), P(rows, None, "tensor"))
    x, kernel = (
        np.sin(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape) for shape in ((8, 16, 64), (64, 64))
    )
    held = place(x, across), place(kernel, NamedSharding(mesh(), P("tensor", "fsdp")))
    found = jax.jit(jnp.matmul, out_shardings=across)(*held)
    np.testing.assert_allclose(found, x @ kernel, rtol=0, atol=1e-4)


TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
TEXT, PICTURES = TOWER | {"vocab_size": 64, "eos_token_id": 63}, TOWER | {"image_size": 32, "patch_size": 8}
CLIP = {"projection_dim": 64, "text_config": TEXT, "vision_config": PICTURES}
IDS = np.arange(8 * 16, dtype=np.int32).reshape(8, 16) % 64
PIXELS = np.sin(np.arange(8 * 32 * 32 * 3, dtype=np.float32)).reshape(8, 32, 32, 3)


def test_clip_over_three_axes_computes_what_one_device_does() -> None:
    """Output and gradients, at a width that each axis splits."""
    model = tiny.random_model(CLIPModel, CLIP, 0)

    def on(mesh: jax.sharding.Mesh) -> tuple:
        set_sharding(model, heads_sharding(mesh))
        graph, weights = nnx.split(model)
        shardings, rows = tree_shardings(weights, mesh), batch_sharding(mesh)

        def outputs(weights: nnx.State, ids: jax.Array, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
            clip = nnx.merge(graph, weights)
            out = clip.text_embeds(ids) + clip.image_embeds(pixels)
            return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

        both = jax.jit(jax.value_and_grad(outputs, has_aux=True), out_shardings=((None, rows), shardings))
        (_, out), gradients = both(place(weights, shardings), *place((IDS, PIXELS), rows))
        return out, jax.tree.leaves(gradients)

    (out, gradients), (expected, theirs) = on(mesh()), on(tiny.mesh())
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4 * float(jnp.std(expected)))
    largest = max(float(jnp.abs(x).max()) for x in theirs)
    for x, y in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * largest)


def test_optimizer_moments_are_sharded_like_their_parameters() -> None:
    tree = {"mu": {"attn": {"to_q": {"kernel": jnp.zeros((8, 8))}}}, "count": jnp.zeros(())}
    found = tree_shardings(tree, mesh())
    assert found["mu"]["attn"]["to_q"]["kernel"].spec == P("fsdp", "tensor") and found["count"].spec == P()


def test_streams_differ_by_name_and_repeat_by_name() -> None:
    data = [jax.random.key_data(stream_key(0, *names)).tolist() for names in
            [("pool", "a", 1), ("pool", "a", 1), ("pool", "a", 2), ("pool", "b", 1), ("noise", "a", 1)]]  # fmt: skip
    assert data[0] == data[1] and len({tuple(d) for d in data}) == 4
    many = stream_keys(0, "pool", ["a", "a", "b"], [1, 2, 1])
    assert jax.random.key_data(many).tolist() == data[1:4]


def test_intels_avx512_is_not_compiled_for_where_the_cache_would_refuse_it() -> None:
    intel, always = "vendor_id : GenuineIntel\nflags : fpu avx2 avx512f avx512vl", "--xla_gpu_dot_merger_threshold_mb=8"
    assert xla_flags("", intel) == f"{always} --xla_cpu_max_isa=AVX2"
    assert xla_flags("--a=1", intel) == f"--a=1 {always} --xla_cpu_max_isa=AVX2"
    for given, processor in (
        ("--xla_cpu_max_isa=AVX512", intel),  # what the user set wins
        ("--a=1", intel.replace("avx512f avx512vl", "")),
        ("", ""),
    ):
        assert xla_flags(given, processor) == f"{given} {always}".lstrip()
    amd = intel.replace("GenuineIntel", "AuthenticAMD")
    assert xla_flags("", amd) == f"{always} --xla_cpu_prefer_vector_width=512"
    assert xla_flags("--xla_gpu_dot_merger_threshold_mb=1", "") == "--xla_gpu_dot_merger_threshold_mb=1"


KEEPS = """
import resource
import numpy as np
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.devices.processor import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.full(16_000_000, 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
a = faults()
keep_memory(local_mesh())
faults()
print(a, faults())
"""


def test_a_processor_keeps_the_memory_of_temporaries() -> None:
    """Of 128 MB, five times: 31,250 pages of 4 KB or 61 large ones each, and then none."""
    found = subprocess.run([sys.executable, "-c", KEEPS], capture_output=True, text=True, check=True)
    before, after = map(int, found.stdout.split())
    assert before > 200 and after < 0.1 * before


@pytest.mark.parametrize(
    ("asked", "platform", "dtype"),
    [
        ("auto", "gpu", "float16"),
        ("auto", "cuda", "float16"),
        ("auto", "tpu", "bfloat16"),
        ("auto", "cpu", "float32"),
        ("tf32", "gpu", "tf32"),
    ],
)
def test_the_devices_settle_which_dtype_suits_them(asked: str, platform: str, dtype: str) -> None:
    model = ConfigDict({"dtype": asked})
    settle_dtype(model, platform)
    assert model.dtype == dtype


def test_a_batch_that_the_mesh_cannot_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.batch=6: must be a multiple of 4"):
        require_divisible(6, mesh(), "train.batch")


def test_rows_of_a_batch_lie_on_the_devices_that_hold_them() -> None:
    """In one process all rows are here, on whatever mesh; what is put together again is the batch."""
    batch = {"x": np.arange(16.0).reshape(8, 2)}
    for shape in ((8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)):
        found = to_devices(batch, mesh(*shape))["x"]
        assert local_rows(8, mesh(*shape)) == list(range(8))
        np.testing.assert_array_equal(found, batch["x"])
        assert found.sharding == batch_sharding(mesh(*shape))


def test_keys_and_arrays_are_put_where_they_are_told() -> None:
    keys = jax.random.split(jax.random.key(0), 8)
    put = place({"key": keys, "x": np.arange(8)}, batch_sharding(mesh()))
    np.testing.assert_array_equal(jax.random.key_data(put["key"]), jax.random.key_data(keys))
    assert put["x"].sharding == put["key"].sharding == batch_sharding(mesh())
