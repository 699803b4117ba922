"""The names of Black Forest Labs' own code for FLUX.2, which ComfyUI and kohya's scripts keep: where each tensor of
diffusers is in such files.

Query, key and value of a stream are one tensor there, and the last modulation has its shift before its scale.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from hgdpo_jax.models.ldm import Stored, third_of

SCALE = "double_blocks.0.img_attn.norm.query_norm.scale"
MARK = "double_stream_modulation_img.lin.weight"  # each transformer has it
PREFIXES = ("", "model.diffusion_model.")  # of its keys, in files of it alone
SWAPPED = "final_layer.adaLN_modulation.1"
_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": SWAPPED,
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_FUSED = {f"attn.to_{x}": ("img_attn.qkv", i) for i, x in enumerate("qkv")}
_FUSED |= {f"attn.add_{x}_proj": ("txt_attn.qkv", i) for i, x in enumerate("qkv")}


def _swapped(value: np.ndarray) -> np.ndarray:
    """Scale and shift, each half of the rows, the other way round."""
    return np.concatenate(np.split(value, 2)[::-1])


def module(name: str, config: Mapping[str, Any]) -> Stored:
    """Where a module of diffusers' transformer is; `read` and `write` are of its rows.

    Args:
        name: path of a linear layer or norm.
        config: of the transformer, which changes nothing.
    """
    del config
    match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", name)
    if match is None:
        key = _OUTSIDE[name]
        return Stored(key, _swapped, _swapped) if key == SWAPPED else Stored(key)
    is_single, number, inside = match.groups()
    if is_single:
        return Stored(f"single_blocks.{number}.{_SINGLE[inside]}")
    if inside in _FUSED:
        fused, third = _FUSED[inside]
        return third_of(f"double_blocks.{number}.{fused}", third)
    return Stored(f"double_blocks.{number}.{_DOUBLE[inside]}")


def saved_part(key: str, config: Mapping[str, Any]) -> Stored:
    """The same in files that ComfyUI saved, which call the scales of norms weights."""
    where = module(key.removesuffix(".weight"), config)
    return where._replace(key=f"{where.key}.weight")


def transformer_part(key: str, config: Mapping[str, Any]) -> Stored:
    """Where a parameter of diffusers' transformer is, without prefix."""
    where = module(key.removesuffix(".weight"), config)
    return where._replace(key=f"{where.key}.{'scale' if where.key.endswith('_norm') else 'weight'}")
