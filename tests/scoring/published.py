"""Published scorers in PyTorch, as the tests' oracles, with the names of their own files."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import BlipForImageTextRetrieval

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def pixels(images: np.ndarray) -> Tensor:
    """uint8 images as CLIP reads them, [b, 3, H, W]."""
    return ((torch.tensor(images) / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def on_black(image: np.ndarray, size: int) -> np.ndarray:
    """What HPSv2 makes of a picture before it is normalised: its long side resized to `size`, black around it."""
    height, width, _ = image.shape
    scale = size / max(height, width)
    new = [round(side * scale) for side in (height, width)]
    small = np.asarray(Image.fromarray(image).resize((new[1], new[0]), Image.Resampling.BICUBIC))
    canvas = np.zeros((size, size, 3), np.uint8)
    top, left = ((size - side) // 2 for side in new)
    canvas[top : top + new[0], left : left + new[1]] = small
    return canvas


def open_clip_names(clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' CLIPModel as open_clip names them, whole attention in one tensor."""
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "logit_scale": "logit_scale",
    }
    names |= {f"text_model.final_layer_norm.{leaf}": f"ln_final.{leaf}" for leaf in ("weight", "bias")}
    for theirs, ours in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        names |= {f"vision_model.{theirs}.{leaf}": f"visual.{ours}.{leaf}" for leaf in ("weight", "bias")}
    found = {names[key]: value for key, value in clip.items() if key in names}
    for projection, name in (("text_projection", "text_projection"), ("visual_projection", "visual.proj")):
        if f"{projection}.weight" in clip:
            found[name] = clip[f"{projection}.weight"].T
    inside = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    inside |= {"self_attn.out_proj": "attn.out_proj"}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        layers = {key.split(".")[3] for key in clip if key.startswith(f"{tower}.encoder.layers.")}
        for i in layers:
            theirs, ours = f"{tower}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
            for leaf in ("weight", "bias"):
                found |= {f"{ours}.{to}.{leaf}": clip[f"{theirs}.{name}.{leaf}"] for name, to in inside.items()}
                parts = [clip[f"{theirs}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
                found[f"{ours}.attn.in_proj_{leaf}"] = torch.cat(parts)
    return {key: value.contiguous() for key, value in found.items()}


def blip_names(blip: BlipForImageTextRetrieval) -> dict[str, Tensor]:
    """transformers' BLIP in the names of Salesforce's code, as ImageReward's file has them."""
    vision = {
        "embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks", "layer_norm": "norm",
        "self_attn.projection": "attn.proj", "self_attn": "attn", "post_layernorm": "norm",
    }  # fmt: skip
    found = {f"text_encoder.{key}": value for key, value in blip.text_encoder.state_dict().items()}
    for key, value in blip.vision_model.state_dict().items():
        for theirs, ours in vision.items():
            key = key.replace(theirs, ours)
        found[f"visual_encoder.{key}"] = value
    return {f"blip.{key}": value.contiguous() for key, value in found.items()}


def random_resnet(width: int, layers: tuple[int, ...], out: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of OpenAI's ModifiedResNet, in its names."""
    generator, found = torch.Generator().manual_seed(seed), dict[str, Tensor]()

    def convolution(name: str, inputs: int, outputs: int, size: int) -> None:
        found[name] = torch.randn(outputs, inputs, size, size, generator=generator) * (inputs * size**2) ** -0.5

    def norm(name: str, channels: int) -> None:
        values = torch.randn(4, channels, generator=generator)
        found.update(
            zip(
                (f"{name}.weight", f"{name}.bias", f"{name}.running_mean", f"{name}.running_var"),
                (1 + 0.2 * values[0], 0.2 * values[1], 0.2 * values[2], values[3].abs() + 0.5),
                strict=True,
            )
        )
        found[f"{name}.num_batches_tracked"] = torch.tensor(3)

    for i, (inputs, outputs) in enumerate(((3, width // 2), (width // 2, width // 2), (width // 2, width)), start=1):
        convolution(f"visual.conv{i}.weight", inputs, outputs, 3)
        norm(f"visual.bn{i}", outputs)
    inputs = width
    for number, count in enumerate(layers):
        inside = width * 2**number
        for block in range(count):
            name, sizes = f"visual.layer{number + 1}.{block}", (inputs, inside, inside, 4 * inside)
            for i, size in enumerate((1, 3, 1)):
                convolution(f"{name}.conv{i + 1}.weight", sizes[i], sizes[i + 1], size)
                norm(f"{name}.bn{i + 1}", sizes[i + 1])
            if block == 0:
                convolution(f"{name}.downsample.0.weight", inputs, 4 * inside, 1)
                norm(f"{name}.downsample.1", 4 * inside)
            inputs = 4 * inside
    for name, outputs in (("q_proj", inputs), ("k_proj", inputs), ("v_proj", inputs), ("c_proj", out)):
        found[f"visual.attnpool.{name}.weight"] = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        found[f"visual.attnpool.{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    found["visual.attnpool.positional_embedding"] = torch.randn(50, inputs, generator=generator)
    return found


def resnet(w: Mapping[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """OpenAI's ModifiedResNet (clip/model.py) of pixels [b, 3, H, W], without the positions of its pooling."""

    def norm(x: Tensor, name: str) -> Tensor:
        numbers = [w[f"visual.{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *numbers)

    for i in (1, 2, 3):
        x = F.relu(norm(F.conv2d(x, w[f"visual.conv{i}.weight"], stride=2 if i == 1 else 1, padding=1), f"bn{i}"))
    x = F.avg_pool2d(x, 2)
    blocks = sorted({tuple(key.split(".")[1:3]) for key in w if key.startswith("visual.layer")})
    for layer, block in blocks:
        name, stride = f"{layer}.{block}", 2 if layer != "layer1" and block == "0" else 1
        h = F.relu(norm(F.conv2d(x, w[f"visual.{name}.conv1.weight"]), f"{name}.bn1"))
        h = F.relu(norm(F.conv2d(h, w[f"visual.{name}.conv2.weight"], padding=1), f"{name}.bn2"))
        h = norm(F.conv2d(F.avg_pool2d(h, stride), w[f"visual.{name}.conv3.weight"]), f"{name}.bn3")
        if f"visual.{name}.downsample.0.weight" in w:
            x = F.conv2d(F.avg_pool2d(x, stride), w[f"visual.{name}.downsample.0.weight"])
            x = norm(x, f"{name}.downsample.1")
        x = F.relu(h + x)
    tokens = x.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens])
    pool = {key.removeprefix("visual.attnpool."): value for key, value in w.items() if "attnpool" in key}
    biases = torch.cat([pool[f"{part}_proj.bias"] for part in "qkv"])
    found, _ = F.multi_head_attention_forward(
        tokens[:1], tokens, tokens, tokens.shape[-1], heads, None, biases, None, None, False, 0.0,
        pool["c_proj.weight"], pool["c_proj.bias"], training=False, use_separate_proj_weight=True,
        q_proj_weight=pool["q_proj.weight"], k_proj_weight=pool["k_proj.weight"], v_proj_weight=pool["v_proj.weight"],
    )  # fmt: skip
    return found[0]


def antonym_share(image: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    """CLIP-IQA of embeddings, as torchmetrics has it."""
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    logits = 100 * unit(image) @ unit(torch.stack([better, worse])).T
    return logits.softmax(-1)[:, 0]
