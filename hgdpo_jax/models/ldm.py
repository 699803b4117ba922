"""Single files in the layout of the original latent-diffusion code: which of their tensors is which of diffusers'.

Stable Diffusion 1.x keeps its text encoder under `cond_stage_model`, XL its two under `conditioner`; the second of them
is OpenCLIP's, with query, key and value in one tensor. Names go from diffusers to LDM, key by key.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hgdpo_jax.models.weights import Weights

Rules = Sequence[tuple[str, str]]

_RESNET: Rules = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
_UNET: Rules = (
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"),
    (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
)
_VAE: Rules = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
)
_OPEN_CLIP: Rules = (
    (r"^text_model\.embeddings\.token_embedding\.weight$", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"^text_projection\.weight$", "text_projection"),
)


class Stored(NamedTuple):
    """Where a tensor is: its key in the file, and what makes diffusers' tensor of it."""

    key: str
    convert: Callable[[np.ndarray], np.ndarray] = lambda value: value


def unet_name(key: str, config: Mapping[str, Any]) -> str:
    """LDM's name, without prefix, of a UNet parameter or module of diffusers."""
    layers = config.get("layers_per_block", 2) + 1
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(.*)", key)
    if not match:
        return _apply(_RESNET, _apply(_UNET, key)) if "resnets" in key else _apply(_UNET, key)
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    first = block * layers + (side == "down")
    if kind == "downsamplers":
        return f"input_blocks.{first + layers - 1}.0.op{rest.removeprefix('.conv')}"
    if kind == "upsamplers":
        place = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return f"output_blocks.{first + layers - 1}.{place}{rest}"
    blocks = "input_blocks" if side == "down" else "output_blocks"
    if kind == "attentions":
        return f"{blocks}.{first + index}.1{rest}"
    return f"{blocks}.{first + index}.0{_apply(_RESNET, rest)}"


def vae_name(key: str, config: Mapping[str, Any]) -> str:
    """LDM's name, without prefix, of a VAE parameter of diffusers."""
    levels = len(config["block_out_channels"])

    def level(match: re.Match[str]) -> str:
        number = int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])
        return f".{match[1]}.{number}."

    key = re.sub(r"\.(down|up)_blocks\.(\d+)\.", level, key)
    key = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", key) if "mid_block" not in key else key
    key = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", key)
    return _apply(_VAE, key)


def _apply(rules: Rules, key: str) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _unet(key: str, config: Mapping[str, Any]) -> Stored:
    return Stored(unet_name(key, config))


def _vae(key: str, config: Mapping[str, Any]) -> Stored:
    name = vae_name(key, config)
    # Attention is written as 1x1 convolutions there.
    if ".attn_1." in name and name.endswith("weight") and ".norm." not in name:
        return Stored(name, lambda value: value.reshape(value.shape[:2]))
    return Stored(name)


def _clip(key: str, config: Mapping[str, Any]) -> Stored:
    del config
    return Stored(f"text_model.{key}")


def _open_clip(key: str, config: Mapping[str, Any]) -> Stored:
    del config
    match = re.match(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", key)
    if match:
        third = "qkv".index(match[2])
        name = f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"
        return Stored(name, lambda value: np.split(value, 3)[third])
    name = _apply(_OPEN_CLIP, key)
    return Stored(name, np.transpose) if name == "text_projection" else Stored(name)


Translate = Callable[[str, Mapping[str, Any]], Stored]
SD1_PARTS: dict[str, tuple[str, Translate]] = {
    "unet": ("model.diffusion_model.", _unet),
    "vae": ("first_stage_model.", _vae),
    "text_encoder": ("cond_stage_model.transformer.", _clip),
}
SDXL_PARTS: dict[str, tuple[str, Translate]] = {
    "unet": ("model.diffusion_model.", _unet),
    "vae": ("first_stage_model.", _vae),
    "text_encoder": ("conditioner.embedders.0.transformer.", _clip),
    "text_encoder_2": ("conditioner.embedders.1.model.", _open_clip),
}
LONE_VAE: tuple[str, Translate] = ("", _vae)  # a file that holds a VAE alone
# In the files and of no use: buffers, and the training loss of the VAE.
_IGNORED = re.compile(r"(^loss\.|(^|\.)position_ids$|^logit_scale$|^attn_mask$)")


class Part(Mapping[str, np.ndarray]):
    """One model of a single file under diffusers' keys, read tensor by tensor.

    What the file holds under the prefix and no key asks for appears under its own name, so that it is noticed.

    Args:
        weights: the single file.
        prefix: of the part's keys in it; empty for a file that holds this part alone.
        translate: diffusers key, config → where it is.
        keys: diffusers keys of the model.
        config: of the model.
    """

    def __init__(
        self, weights: Weights, prefix: str, translate: Translate, keys: Iterable[str], config: Mapping[str, Any]
    ) -> None:
        self._weights = weights
        wanted = {key: translate(key, config) for key in keys}
        found = {key: Stored(prefix + where.key, where.convert) for key, where in wanted.items()}
        self._where = {key: where for key, where in found.items() if where.key in weights}
        used = {where.key for where in self._where.values()}
        for key in weights:
            if key.startswith(prefix) and key not in used and not _IGNORED.search(key.removeprefix(prefix)):
                self._where[key] = Stored(key)

    def __getitem__(self, key: str) -> np.ndarray:
        where = self._where[key]
        return where.convert(self._weights[where.key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
