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
from hgdpo_jax.diffusion.recipe import Drawing
from hgdpo_jax.diffusion.source import Source, open_source
from hgdpo_jax.models.convert import Place, abstract, from_torch, keys, on_default_device
from hgdpo_jax.models.ip_adapter import IPAdapter
from hgdpo_jax.models.layouts import Layout
from hgdpo_jax.models.text import Conditioner
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
        """The models under the names of their folders. Where captions were encoded before, there is no text encoder."""
        texts = {
            name: getattr(self.text, name) for name in ("text_encoder", "text_encoder_2") if hasattr(self.text, name)
        }
        return {self.family.denoiser: self.denoiser, "vae": self.vae, **texts}

    @property
    def layout(self) -> Layout:
        """How other programs know such a checkpoint."""
        return self.family.layout(self.models, self.denoiser.config)

    @property
    def drawing(self) -> Drawing:
        """How the recipe draws with it."""
        return self.family.drawing(self.index)

    @property
    def networks(self) -> dict[str, nnx.Module]:
        """What predicts the noise of a latent and a caption, and perhaps of a concept image."""
        adapter = {} if self.adapter is None else {"adapter": self.adapter}
        return {self.family.denoiser: self.denoiser, "text": self.text, **adapter}

    @property
    def positions(self) -> int:
        """The most tokens of a caption that are read."""
        return min(self.family.positions, *(tokenizer.model_max_length for tokenizer in self.tokenizers.values()))

    def require_guidance(self, guidance: float) -> None:
        """Raises UserError for guidance of a model that was distilled to draw without."""
        if guidance > 1 >= self.drawing.guidance:
            raise UserError(f"guidance {guidance:g}: this {self.family.title} is distilled and draws without; set it "
                            "to 1: --guidance, pairs.guidance and evaluate.guidance")  # fmt: skip

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
    place: Place = on_default_device,
    text: Conditioner | None = None,
) -> Pipeline:
    """Reads a checkpoint, tensor by tensor, onto its devices.

    The VAE computes in float32 whatever `dtype` says: that of XL gives NaN in half precision.

    Args:
        base, vae, lora: see :func:`hgdpo_jax.diffusion.source.open_source`.
        dtype: of the computation of UNet and text encoders, as in the config: tf32 is float32 here, see
            :func:`hgdpo_jax.devices.xla.use_precision`.
        param_dtype: of the parameters of `denoiser` and `text` encoders; by these names where they differ.
        place: puts a parameter on its devices.
        text: takes the place of the text encoders, which are then not read.

    Raises:
        UserError: see :func:`hgdpo_jax.diffusion.source.open_source`; or weights that do not fit their config.
    """
    source = open_source(str(base), str(vae), str(lora))
    return _assemble(source, dtype, param_dtype, _reader(source, place), text)


def load_vae(base: str | Path, vae: str | Path = "", place: Place = on_default_device) -> Any:
    """The VAE of a checkpoint alone, as :func:`load_pipeline` reads it."""
    source = open_source(str(base), str(vae))
    return _model(source, "vae", "float32", "float32", _reader(source, place))


def text_of(source: Source, dtype: str, place: Place | None = None) -> Conditioner:
    """The text encoders of a checkpoint alone, frozen, as :func:`load_pipeline` reads them; of shapes without `place`.

    Raises:
        UserError: see :func:`load_pipeline`.
    """
    fill = _fill_with_shapes if place is None else _reader(source, place)
    return _conditioner(source, {part: _model(source, part, dtype, dtype, fill) for part in _texts(source)})


def of_shapes(source: Source, dtype: str = "float32", param_dtype: Mapping[str, str] | str = "float32") -> Pipeline:
    """The pipeline that :func:`load_pipeline` gives, with shapes in place of its parameters."""
    return _assemble(source, dtype, param_dtype, _fill_with_shapes)


_Fill = Callable[[str, nnx.Module, jnp.dtype], None]  # gives a part's model its parameters, of a dtype


def _reader(source: Source, place: Place) -> _Fill:
    def fill(part: str, model: nnx.Module, stored: jnp.dtype) -> None:
        weights, name = source.open(part, keys(model)), f"{source.name}, {part}"
        from_torch(weights, model, name, stored, place, source.expected(part))

    return fill


def _fill_with_shapes(part: str, model: nnx.Module, stored: jnp.dtype) -> None:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, stored), nnx.state(model, nnx.Param))
    nnx.update(model, shapes)


def _model(source: Source, part: str, dtype: str, param_dtype: str, fill: _Fill) -> Any:
    if dtype == "float16" and source.family.overflows:
        raise UserError(f"config key model.dtype=float16: the numbers of {source.family.title} grow beyond it; expects "
                        "bfloat16")  # fmt: skip
    found = abstract(source.family.models[part], source.configs[part], _stored(dtype))
    fill(part, found, _stored(param_dtype))
    return found


def _texts(source: Source) -> list[str]:
    """The folders of the text encoders."""
    return [part for part in source.configs if part not in (source.family.denoiser, "vae")]


def _conditioner(source: Source, models: Mapping[str, Any]) -> Conditioner:
    return source.family.conditioner(source.name, models, source.tokenizers, source.index)


def _assemble(
    source: Source, dtype: str, param_dtype: Mapping[str, str] | str, fill: _Fill, text: Conditioner | None = None
) -> Pipeline:
    """A pipeline of the models that `fill` makes; `text` as in :func:`load_pipeline`."""
    texts = _texts(source) if text is None else []
    kinds = {source.family.denoiser: "denoiser"} | dict.fromkeys(texts, "text")

    def stored(part: str) -> str:
        return param_dtype if isinstance(param_dtype, str) else param_dtype[kinds[part]]

    models = {part: _model(source, part, dtype, stored(part), fill) for part in source.configs if part in kinds}
    return Pipeline(
        family=source.family,
        denoiser=models[source.family.denoiser],
        vae=_model(source, "vae", "float32", "float32", fill),
        text=text or _conditioner(source, models),
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
    about: dict[str, Any] = {
        "configs": {part: _settings(config) for part, config in source.configs.items()},
        "vocabularies": {name: tokenizer.get_vocab() for name, tokenizer in source.tokenizers.items()},
        "padding": {name: tokenizer.pad_token for name, tokenizer in source.tokenizers.items()},
        "scheduler": _settings(source.scheduler),
        "pipeline": _settings(source.index),
    }
    about |= {} if source.lora_alpha is None else {"lora_alpha": source.lora_alpha}
    if not processes.is_alone():  # each host may have a base of its own
        processes.require_same({f"content of {base}": json_hash([about, *map(fingerprint, source.files)])[:12]})
    return processes.broadcast(lambda: json_hash({"weights": [index.hash(file) for file in source.files], **about}))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the notes of who wrote it and where."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
