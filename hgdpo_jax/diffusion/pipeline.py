"""A Stable Diffusion checkpoint in memory: UNet, VAE, text encoders, tokenizer and noise schedule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from transformers import CLIPTokenizer

from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.diffusion.source import MODELS, POSITIONS, Source, open_source
from hgdpo_jax.models.convert import Place, abstract, from_torch, keys
from hgdpo_jax.models.ip_adapter import IPAdapter
from hgdpo_jax.models.text import TextConditioner, both
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.models.vae import AutoencoderKL
from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import fingerprint, json_hash
from hgdpo_jax.run.index import Index


@dataclass(frozen=True)
class Pipeline:
    """The parts of a Stable Diffusion checkpoint.

    Attributes:
        tokenizers: `tokenizer`, and XL's `tokenizer_2`.
        schedule: made from scheduler_config.json, which is its `config`.
        index: model_index.json.
        licence: of the checkpoint, where it states one.
        adapter: for concept images; no checkpoint brings one.
        no_concept: what an adapter reads where there is no concept image.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: TextConditioner
    tokenizers: Mapping[str, CLIPTokenizer]
    schedule: NoiseSchedule
    index: Mapping[str, Any]
    licence: str | None
    adapter: IPAdapter | None = None
    no_concept: Float[np.ndarray, "1 m f"] | None = None

    @property
    def models(self) -> dict[str, Any]:
        """The models under the names of their folders."""
        found = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text.text_encoder}
        return found | ({"text_encoder_2": self.text.text_encoder_2} if hasattr(self.text, "text_encoder_2") else {})

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
        return height // factor, width // factor, int(self.unet.config.get("in_channels", 4))

    def tokenize(self, captions: Sequence[str]) -> Int[np.ndarray, "b s"]:
        """Token ids, padded and cut to CLIP's 77 positions, as diffusers does. XL's are of both tokenizers, see
        :mod:`hgdpo_jax.models.text`."""
        return _ids(self.tokenizers, captions)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """The number of tokens of each caption, with begin and end, before it is cut."""
        counts = [
            [len(ids) for ids in tokenizer(list(captions), verbose=False).input_ids]
            for tokenizer in self.tokenizers.values()
        ]
        return [max(of_each) for of_each in zip(*counts, strict=True)]


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Int[np.ndarray, "b s"]:
    """Token ids int32 [b, 77] of one tokenizer: begin, words, end, padding.

    `<|endoftext|>` in a caption is a token of its own, not the end, as in diffusers.
    """
    ids = tokenizer(
        list(captions),
        padding="max_length",
        max_length=min(tokenizer.model_max_length, POSITIONS),
        truncation=True,
        return_tensors="np",
    ).input_ids
    return ids.astype(np.int32)


def _ids(tokenizers: Mapping[str, CLIPTokenizer], captions: Sequence[str]) -> Int[np.ndarray, "b s"]:
    """See :meth:`Pipeline.tokenize`."""
    first = tokenize(tokenizers["tokenizer"], captions)
    return both(first, tokenize(tokenizers["tokenizer_2"], captions)) if "tokenizer_2" in tokenizers else first


def load_pipeline(
    base: str | Path,
    dtype: str = "float32",
    *,
    vae: str | Path = "",
    lora: str | Path = "",
    param_dtype: Mapping[str, str] | str = "float32",
    place: Place = lambda name, value: jax.device_put(value),
) -> Pipeline:
    """Reads a checkpoint, tensor by tensor, onto its devices.

    The VAE computes in float32 whatever `dtype` says: that of XL gives NaN in half precision.

    Args:
        base, vae, lora: see :func:`hgdpo_jax.diffusion.source.open_source`.
        dtype: of the computation of UNet and text encoders, as in the config: tf32 is float32 here, see
            :func:`hgdpo_jax.devices.xla.use_precision`.
        param_dtype: of the parameters of UNet and text encoders; by part where they differ.
        place: puts a parameter on its devices.

    Raises:
        UserError: see :func:`hgdpo_jax.diffusion.source.open_source`; or weights that do not fit their config.
    """
    source = open_source(str(base), str(vae), str(lora))

    def fill(part: str, model: nnx.Module, stored: jnp.dtype) -> None:
        weights, name = source.open(part, keys(model)), f"{source.name}, {part}"
        from_torch(weights, model, name, stored, place, source.expected(part))

    return _assemble(source, dtype, param_dtype, fill)


