"""Candidates with their scores, kept once for all stages of a run (`pairs.keep_candidates`).

    W/candidates/made_from.json       what they are drawn and scored with, written with the first of them
    W/candidates/SHA256.safetensors   those of some prompts, in a file that is named by its hash

A picture of a pool is a function of (seed, prompt, number), a reconstruction one of (seed, prompt, photograph,
strength). So a smaller pool is the first of a larger one, and of other strengths only those are made that are missing.
A candidate takes 2 · h · w · c bytes: 32 KiB at 512x512, 88 KiB at 1024x704.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from hgdpo_jax.config import ALWAYS
from hgdpo_jax.curriculum.candidates import Candidates
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.data.record import LATENT
from hgdpo_jax.run import processes, provenance
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import as_written, atomic_path, require_space, write_json

FOLDER = "candidates"
_REMEDY = "remove it, and its candidates are made again"


def open_store(config: ConfigDict, workdir: Path, inputs: Mapping[str, Any]) -> "Store | None":
    """The candidates of a run; None where its stage neither takes nor keeps any.

    Args:
        config: of the stage.
        workdir: of the run.
        inputs: what the pairs of the stage are made from.

    Raises:
        UserError: see :class:`Store`.
    """
    if not config.pairs.keep_candidates:
        return None
    # Only rounding depends on `pairs.batch`.
    keys = ["seed", "model.dtype", "pairs.sampler", "pairs.steps", "pairs.guidance"]
    keys += ["pairs.negative_prompt"] if config.pairs.negative_prompt else []
    keys += ["pairs.guidance_interval"] if tuple(config.pairs.guidance_interval) != ALWAYS else []
    contents = [provenance.content_key(name) for name in ("model.base", "pairs.scorer")]
    return Store(workdir / FOLDER, provenance.settings(config, keys) | {name: inputs[name] for name in contents})


def key_of(
    kind: str, photograph: Photograph, resolution: tuple[int, int], pixels: Float[np.ndarray, "H W 3"] | None = None
) -> str:
    """Tells a prompt's candidates of a kind from all others.

    Args:
        kind: `pool`, or how a photograph is reconstructed.
        photograph: whose id and caption they are drawn for.
        resolution: (H, W) in pixels.
        pixels: of the photograph, where they are used.
    """
    key = sha256(json.dumps([kind, photograph.id, photograph.caption, resolution]).encode())
    if pixels is not None:
        key.update(pixels.tobytes())
    return key.hexdigest()


class Store:
    """The candidates that are kept in a folder. `made` and `read` count those that this process added and took.

    Args:
        folder: W/candidates, which need not exist.
        made_from: what all are drawn and scored with, see :mod:`hgdpo_jax.run.provenance`.

    Raises:
        UserError: the folder holds candidates of something else, or a file is damaged.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any]) -> None:
        self.folder, self._made_from = folder, made_from
        self.made = self.read = 0
        self._places: dict[tuple[str, int], tuple[Path, int]] = {}
        self._require_same()
        for path in sorted(folder.glob("*.safetensors")):
            self._learn(path)
        self._load = lru_cache(maxsize=8)(_load)

    def _require_same(self) -> None:
        path = self.folder / "made_from.json"
        if path.is_file():
            with as_written(path, "remove its folder, and the candidates are made again"):
                found = {**json.loads(path.read_text())}
            remedy = "use that, leave out pairs.keep_candidates, or choose another --workdir"
            provenance.require_same(found, self._made_from, str(self.folder), remedy)
        elif any(self.folder.glob("*.safetensors")):
            raise UserError(f"{path}: is missing, so nothing says what the candidates beside it are of; remove its "
                            "folder, and they are made again")  # fmt: skip

    def _learn(self, path: Path) -> None:
        with as_written(path, _REMEDY):
            try:
                with safe_open(path, "np") as file:
                    entries = json.loads(file.metadata()["candidates"])
            except SafetensorError as error:
                raise ValueError(error) from error
            for row, (key, number) in enumerate(entries):
                self._places[key, number] = path, row

    def missing(self, keys: Sequence[str], numbers: Sequence[int]) -> tuple[list[int], list[int]]:
        """The rows of prompts, and the numbers, that have to be made: each of these prompts in each of these numbers.

        Args:
            keys: of the prompts, see :func:`key_of`.
            numbers: that are wanted of each.
        """
        wanted = [(row, number) for row, key in enumerate(keys) for number in numbers
                  if (key, number) not in self._places]  # fmt: skip
        lacking = {number for _, number in wanted}
        return list(dict.fromkeys(row for row, _ in wanted)), [number for number in numbers if number in lacking]

    def add(self, keys: Sequence[str], made: Candidates) -> None:
        """Keeps the candidates of some prompts. Raises UserError where the disk is full."""
        self._require_same()
        entries = [(key, int(number)) for key in keys for number in made.numbers]
        latents = np.ascontiguousarray(made.latents.reshape(-1, *made.latents.shape[2:]), LATENT)
        scores = np.ascontiguousarray(made.scores.reshape(-1, *made.scores.shape[2:]), np.float32)
        data = save({"latents": latents, "scores": scores}, {"candidates": json.dumps(entries)})
        self.folder.mkdir(parents=True, exist_ok=True)
        require_space(self.folder, len(data), "candidates")
        if not (self.folder / "made_from.json").is_file():
            write_json(self.folder / "made_from.json", self._made_from, shared=True)
        path = self.folder / f"{sha256(data).hexdigest()}.safetensors"
        with atomic_path(path, shared=True) as temporary:
            temporary.write_bytes(data)
        self._places |= {entry: (path, row) for row, entry in enumerate(entries)}
        self.made += len(entries)

    def take(self, keys: Sequence[str], numbers: Sequence[int]) -> Candidates:
        """These candidates of some prompts, latents in float16. Raises UserError where a file is damaged."""
        places = [self._places[key, number] for key in keys for number in numbers]
        rows = [[self._load(path)[name][row] for name in ("latents", "scores")] for path, row in places]
        (latents, scores), shape = map(np.stack, zip(*rows, strict=True)), (len(keys), len(numbers))
        return Candidates(
            latents.reshape(*shape, *latents.shape[1:]), scores.reshape(*shape, *scores.shape[1:]), np.array(numbers)
        )

    def counts(self) -> tuple[int, int]:
        """How many candidates all processes made, and how many they took that were there."""
        here = np.array([[self.made, self.read]])
        made, read = processes.map_over_processes(jax.process_count(), lambda _: here).sum(0).tolist()
        return made, read


def _load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file. Raises UserError where it is not what its name says."""
    data = path.read_bytes()
    if sha256(data).hexdigest() != path.stem:
        raise UserError(f"{path}: truncated or altered (its hash is not its name); {_REMEDY}")
    return load(data)
