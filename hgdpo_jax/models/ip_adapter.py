"""IP-Adapter (Ye et al. 2023): image prompts by attention of its own beside that to the text, and its file format.

Three kinds: `ip_adapter` reads CLIP's projected image embedding, `ip_adapter_plus` the penultimate hidden states of
CLIP's vision tower, `face_id` the embedding of a face recogniser. Module names are the keys of the published files.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hgdpo_jax.models.attend import xla
from hgdpo_jax.models.attention import Memory, Pair, Passthrough, as_pair
from hgdpo_jax.models.clip import CLIPVisionModelWithProjection
from hgdpo_jax.models.convert import Place, abstract, from_torch, on_default_device, to_torch
from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.model_config import Json, ModelConfig, read_config
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.models.weights import Weights, open_folder, write_weights
from hgdpo_jax.run.errors import UserError

_HEAD_WIDTH = 64  # of the Resampler; no file tells it, all have it
_LARGEST_RESAMPLER = 1280  # SDXL's is narrower than its text


class ImageProjection(nnx.Module):
    """`ip_adapter`: each embedding to a few tokens by one linear layer."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        width = config["cross_attention_dim"]
        self.proj = make.linear(config["features"], config["tokens"] * width)
        self.norm = make.layer_norm(width)

    def __call__(self, features: Float[Array, "b m f"]) -> Float[Array, "b t e"]:
        """t is m times the config's tokens."""
        return self.norm(self.proj(features).reshape(features.shape[0], -1, self.norm.num_features))


class FaceProjection(nnx.Module):
    """`face_id`: each embedding to a few tokens by a hidden layer of twice its width."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        inputs, width = config["features"], config["cross_attention_dim"]
        hidden = make.linear(inputs, 2 * inputs)
        self.proj = nnx.List([hidden, Passthrough(), make.linear(2 * inputs, config["tokens"] * width)])
        self.norm = make.layer_norm(width)

    def __call__(self, features: Float[Array, "b m f"]) -> Float[Array, "b t e"]:
        """t is m times the config's tokens."""
        tokens = self.proj[2](jax.nn.gelu(self.proj[0](features), approximate=False))
        return self.norm(tokens.reshape(features.shape[0], -1, self.norm.num_features))


