"""Draws the images among which winners and losers are chosen: pools, reconstructions, and their scores.

Everything drawn is a function of (seed, stream, example id, number in the pool), so any single candidate can be made
again. Work is cut into batches of one fixed size, so that each program is compiled once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int
from tqdm import tqdm

from hgdpo_jax import runtime
from hgdpo_jax.diffusion.guidance import guided
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.samplers import sample
from hgdpo_jax.diffusion.sdrecon import sdrecon

Arrays = dict[str, np.ndarray]


TEXT_POLICY_FROM = 900  # a text encoder's policy acts while t is at least this (HG-DPO's inference recipe)


class Painter:
    """Text → latents and photograph → reconstructions with one pipeline, and latents → images.

    Args:
        pipeline: ε_base, or any other pipeline.
        mesh: batches are split over its data and fsdp axes.
        sampler, steps, guidance: as in the config; guidance 1 means none.
        batch: images per call, a multiple of data x fsdp.
        seed: of all that is drawn.
        normalise: latent adaptive normalisation: what :meth:`generate` draws keeps, step by step, the channel
            statistics of what the pipeline draws as it was given. Takes twice the time.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        mesh: Mesh,
        *,
        sampler: str,
        steps: int,
        guidance: float,
        batch: int,
        seed: int,
        normalise: bool = False,
    ) -> None:
        runtime.check_batch(batch, mesh, "batch")
        self.batch, self.mesh, self.seed = batch, mesh, seed
        self._schedule = pipeline.schedule
        self._latent_shape = pipeline.latent_shape
        unet, unet_state = nnx.split(pipeline.unet)
        text, text_state = nnx.split(pipeline.text)
        vae, vae_state = nnx.split(pipeline.vae)
        weights = {"unet": unet_state, "text": text_state, "vae": vae_state}
        self._weights = jax.device_put(weights, runtime.shardings(weights, mesh))
        self._given = self._weights
        factor = pipeline.vae.pixels_per_latent

        def denoiser(weights: Any, input_ids: jax.Array, shape: tuple[int, ...]) -> Callable:
            """The prediction for these captions; what does not depend on the step is computed here."""
            network = nnx.merge(unet, weights["unet"])
            size = (shape[0] * factor, shape[1] * factor)

            def look_up(text_weights: Any) -> tuple[Any, Any]:
                conditioner = nnx.merge(text, text_weights)
                condition = conditioner(input_ids, size)
                if guidance != 1.0:
                    empty = conditioner.empty(input_ids.shape[0], size)
                    condition = jax.tree.map(lambda *parts: jnp.concatenate(parts), empty, condition)
                return network.keys_values(condition.encoder_hidden_states), condition.added_cond

            late = look_up(weights["text"])
            early = look_up(weights["early text"]) if "early text" in weights else None

            def predict(x: jax.Array, t: jax.Array) -> jax.Array:
                condition = late
                if early is not None:
                    condition = jax.tree.map(lambda a, b: jnp.where(t[0] >= TEXT_POLICY_FROM, a, b), early, late)
                return network(x, t, *condition)

            return predict if guidance == 1.0 else guided(predict, guidance)

        def generate(
            weights: Any, given: Any, input_ids: jax.Array, key: jax.Array, shape: tuple[int, ...]
        ) -> jax.Array:
            keys = jax.vmap(jax.random.split)(key)
            start = jax.vmap(lambda k: jax.random.normal(k, shape))(keys[:, 0])
            denoise = denoiser(weights, input_ids, shape)
            anchor = denoiser(given, input_ids, shape) if normalise else None
            return sample(denoise, self._schedule, start, keys[:, 1], sampler, steps, anchor=anchor)

        def reconstruct(
            weights: Any, input_ids: jax.Array, key: jax.Array, latent: jax.Array, strength: int
        ) -> jax.Array:
            denoise = denoiser(weights, input_ids, latent.shape[1:])
            return sdrecon(denoise, self._schedule, latent, key, strength, sampler, steps)

        self._generate = jax.jit(generate, static_argnames="shape")
        self._reconstruct = jax.jit(reconstruct, static_argnames="strength")
        self._decode = jax.jit(lambda weights, latent: nnx.merge(vae, weights["vae"]).to_images(latent))
        self._encode = jax.jit(lambda weights, image: nnx.merge(vae, weights["vae"]).to_latents(image))

    def use(self, *policies: Any) -> None:
        """Draws with these policies' parameters, and otherwise with what the pipeline was given, from now on.

        A policy of the text encoders is used while t ≥ 900 only. Nothing is compiled again for another policy of the
        same kind.
        """
        self._weights = self._given
        for policy in policies:
            for name, state in policy.items():
                place = "early text" if name == "text" else name
                self._weights = self._weights | {place: nnx.merge_state(self._given[name], state)}

    def keys(self, stream: str, example_ids: Sequence[str], numbers: Sequence[int]) -> jax.Array:
        """A key for each (example, number in its pool)."""
        return runtime.stream_keys(self.seed, stream, example_ids, numbers)

    def generate(
        self, input_ids: Int[np.ndarray, "n s"], keys: jax.Array, resolution: tuple[int, int], note: str
    ) -> Float[np.ndarray, "n h w c"]:
        """Latents drawn for each row of token ids."""
        shape = self._latent_shape(resolution)
        return self._run(
            lambda part: self._generate(self._weights, self._given, part["ids"], part["key"], shape=shape),
            {"ids": input_ids, "key": keys},
            note,
        )

    def reconstruct(
        self,
        latents: Float[np.ndarray, "n h w c"],
        input_ids: Int[np.ndarray, "n s"],
        keys: jax.Array,
        strength: int,
        note: str,
    ) -> Float[np.ndarray, "n h w c"]:
        """SDRecon of each latent: noised to timestep 100 * strength and denoised from there."""
        return self._run(
            lambda part: self._reconstruct(self._weights, part["ids"], part["key"], part["latent"], strength=strength),
            {"ids": input_ids, "key": keys, "latent": latents},
            note,
        )

    def decode(self, latents: Float[np.ndarray, "n h w c"], note: str) -> Float[np.ndarray, "n H W 3"]:
        """Images in [-1, 1]."""
        return self.measure(latents, {}, lambda images: images, note)

    def measure(
        self, latents: Float[np.ndarray, "n h w c"], beside: Arrays, function: Callable[..., Any], note: str
    ) -> Any:
        """`function(images, **beside)` over decoded latents, batch by batch; only its results leave the devices.

        Args:
            latents: scaled.
            beside: further arrays of n rows for the function's keyword arguments.
            function: gets images [b, H, W, 3] in [-1, 1] and returns a pytree of arrays of b rows.
        """
        return self._run(
            lambda part: function(self._decode(self._weights, part["latent"]), **{name: part[name] for name in beside}),
            {"latent": latents, **beside},
            note,
        )

    def encode(self, images: Float[np.ndarray, "n H W 3"], note: str) -> Float[np.ndarray, "n h w c"]:
        """Scaled latent means of images in [-1, 1]."""
        return self._run(lambda part: self._encode(self._weights, part["image"]), {"image": images}, note)

    def _run(self, program: Callable[[dict[str, jax.Array]], Any], arrays: dict[str, Any], note: str) -> Any:
        """Batches of one size through a jitted program; the last is padded with its last row."""
        count = len(next(iter(arrays.values())))
        sharding = runtime.batch_sharding(self.mesh)
        parts = []
        for begin in tqdm(range(0, count, self.batch), desc=note, unit="batch", leave=False):
            index = np.minimum(np.arange(begin, begin + self.batch), count - 1)
            part = {name: jax.device_put(value[index], sharding) for name, value in arrays.items()}
            parts.append(jax.tree.map(runtime.to_host, program(part)))
        return jax.tree.map(lambda *rows: np.concatenate(rows)[:count], *parts)
