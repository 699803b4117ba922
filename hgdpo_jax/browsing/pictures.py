"""The pictures of a page: latents decoded by the VAE, and photographs. Each is made once and kept.

    W/browse/pictures/NAME.png    the name is a hash of what the picture is made of; .jpg where it is larger than 256 px

A stage's losers are the winners of the stage before: they are one picture.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict
from PIL import Image

from hgdpo_jax.browsing.reconstructions import Reconstructor
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.devices.sharding import batch_sharding, heads_sharding, parameter_placer, tree_shardings
from hgdpo_jax.devices.transfer import one_ahead, place, to_host
from hgdpo_jax.diffusion.pipeline import load_vae
from hgdpo_jax.models.attention import set_sharding
from hgdpo_jax.pictures.write import jpeg, png, require_finite, to_uint8
from hgdpo_jax.run.files import atomic_path, json_hash
from hgdpo_jax.run.index import Index

SMALL = 256  # pixels a side, up to which a picture is kept pixel by pixel
SIDE = 512  # pixels that the longer side of a larger picture is reduced to
_AT_ONCE, _MOST = 2**20, 16  # pixels, and pictures, that a device decodes at once
_READ = 32  # photographs that are in memory at once
_THREADS = 8  # that write
Images = Float[np.ndarray, "n H W 3"]


def is_small(size: Sequence[int]) -> bool:
    """Whether a picture of this height and width is kept pixel by pixel, as PNG; others are JPEG."""
    return max(size) <= SMALL


def thumbnail(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """The file of a picture, reduced to :data:`SIDE` where it is not small."""
    if is_small(image.shape[:2]):
        return png(image)
    reduced = Image.fromarray(image)
    reduced.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return jpeg(np.asarray(reduced))


def _name(content: str, size: Sequence[int]) -> str:
    return f"{content[:16]}.{'png' if is_small(size) else 'jpg'}"


class Decoder:
    """Latents → images in [-1, 1], with a checkpoint's VAE alone.

    Args:
        config: of a stage, whose base it is.
    """

    def __init__(self, config: ConfigDict) -> None:
        self._mesh = local_mesh()
        vae = load_vae(config.model.base, config.model.vae, parameter_placer(self._mesh))
        set_sharding(vae, heads_sharding(self._mesh))
        self.pixels_per_latent = vae.pixels_per_latent
        graph, weights = nnx.split(vae)
        self._weights = place(weights, tree_shardings(weights, self._mesh))
        self._rows = batch_sharding(self._mesh)

        def decode(weights: Any, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
            return nnx.merge(graph, weights).to_images(latents)

        self._decode = jax.jit(decode, out_shardings=self._rows)

    def __call__(self, latents: Sequence[Float[np.ndarray, "h w c"]], names: Sequence[str]) -> Iterator[Images]:
        """Images of latents of one shape, batch by batch; the devices have the next one before one is given out.

        Raises:
            UserError: one holds NaN or infinity; it is named.
        """
        height, width = (side * self.pixels_per_latent for side in latents[0].shape[:2])
        size = self._mesh.size * max(1, min(_MOST, _AT_ONCE // (height * width)))

        def begin(first: int) -> tuple[int, Array]:
            rows = np.minimum(np.arange(first, first + size), len(latents) - 1)  # the last fills up the batch
            batch = np.stack([latents[row] for row in rows]).astype(np.float32)
            return first, self._decode(self._weights, place(batch, self._rows))

        for first, found in one_ahead(begin, range(0, len(latents), size)):
            images = to_host(found)[: len(latents) - first]
            require_finite(images, names[first : first + size])
            yield images


class Pictures:
    """The folder of the pictures.

    Args:
        folder: W/browse/pictures.
        index: of the photographs' content.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._index = folder, index
        self._there = {path.name for path in folder.iterdir()}
        self._used: set[str] = set()

    def of_latents(
        self, latents: Sequence[Float[np.ndarray, "h w c"]], decoder: Decoder, base: str, what: Sequence[str]
    ) -> list[str]:
        """The names of the pictures of latents of one shape, which are made unless they are there.

        Args:
            latents: of a shard.
            decoder: makes images of them.
            base: content hash of the decoder's checkpoint.
            what: each latent's name, for errors.
        """
        if not latents:
            return []
        size = [side * decoder.pixels_per_latent for side in latents[0].shape[:2]]
        hashes = [hashlib.sha256(base.encode() + latent.tobytes()).hexdigest() for latent in latents]
        names = [_name(digest, size) for digest in hashes]
        new = self._new(names)
        if new:
            chosen = [latents[row] for row in new.values()]
            images = decoder(chosen, [what[row] for row in new.values()])
            self._write(list(new), images)
        return names

    def of_photographs(self, photographs: Sequence[Photograph], resolution: tuple[int, int]) -> dict[str, str]:
        """id → name of the picture, of those photographs that can be read, cut as the pairs are."""
        names = {}
        for photograph in photographs:
            try:
                about = [self._index.hash(photograph.picture), photograph.mirrored, resolution]
            except (OSError, ValueError):
                continue  # it is not there
            names[photograph.id] = _name(json_hash(about), resolution)
        ids = list(names)
        new = {ids[row] for row in self._new(list(names.values())).values()}
        todo = [photograph for photograph in photographs if photograph.id in new]
        for begin in range(0, len(todo), _READ):
            readable, images = load_images(todo[begin : begin + _READ], resolution)
            self._write([names[photograph.id] for photograph in readable], [images])
        return {name: file for name, file in names.items() if file in self._there}

    def of_reconstructions(
        self,
        photographs: Sequence[Photograph],
        resolution: tuple[int, int],
        stage: str,
        strengths: Sequence[int],
        draw: Reconstructor | None,
    ) -> dict[str, list[str]]:
        """id → names of a photograph's reconstructions at these strengths, of those that are there.

        Args:
            photographs: of one resolution, which can be read.
            resolution: (H, W) in pixels.
            stage: tells what its pairs are made from.
            strengths: of the stage.
            draw: draws those that are not there; None leaves them out.
        """
        names = {}
        for photograph in photographs:
            about = [stage, photograph.id, self._index.hash(photograph.picture)]
            names[photograph.id] = [_name(json_hash([*about, strength]), resolution) for strength in strengths]
        new = self._new([name for each in names.values() for name in each])
        todo = [photograph for photograph in photographs if not new.keys().isdisjoint(names[photograph.id])]
        for begin in range(0, len(todo) if draw else 0, _READ):
            readable, images = load_images(todo[begin : begin + _READ], resolution)
            if draw and readable:
                self._write([name for photograph in readable for name in names[photograph.id]], draw(readable, images))
        return {name: each for name, each in names.items() if self._there.issuperset(each)}

    def _new(self, names: Sequence[str]) -> dict[str, int]:
        """name → its first row, of those that are not there."""
        self._used.update(names)
        found: dict[str, int] = {}
        for row, name in enumerate(names):
            if name not in self._there:
                found.setdefault(name, row)
        return found

    def _write(self, names: Sequence[str], batches: Iterable[Images]) -> None:
        """Writes pictures while the next are computed."""
        left, written = iter(names), list[Future[None]]()
        with ThreadPoolExecutor(_THREADS) as threads:
            for images in batches:
                written += [threads.submit(self._write_one, next(left), image) for image in to_uint8(images)]
            for one in written:
                one.result()  # raises what went wrong there
        self._there.update(names)

    def _write_one(self, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        with atomic_path(self._folder / name) as temporary:
            temporary.write_bytes(thumbnail(image))

    def remove_others(self) -> None:
        """Takes away what no page shows any more."""
        for name in self._there - self._used:
            (self._folder / name).unlink()
