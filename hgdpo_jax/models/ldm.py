"""Single files in the layout of the original latent-diffusion code (LDM): where each tensor of diffusers is in them.

Stable Diffusion 1.x keeps its text encoder under `cond_stage_model`, XL its two under `conditioner`; the second one is
OpenCLIP's, with query, key and value in one tensor.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from hgdpo_jax.models.weights import LazyWeights, Weights
from hgdpo_jax.run.errors import UserError

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


def _same(value: np.ndarray) -> np.ndarray:
    return value


class Stored(NamedTuple):
    """Where a tensor of diffusers is in a file.

    Attributes:
        key: of the file's tensor.
        read: file's tensor → diffusers'.
        write: diffusers' tensor → file's.
        third: 0, 1 or 2 where the file's tensor holds three of diffusers', one below the other; else None.
    """

    key: str
    read: Callable[[np.ndarray], np.ndarray] = _same
    write: Callable[[np.ndarray], np.ndarray] = _same
    third: int | None = None


def third_of(key: str, number: int) -> Stored:
    """A tensor of diffusers that is one of three in the file's tensor, one below the other."""
    return Stored(key, lambda value: np.split(value, 3)[number], third=number)


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


def unet_part(key: str, config: Mapping[str, Any]) -> Stored:
    """Where a parameter or module of a UNet of diffusers is, without prefix."""
    return Stored(unet_name(key, config))


def vae_part(key: str, config: Mapping[str, Any]) -> Stored:
    """Where a VAE parameter of diffusers is, without prefix."""
    name = vae_name(key, config)
    # Attention is written as 1x1 convolutions there.
    if ".attn_1." in name and name.endswith("weight") and ".norm." not in name:
        return Stored(name, lambda value: value.reshape(value.shape[:2]), lambda value: value[:, :, None, None])
    return Stored(name)


def clip_part(key: str, config: Mapping[str, Any]) -> Stored:
    """Where a parameter or module of a text encoder of transformers is."""
    return Stored(f"text_model.{key}")


def bare(key: str, config: Mapping[str, Any]) -> Stored:
    """Where a parameter or module is that has the same name: SD 1.x's text encoder in files that follow NovelAI's."""
    return Stored(key)


def open_clip_text(key: str, config: Mapping[str, Any]) -> Stored:
    """Where a parameter of transformers' text encoder with projection is in OpenCLIP's names."""
    match = re.match(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", key)
    if match:
        return third_of(f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}", "qkv".index(match[2]))
    name = _apply(_OPEN_CLIP, key)
    return Stored(name, np.transpose, np.transpose) if name == "text_projection" else Stored(name)


Translate = Callable[[str, Mapping[str, Any]], Stored]
VAE_PREFIX = "first_stage_model."
VAE_CONV = "encoder.down.0.block.0.conv1.weight"  # each VAE has it
SD1_PARTS: dict[str, tuple[str, Translate]] = {
    "unet": ("model.diffusion_model.", unet_part),
    "vae": (VAE_PREFIX, vae_part),
    "text_encoder": ("cond_stage_model.transformer.", clip_part),
}
SDXL_PARTS: dict[str, tuple[str, Translate]] = {
    "unet": ("model.diffusion_model.", unet_part),
    "vae": (VAE_PREFIX, vae_part),
    "text_encoder": ("conditioner.embedders.0.transformer.", clip_part),
    "text_encoder_2": ("conditioner.embedders.1.model.", open_clip_text),
}
# Nobody needs these: buffers, the training loss of a VAE, the running mean of its weights, and what CLIP has beside a
# text encoder.
_IGNORED = re.compile(
    r"^(loss|model_ema|vision_model|visual|visual_projection)\.|(^|\.)(position_ids|text_projection(\.weight)?)$"
    r"|^(logit_scale|attn_mask)$"
)


class TranslatedWeights(LazyWeights):
    """One model of a single file under diffusers' keys, read tensor by tensor.

    A tensor under the prefix that no key asks for appears under its own name, so that it is noticed.

    Args:
        weights: the single file.
        prefix: that of the part's keys in the file; empty for a file that holds this part alone.
        translate: diffusers key, config → where it is.
        keys: diffusers keys of the model.
        config: of the model.
    """

    def __init__(
        self, weights: Weights, prefix: str, translate: Translate, keys: Iterable[str], config: Mapping[str, Any]
    ) -> None:
        expected = {key: translate(key, config) for key in keys}
        places = {key: place for key, place in expected.items() if prefix + place.key in weights}
        rest = {key.removeprefix(prefix) for key in weights if key.startswith(prefix)}
        rest -= {place.key for place in places.values()}
        places |= {prefix + key: Stored(key) for key in rest if not _IGNORED.search(key)}
        super().__init__({key: partial(_read, weights, prefix, place) for key, place in places.items()})


def _read(weights: Weights, prefix: str, place: Stored) -> np.ndarray:
    """A tensor of diffusers. Raises UserError where the file's has a shape that it cannot be made of."""
    value = weights[prefix + place.key]
    try:
        return place.read(value)
    except (ValueError, IndexError) as error:
        where = f"{weights.files[0]}: weight {prefix}{place.key}"
        raise UserError(f"{where} is {value.shape}; does not fit the model that it was taken for") from error


def to_single_file(
    models: Mapping[str, Mapping[str, np.ndarray]],
    configs: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, tuple[str, Translate]],
) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint in LDM's layout.

    Args:
        models: part → diffusers key → tensor.
        configs: part → config.
        parts: where each is kept, SD1_PARTS or SDXL_PARTS.
    """
    stored: dict[str, dict[int | None, np.ndarray]] = {}
    for part, (prefix, translate) in parts.items():
        for key, tensor in models[part].items():
            where = translate(key, configs[part])
            stored.setdefault(prefix + where.key, {})[where.third] = where.write(tensor)
    return {
        key: thirds[None] if None in thirds else np.concatenate([thirds[i] for i in range(3)])
        for key, thirds in stored.items()
    }
