"""A checkpoint in memory: the model that predicts, VAE, text encoders, tokenizers and noise schedule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from hgdpo_jax.diffusion.family import Family, Tokenizers
from hgdpo_jax.diffusion.process import Process
from hgdpo_jax.diffusion.source import Source, open_source
from hgdpo_jax.models.convert import Place, abstract, from_torch, keys
from hgdpo_jax.models.ip_adapter import IPAdapter
from hgdpo_jax.models.layouts import Layout
from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import fingerprint, json_hash
from hgdpo_jax.run.index import Index


@dataclass(frozen=True)
class Pipeline:
    """The parts of a checkpoint.

    Attributes:
        family: which kind it is.
        denoiser: UNet or transformer.
        tokenizers: `tokenizer`, and XL's `tokenizer_2`.
        schedule: made from scheduler_config.json, which is its `config`.
        index: model_index.json.
        licence: of the checkpoint, where it states one.
        folder: see :class:`hgdpo_jax.diffusion.source.Source`.
        adapter: for concept images; no checkpoint brings one.
        no_concept: what an adapter reads where there is no concept image.
    """

    family: Family
    denoiser: Any
    vae: Any
    text: Any
    tokenizers: Tokenizers
    schedule: Process
    index: Mapping[str, Any]
    licence: str | None
    folder: Path | None = None
    adapter: IPAdapter | None = None
    no_concept: Float[np.ndarray, "1 m f"] | None = None

    @property
    def models(self) -> dict[str, Any]:
        """The models under the names of their folders."""
        found = {self.family.denoiser: self.denoiser, "vae": self.vae, "text_encoder": self.text.text_encoder}
        return found | ({"text_encoder_2": self.text.text_encoder_2} if hasattr(self.text, "text_encoder_2") else {})

    @property
    def layout(self) -> Layout:
        """How other programs know such a checkpoint."""
        return self.family.layout(self.models)

    @property
    def networks(self) -> dict[str, nnx.Module]:
        """What predicts the noise of a latent and a caption, and perhaps of a concept image."""
        adapter = {} if self.adapter is None else {"adapter": self.adapter}
        return {self.family.denoiser: self.denoiser, "text": self.text, **adapter}

    def latent_shape(self, resolution: tuple[int, int]) -> tuple[int, int, int]:
        """(h, w, c) of the latents of images of a resolution (height, width).

        Raises:
            UserError: the model cannot halve it as often as it must.
        """
        factor = self.vae.pixels_per_latent
        multiple = factor * self.denoiser.latent_multiple
        height, width = resolution
        if height % multiple or width % multiple:
            raise UserError(
                f"resolution {height}x{width}: this model needs height and width in multiples of {multiple} pixels"
            )
        return height // factor, width // factor, int(self.denoiser.config.get("in_channels", 4))

    def tokenize(self, captions: Sequence[str]) -> Int[np.ndarray, "b s"]:
        """Token ids, padded and cut as diffusers does."""
        return self.family.tokenize(self.tokenizers, captions)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """The number of tokens of each caption before it is cut."""
        return self.family.count(self.tokenizers, captions)


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
        param_dtype: of the parameters of `denoiser` and `text` encoders; by these names where they differ.
        place: puts a parameter on its devices.

    Raises:
        UserError: see :func:`hgdpo_jax.diffusion.source.open_source`; or weights that do not fit their config.
    """
    source = open_source(str(base), str(vae), str(lora))

    def fill(part: str, model: nnx.Module, stored: jnp.dtype) -> None:
        weights, name = source.open(part, keys(model)), f"{source.name}, {part}"
        from_torch(weights, model, name, stored, place, source.expected(part))

    return _assemble(source, dtype, param_dtype, fill)


def load_vae(base: str | Path, vae: str | Path = "", place: Place = lambda name, value: jax.device_put(value)) -> Any:
    """The VAE of a checkpoint alone, as :func:`load_pipeline` reads it."""
    source = open_source(str(base), str(vae))
    found = abstract(source.family.models["vae"], source.configs["vae"], jnp.float32)
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

    if dtype == "float16" and source.family.overflows:
        raise UserError(f"config key model.dtype=float16: the numbers of {source.family.title} grow beyond it; expects "
                        "bfloat16")  # fmt: skip

    def model(part: str) -> Any:
        computed = jnp.float32 if part == "vae" else _stored(dtype)
        found = abstract(source.family.models[part], source.configs[part], computed)
        of_kind = param_dtype if isinstance(param_dtype, str) else param_dtype[kind(part)]
        fill(part, found, _stored("float32" if part == "vae" else of_kind))
        return found

    def kind(part: str) -> str:
        return "denoiser" if part == source.family.denoiser else "text"

    models = {part: model(part) for part in source.configs}
    return Pipeline(
        family=source.family,
        denoiser=models[source.family.denoiser],
        vae=models["vae"],
        text=source.family.conditioner(source.name, models, source.tokenizers, source.index),
        tokenizers=source.tokenizers,
        schedule=source.family.process(source.scheduler, f"model {source.name}: "),
        index=source.index,
        licence=source.licence,
        folder=source.folder,
    )


def _stored(dtype: str) -> jnp.dtype:
    return jnp.dtype("float32" if dtype == "tf32" else dtype)


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
