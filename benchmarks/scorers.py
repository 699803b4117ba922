"""How far the scorers are from published code, on twenty of the embedded photographs.

python -m benchmarks.scorers [KIND ...]      kinds: clip hps image_reward clip_iqa; all unless given

Networks have random weights and the published widths, but few layers (the ResNet is whole). `hps` and `clip_iqa` take
their networks from open_clip_torch and piq, which have to be installed; the others theirs from transformers. Each
picture is scored as it is (96 × 96), and cut to 96 × 72.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from hgdpo_jax.config import ASSETS
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.diffusion.pipeline import tokenize
from hgdpo_jax.run.places import Place
from hgdpo_jax.scoring.image_reward import reader
from hgdpo_jax.scoring.preference import CLIP_TOKENIZER
from hgdpo_jax.scoring.quality import ANTONYMS, antonym_ids
from hgdpo_jax.scoring.scorers import open_scorer
from tests.scoring import published

PORTRAITS = ASSETS / "portraits"
COUNT = 20
Theirs = Iterator[tuple[str, Path, Callable[[list[Image.Image], Tensor], Tensor]]]  # name, place, pictures → scores


def normalised(pictures: list[Image.Image]) -> Tensor:
    return published.pixels(np.stack([np.asarray(picture) for picture in pictures]))


def linear(width: int) -> nn.Sequential:
    """LAION's predictor, which is also ImageReward's head."""
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise([width, 1024, 128, 64, 16, 1])))


def linear_names(layers: nn.Sequential, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}layers.{'02467'[int(key[0])]}{key[1:]}": value for key, value in layers.state_dict().items()}


def clip(folder: Path) -> Theirs:
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 4}
    text = tower | {"eos_token_id": 49407, "bos_token_id": 49406}
    vision = tower | {"image_size": 224, "patch_size": 32}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=512)
    model, head = transformers.CLIPModel(config).eval(), linear(512)
    model.save_pretrained(folder)
    processor = transformers.CLIPImageProcessor()
    processor.save_pretrained(folder)
    save_file(linear_names(head, ""), folder / "aesthetic.safetensors")

    def pixels(pictures: list[Image.Image]) -> Tensor:
        return torch.tensor(np.asarray(processor(pictures, return_tensors="np")["pixel_values"]))

    def rated(pictures: list[Image.Image], ids: Tensor) -> Tensor:
        found = model.get_image_features(pixels(pictures)).pooler_output
        return head(found / found.norm(dim=-1, keepdim=True))[:, 0]

    logits = lambda pictures, ids: model(ids, pixels(pictures)).logits_per_image.diag()  # noqa: E731
    yield "pickscore", folder, logits
    yield "clip_score", folder, lambda *given: 100 * (logits(*given) / model.logit_scale.exp()).clamp(min=0)
    yield "aesthetic", folder, rated


def hps(folder: Path) -> Theirs:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=3, width=1280, head_width=80, patch_size=14, image_size=224)
    model = CLIP(1024, vision, CLIPTextCfg(width=1024, heads=16, layers=3)).eval()
    file = folder / "hps.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)

    def cosine(pictures: list[Image.Image], ids: Tensor) -> Tensor:
        pixels = published.pixels(np.stack([published.on_black(np.asarray(picture), 224) for picture in pictures]))
        return (model.encode_image(pixels, normalize=True) * model.encode_text(ids, normalize=True)).sum(-1)

    yield "hps", file, cosine


def image_reward(folder: Path) -> Theirs:
    size = {"num_attention_heads": 12, "num_hidden_layers": 3}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "image_size": 224, "layer_norm_eps": 1e-6}
    config = transformers.BlipConfig(
        vision_config=vision | size | {"num_attention_heads": 16},
        text_config=size | {"hidden_size": 768, "intermediate_size": 3072, "encoder_hidden_size": 1024},
    )
    model, head = transformers.BlipForImageTextRetrieval(config).eval(), linear(768)
    words = {word.strip(",.") for line in captions() for word in line.lower().split()}
    vocabulary = [
        "[PAD]",
        *(f"[unused{i}]" for i in range(99)),
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ",",
        *sorted(words),
    ]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    save_file(published.blip_names(model) | linear_names(head, "mlp."), folder / "ImageReward.safetensors")
    processor, read = transformers.CLIPImageProcessor(), reader(folder / "vocab.txt")

    def rewards(pictures: list[Image.Image], ids: Tensor) -> Tensor:
        pixels = torch.tensor(np.asarray(processor(pictures, return_tensors="np")["pixel_values"]))
        tokens = torch.tensor(read(ids.numpy().astype(np.int32)))
        seen = model.vision_model(pixels).last_hidden_state
        state = model.text_encoder(tokens, attention_mask=tokens != 0, encoder_hidden_states=seen).last_hidden_state
        return (head(state[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072

    yield "image_reward", folder, rewards


def clip_iqa(folder: Path) -> Theirs:
    from piq.feature_extractors.clip import CLIP

    model, file = CLIP(1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12).eval(), folder / "rn50.safetensors"
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)

    def share(kind: str) -> Callable[[list[Image.Image], Tensor], Tensor]:
        return lambda pictures, ids: published.antonym_share(
            model.encode_image(normalised(pictures), pos_embedding=False),
            *model.encode_text(torch.tensor(antonym_ids(kind)).long()),
        )

    for kind in ANTONYMS:
        yield f"clip_iqa_{kind}", file, share(kind)


KINDS = {"clip": clip, "hps": hps, "image_reward": image_reward, "clip_iqa": clip_iqa}


def lines() -> list[dict[str, str]]:
    return [json.loads(line) for line in (PORTRAITS / "captions.jsonl").read_text().splitlines()[:COUNT]]


def captions() -> list[str]:
    return [line["caption"] for line in lines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    torch.manual_seed(0)
    square = [Image.open(PORTRAITS / line["file"]).convert("RGB") for line in lines()]
    shapes = {"96x96": square, "96x72": [picture.crop((12, 0, 84, 96)) for picture in square]}
    ids = tokenize(transformers.CLIPTokenizer.from_pretrained(CLIP_TOKENIZER), captions())
    for kind in parser.parse_args().kinds:
        with TemporaryDirectory() as folder, torch.no_grad():
            for name, place, theirs in KINDS[kind](Path(folder)):
                scorer = open_scorer(Place(name, str(place)), local_mesh())
                for shape, pictures in shapes.items():
                    images = np.stack([np.asarray(picture) for picture in pictures]) / np.float32(127.5) - 1
                    ours = np.asarray(scorer.score(images.astype(np.float32), ids))
                    expected = theirs(pictures, torch.tensor(ids).long()).numpy()
                    off, spread = np.abs(ours - expected).max(), expected.std()
                    print(f"{name} {shape}: {off:.1e} at most, of a spread of {spread:.1e}")


if __name__ == "__main__":
    main()
