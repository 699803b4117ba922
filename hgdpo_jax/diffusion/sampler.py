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
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from hgdpo_jax.config import ALWAYS
from hgdpo_jax.devices.random import stream_keys
from hgdpo_jax.devices.sharding import batch_sharding
from hgdpo_jax.devices.transfer import one_ahead, place, to_host
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.programs import Guidance, Programs, SamplerInputs
from hgdpo_jax.diffusion.sdrecon import sdrecon
from hgdpo_jax.diffusion.trajectory import State, Trajectory, from_noise
from hgdpo_jax.pictures.write import require_finite
from hgdpo_jax.run.progress import Progress

# Images in [-1, 1] and token ids → a pytree of arrays of b rows.
ImageFunction = Callable[[Float[Array, "b H W 3"], Int[Array, "b s"]], Any]
Keys = Key[Array, "n"]
TokenIds = Int[np.ndarray, "n s"]
Images = Float[np.ndarray, "n H W 3"]
Latents = Float[np.ndarray, "n h w c"]
HostState = tuple[Latents, Latents]  # as trajectory.State
Concepts = Float[np.ndarray, "n m f"]


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
        normalise: latent adaptive normalisation: what is drawn keeps, step by step, the channel statistics of what the
            pipeline draws as it was given. Takes twice the time.
        concept_scale: strength of the pipeline's adapter, where it has one.
        interval: the lowest and the highest timestep, of 1000, at which there is guidance; all unless given.

    Raises:
        UserError: guidance of a distilled model; or see :class:`hgdpo_jax.diffusion.process.Process`.
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
        interval: Sequence[int] | None = None,
    ) -> None:
        pipeline.require_guidance(guidance)
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch, self.mesh, self.seed = -(-batch // ways) * ways, mesh, seed
        self.tokenize, self.latent_shape, self._rows = pipeline.tokenize, pipeline.latent_shape, batch_sharding(mesh)
        self._process, self._solver, self._steps = pipeline.schedule, solver, steps
        self._trajectory((1, 1))  # raises for steps that there are not
        level = pipeline.schedule.level
        acts = (np.float32(level(interval[0])), np.float32(level(interval[1]))) if interval else None
        self._guidance = Guidance(np.float32(guidance), pipeline.tokenize([negative]), acts)
        if negative and guidance <= 1.0:
            logging.warning("negative prompt %r: has no effect, guidance %g means none", negative, guidance)
        self._programs = Programs(pipeline, mesh, guidance > 1.0, normalise, concept_scale)
        self._weights = self._programs.given

    @classmethod
    def from_config(cls, pipeline: Pipeline, mesh: Mesh, settings: ConfigDict, seed: int) -> "Sampler":
        """As the config's `pairs` or `evaluate` group says."""
        given = {name: settings[name] for name in ("steps", "guidance", "batch")}
        if "guidance_interval" in settings and tuple(settings.guidance_interval) != ALWAYS:
            given["interval"] = settings.guidance_interval
        return cls(pipeline, mesh, solver=settings.sampler, negative=settings.negative_prompt, seed=seed, **given)

    def use_policies(self, *policies: Any) -> None:
        """Draws with these policies' parameters, and otherwise with what the pipeline was given, from now on.

        A policy of the text encoders is used as the recipe says, at early timesteps only: it needs a program of its
        own. Nothing else is compiled again for other policies.
        """
        self._weights = given = self._programs.given
        for name, state in (item for policy in policies for item in policy.items()):
            merged = place(nnx.merge_state(given[name], state), self._programs.shardings[name])
            self._weights = self._weights | {"early text" if name == "text" else name: merged}

    def whole_batches(self, each: int) -> int:
        """The smallest number of things whose images, `each` for every one, fill whole batches."""
        return self.batch // math.gcd(self.batch, each)

    def traced(self, resolution: tuple[int, int]) -> tuple[jax.stages.Traced, jax.stages.Traced]:
        """The programs that draw and decode a batch of a resolution from noise; the pipeline may be one of shapes."""
        latent = (self.latent_shape(resolution), jnp.float32)
        rows = (self.tokenize([""]).shape[1:], jnp.int32), ((), jax.random.key(0).dtype), latent
        shapes = [jax.ShapeDtypeStruct((self.batch, *shape), dtype) for shape, dtype in rows]
        inputs, programs = SamplerInputs(None, *place(shapes, self._rows)), self._programs
        draw = programs.draw.trace(
            self._weights, programs.given, inputs, self._trajectory(self.latent_shape(resolution)), self._guidance
        )
        return draw, programs.decode.trace(self._weights, inputs.latent)

    def keys(self, stream: str, example_ids: Sequence[str], numbers: Sequence[int]) -> Keys:
        """A key for each (example, number in its pool)."""
        return stream_keys(self.seed, stream, example_ids, numbers)

    def generate(
        self, ids: TokenIds, keys: Keys, resolution: tuple[int, int], note: str, concept: Concepts | None = None
    ) -> Latents:
        """Latents drawn for each row of token ids, and of concept features where the pipeline has an adapter."""
        inputs = self._fresh(ids, keys, resolution, concept)
        trajectory = self._trajectory(self.latent_shape(resolution))
        return self._run(lambda part: self._draw(trajectory, part), inputs, note)

    def candidates(
        self,
        ids: TokenIds,
        keys: Keys,
        resolution: tuple[int, int],
        measure: ImageFunction,
        note: str,
        concept: Concepts | None = None,
    ) -> tuple[Float[Array | np.ndarray, "n h w c"], Any]:
        """As :meth:`generate`, and what `measure` makes of each.

        Whole batches stay on the devices, which may still compute the last ones.
        """

        trajectory = self._trajectory(self.latent_shape(resolution))

        def program(part: Any) -> tuple[jax.Array, Any]:
            latents = self._draw(trajectory, part)
            return latents, measure(self._decode(latents), part.ids)

        return self._run_ahead(program, self._fresh(ids, keys, resolution, concept), note)

    def drafts(
        self, ids: TokenIds, keys: Keys, resolution: tuple[int, int], steps: int, measure: ImageFunction, note: str
    ) -> Any:
        """What `measure` makes of candidates that are drawn in other steps than the sampler's."""
        trajectory = self._trajectory(self.latent_shape(resolution), steps)

        def program(part: Any) -> Any:
            return measure(self._decode(self._draw(trajectory, part)), part.ids)

        return self._run(program, self._fresh(ids, keys, resolution, None), note)

    def part_way(
        self,
        ids: TokenIds,
        keys: Keys,
        state: HostState,
        steps: tuple[int, int],
        measure: ImageFunction,
        note: str,
    ) -> tuple[HostState, Any]:
        """Some steps of candidates, from the first to before the last of `steps`.

        Args:
            ids, keys, measure, note: as in :meth:`candidates`.
            state: where they stand before; of none of the steps, :meth:`start`.

        Returns:
            Where they stand then, and what `measure` makes of the images that they predict there.
        """
        first, last = map(np.int32, steps)
        trajectory = self._trajectory(state[0].shape[1:])._replace(first=first, length=last)

        def program(part: Any) -> tuple[State, Any]:
            after = self._advance(trajectory, part)
            return after, measure(self._decode(after[1]), part.ids)

        return self._run(program, SamplerInputs(None, ids, keys, state[0], state=state), note)

    def rest(
        self, ids: TokenIds, keys: Keys, state: HostState, first: int, measure: ImageFunction, note: str
    ) -> tuple[Float[Array | np.ndarray, "n h w c"], Any]:
        """As :meth:`candidates`, of such as stand where :meth:`part_way` has left them before step `first`."""
        trajectory = self._trajectory(state[0].shape[1:])._replace(first=np.int32(first))

        def program(part: Any) -> tuple[jax.Array, Any]:
            latents, _ = self._advance(trajectory, part)
            return latents, measure(self._decode(latents), part.ids)

        return self._run_ahead(program, SamplerInputs(None, ids, keys, state[0], state=state), note)

    def start(self, count: int, resolution: tuple[int, int]) -> HostState:
        """Where candidates stand before the first step: their noise comes from their keys."""
        nothing = np.broadcast_to(np.float32(0), (count, *self.latent_shape(resolution)))
        return nothing, nothing

    def reconstructions(
        self,
        images: Images,
        ids: TokenIds,
        keys: Mapping[int, Keys],
        measure: ImageFunction,
        note: str,
        redrawn: Float[np.ndarray, "n h w 1"] | None = None,
    ) -> tuple[Float[Array | np.ndarray, "n m h w c"], Any]:
        """SDRecon of images in [-1, 1] at m strengths, and what `measure` makes of each; as in :meth:`candidates`.

        Args:
            images, ids: the photographs and their captions.
            keys: of each strength; strength 0 is the encoded photograph itself.
            measure, note: as in :meth:`candidates`.
            redrawn: 1 in the cells of a latent that are redrawn, the others keep the photograph; all unless given.
        """

        def program(part: Any) -> tuple[jax.Array, Any]:
            encoded, found = self._encode(part["images"]), []
            for strength in keys:
                inputs = SamplerInputs(None, part["ids"], part["keys"][strength], encoded, part["redrawn"])
                latents = self._draw(self._sdrecon(strength, encoded.shape[1:]), inputs) if strength else encoded
                found.append((latents, measure(self._decode(latents), part["ids"])))
            return jax.tree.map(lambda *each: jnp.stack(each, axis=1), *found)

        return self._run_ahead(program, {"images": images, "ids": ids, "keys": dict(keys), "redrawn": redrawn}, note)

    def reconstruct(self, latents: Latents, ids: TokenIds, keys: Keys, strength: int, note: str) -> Latents:
        """SDRecon of each latent: noised to timestep 100 · strength and denoised from there."""
        trajectory = self._sdrecon(strength, latents.shape[1:])
        return self._run(lambda part: self._draw(trajectory, part), SamplerInputs(None, ids, keys, latents), note)

    def decode(self, latents: Latents, note: str) -> Images:
        """Images in [-1, 1].

        Raises:
            UserError: one holds NaN or infinity.
        """
        images = self._run(self._decode, latents, note)
        names = [f"{note}, picture {number}" for number in range(len(latents))]
        require_finite(latents, names)
        require_finite(images, names)
        return images

    def encode(self, images: Images, note: str) -> Latents:
        """Scaled latent means of images in [-1, 1]."""
        return self._run(self._encode, images, note)

    def measure_latents(self, latents: Latents, ids: TokenIds, measure: ImageFunction, note: str) -> Any:
        """What `measure` makes of decoded latents; only its results leave the devices."""
        return self._run(lambda part: measure(self._decode(part[0]), part[1]), (latents, ids), note)

    def measure_images(self, images: Images, ids: TokenIds, measure: ImageFunction, note: str) -> Any:
        """As :meth:`measure_latents`, of images in [-1, 1]."""
        return self._run(lambda part: measure(*part), (images, ids), note)

    def _fresh(self, ids: TokenIds, keys: Keys, resolution: tuple[int, int], concept: Concepts | None) -> SamplerInputs:
        """Inputs of a trajectory from noise."""
        return SamplerInputs(
            concept, ids, keys, np.broadcast_to(np.float32(0), (len(ids), *self.latent_shape(resolution)))
        )

    def _trajectory(self, latent: Sequence[int], steps: int | None = None) -> Trajectory:
        """From noise to a latent of this shape. One program does for every solver, number of steps and guidance."""
        return from_noise(self._process.of_latents(*latent[:2]), self._solver, steps or self._steps)

    def _sdrecon(self, strength: int, latent: Sequence[int]) -> Trajectory:
        return sdrecon(self._process.of_latents(*latent[:2]), self._solver, self._steps, strength)

    def _draw(self, trajectory: Trajectory, part: SamplerInputs) -> Float[Array, "b h w c"]:
        return self._programs.draw(self._weights, self._programs.given, part, trajectory, self._guidance)

    def _advance(self, trajectory: Trajectory, part: SamplerInputs) -> State:
        return self._programs.advance(self._weights, self._programs.given, part, trajectory, self._guidance)

    def _decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        return self._programs.decode(self._weights, latents)

    def _encode(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        return self._programs.encode(self._weights, images)

    def _batches(self, program: Callable[[Any], Any], arrays: Any, note: str) -> Iterator[Any]:
        """What a program makes of batches of one size; the last is padded with its last row. The devices have the next
        one before a result is given out."""
        count = _rows(arrays)

        def run(begin: int) -> Any:
            index = np.minimum(np.arange(begin, begin + self.batch), count - 1)
            return program(place(jax.tree.map(lambda value: value[index], arrays), self._rows))

        begins = range(0, count, self.batch)
        return one_ahead(run, Progress(begins, desc=note, unit="batch", leave=False, disable=len(begins) < 2))

    def _run(self, program: Callable[[Any], Any], arrays: Any, note: str) -> Any:
        """All batches' results, on the host."""
        parts = [jax.tree.map(to_host, part) for part in self._batches(program, arrays, note)]
        return jax.tree.map(lambda *rows: np.concatenate(rows)[: _rows(arrays)], *parts)

    def _run_ahead(self, program: Callable[[Any], Any], arrays: Any, note: str) -> Any:
        """All batches' results, on the devices. The last two are not waited for, but no more: a batch takes memory from
        when the devices are given it. Where the last is padded, on the host: to cut it, devices would exchange rows."""
        parts: list[Any] = []
        for part in self._batches(program, arrays, note):
            jax.block_until_ready(parts[-1:])
            parts.append(part)
        if _rows(arrays) % self.batch:
            return jax.tree.map(lambda *rows: np.concatenate([*map(np.asarray, rows)])[: _rows(arrays)], *parts)
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)


def _rows(arrays: Any) -> int:
    return len(jax.tree.leaves(arrays)[0])
