"""CLIP from one file in the names of OpenAI's code, which open_clip keeps: the sizes are read off its tensors.

Two kinds of vision towers: a ViT, which becomes transformers' CLIPModel, and a ResNet. How many heads share a width no
tensor tells; it is known of each published network.
"""

import math
from collections.abc import Mapping
from typing import Any

from hgdpo_jax.models.clip import CLIPModel, CLIPTextModelWithProjection
from hgdpo_jax.models.clip_resnet import CLIPResNet
from hgdpo_jax.models.convert import abstract, keys
from hgdpo_jax.models.ldm import Stored, TranslatedWeights, open_clip_text
from hgdpo_jax.models.weights import Weights, under
from hgdpo_jax.run.errors import UserError

_BLOCK = "transformer.resblocks."
_VISION = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
}
# The pooling's positions, which CLIP-IQA leaves out, and the counters of PyTorch's batch normalisation.
_UNUSED = r"^attnpool\.positional_embedding$|\.num_batches_tracked$"


def clip_part(key: str, config: Mapping[str, Any]) -> Stored:
    """Where a parameter of transformers' CLIPModel is in such a file; see :class:`TranslatedWeights`."""
    if key == "visual_projection.weight":
        return open_clip_text("text_projection.weight", config)._replace(key="visual.proj")
    if not key.startswith("vision_model."):
        return open_clip_text(key, config)
    name = key.removeprefix("vision_model.")
    for theirs, ours in _VISION.items():
        if name.startswith(theirs):
            return Stored(f"visual.{ours}{name.removeprefix(theirs)}")
    place = open_clip_text(f"text_model.{name}", config)
    return place._replace(key=f"visual.{place.key}")


def vit(weights: Weights, heads: int) -> tuple[CLIPModel, Mapping[str, Any]]:
    """A CLIPModel with GELU, still without numbers, and those that fill it.

    Args:
        weights: the file.
        heads: of each of the two towers.

    Raises:
        UserError: the file has no such towers.
    """
    width, patch = _size(weights, "visual.class_embedding"), _size(weights, "visual.conv1.weight", 2)
    side = math.isqrt(_size(weights, "visual.positional_embedding") - 1)
    vision = _tower(weights, "visual.", width, heads) | {"image_size": side * patch, "patch_size": patch}
    text = _text(weights, heads)
    activation = {"hidden_act": "gelu"}
    config = {"projection_dim": text["projection_dim"], "text_config": text | activation}
    model = abstract(CLIPModel, config | {"vision_config": vision | activation})
    return model, TranslatedWeights(weights, "", clip_part, keys(model), model.config)


def resnet(weights: Weights) -> tuple[CLIPResNet, Mapping[str, Any]]:
    """OpenAI's ResNet with attention as its pooling, still without numbers, and those that fill it; as :func:`vit`."""
    width = _size(weights, "visual.layer1.0.conv1.weight")
    layers = [_count(weights, f"visual.layer{number}.") for number in range(1, 5)]
    out = _size(weights, "visual.attnpool.c_proj.weight")
    model = abstract(CLIPResNet, {"width": width, "layers": layers, "projection_dim": out})
    return model, under(weights, "visual.", _UNUSED)


def resnet_text(weights: Weights) -> tuple[CLIPTextModelWithProjection, Mapping[str, Any]]:
    """The text tower beside OpenAI's ResNet, as :func:`vit`: 64 channels a head, QuickGELU."""
    width = _size(weights, "ln_final.weight")
    model = abstract(CLIPTextModelWithProjection, _text(weights, width // 64) | {"hidden_act": "quick_gelu"})
    return model, TranslatedWeights(weights, "", open_clip_text, keys(model), model.config)


def _text(weights: Weights, heads: int) -> dict[str, Any]:
    words, width = (_size(weights, "token_embedding.weight", axis) for axis in (0, 1))
    positions = _size(weights, "positional_embedding")
    found = {"vocab_size": words, "max_position_embeddings": positions, "eos_token_id": words - 1}
    return found | _tower(weights, "", width, heads) | {"projection_dim": _size(weights, "text_projection", 1)}


def _tower(weights: Weights, prefix: str, width: int, heads: int) -> dict[str, int]:
    hidden = _size(weights, f"{prefix}{_BLOCK}0.mlp.c_fc.weight")
    found = {"hidden_size": width, "intermediate_size": hidden, "num_attention_heads": heads}
    return found | {"num_hidden_layers": _count(weights, f"{prefix}{_BLOCK}")}


def _count(weights: Weights, prefix: str) -> int:
    """The number of modules in a list."""
    return len({key.removeprefix(prefix).partition(".")[0] for key in weights if key.startswith(prefix)})


def _size(weights: Weights, key: str, axis: int = 0) -> int:
    if key not in weights:
        raise UserError(f"{weights.files[0]}: weight {key} is missing; expected CLIP in open_clip's names")
    return weights.size(key, axis)
