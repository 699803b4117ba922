"""The programs of a config on described devices, with shapes and shardings in place of weights and pairs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.devices.mesh import require_divisible
from hgdpo_jax.devices.sharding import batch_sharding, tree_shardings
from hgdpo_jax.devices.transfer import place
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.diffusion.source import Source, open_source, without_weights
from hgdpo_jax.faces.concepts import encoder_of
from hgdpo_jax.models import attend, ip_adapter
from hgdpo_jax.models.architectures import KLEIN_4B, SD15, SDXL
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import abstract
from hgdpo_jax.models.int8 import quantise
from hgdpo_jax.models.text import encoded_shapes
from hgdpo_jax.run.settings import named
from hgdpo_jax.scoring.scorers import listed, parts
from hgdpo_jax.training import step as steps
from hgdpo_jax.training import text_cache
from hgdpo_jax.training.cost import operations
from hgdpo_jax.training.inputs import loss_of
from hgdpo_jax.training.optimizer import make_optimizer, numbers_of
from hgdpo_jax.training.policy import add_fresh_lora, configured, parameter_dtypes

# The image encoder of the published adapters.
_VIT_H = {"hidden_size": 1280, "image_size": 224, "patch_size": 14, "projection_dim": 1024}
_PICKSCORE = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """A program of described devices.

    Attributes:
        trace: traces it; each of its arguments has its place.
        held: name → bytes that lie on a device throughout.
        beside: bytes of `held` that are no arguments of the program.
        trips: of its loops whose number of turns is an argument.
        gradients: bytes of what a device adds up with the others that compute other pairs.
        copies: 1; where it is the program of one device, how many devices run it, each with pairs of its own.
    """

    trace: Callable[[], jax.stages.Traced]
    held: dict[str, int]
    beside: int
    trips: int = 1
    gradients: int = 0
    copies: int = 1

    @property
    def lowered(self) -> jax.stages.Lowered:
        """Ready to be compiled."""
        return self.trace().lower()

    @property
    def operations(self) -> tuple[float, float]:
        """Floating-point operations of all devices together: (convolutions, products)."""
        convolutions, products = counted(self.trace, trips=self.trips)
        return self.copies * convolutions, self.copies * products


def open_architecture(config: ConfigDict, variant: str) -> Source:
    """ε_base of a config, whose weights are not read; without one the architecture that the variant is for.

    Raises:
        UserError: there is neither, or ε_base cannot be opened.
    """
    known = {"": SD15, "sd15": SD15, "sdxl": SDXL, "klein": KLEIN_4B}
    if config.model.base or variant not in known:
        return open_source(config.model.base, config.model.vae, config.model.lora)
    return without_weights(known[variant])


def pipeline_of(config: ConfigDict, source: Source, mesh: Mesh) -> Pipeline:
    """The pipeline that :func:`hgdpo_jax.training.policy.load_trainable` gives, of shapes."""
    pipeline = pipelines.of_shapes(source, config.model.dtype, parameter_dtypes(config))
    pipeline = configured(pipeline, config, mesh)
    add_fresh_lora(pipeline, config)
    for network in pipeline.networks.values():  # LoRA has values, which no described device can take
        nnx.update(network, jax.eval_shape(nnx.state, network))
    if config.train.params == "adapter":
        concept = concept_shape(config)
        about = ip_adapter.default_config(pipeline.denoiser, config.adapter.kind, concept[1])
        adapter = abstract(ip_adapter.IPAdapter, about, pipeline.denoiser.dtype)
        pipeline = replace(pipeline, adapter=adapter, no_concept=np.zeros((1, *concept), np.float32))
    return pipeline


def concept_shape(config: ConfigDict) -> tuple[int, int]:
    """Tokens and features (m, f) that an adapter reads of an image; without an encoder those of CLIP ViT-H/14."""
    settings = config.adapter
    if settings.kind == "face_id":
        return encoder_of(config).nothing.shape[1:]
    folder = settings.image_encoder
    about = ip_adapter.image_encoder_config(Path(folder)) if folder else _VIT_H
    if settings.kind == "ip_adapter":
        return 1, about["projection_dim"]
    return (about["image_size"] // about["patch_size"]) ** 2 + 1, about["hidden_size"]


def step(config: ConfigDict, source: Source, mesh: Mesh) -> Program:
    """The optimizer step, as :mod:`hgdpo_jax.training.loop` runs it.

    Raises:
        UserError: the batch or a resolution does not suit the mesh or the model.
    """
    settings, pipeline = config.train, pipeline_of(config, source, mesh)
    require_divisible(settings.batch // settings.accumulate, mesh, "train.batch / train.accumulate")
    encoded = {}
    if settings.text_cache:
        encoded = encoded_shapes(pipeline.text, settings.batch)._asdict()
        pipeline = replace(pipeline, text=text_cache.planned(pipeline.text, mesh))
    if settings.quantize == "int8":
        quantise(pipeline.networks.values())
    denoiser, policy, frozen = steps.split_params(pipeline, settings.params)
    tx = make_optimizer(settings)
    state = _placed(jax.eval_shape(lambda p: steps.init_state(p, tx, settings.ema, settings.auto_beta), policy), mesh)
    policy, frozen = _placed(policy, mesh), _placed(frozen, mesh)
    latent = ("winner", "loser") if settings.objective != "sft" else ("winner",)
    # Of several resolutions the largest: each has a program of its own.
    shape = max((pipeline.latent_shape(size) for size in configuration.resolutions(config).values()), key=np.prod)
    batch = {name: _rows(mesh, (settings.batch, *shape), np.float16) for name in latent}
    batch["input_ids"] = _rows(mesh, (settings.batch, *pipeline.tokenize([""]).shape[1:]), np.int32)
    batch |= {name: _rows(mesh, x.shape, x.dtype) for name, x in encoded.items() if x is not None}
    if settings.objective == "smpo":
        batch["scores"] = _rows(mesh, (settings.batch, 2), np.float32)
    if settings.reference_cache:
        batch["example"] = _rows(mesh, (settings.batch,), np.int32)
        batch["reference"] = _rows(mesh, (settings.batch, 2, *shape), np.float32)
    if pipeline.no_concept is not None:
        batch["concept"] = _rows(mesh, (settings.batch, *pipeline.no_concept.shape[1:]), np.float16)
    reference = policy if configuration.has_reference(config) else {}
    loss = loss_of(config, denoiser, pipeline.schedule, mesh)
    placed = jax.tree.map(lambda x: x.sharding, state)

    arguments = (state, reference, frozen, batch, numbers_of(config, 0))

    def trace() -> jax.stages.Traced:
        return steps.make_step(loss, tx, settings.accumulate, placed).trace(*arguments)  # type: ignore[attr-defined]  # of jax.jit

    # The pipeline keeps the policy that it was loaded with; where it is the reference, that is all of it.
    kept = not configuration.has_reference(config) or (settings.start != "base" and settings.reference != "base")
    beside = {"policy of the base": size(policy) if kept else 0, "VAE": size(_placed(nnx.state(pipeline.vae), mesh))}
    held = {
        "weights": size(frozen),
        "policy": size(state.policy) + size(state.ema),
        "reference": size(reference),
        "optimizer": size(state.optimizer),
    }
    if settings.text_cache and settings.objective != "sft":  # without the empty caption, looks alone read them
        beside["captions of looks"] = size(frozen["text"])
        held["weights"] -= beside["captions of looks"]
    if settings.reference_cache and settings.blocks != "up":  # whose reference is looked at between steps only
        beside["reference"] = held["reference"]
    return Program(trace, held | beside, sum(beside.values()), gradients=size(policy))


def drawing(config: ConfigDict, source: Source, mesh: Mesh) -> tuple[Program, Program]:
    """The programs that draw a batch of the pool's images from noise, as `pairs` says, and decode it."""
    pipeline, pairs = pipeline_of(config, source, mesh), config.pairs
    resolution = max(configuration.resolutions(config).values(), key=np.prod)

    def trace(part: int) -> jax.stages.Traced:
        return Sampler.from_config(pipeline, mesh, pairs, seed=0).traced(resolution)[part]

    held = {name: size(_placed(nnx.state(network), mesh)) for name, network in pipeline.networks.items()}
    networks = sum(held.values())
    held["VAE"] = size(_placed(nnx.state(pipeline.vae), mesh))
    held["scorer"] = _scorer_size(config)
    draw = Program(partial(trace, 0), held, held["VAE"] + held["scorer"], pairs.steps)
    return draw, Program(partial(trace, 1), held, networks + held["scorer"])


