"""The programs of a pipeline that a sampler compiles: latents are drawn and decoded, images encoded.

Weights are arguments of the programs, so that another policy needs no other program. Only a text encoder's policy does,
because it acts at early timesteps and the given weights at late ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree

from hgdpo_jax.devices.sharding import batch_sharding, heads_sharding, tree_shardings
from hgdpo_jax.devices.transfer import place
from hgdpo_jax.diffusion.guidance import Denoise, guided, guided_within, side_by_side
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.process import Latent, Timesteps
from hgdpo_jax.diffusion.recipe import text_policy_acts
from hgdpo_jax.diffusion.trajectory import Given, State, Trajectory, sample
from hgdpo_jax.models.attention import set_sharding
from hgdpo_jax.models.ip_adapter import join
from hgdpo_jax.models.layers import in_rows

Images = Float[Array, "b H W 3"]  # in [-1, 1]
# States by name: `unet` or `transformer`, `text`, `vae`, `adapter` where there is one, and `early text` where a text
# encoder's policy is used at early timesteps.
Weights = dict[str, PyTree[Array]]
# Pixels that a device decodes or encodes at once, in float32: one image of 1024x704, four of 512x512, 2.5 GiB.
_AT_ONCE = 2**20


class SamplerInputs(NamedTuple):
    """What images are drawn from, b rows each: concept features where the pipeline has an adapter, token ids, PRNG keys
    and the scaled latents of photographs, of which a trajectory from noise uses the shape alone; and 1 where a
    photograph is redrawn, if not everywhere; and where a trajectory stands that goes on from its middle."""

    concept: Float[Array | np.ndarray, "b m f"] | None
    ids: Int[Array | np.ndarray, "b s"]
    key: Key[Array, "b"]
    latent: Given
    redrawn: Float[Array | np.ndarray, "b h w 1"] | None = None
    state: tuple[Given, Given] | None = None


class Guidance(NamedTuple):
    """Scale of classifier-free guidance; the token ids that stand for the empty caption, [1 s]; the timesteps between
    which there is guidance, both included, if not at all."""

    scale: np.float32
    negative_ids: Int[np.ndarray, "1 s"]
    interval: tuple[np.float32, np.float32] | None = None


class Programs:
    """Compiled `draw(weights, given, inputs, trajectory, guidance)`, which gives latents, `advance` of the same, which
    gives the state after some of the steps, `decode(weights, latents)` and `encode(weights, images)`. What one gives,
    the next takes as it lies.

    Args:
        pipeline: its weights are placed on the mesh, as `given`.
        mesh: batches are split over its data and fsdp axes.
        guide: whether there is guidance.
        normalise: latent adaptive normalisation towards `given`.
        concept_scale: strength of the pipeline's adapter.
    """

    def __init__(self, pipeline: Pipeline, mesh: Mesh, guide: bool, normalise: bool, concept_scale: float) -> None:
        self._pipeline, self._guide, self._normalise, self._concept_scale = pipeline, guide, normalise, concept_scale
        self._graphs: dict[str, Any] = {}
        given: Weights = {}
        for name, network in {**pipeline.networks, "vae": pipeline.vae}.items():
            set_sharding(network, heads_sharding(mesh))
            self._graphs[name], given[name] = nnx.split(network)
        self.shardings = tree_shardings(given, mesh)
        self.given: Weights = place(given, self.shardings)
        rows, self._ways = batch_sharding(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
        programs = self._draw, self._advance, self._decode, self._encode
        self.draw, self.advance, self.decode, self.encode = (jax.jit(each, out_shardings=rows) for each in programs)

    def _draw(
        self, weights: Weights, given: Weights, inputs: SamplerInputs, trajectory: Trajectory, guidance: Guidance
    ) -> Latent:
        return self._advance(weights, given, inputs, trajectory, guidance)[0]

    def _advance(
        self, weights: Weights, given: Weights, inputs: SamplerInputs, trajectory: Trajectory, guidance: Guidance
    ) -> State:
        denoise = self._denoiser(weights, inputs, guidance)
        anchor = self._denoiser(given, inputs, guidance) if self._normalise else None
        schedule, (_, _, key, latent, redrawn, state) = self._pipeline.schedule, inputs
        return sample(denoise, schedule, trajectory, latent, key, anchor, redrawn, state)

    def _decode(self, weights: Weights, latents: Latent) -> Images:
        vae = nnx.merge(self._graphs["vae"], weights["vae"])
        pixels = latents.shape[1] * latents.shape[2] * vae.pixels_per_latent**2
        return _in_parts(vae.to_images, latents, _parts(len(latents) // self._ways, pixels))

    def _encode(self, weights: Weights, images: Images) -> Latent:
        vae = nnx.merge(self._graphs["vae"], weights["vae"])
        pixels = images.shape[1] * images.shape[2]
        return _in_parts(vae.to_latents, images, _parts(len(images) // self._ways, pixels))

    def _denoiser(self, weights: Weights, inputs: SamplerInputs, guidance: Guidance) -> Denoise:
        """The prediction for these captions and concepts; what does not depend on the step is computed here."""
        name = self._pipeline.family.denoiser
        denoiser = nnx.merge(self._graphs[name], weights[name])
        late = self._text(denoiser, weights["text"], inputs, guidance)
        early = self._text(denoiser, weights["early text"], inputs, guidance) if "early text" in weights else None
        if inputs.concept is not None:
            adapter = nnx.merge(self._graphs["adapter"], weights["adapter"])
            assert self._pipeline.no_concept is not None  # an adapter comes with it
            no_concept = jnp.repeat(self._pipeline.no_concept, len(inputs.concept), axis=0)
            concept = adapter(self._beside_empty(no_concept, inputs.concept))

        def read(t: Timesteps) -> tuple[Any, Any]:
            memory, added = late
            if early is not None:
                rows = 2 * len(t) if self._guide else len(t)
                acts = in_rows(text_policy_acts(t), rows)  # the same in all, but each device has its own
                memory, added = jax.tree.map(lambda *x: jax.vmap(jnp.where)(acts, *x), early, late)
            return (memory if inputs.concept is None else join(memory, concept, self._concept_scale)), added

        def predict(x: Latent, t: Timesteps) -> Float[Array, "n h w c"]:
            return denoiser(x, t, *read(t))

        def alone(x: Latent, t: Timesteps) -> Latent:
            return denoiser(x, t, *jax.tree.map(lambda both: both[1::2], read(t)))

        if not self._guide:
            return predict
        with_guidance = guided(predict, guidance.scale)
        return guided_within(guidance.interval, with_guidance, alone) if guidance.interval else with_guidance

    def _text(
        self, denoiser: Any, weights: PyTree[Array], inputs: SamplerInputs, guidance: Guidance
    ) -> tuple[Any, Any]:
        """What the denoiser reads of the captions."""
        height, width = (self._pipeline.vae.pixels_per_latent * side for side in inputs.latent.shape[1:3])
        encode = nnx.merge(self._graphs["text"], weights)
        empty = encode.empty(len(inputs.ids), (height, width), guidance.negative_ids)
        condition = self._beside_empty(empty, encode(inputs.ids, (height, width)))
        return denoiser.read_text(condition.encoder_hidden_states), condition.added_cond

    def _beside_empty(self, empty: PyTree[Array], given: PyTree[Array]) -> Any:
        return jax.tree.map(side_by_side, empty, given) if self._guide else given


def _parts(images: int, pixels: int) -> int:
    """The fewest equal parts of a device's images, of so many pixels each, that have at most :data:`_AT_ONCE` pixels or
    are one image."""
    fit = (n for n in range(1, images) if images % n == 0 and images // n * pixels <= _AT_ONCE)
    return next(fit, images)


def _in_parts(function: Callable[[Array], Array], x: Float[Array, "b *n"], parts: int) -> Float[Array, "b *m"]:
    """`function` of all rows, a part of them at a time. Strided, so that each device keeps the rows that it holds."""
    if parts == 1:
        return function(x)
    found = jax.lax.map(function, x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1))
    return found.swapaxes(0, 1).reshape(len(x), *found.shape[2:])
