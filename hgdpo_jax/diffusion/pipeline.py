"""A Stable Diffusion checkpoint in memory: UNet, VAE, text encoders, tokenizer and noise schedule.

It is read from what people have: a folder as diffusers writes it, a single file in the original LDM layout, or a
repository of the Hugging Face hub at a pinned revision.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from jaxtyping import Float, Int
from transformers import CLIPTokenizer

from hgdpo_jax.config import ASSETS
from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.errors import UserError
from hgdpo_jax.files import Index, json_hash
from hgdpo_jax.models import ldm
from hgdpo_jax.models.architectures import recognise
from hgdpo_jax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from hgdpo_jax.models.convert import Place, abstract, from_torch, keys, read_config, read_json
from hgdpo_jax.models.ip_adapter import IPAdapter
from hgdpo_jax.models.text import TextConditioner
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.models.vae import AutoencoderKL
from hgdpo_jax.models.weights import Weights, open_folder, refuse_pickle

MODELS: dict[str, type[nnx.Module]] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
_HUB = re.compile(r"([\w.-]+/[\w.-]+)@(\w+)")
_FROM_HUB = ["*.json", "*.txt", "*.safetensors", "README.md"]


@dataclass(frozen=True)
class Pipeline:
    """The parts of a Stable Diffusion checkpoint.

    Attributes:
        tokenizers: `tokenizer`, and XL's `tokenizer_2`.
        scheduler: scheduler_config.json, from which `schedule` is made.
        index: model_index.json.
        licence: of the checkpoint, where it states one.
        adapter: for concept images, and what it reads where there is none, [1 m f]; no checkpoint brings one.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: TextConditioner
    tokenizers: Mapping[str, CLIPTokenizer]
    schedule: NoiseSchedule
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any]
    licence: str | None
    adapter: IPAdapter | None = None
    no_concept: Float[np.ndarray, "1 m f"] | None = None

    @property
    def models(self) -> dict[str, Any]:
        """The models under the names of their folders."""
        second = {"text_encoder_2": self.text.text_encoder_2} if hasattr(self.text, "text_encoder_2") else {}
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text.text_encoder, **second}

    @property
    def networks(self) -> dict[str, nnx.Module]:
        """What predicts the noise of a latent and a caption, and perhaps of a concept image."""
        adapter = {} if self.adapter is None else {"adapter": self.adapter}
        return {"unet": self.unet, "text": self.text, **adapter}

    def latent_shape(self, resolution: tuple[int, int]) -> tuple[int, int, int]:
        """(h, w, c) of the latents of images of a resolution (height, width).

        Raises:
            UserError: the UNet cannot halve it as often as it must.
        """
        factor = self.vae.pixels_per_latent
        multiple = factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)
        height, width = resolution
        if height % multiple or width % multiple:
            raise UserError(
                f"resolution {height}x{width}: this model needs height and width in multiples of {multiple} pixels"
            )
        return height // factor, width // factor, int(self.unet.config["in_channels"])

    def tokenize(self, captions: Sequence[str]) -> Int[np.ndarray, "b s"]:
        """Token ids, padded and cut to the 77 positions CLIP has, as diffusers does."""
        return tokenize(self.tokenizers["tokenizer"], captions)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Int[np.ndarray, "b s"]:
    """Token ids int32 [b, 77]: begin, words, end, padding."""
    ids = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="np",
    ).input_ids
    return ids.astype(np.int32)


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, opened but not read.

    Attributes:
        name: what the user gave.
        configs: config.json of each model.
        open: part, keys of its model → its weights.
        files: all its safetensors files.
        tokenizers, scheduler, index, licence: see :class:`Pipeline`.
    """

    name: str
    configs: Mapping[str, Mapping[str, Any]]
    open: Callable[[str, Sequence[str]], Mapping[str, np.ndarray]]
    files: Sequence[Path]
    tokenizers: Mapping[str, CLIPTokenizer]
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any]
    licence: str | None


def find(base: str, vae: str = "") -> Source:
    """Opens a checkpoint.

    Args:
        base: a diffusers folder, a .safetensors file in the LDM layout, or `owner/name@revision` on the hub.
        vae: a folder or file whose VAE replaces that of the checkpoint; empty for none.

    Raises:
        UserError: there is no such thing, it is a pickle, or something this package does not compute.
    """
    if not base:
        raise UserError("config key model.base: is empty; set it to a diffusers folder or a .safetensors checkpoint")
    path = Path(base)
    refuse_pickle(path)
    if path.is_file():
        source = _single_file(path)
    elif path.is_dir():
        source = _folder(path)
    elif match := _HUB.fullmatch(base):
        source = _folder(_download(match[1], match[2]))
    else:
        raise UserError(
            f"model {base}: no such folder or file; from the hub write owner/name@revision, with the revision's hash"
        )
    source = _with_vae(source, Path(vae)) if vae else source
    _check_fit(source)
    return source


def _folder(folder: Path) -> Source:
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise UserError(f"model {folder}: has no model_index.json; give a folder as diffusers writes it")
    index = read_json(index_path)
    for part, kind in index.items():
        if part in (*MODELS, "tokenizer", "tokenizer_2", "scheduler") and kind[0] and not (folder / part).is_dir():
            raise UserError(f"model {folder}: has no folder {part}; its model_index.json names one")
    parts = [part for part in MODELS if (index.get(part) or [None])[0]]
    for part in ("unet", "vae", "text_encoder"):
        if part not in parts:
            raise UserError(f"model {folder}: {index.get('_class_name')} has no {part}; expected Stable Diffusion")
    weights = {part: open_folder(folder / part) for part in parts}
    return Source(
        name=str(folder),
        configs={part: read_config(folder / part) for part in parts},
        open=lambda part, keys: weights[part],
        files=[file for part in parts for file in weights[part].files],
        tokenizers={
            name: _tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2") if (folder / name).is_dir()
        },
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        index=index,
        licence=_licence(folder / "README.md"),
    )


def _tokenizer(folder: Path) -> CLIPTokenizer:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{folder}: has neither tokenizer.json nor vocab.json; copy the folder again")
    return CLIPTokenizer.from_pretrained(folder)


def _licence(card: Path) -> str | None:
    """`license` in the front matter of a model card."""
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(), re.DOTALL)
    found = re.search(r"^license: *(\S+)", front[1], re.MULTILINE) if front else None
    return found[1].strip("\"'") if found else None


def _single_file(path: Path) -> Source:
    weights = Weights(path)
    architecture = recognise(weights, str(path))

    def part(name: str, keys: Sequence[str]) -> Mapping[str, np.ndarray]:
        prefix, translate = architecture.parts[name]
        return ldm.Part(weights, prefix, translate, keys, architecture.configs[name])

    folder = ASSETS / "portraits" / "base" / "tokenizer"  # CLIP's: all Stable Diffusions have it
    tokenizers = {"tokenizer": CLIPTokenizer.from_pretrained(folder)}
    if "tokenizer_2" in architecture.index:
        tokenizers["tokenizer_2"] = CLIPTokenizer.from_pretrained(folder, pad_token="!")
    return Source(
        name=str(path),
        configs=architecture.configs,
        open=part,
        files=[path],
        tokenizers=tokenizers,
        scheduler=architecture.scheduler,
        index=architecture.index,
        licence=weights.metadata.get("modelspec.license"),
    )


def _download(repository: str, revision: str) -> Path:
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(f"model {repository}@{revision}: give the 40 characters of a commit; a branch can change")
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_FROM_HUB))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {repository}@{revision}: cannot be downloaded ({reason})") from error


def _with_vae(source: Source, path: Path) -> Source:
    """The source with another VAE: a model folder, or a file in either layout."""
    refuse_pickle(path)
    config = source.configs["vae"]
    if path.is_dir():
        config, weights = read_config(path), open_folder(path)
    else:
        weights = Weights(path)

    def part(name: str, keys: Sequence[str]) -> Mapping[str, np.ndarray]:
        if name != "vae":
            return source.open(name, keys)
        if "encoder.down.0.block.0.conv1.weight" in weights:
            return ldm.Part(weights, *ldm.LONE_VAE, keys, config)
        return weights

    configs = {**source.configs, "vae": config}
    return replace(source, configs=configs, open=part, files=[*source.files, *weights.files])


def _check_fit(source: Source) -> None:
    """Raises UserError where the parts of a checkpoint are not of one model."""
    unet, vae = source.configs["unet"], source.configs["vae"]
    texts = [config for part, config in source.configs.items() if part.startswith("text_encoder")]
    channels, latent = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latent:
        kind = "as inpainting models do; " if channels == 9 else ""
        raise UserError(f"model {source.name}: its UNet takes {channels} channels, {kind}the latents of its VAE have "
                        f"{latent}")  # fmt: skip
    width, given = unet["cross_attention_dim"], sum(config["hidden_size"] for config in texts)
    if width != given:
        raise UserError(f"model {source.name}: its text encoders give embeddings of width {given}, its UNet reads "
                        f"{width}; they belong to different models")  # fmt: skip


def load(
    base: str | Path,
    dtype: str = "float32",
    *,
    vae: str | Path = "",
    param_dtype: Mapping[str, str] | str = "float32",
    place: Place = lambda name, value: jax.device_put(value),
) -> Pipeline:
    """Reads a checkpoint, tensor by tensor, onto its devices; see :func:`find` for what it may be.

    The VAE computes in float32 whatever `dtype` says: that of XL gives NaN in half precision.

    Args:
        base, vae: see :func:`find`.
        dtype: of the computation of UNet and text encoders.
        param_dtype: of the parameters of UNet and text encoders; by part where they differ.
        place: puts a parameter on its devices.

    Raises:
        UserError: see :func:`find`; or weights that do not fit their config.
    """
    source = find(str(base), str(vae))
    compute = jnp.dtype(dtype)

    def model(part: str) -> Any:
        if part not in source.configs:
            return None
        found = abstract(MODELS[part], source.configs[part], jnp.float32 if part == "vae" else compute)
        stored = "float32" if part == "vae" else param_dtype
        stored = stored if isinstance(stored, str) else stored[part]
        from_torch(source.open(part, keys(found)), found, f"{source.name}, {part}", jnp.dtype(stored), place)
        return found

    return Pipeline(
        unet=model("unet"),
        vae=model("vae"),
        text=TextConditioner(
            model("text_encoder"),
            model("text_encoder_2"),
            empty_ids=tuple(tokenize(source.tokenizers["tokenizer"], [""])[0].tolist()),
            pad_2=_second_padding(source),
            zero_empty=bool(source.index.get("force_zeros_for_empty_prompt", False)),
        ),
        tokenizers=source.tokenizers,
        schedule=NoiseSchedule.from_config(source.scheduler, f"model {source.name}: "),
        scheduler=source.scheduler,
        index=source.index,
        licence=source.licence,
    )


def _second_padding(source: Source) -> int:
    """The padding of the second tokenizer, once it is sure that nothing else differs."""
    if "tokenizer_2" not in source.tokenizers:
        return 0
    first, second = (source.tokenizers[name] for name in ("tokenizer", "tokenizer_2"))
    text = ["a photo of a cat, 35mm"]
    if not np.array_equal(first(text, return_tensors="np").input_ids, second(text, return_tensors="np").input_ids):
        raise UserError(f"model {source.name}: tokenizer and tokenizer_2 have different vocabularies; expected CLIP's")
    return int(second.pad_token_id)


def content_hash(base: str | Path, vae: str | Path = "", index: Index | None = None) -> str:
    """sha256 over all that is computed with of a checkpoint: weights, configs, vocabularies, schedule. Neither the
    names of files nor their place count.

    Args:
        base, vae: see :func:`find`.
        index: spares reading files that it knows.
    """
    source, index = find(str(base), str(vae)), index or Index()
    return json_hash(
        {
            "weights": [index.hash(file) for file in source.files],
            "configs": {part: _settings(config) for part, config in source.configs.items()},
            "vocabularies": {name: tokenizer.get_vocab() for name, tokenizer in source.tokenizers.items()},
            "padding": {name: tokenizer.pad_token for name, tokenizer in source.tokenizers.items()},
            "scheduler": _settings(source.scheduler),
            "pipeline": _settings(source.index),
        }
    )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the notes of who wrote it and where."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
