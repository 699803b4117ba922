"""The programs that are measured, with random weights, ready to be compiled."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from benchmarks.gpu.parts import Drawing, Step
from hgdpo_jax import config as configuration
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.devices.sharding import path_name, tree_shardings
from hgdpo_jax.devices.transfer import place, to_devices
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.diffusion.source import Source, without_weights
from hgdpo_jax.models import attend
from hgdpo_jax.models.architectures import SD15, SDXL, Architecture
from hgdpo_jax.run.settings import load_config
from hgdpo_jax.training import step as steps
from hgdpo_jax.training.cost import operations
from hgdpo_jax.training.optimizer import make_optimizer, numbers_of
from hgdpo_jax.training.policy import add_fresh_lora, configured, parameter_dtypes

_ARCHITECTURES = {"sd15": SD15, "sdxl": SDXL}
_NUMBERS = 2**22  # random ones, which weights repeat: to draw a billion takes a processor longer than the GPU's part
CAPTION = "a woman in a red coat on a bridge"


def small(architecture: Architecture) -> Architecture:
    """The same kinds of layers in networks that a processor compiles in seconds."""
    configs, width = {name: dict(config) for name, config in architecture.configs.items()}, 16
    text = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": 2, "num_hidden_layers": 2}
    texts = [name for name in configs if name.startswith("text_encoder")]
    for name in texts:
        configs[name] |= text | ({"projection_dim": width} if "projection_dim" in configs[name] else {})
    unet = {"block_out_channels": [width], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
    unet |= {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    unet |= {"cross_attention_dim": len(texts) * width}
    if len(texts) == 2:  # six numbers of an image's size beside the second text encoder's
        times = configs["unet"]["addition_time_embed_dim"]
        unet |= {"transformer_layers_per_block": 1, "projection_class_embeddings_input_dim": 6 * times + width}
    configs["unet"] |= unet
    configs["vae"] |= {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4}
    return replace(architecture, configs=configs)


def config_of(program: Step | Drawing, is_small: bool) -> ConfigDict:
    """Stage 1 as `program` says."""
    model = program.model if isinstance(program, Step) else "sd15"
    size = "32x32" if is_small else {"sd15": "512x512", "sdxl": "1024x1024"}[model]
    overrides = [f"model.dtype={program.dtype}", f"data.resolutions={size}"]
    if isinstance(program, Step):
        overrides += [f"train.batch={program.pairs}", f"train.checkpointing={program.checkpointing}"]
    return load_config(f"configs/stage1.py:{model}", overrides)


def source_of(model: str, is_small: bool) -> Source:
    """A checkpoint without weights."""
    architecture = _ARCHITECTURES[model]
    return without_weights(small(architecture) if is_small else architecture)


@dataclass
class Programs:
    """Makes programs on the devices that are here; weights of one model and dtype are held once."""

    is_small: bool
    _weights: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return local_mesh()

    def step(self, program: Step) -> "CompiledStep":
        """A step, traced and lowered; no other thread may trace meanwhile."""
        config = config_of(program, self.is_small)
        train, pipeline = config.train, self._pipeline(program.model, config)
        add_fresh_lora(pipeline, config, self.mesh)
        denoiser, policy, frozen = steps.split_params(pipeline, train.params)
        tx = make_optimizer(train)
        state = steps.init_state(policy, tx, train.ema)
        placed = tree_shardings(state, self.mesh)
        step = steps.make_step(steps.preference_loss(denoiser, pipeline.schedule), tx, train.accumulate, placed)
        (resolution,) = configuration.resolutions(config).values()
        rng, shape = np.random.default_rng(0), (program.pairs, *pipeline.latent_shape(resolution))
        batch = {name: rng.standard_normal(shape, np.float32).astype(np.float16) for name in ("winner", "loser")}
        batch["input_ids"] = pipeline.tokenize([CAPTION] * program.pairs)
        given = (policy, frozen, to_devices(batch, self.mesh), numbers_of(config, 100))
        state = place(state, placed)
        with _kernels(program.chunks):
            traced = step.trace(state, *given)
        flags = {"xla_gpu_deterministic_ops": True} if program.deterministic else {}
        lowered = traced.lower()
        return CompiledStep(lambda: lowered.compile(flags), operations(traced.jaxpr), state, given)

    def drawing(self, program: Drawing) -> "CompiledDrawing":
        """Drawing and decoding, traced and lowered."""
        config = config_of(program, self.is_small)
        pairs, (resolution,) = config.pairs, configuration.resolutions(config).values()
        pairs.update(batch=program.images, steps=2 if self.is_small else 50, guidance=5.0, sampler="dpmpp_2m")
        pipeline = self._pipeline("sd15", config)
        nnx.update(pipeline.vae, self._filled(("vae",), nnx.state(pipeline.vae)))
        sampler = Sampler.from_config(pipeline, self.mesh, pairs, config.seed)
        traced = sampler.traced(resolution)
        count = operations(traced[0].jaxpr, trips=pairs.steps), operations(traced[1].jaxpr)
        lowered = [each.lower() for each in traced]
        return CompiledDrawing(lambda: [each.compile() for each in lowered], count, sampler, resolution)

    def _pipeline(self, model: str, config: ConfigDict) -> Pipeline:
        """With random weights, but for the VAE's, which a step does not need."""
        pipeline = pipelines.of_shapes(source_of(model, self.is_small), config.model.dtype, parameter_dtypes(config))
        pipeline = configured(pipeline, config, self.mesh)
        found = self._filled((model, config.model.dtype), nnx.state(pipeline.networks))
        nnx.update(pipeline.networks, found)
        return pipeline

    def _filled(self, name: tuple[Any, ...], shapes: Any) -> Any:
        if name not in self._weights:
            self._weights[name] = place(random_weights(shapes), tree_shardings(shapes, self.mesh))
        return self._weights[name]