def _scorer_size(config: ConfigDict) -> int:
    """Bytes of the networks that choose the pairs, of which every device has a copy; without a scorer PickScore's."""
    if config.pairs.loser in ("none", "given"):
        return 0
    with named("pairs.scorer", config.pairs.scorer):
        models = [network.model for place in listed(config.pairs.scorer) for network in parts(place).networks]
    states = (
        [nnx.state(model) for model in models] if config.pairs.scorer else nnx.state(abstract(CLIPModel, _PICKSCORE))
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states))


def of_one_device(whole: Program, part: Program, mesh: Mesh) -> Program:
    """`whole`, traced as `part`, which one device of the mesh runs: what is exchanged on the way is left out."""
    return replace(whole, trace=part.trace, copies=ways(mesh))


def ways(mesh: Mesh) -> int:
    """Parts of a batch that are on different devices."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def counted(trace: Callable[..., jax.stages.Traced], *arguments: Any, trips: int = 1) -> tuple[float, float]:
    """Operations (convolutions, products) of the program that `trace(*arguments)` traces, whatever kernel its attention
    has; `trips` as in :func:`hgdpo_jax.training.cost.operations`."""
    with _plain_attention():
        jaxpr = trace(*arguments).jaxpr
    return operations(jaxpr, ("conv_general_dilated",), trips), operations(jaxpr, ("dot_general",), trips)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Inside, attention is two products: what a kernel computes cannot be counted, nor what it computes again."""
    kept = attend.kernel
    attend.kernel = lambda *_: attend.xla
    try:
        yield
    finally:
        attend.kernel = kept


def _placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes, of arrays too, with the shardings of the table: arrays cannot lie on devices that are not here."""
    shapes = jax.eval_shape(lambda tree: tree, tree)
    return place(shapes, tree_shardings(shapes, mesh))


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=batch_sharding(mesh))


def size(tree: Any) -> int:
    """Bytes of one device's part of some placed shapes."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))
