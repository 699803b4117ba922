"""Keys and shapes of a Stable Diffusion single file in its original layout, built up as the original code builds it.

Nothing here knows diffusers' names: what belongs where is left to diffusers' own conversion, and compared with ours.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _conv(name: str, inputs: int, outputs: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, size, size), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _res_block(name: str, inputs: int, outputs: int, time: int) -> Shapes:
    shapes = _norm(f"{name}.in_layers.0", inputs) | _conv(f"{name}.in_layers.2", inputs, outputs)
    shapes |= _linear(f"{name}.emb_layers.1", time, outputs)
    shapes |= _norm(f"{name}.out_layers.0", outputs) | _conv(f"{name}.out_layers.3", outputs, outputs)
    return shapes | (_conv(f"{name}.skip_connection", inputs, outputs, 1) if inputs != outputs else {})


def _spatial_transformer(name: str, width: int, context: int, depth: int, linear: bool) -> Shapes:
    shapes = _norm(f"{name}.norm", width)
    for end in ("proj_in", "proj_out"):
        shapes |= _linear(f"{name}.{end}", width, width) if linear else _conv(f"{name}.{end}", width, width, 1)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attention, inputs in (("attn1", width), ("attn2", context)):
            shapes |= _linear(f"{block}.{attention}.to_q", width, width, bias=False)
            shapes |= _linear(f"{block}.{attention}.to_k", inputs, width, bias=False)
            shapes |= _linear(f"{block}.{attention}.to_v", inputs, width, bias=False)
            shapes |= _linear(f"{block}.{attention}.to_out.0", width, width)
        shapes |= _linear(f"{block}.ff.net.0.proj", width, 8 * width) | _linear(f"{block}.ff.net.2", 4 * width, width)
        for norm in ("norm1", "norm2", "norm3"):
            shapes |= _norm(f"{block}.{norm}", width)
    return shapes


def unet(config: Mapping[str, Any]) -> Shapes:
    """The UNet, of the widths, depths and attention levels of a diffusers config."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    time, context = 4 * widths[0], config["cross_attention_dim"]
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    depths = config.get("transformer_layers_per_block", [1] * len(widths))
    linear = config.get("use_linear_projection", False)
    shapes = _linear("time_embed.0", widths[0], time) | _linear("time_embed.2", time, time)
    if "projection_class_embeddings_input_dim" in config:
        inputs = config["projection_class_embeddings_input_dim"]
        shapes |= _linear("label_emb.0.0", inputs, time) | _linear("label_emb.0.2", time, time)
    shapes |= _conv("input_blocks.0.0", config["in_channels"], widths[0])
    number, width, skips = 1, widths[0], [widths[0]]
    for level, out in enumerate(widths):
        for _ in range(layers):
            shapes |= _res_block(f"input_blocks.{number}.0", width, out, time)
            if attends[level]:
                shapes |= _spatial_transformer(f"input_blocks.{number}.1", out, context, depths[level], linear)
            number, width = number + 1, out
            skips.append(width)
        if level < len(widths) - 1:
            shapes |= _conv(f"input_blocks.{number}.0.op", width, width)
            number += 1
            skips.append(width)
    shapes |= _res_block("middle_block.0", width, width, time) | _res_block("middle_block.2", width, width, time)
    shapes |= _spatial_transformer("middle_block.1", width, context, depths[-1], linear)
    number = 0
    for level in reversed(range(len(widths))):
        for i in range(layers + 1):
            name, out = f"output_blocks.{number}", widths[level]
            shapes |= _res_block(f"{name}.0", width + skips.pop(), out, time)
            width, place = out, 1
            if attends[level]:
                shapes |= _spatial_transformer(f"{name}.1", out, context, depths[level], linear)
                place = 2
            if level and i == layers:
                shapes |= _conv(f"{name}.{place}.conv", out, out)
            number += 1
    return shapes | _norm("out.0", width) | _conv("out.2", width, config["out_channels"])


