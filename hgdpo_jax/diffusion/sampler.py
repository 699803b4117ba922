"""Draws: text → latents → images, and photograph → reconstruction, with any policies of one pipeline.

Everything drawn is a function of its captions and of a key made from (seed, stream, example id, number), so any single
image can be made again. Work is cut into batches of one fixed size, so that each program is compiled once.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from hgdpo_jax.devices.random import stream_keys
from hgdpo_jax.devices.sharding import batch_sharding, heads_sharding, tree_shardings
from hgdpo_jax.devices.transfer import one_ahead, place, to_host
from hgdpo_jax.diffusion.guidance import guided, side_by_side
from hgdpo_jax.diffusion.pipeline import POSITIONS, Pipeline
from hgdpo_jax.diffusion.recipe import text_policy_acts
from hgdpo_jax.diffusion.solvers import Trajectory, from_noise, sample, sdrecon
from hgdpo_jax.models.attention import Memory, set_sharding
from hgdpo_jax.models.ip_adapter import join
from hgdpo_jax.models.layers import in_rows
from hgdpo_jax.run import processes

Arrays = dict[str, np.ndarray]
ImageFunction = Callable[
    [Float[Array, "b H W 3"], Int[Array, "b s"]], Any
]  # images in [-1, 1] and token ids → arrays of b rows


class Sampler:
    """Text → latents and photograph → reconstructions with one pipeline, and latents → images.

    Args:
        pipeline: ε_base, or any other pipeline.
        mesh: batches are split over its data and fsdp axes.
        solver, steps, guidance: `sampler`, `steps` and `guidance` of the config; guidance up to 1 means none, as in
            diffusers.
        batch: images per call, rounded up to a multiple of data x fsdp.
        seed: of all that is drawn.
        negative: prompt that takes the place of the empty one in guidance, as in diffusers.
        normalise: latent adaptive normalisation: what :meth:`generate` draws keeps, step by step, the channel
            statistics of what the pipeline draws as it was given. Takes twice the time.
        concept_scale: strength of the pipeline's adapter, where it has one.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        mesh: Mesh,
        *,
        solver: str,
        steps: int,
        guidance: float,
        batch: int,
        seed: int,
        negative: str = "",
        normalise: bool = False,
        concept_scale: float = 1.0,
    ) -> None:
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch, self.mesh, self.seed = -(-batch // ways) * ways, mesh, seed
        self._silent = not processes.is_first()
        self._schedule = pipeline.schedule
        self._latent_shape = pipeline.latent_shape
        self._given: dict[str, Any] = {}
        graphs = {}
        for name, network in {**pipeline.networks, "vae": pipeline.vae}.items():
            set_sharding(network, heads_sharding(mesh))
            graphs[name], self._given[name] = nnx.split(network)
        self._shardings = tree_shardings(self._given, mesh)
        self._given = place(self._given, self._shardings)
        self._weights = self._given
        with_guidance, factor = guidance > 1.0, pipeline.vae.pixels_per_latent

        def denoiser(weights: Any, inputs: dict[str, jax.Array], scale: jax.Array, negative_ids: jax.Array) -> Callable:
            """The prediction for these captions and concepts; what does not depend on the step is computed here."""
            unet = nnx.merge(graphs["unet"], weights["unet"])
            size = tuple(factor * side for side in inputs["latent"].shape[1:3])

            def beside_empty(empty: Any, given: Any) -> Any:
                return jax.tree.map(side_by_side, empty, given) if with_guidance else given

            def text(text_weights: Any) -> tuple[Memory, Any]:
                encode = nnx.merge(graphs["text"], text_weights)
                empty = encode.empty(len(inputs["ids"]), size, negative_ids)
                condition = beside_empty(empty, encode(inputs["ids"], size))
                return unet.keys_values(condition.encoder_hidden_states), condition.added_cond

            late = text(weights["text"])
            early = text(weights["early text"]) if "early text" in weights else None
            if "concept" in inputs:
                adapter = nnx.merge(graphs["adapter"], weights["adapter"])
                no_concept = jnp.repeat(pipeline.no_concept, len(inputs["concept"]), axis=0)
                concept = adapter(beside_empty(no_concept, inputs["concept"]))

            def predict(x: jax.Array, t: jax.Array) -> jax.Array:
                memory, added = late
                if early is not None:
                    rows = 2 * len(t) if with_guidance else len(t)
                    acts = in_rows(text_policy_acts(t), rows)  # the same in all, but each device has its own
                    memory, added = jax.tree.map(lambda *x: jax.vmap(jnp.where)(acts, *x), early, late)
                if "concept" in inputs:
                    memory = join(memory, concept, concept_scale)
                return unet(x, t, memory, added)

            return guided(predict, scale) if with_guidance else predict

        def draw(
            weights: Any,
            given: Any,
            inputs: dict[str, jax.Array],
            trajectory: Trajectory,
            scale: jax.Array,
            negative_ids: jax.Array,
        ) -> jax.Array:
            denoise = denoiser(weights, inputs, scale, negative_ids)
            anchor = denoiser(given, inputs, scale, negative_ids) if normalise else None
            return sample(denoise, self._schedule, trajectory, inputs["latent"], inputs["key"], anchor)

        # One program, whatever is drawn from, by whichever sampler, in how many steps and with what guidance; another
        # where there are two texts to choose from in each step.
        self._guidance = (np.float32(guidance), pipeline.tokenize([negative]))
        if negative and not with_guidance:
            logging.warning("negative prompt %r: has no effect, guidance %g means none", negative, guidance)
        self._from_noise = from_noise(self._schedule, solver, steps)
        self._sdrecon = lambda strength: sdrecon(self._schedule, solver, steps, strength)
        self._rows = batch_sharding(mesh)

        def decode(weights: Any, latent: jax.Array) -> jax.Array:
            return nnx.merge(graphs["vae"], weights["vae"]).to_images(latent)

        def encode(weights: Any, image: jax.Array) -> jax.Array:
            return nnx.merge(graphs["vae"], weights["vae"]).to_latents(image)

        # What one gives, the next takes as it lies.
        self._draw, self._decode, self._encode = (
            jax.jit(program, out_shardings=self._rows) for program in (draw, decode, encode)
        )

    @classmethod
    def from_config(cls, pipeline: Pipeline, mesh: Mesh, settings: ConfigDict, seed: int) -> "Sampler":
        """As the config's `pairs` or `evaluate` group says."""
        return cls(
            pipeline,
            mesh,
            solver=settings.sampler,
            steps=settings.steps,
            guidance=settings.guidance,
            batch=settings.batch,
            seed=seed,
            negative=settings.negative_prompt,
        )

    def use_policies(self, *policies: Any) -> None:
        """Draws with these policies' parameters, and otherwise with what the pipeline was given, from now on.

        A policy of the text encoders is used as the recipe says, at early timesteps only: it needs a program of its
        own. Nothing else is compiled again for other policies.
        """
        self._weights = self._given
        for policy in policies:
            for name, state in policy.items():
                role = "early text" if name == "text" else name
                merged = nnx.merge_state(self._given[name], state)
                self._weights = self._weights | {role: place(merged, self._shardings[name])}

    def whole_batches(self, each: int) -> int:
        """Of how many things, with so many images of each, the images fill whole batches: the fewest."""
        return self.batch // math.gcd(self.batch, each)

    def traced(self, resolution: tuple[int, int]) -> tuple[jax.stages.Traced, jax.stages.Traced]:
        """The programs that draw and decode a batch of a resolution from noise; the pipeline may be one of shapes."""
        rows = {"ids": ((POSITIONS,), jnp.int32), "key": ((), jax.random.key(0).dtype)}
        rows["latent"] = (self._latent_shape(resolution), jnp.float32)
        inputs = {name: jax.ShapeDtypeStruct((self.batch, *shape), dtype) for name, (shape, dtype) in rows.items()}
        inputs = place(inputs, self._rows)
        draw = self._draw.trace(self._weights, self._given, inputs, self._from_noise, *self._guidance)
        return draw, self._decode.trace(self._weights, inputs["latent"])

    def keys(self, stream: str, example_ids: Sequence[str], numbers: Sequence[int]) -> jax.Array:
        """A key for each (example, number in its pool)."""
        return stream_keys(self.seed, stream, example_ids, numbers)

    def generate(
        self,
        input_ids: Int[np.ndarray, "n s"],
        keys: jax.Array,
        resolution: tuple[int, int],
        note: str,
        concept: Float[np.ndarray, "n m f"] | None = None,
    ) -> Float[np.ndarray, "n h w c"]:
        """Latents drawn for each row of token ids, and of concept features where the pipeline has an adapter."""
        return self._along(self._from_noise, self._fresh(input_ids, keys, resolution, concept), note)

    def candidates(
        self,
        input_ids: Int[np.ndarray, "n s"],
        keys: jax.Array,
        resolution: tuple[int, int],
        judge: ImageFunction,
        note: str,
        concept: Float[np.ndarray, "n m f"] | None = None,
    ) -> tuple[Float[Array, "n h w c"], Any]:
        """As :meth:`generate`, and what `judge` makes of each. Of whole batches neither has left the devices, and the
        last ones may still be computed."""

        def program(part: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
            latents = self._drawn(self._from_noise, part)
            return latents, judge(self._decode(self._weights, latents), part["ids"])

        return self._kept(program, self._fresh(input_ids, keys, resolution, concept), note)

    def reconstructions(
        self,
        images: Float[np.ndarray, "n H W 3"],
        input_ids: Int[np.ndarray, "n s"],
        keys: Mapping[int, jax.Array],
        judge: ImageFunction,
        note: str,
    ) -> tuple[Float[Array, "n m h w c"], Any]:
        """SDRecon of images in [-1, 1] at m strengths, and what `judge` makes of each; as in :meth:`candidates`.

        Args:
            images, input_ids: of the photographs.
            keys: for each strength, n of them; strength 0 is the encoded photograph itself.
            judge, note: as in :meth:`candidates`.
        """

        def program(part: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
            encoded, ids, found = self._encode(self._weights, part["image"]), part["ids"], []
            for strength in keys:
                inputs = {"ids": ids, "key": part[f"key {strength}"], "latent": encoded}
                latents = self._drawn(self._sdrecon(strength), inputs) if strength else encoded
                found.append((latents, judge(self._decode(self._weights, latents), ids)))
            return jax.tree.map(lambda *each: jnp.stack(each, axis=1), *found)

        inputs = {"image": images, "ids": input_ids} | {f"key {strength}": of for strength, of in keys.items()}
        return self._kept(program, inputs, note)

    def _fresh(
        self, ids: np.ndarray, keys: jax.Array, resolution: tuple[int, int], concept: np.ndarray | None
    ) -> dict[str, Any]:
        """Inputs of a drawing from nothing."""
        nothing = np.broadcast_to(np.float32(0), (len(ids), *self._latent_shape(resolution)))
        return {"ids": ids, "key": keys, "latent": nothing} | ({} if concept is None else {"concept": concept})

    def reconstruct(
        self,
        latents: Float[np.ndarray, "n h w c"],
        input_ids: Int[np.ndarray, "n s"],
        keys: jax.Array,
        strength: int,
        note: str,
    ) -> Float[np.ndarray, "n h w c"]:
        """SDRecon of each latent: noised to timestep 100 * strength and denoised from there."""
        return self._along(self._sdrecon(strength), {"ids": input_ids, "key": keys, "latent": latents}, note)

    def _along(self, trajectory: Trajectory, inputs: Arrays, note: str) -> np.ndarray:
        return self._run(lambda part: self._drawn(trajectory, part), inputs, note)

    def _drawn(self, trajectory: Trajectory, part: dict[str, jax.Array]) -> jax.Array:
        return self._draw(self._weights, self._given, part, trajectory, *self._guidance)

    def decode(self, latents: Float[np.ndarray, "n h w c"], note: str) -> Float[np.ndarray, "n H W 3"]:
        """Images in [-1, 1]."""
        return self.measure_latents(latents, {}, lambda images: images, note)

    def measure_latents(
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

    def measure_images(
        self, images: Float[np.ndarray, "n H W 3"], beside: Arrays, function: Callable[..., Any], note: str
    ) -> Any:
        """As :meth:`measure_latents`, over images in [-1, 1] that are given."""
        return self._run(
            lambda part: function(part["image"], **{name: part[name] for name in beside}),
            {"image": images, **beside},
            note,
        )

    def encode(self, images: Float[np.ndarray, "n H W 3"], note: str) -> Float[np.ndarray, "n h w c"]:
        """Scaled latent means of images in [-1, 1]."""
        return self._run(lambda part: self._encode(self._weights, part["image"]), {"image": images}, note)

    def _batches(
        self, program: Callable[[dict[str, jax.Array]], Any], arrays: dict[str, Any], note: str
    ) -> Iterator[Any]:
        """What a program makes of batches of one size; the last is padded with its last row. The devices have the next
        one before a result is given out."""
        count = len(next(iter(arrays.values())))

        def run(begin: int) -> Any:
            index = np.minimum(np.arange(begin, begin + self.batch), count - 1)
            return program(place({name: value[index] for name, value in arrays.items()}, self._rows))

        begins = range(0, count, self.batch)
        bar = tqdm(begins, desc=note, unit="batch", leave=False, disable=self._silent or len(begins) == 1 or None)
        return one_ahead(run, bar)

    def _run(self, program: Callable[[dict[str, jax.Array]], Any], arrays: dict[str, Any], note: str) -> Any:
        """All batches' results, on the host."""
        count = len(next(iter(arrays.values())))
        parts = [jax.tree.map(to_host, part) for part in self._batches(program, arrays, note)]
        return jax.tree.map(lambda *rows: np.concatenate(rows)[:count], *parts)

    def _kept(self, program: Callable[[dict[str, jax.Array]], Any], arrays: dict[str, Any], note: str) -> Any:
        """All batches' results, on the devices. The last two are not waited for, but no more: a batch takes memory from
        when the devices are given it. Where the last is padded, on the host: to cut it, devices would exchange rows."""
        count, parts = len(next(iter(arrays.values()))), []
        for part in self._batches(program, arrays, note):
            jax.block_until_ready(parts[-1:])
            parts.append(part)
        if count % self.batch:
            return jax.tree.map(lambda *rows: np.concatenate([np.asarray(row) for row in rows])[:count], *parts)
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)
