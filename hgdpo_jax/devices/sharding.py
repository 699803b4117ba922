"""Where each parameter lies on the mesh: one table from names to axes."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

# First match decides. A Linear kernel is [in, out], a Conv kernel [height, width, in, out]; a 1x1 one is split like a
# Linear. Projections into heads or hidden units are split over `tensor` by output, projections back by input, so that
# a block needs one all-reduce. A matrix of several (to_qkv_mlp_proj: queries, keys, values, and two of a feed-forward
# part) is cut as one: each device has its share of the products, and pieces of the result move to where they are read.
# LoRA and all others are on every device whole.
# A pattern is of the last names of a path, each of them whole.
SHARDING_TABLE: dict[str, PartitionSpec] = {
    r"attn\.proj\.kernel": PartitionSpec("tensor", "fsdp"),  # of BLIP; other `proj` go into hidden units or tokens
    r"(to_[qkv]|to_kv|to_[kv]_ip|([a-z]+_)?[qkv]_proj|to_qkv_mlp_proj)\.kernel": PartitionSpec("fsdp", "tensor"),
    r"(proj|gate_proj|up_proj|out_proj|time_emb_proj|fc1|linear_(1|in))\.kernel": PartitionSpec("fsdp", "tensor"),
    r"(to_out\.0|attn\.to_out|to_add_out|o_proj|c_proj)\.kernel": PartitionSpec("tensor", "fsdp"),
    r"(net\.2|down_proj|fc2|linear_(2|out)|proj_in|proj_out)\.kernel": PartitionSpec("tensor", "fsdp"),
    # Of a flow transformer: what reads or makes all channels of a token, which `tensor` does not split.
    r"(\w*modulation\w*|norm_out)\.linear\.kernel": PartitionSpec("fsdp", None),
    r"(x|context)_embedder\.kernel": PartitionSpec(None, "fsdp"),
    r"\w*conv\w*\.kernel": PartitionSpec(None, None, None, "fsdp"),
    r"embedding": PartitionSpec("fsdp", None),
}


def path_name(path: tuple[Any, ...]) -> str:
    """`unet.down_blocks.0.conv.kernel` for a key path of a pytree."""
    return ".".join(
        str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path if str(k) != ".value"
    )


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The table's answer for the last dimensions of a parameter; an axis that does not divide its dimension is left
    out."""
    for pattern, spec in SHARDING_TABLE.items():
        if re.search(rf"(^|\.)({pattern})$", name) and len(spec) <= len(shape):
            other = len(shape) - len(spec)
            axes = zip(spec, shape[other:], strict=True)
            return PartitionSpec(*[None] * other, *(a if a and n % mesh.shape[a] == 0 else None for a, n in axes))
    return PartitionSpec()


def tree_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """A NamedSharding for each array (or ShapeDtypeStruct) of a pytree, decided by its path."""
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, mesh)), tree
    )


def parameter_placer(mesh: Mesh) -> Callable[[str, np.ndarray], jax.Array]:
    """Puts a parameter on the mesh as the table says: each device gets its shard and nothing else."""

    def place(name: str, value: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, partition_spec(name, value.shape, mesh))
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return place


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def row_axes(mesh: Mesh) -> tuple[str, str]:
    """The axes that split the rows of a batch, the outer one first.

    That is `fsdp` where all three axes are above 1. XLA of jaxlib 0.10.2 computes wrong numbers there with the other
    order, by Shardy as without: a product of [(data fsdp), tensor] with [tensor, fsdp] that is to be [(data fsdp),
    tensor] has its rows mixed up if fsdp and tensor are of one size.
    """
    return ("fsdp", "data") if min(mesh.shape.values()) > 1 else ("data", "fsdp")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension is split over data and fsdp, see :func:`row_axes`."""
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh)))


def heads_sharding(mesh: Mesh) -> NamedSharding:
    """Of queries, keys and values [b n heads d]: `tensor` splits the heads, as the table splits what makes them."""
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh), None, "tensor", None))