def load_vae(
    base: str | Path, vae: str | Path = "", place: Place = lambda name, value: jax.device_put(value)
) -> AutoencoderKL:
    """The VAE of a checkpoint alone, as :func:`load_pipeline` reads it."""
    source = open_source(str(base), str(vae))
    found = abstract(AutoencoderKL, source.configs["vae"], jnp.float32)
    weights = source.open("vae", keys(found))
    from_torch(weights, found, f"{source.name}, vae", _stored("float32"), place, source.expected("vae"))
    return found


def of_shapes(source: Source, dtype: str = "float32", param_dtype: Mapping[str, str] | str = "float32") -> Pipeline:
    """The pipeline that :func:`load_pipeline` gives, with shapes in place of its parameters."""

    def fill(part: str, model: nnx.Module, stored: jnp.dtype) -> None:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, stored), nnx.state(model, nnx.Param))
        nnx.update(model, shapes)

    return _assemble(source, dtype, param_dtype, fill)


def _assemble(
    source: Source,
    dtype: str,
    param_dtype: Mapping[str, str] | str,
    fill: Callable[[str, nnx.Module, jnp.dtype], None],
) -> Pipeline:
    """A pipeline whose models `fill` gives their parameters: from the part, the model without, and their dtype."""

    def model(part: str) -> Any:
        if part not in source.configs:
            return None
        found = abstract(MODELS[part], source.configs[part], jnp.float32 if part == "vae" else _stored(dtype))
        stored = "float32" if part == "vae" else param_dtype
        fill(part, found, _stored(stored if isinstance(stored, str) else stored[part]))
        return found

    return Pipeline(
        unet=model("unet"),
        vae=model("vae"),
        text=TextConditioner(
            model("text_encoder"),
            model("text_encoder_2"),
            empty_ids=tuple(_ids(source.tokenizers, [""])[0].tolist()),
            pad_2=_second_padding(source),
            zero_empty=bool(source.index.get("force_zeros_for_empty_prompt", False)),
        ),
        tokenizers=source.tokenizers,
        schedule=NoiseSchedule.from_config(source.scheduler, f"model {source.name}: "),
        index=source.index,
        licence=source.licence,
    )


def _stored(dtype: str) -> jnp.dtype:
    return jnp.dtype("float32" if dtype == "tf32" else dtype)


def _second_padding(source: Source) -> int:
    """The padding of the second tokenizer, once it is sure that words are the same to both."""
    if "tokenizer_2" not in source.tokenizers:
        return 0
    first, second = (source.tokenizers[name] for name in ("tokenizer", "tokenizer_2"))
    text = ["a photo of a cat, 35mm"]
    if not np.array_equal(first(text, return_tensors="np").input_ids, second(text, return_tensors="np").input_ids):
        raise UserError(f"model {source.name}: tokenizer and tokenizer_2 have different vocabularies; expected CLIP's")
    return int(second.pad_token_id)


def base_hash(base: str | Path, vae: str | Path = "", lora: str | Path = "", index: Index | None = None) -> str:
    """sha256 over what a checkpoint computes with: weights, configs, vocabularies, schedule.

    The names of files and their place do not count. Process 0 reads all, the others enough to tell checkpoints apart.

    Args:
        base, vae, lora: see :func:`hgdpo_jax.diffusion.source.open_source`.
        index: spares reading files that it knows.

    Raises:
        UserError: see :func:`hgdpo_jax.diffusion.source.open_source`; or the processes' bases differ.
    """
    source, index = open_source(str(base), str(vae), str(lora)), index or Index()
    about = {
        "configs": {part: _settings(config) for part, config in source.configs.items()},
        "vocabularies": {name: tokenizer.get_vocab() for name, tokenizer in source.tokenizers.items()},
        "padding": {name: tokenizer.pad_token for name, tokenizer in source.tokenizers.items()},
        "scheduler": _settings(source.scheduler),
        "pipeline": _settings(source.index),
    }
    if not processes.is_alone():  # each host may have a base of its own
        processes.require_same({f"content of {base}": json_hash([about, *map(fingerprint, source.files)])[:12]})
    return processes.broadcast(lambda: json_hash({"weights": [index.hash(file) for file in source.files], **about}))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the notes of who wrote it and where."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