class PerceiverAttention(nnx.Module):
    """Attention of latents over the image's tokens and the latents themselves."""

    def __init__(self, width: int, heads: int, make: Layers) -> None:
        inner = heads * _HEAD_WIDTH
        self.norm1 = make.layer_norm(width)
        self.norm2 = make.layer_norm(width)
        self.to_q = make.linear(width, inner, bias=False)
        self.to_kv = make.linear(width, 2 * inner, bias=False)
        self.to_out = make.linear(inner, width, bias=False)

    def __call__(self, x: Float[Array, "b m d"], latents: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """What is added to the latents."""
        latents = self.norm2(latents)
        context = jnp.concatenate([self.norm1(x), latents], axis=1)
        projected = (self.to_q(latents), *jnp.split(self.to_kv(context), 2, axis=-1))
        q, k, v = (part.reshape(*part.shape[:2], -1, _HEAD_WIDTH) for part in projected)
        return self.to_out(xla(q, k, v).reshape(*latents.shape[:2], -1))


class Resampler(nnx.Module):
    """`ip_adapter_plus`: learned latents that attend to the image's tokens layer after layer."""

    def __init__(self, config: Mapping[str, Any], make: Layers) -> None:
        width = config["width"]
        self.latents = make.normal((1, config["tokens"], width), width**-0.5)
        self.proj_in = make.linear(config["features"], width)
        self.proj_out = make.linear(width, config["cross_attention_dim"])
        self.norm_out = make.layer_norm(config["cross_attention_dim"])

        def layer() -> nnx.List:
            attention = PerceiverAttention(width, config["heads"], make)
            wide, back = make.linear(width, 4 * width, bias=False), make.linear(4 * width, width, bias=False)
            return nnx.List([attention, nnx.List([make.layer_norm(width), wide, Passthrough(), back])])

        self.layers = nnx.List([layer() for _ in range(config["depth"])])

    def __call__(self, features: Float[Array, "b m f"]) -> Float[Array, "b t e"]:
        """t is the config's tokens, whatever m is."""
        x = self.proj_in(features)
        latents = jnp.broadcast_to(self.latents[...].astype(x.dtype), (x.shape[0], *self.latents.shape[1:]))
        for attention, (norm, wide, _, back) in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + back(jax.nn.gelu(wide(norm(latents)), approximate=False))
        return self.norm_out(self.proj_out(latents))


_PROJECTIONS = {"ip_adapter": ImageProjection, "ip_adapter_plus": Resampler, "face_id": FaceProjection}
KINDS = tuple(_PROJECTIONS)


class KeysValues(nnx.Module):
    """The keys and values that one cross-attention of the UNet looks up in the image's tokens."""

    def __init__(self, context_width: int, width: int, heads: int, make: Layers) -> None:
        self.heads = heads
        self.to_k_ip = make.linear(context_width, width, bias=False)
        self.to_v_ip = make.linear(context_width, width, bias=False)

    def __call__(self, tokens: Float[Array, "b t e"]) -> Pair:
        both = (self.to_k_ip, self.to_v_ip)
        return as_pair(*(project(tokens).reshape(*tokens.shape[:2], self.heads, -1) for project in both))


class IPAdapter(nnx.Module):
    """Image features → what the UNet's cross-attentions look up in the image.

    Args:
        config: `kind` (one of KINDS); `features`, the width of what it reads; `tokens`, how many it makes;
            `cross_attention_dim`, their width; `cross_attentions`, a list of [name, width, heads] in the order of the
            file; of `ip_adapter_plus` also `width`, `heads` and `depth` of the Resampler.
        rngs: for the initial weights.
        dtype: compute dtype, that of the UNet; parameters are float32.

    Raises:
        UserError: there is no such kind.
    """

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        if config["kind"] not in KINDS:
            raise UserError(f"IP-Adapter kind {config['kind']!r}: expects one of {', '.join(KINDS)}")
        self.config, self.dtype, make = ModelConfig(config), jnp.dtype(dtype), Layers(rngs, dtype)
        self.image_proj = _PROJECTIONS[config["kind"]](config, make)
        layers: list[nnx.Module] = []
        for _, width, heads in config["cross_attentions"]:  # the file counts the self-attentions too
            layers += [Passthrough(), KeysValues(config["cross_attention_dim"], width, heads, make)]
        self.ip_adapter = nnx.List(layers)

    def by_name(self) -> dict[str, KeysValues]:
        """Name of a transformer block in the UNet → the keys and values of its cross-attention."""
        names = [name for name, _, _ in self.config["cross_attentions"]]
        return dict(zip(names, self.ip_adapter[1::2], strict=True))

    def __call__(self, features: Float[Array, "b m f"]) -> Memory:
        """One pair for each cross-attention, to be put beside the text's by :func:`join`.

        Args:
            features: those of :func:`image_features`, or m identity embeddings for `face_id`.

        Raises:
            UserError: features of another width.
        """
        if features.shape[-1] != self.config["features"]:
            raise UserError(
                f"IP-Adapter: reads image features of width {self.config['features']}, not {features.shape[-1]}; "
                "take the image encoder that it was trained with"
            )
        tokens = self.image_proj(features.astype(self.dtype))
        return {name: [layer(tokens)] for name, layer in self.by_name().items()}


def join(text: Memory, image: Memory, scale: float | Float[Array, ""]) -> Memory:
    """What the UNet is called with: attention to the text plus `scale` times attention to the image."""
    return {name: [*pairs, *((k, (scale * v).astype(v.dtype)) for k, v in image[name])] for name, pairs in text.items()}


def load_image_encoder(folder: str | Path) -> CLIPVisionModelWithProjection:
    """The image encoder of a CLIPVisionModelWithProjection's folder or of a CLIPModel's, in float32.

    Raises:
        UserError: it is neither, a file is missing or damaged, or the weights do not fit the config.
    """
    folder = Path(folder)
    model = abstract(CLIPVisionModelWithProjection, image_encoder_config(folder), jnp.float32)
    from_torch(open_folder(folder), model, str(folder))
    return model


def image_encoder_config(folder: Path) -> Json:
    """The config of an image encoder; see :func:`load_image_encoder`."""
    config = read_config(folder)
    if "vision_config" in config:
        projected = {"projection_dim": config.get("projection_dim", 512)}
        config = Json(config.path, {**(config["vision_config"] or {}), **projected})
    if not {"patch_size", "projection_dim"} <= config.keys():
        raise UserError(
            f"{folder}: is not an image encoder; expected a folder of CLIPVisionModelWithProjection or CLIPModel"
        )
    return config


def image_features(
    encoder: CLIPVisionModelWithProjection, kind: str, pixels: Float[Array, "b H W 3"]
) -> Float[Array, "b m f"]:
    """The features, float32, that an adapter of a kind other than `face_id` reads of CLIP-normalised pixels."""
    output = encoder(pixels)
    features = output.hidden_states[-2] if kind == "ip_adapter_plus" else output.pooled[:, None]
    return features.astype(jnp.float32)


def empty(
    kind: str, features: Float[Array, "b m f"], encoder: CLIPVisionModelWithProjection | None = None
) -> Float[Array, "b m f"]:
    """The features of no image: the unconditional half of guidance reads them, and training where it drops an image.

    They are zeros; for `ip_adapter_plus` they are those of an image that is zero once normalised.
    """
    if kind != "ip_adapter_plus":
        return jnp.zeros_like(features)
    if encoder is None:
        raise ValueError("ip_adapter_plus reads images with an encoder")
    size = encoder.config["image_size"]
    return jnp.broadcast_to(image_features(encoder, kind, jnp.zeros((1, size, size, 3))), features.shape)


def default_config(unet: UNet2DConditionModel, kind: str, features: int) -> dict[str, Any]:
    """An adapter's config in the sizes of the published ones.

    Args:
        unet: the UNet that it is for; only its shapes matter.
        kind: one of KINDS.
        features: width of what it reads.

    Raises:
        UserError: the UNet's cross-attentions read contexts of several widths.
    """
    attentions, context_width = _cross_attentions(unet)
    config = {
        "kind": kind,
        "features": features,
        "tokens": 16 if kind == "ip_adapter_plus" else 4,
        "cross_attention_dim": context_width,
        "cross_attentions": attentions,
    }
    if kind == "ip_adapter_plus":
        width = min(context_width, _LARGEST_RESAMPLER)
        config |= {"width": width, "heads": max(1, width // _HEAD_WIDTH), "depth": 4}
    return config


def fresh(unet: UNet2DConditionModel, kind: str, features: int, rngs: nnx.Rngs) -> IPAdapter:
    """An adapter to train, with :func:`default_config`, float32 parameters and the UNet's compute dtype.

    The projection is random; keys and values start as copies of the text's.

    Raises:
        UserError: there is no such kind, or the UNet's cross-attentions read contexts of several widths.
    """
    config = default_config(unet, kind, features)
    adapter = abstract(IPAdapter, config, unet.dtype)
    adapter.image_proj = _PROJECTIONS[kind](config, Layers(rngs, unet.dtype))
    blocks = unet.transformer_blocks()
    for name, layer in adapter.by_name().items():  # copies: a training step may give its buffers away
        layer.to_k_ip.kernel.set_value(jnp.array(blocks[name].attn2.to_k.kernel[...], jnp.float32))
        layer.to_v_ip.kernel.set_value(jnp.array(blocks[name].attn2.to_v.kernel[...], jnp.float32))
    return adapter


def load(path: str | Path, unet: UNet2DConditionModel, place: Place = on_default_device) -> IPAdapter:
    """An adapter from a .safetensors file in the published layout, which tells its kind and sizes. It computes in the
    UNet's dtype; its parameters are float32.

    Args:
        path: of the file.
        unet: the UNet that it is used with; only its shapes matter.
        place: puts a parameter on its devices.

    Raises:
        UserError: the file is missing, damaged, a pickle, no IP-Adapter, one of a kind that is not implemented, or one
            for another UNet.
    """
    weights = Weights(Path(path))
    model = abstract(IPAdapter, _recognise(weights, str(path), unet), unet.dtype)
    from_torch(weights, model, str(path), place=place)
    return model


def save(adapter: IPAdapter, path: str | Path) -> None:
    """Writes a .safetensors file in float32, with the keys of the published ones: diffusers' loader reads it."""
    write_weights(Path(path), to_torch(adapter), np.float32)


def _cross_attentions(unet: UNet2DConditionModel) -> tuple[list[list[Any]], int]:
    """[name, width, heads] of each cross-attention, in the file's order (the middle block comes last); and the width of
    the text."""

    def order(name: str) -> tuple[int, list[int]]:
        parts = name.split(".")
        return ("down_blocks", "up_blocks", "mid_block").index(parts[0]), [int(p) for p in parts if p.isdigit()]

    blocks = unet.transformer_blocks()
    layers = {name: blocks[name].attn2 for name in sorted(blocks, key=order)}
    widths = {layer.to_k.in_features for layer in layers.values()}
    if len(widths) != 1:
        raise UserError(f"IP-Adapter: needs cross-attentions that read one width, this UNet's read {sorted(widths)}")
    return [[name, layer.to_k.out_features, layer.heads] for name, layer in layers.items()], widths.pop()


def _recognise(weights: Weights, source: str, unet: UNet2DConditionModel) -> dict[str, Any]:
    """The config of an adapter from the keys and shapes of its file."""

    def size(key: str, axis: int = 0) -> int:
        if key not in weights:
            raise UserError(f"{source}: weight {key} is missing; the file is not whole")
        if not (found := weights.size(key, axis)):
            raise UserError(f"{source}: weight {key} is empty; the file is broken")
        return found

    loras = sorted(key for key in weights if "_lora." in key)
    if loras:
        raise UserError(
            f"{source}: has a LoRA inside ({loras[0]}, {len(loras)} weights in all), which is not supported; "
            "write the file without them and merge that LoRA into the checkpoint"
        )
    if "image_proj.proj.3.weight" in weights or any(key.startswith("image_proj.perceiver") for key in weights):
        raise UserError(f"{source}: is a Full-Face or FaceID-Plus adapter, not supported; only {', '.join(KINDS)} are")
    config: dict[str, Any] = {}
    if "image_proj.latents" in weights:
        inner = size("image_proj.layers.0.0.to_q.weight")
        config |= {"kind": "ip_adapter_plus", "features": size("image_proj.proj_in.weight", 1)}
        config |= {"tokens": size("image_proj.latents", 1), "width": size("image_proj.latents", 2)}
        config |= {"heads": inner // _HEAD_WIDTH, "cross_attention_dim": size("image_proj.norm_out.weight")}
        config["depth"] = sum(f"image_proj.layers.{i}.0.to_q.weight" in weights for i in range(len(weights)))
    elif "image_proj.proj.weight" in weights or "image_proj.proj.0.weight" in weights:
        plain = "image_proj.proj.weight" in weights
        first, last = ("image_proj.proj.weight",) * 2 if plain else [f"image_proj.proj.{i}.weight" for i in (0, 2)]
        width = size("image_proj.norm.weight")
        config |= {"kind": "ip_adapter" if plain else "face_id", "features": size(first, 1)}
        config |= {"tokens": size(last) // width, "cross_attention_dim": width}
    else:
        raise UserError(f"{source}: is not an IP-Adapter; expected weights named image_proj.… and ip_adapter.…")
    attentions, context_width = _cross_attentions(unet)
    numbers = sorted(
        int(key.split(".")[1]) for key in weights if re.fullmatch(r"ip_adapter\.\d+\.to_k_ip\.weight", key)
    )
    widths = [weights.size(f"ip_adapter.{i}.to_k_ip.weight") for i in numbers]
    expected = [width for _, width, _ in attentions]
    if (widths, config["cross_attention_dim"]) != (expected, context_width):
        theirs, ours = (
            f"{len(x)} cross-attentions ({', '.join(map(str, sorted(set(x))))} wide)" for x in (widths, expected)
        )
        raise UserError(
            f"{source}: is for another UNet: it has {theirs} for tokens of width {config['cross_attention_dim']}, "
            f"this UNet has {ours} for text of width {context_width}"
        )
    return config | {"cross_attentions": attentions}