def random_weights(shapes: Any) -> Any:
    """Arrays that keep the size of what goes through, since a GPU multiplies zeros faster; scales of norms are one."""
    numbers = np.random.default_rng(0).standard_normal(_NUMBERS, np.float32)
    scaled: dict[tuple[float, Any], np.ndarray] = {}

    def one(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        if leaf.ndim < 2:
            return np.full(leaf.shape, path_name(path).endswith("scale"), leaf.dtype)
        size = math.prod(leaf.shape[:-1]) ** -0.5
        if (size, leaf.dtype) not in scaled:
            scaled[size, leaf.dtype] = (size * numbers).astype(leaf.dtype)
        found, count = scaled[size, leaf.dtype], math.prod(leaf.shape)
        return found[:count].reshape(leaf.shape) if count <= _NUMBERS else np.resize(found, leaf.shape)

    return jax.tree.map_with_path(one, shapes)


@contextmanager
def _kernels(chunks: bool) -> Iterator[None]:
    """Inside, where `chunks`, attention is what a GPU without a kernel of its own gets."""
    kept = attend.kernel
    if chunks:
        attend.kernel = lambda device, q, k: kept(SimpleNamespace(platform="gpu", device_kind=""), q, k)
    try:
        yield
    finally:
        attend.kernel = kept


@dataclass
class CompiledStep:
    """Attributes:
    compile: may run in any thread.
    operations: floating-point operations of a step.
    state: before the next step.
    given: the step's other arguments.
    seconds: that compiling took.
    """

    compile: Callable[[], jax.stages.Compiled]
    operations: float
    state: steps.TrainState
    given: tuple[Any, ...]
    seconds: float = 0.0

    @cached_property
    def program(self) -> jax.stages.Compiled:
        return self.compile()

    def run(self, count: int) -> dict[str, Any]:
        """So many steps, queued as training queues them; the last one's metrics, once all have ended."""
        for _ in range(count):
            self.state, metrics = self.program(self.state, *self.given)
        return jax.block_until_ready(metrics)


@dataclass
class CompiledDrawing:
    """Attributes:
    compile, seconds: as of :class:`CompiledStep`.
    operations: of drawing a batch, and of decoding it.
    """

    compile: Callable[[], list[jax.stages.Compiled]]
    operations: tuple[float, float]
    sampler: Sampler
    resolution: tuple[int, int]
    seconds: float = 0.0

    @cached_property
    def program(self) -> list[jax.stages.Compiled]:
        return self.compile()

    def run(self, count: int) -> Any:
        """So many batches, drawn and decoded as for a pool; the mean of each image."""
        images = count * self.sampler.batch
        keys = self.sampler.keys("benchmark", ["one"] * images, range(images))
        ids = self.sampler.tokenize([CAPTION] * images)
        return jax.block_until_ready(
            self.sampler.candidates(ids, keys, self.resolution, lambda x, _: x.mean((1, 2, 3)), "")
        )