def _vae_res_block(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", inputs) | _conv(f"{name}.conv1", inputs, outputs)
    shapes |= _norm(f"{name}.norm2", outputs) | _conv(f"{name}.conv2", outputs, outputs)
    return shapes | (_conv(f"{name}.nin_shortcut", inputs, outputs, 1) if inputs != outputs else {})


def _vae_middle(name: str, width: int) -> Shapes:
    shapes = _vae_res_block(f"{name}.block_1", width, width) | _vae_res_block(f"{name}.block_2", width, width)
    shapes |= _norm(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.attn_1.{part}", width, width, 1)
    return shapes


def vae(config: Mapping[str, Any]) -> Shapes:
    """The autoencoder."""
    widths, layers, latent = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    shapes, width = _conv("encoder.conv_in", 3, widths[0]), widths[0]
    for level, out in enumerate(widths):
        for i in range(layers):
            shapes |= _vae_res_block(f"encoder.down.{level}.block.{i}", width, out)
            width = out
        if level < len(widths) - 1:
            shapes |= _conv(f"encoder.down.{level}.downsample.conv", width, width)
    shapes |= _vae_middle("encoder.mid", width)
    shapes |= _norm("encoder.norm_out", width) | _conv("encoder.conv_out", width, 2 * latent)
    shapes |= _conv("decoder.conv_in", latent, width) | _vae_middle("decoder.mid", width)
    for level in reversed(range(len(widths))):
        for i in range(layers + 1):
            shapes |= _vae_res_block(f"decoder.up.{level}.block.{i}", width, widths[level])
            width = widths[level]
        if level:
            shapes |= _conv(f"decoder.up.{level}.upsample.conv", width, width)
    shapes |= _norm("decoder.norm_out", width) | _conv("decoder.conv_out", width, 3)
    return shapes | _conv("quant_conv", 2 * latent, 2 * latent, 1) | _conv("post_quant_conv", latent, latent, 1)


def clip(config: Mapping[str, Any]) -> Shapes:
    """CLIP's text tower as transformers named it when these files were written."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    shapes = {"embeddings.token_embedding.weight": (config["vocab_size"], width)}
    shapes["embeddings.position_embedding.weight"] = (77, width)
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{part}", width, width)
        shapes |= _linear(f"{layer}.mlp.fc1", width, hidden) | _linear(f"{layer}.mlp.fc2", hidden, width)
        shapes |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
    shapes |= _norm("final_layer_norm", width)
    return {f"text_model.{key}": shape for key, shape in shapes.items()}


def open_clip(config: Mapping[str, Any]) -> Shapes:
    """OpenCLIP's text tower."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {"token_embedding.weight": (config["vocab_size"], width), "positional_embedding": (77, width)}
    for i in range(config["num_hidden_layers"]):
        block = f"transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{block}.attn.out_proj", width, width)
        shapes |= _linear(f"{block}.mlp.c_fc", width, hidden) | _linear(f"{block}.mlp.c_proj", hidden, width)
        shapes |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
    shapes |= _norm("ln_final", width)
    return shapes | {"text_projection": (width, config["projection_dim"]), "logit_scale": ()}


def single_file(configs: Mapping[str, Mapping[str, Any]], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A whole checkpoint of random weights, as people share it."""
    xl = "text_encoder_2" in configs
    parts = {"model.diffusion_model.": unet(configs["unet"]), "first_stage_model.": vae(configs["vae"])}
    if xl:
        parts["conditioner.embedders.0.transformer."] = clip(configs["text_encoder"])
        parts["conditioner.embedders.1.model."] = open_clip(configs["text_encoder_2"])
    else:
        parts["cond_stage_model.transformer."] = clip(configs["text_encoder"])
    rng = np.random.default_rng(0)
    weights = {
        prefix + key: np.asarray(0.05 * rng.standard_normal(shape, np.float32), dtype)
        for prefix, shapes in parts.items()
        for key, shape in shapes.items()
    }
    text = "conditioner.embedders.0" if xl else "cond_stage_model"
    positions = np.arange(77, dtype=np.int64)[None]
    return weights | {f"{text}.transformer.text_model.embeddings.position_ids": positions}
