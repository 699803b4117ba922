"""Candidates that are kept for all stages of a run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.candidates import Candidates
from hgdpo_jax.curriculum.store import FOLDER, Store, open_store
from hgdpo_jax.curriculum.winners import Group, Pool, Reconstruction
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import file_hash
from hgdpo_jax.run.settings import load_config

SIZE = (32, 32)


class Fake(Sampler):
    """Draws what depends on a prompt's name and a number, as the sampler does, and counts."""

    def __init__(self) -> None:
        self.drawn: list[tuple[str, int]] = []

    def keys(self, stream: str, names: Sequence[str], numbers: Sequence[int]) -> list[tuple[str, int]]:
        return list(zip(names, numbers, strict=True))

    def candidates(self, ids: Any, keys: Any, resolution: Any, measure: Any, note: str) -> tuple[np.ndarray, Any]:
        self.drawn += keys
        values = np.array([10.0 * ord(name) + number for name, number in keys], np.float32)
        return np.broadcast_to(values[:, None, None, None], (len(keys), 4, 4, 8)), np.sin(values)

    def reconstructions(self, images: Any, ids: Any, keys: Mapping[int, Any], *_: Any) -> tuple[np.ndarray, Any]:
        made = [self.candidates(ids, keys[strength], None, None, "") for strength in keys]
        return np.stack([m[0] for m in made], axis=1), np.stack([m[1] for m in made], axis=1)


def group_of(names: str, pixels: float = 0.0) -> Group:
    photographs = [Photograph(name, Path(), f"caption of {name}") for name in names]
    images = np.full((len(names), *SIZE, 3), pixels, np.float32)
    return Group(photographs, np.zeros((len(names), 77), np.int32), SIZE, images)


def of_kind(cls: Any, store: Store | None, **settings: Any) -> tuple[Any, Fake]:
    """Winners that a fake sampler draws, and the sampler."""
    winners = object.__new__(cls)
    winners.settings, winners.sampler, winners.store = configuration.default().pairs, Fake(), store
    winners.scorers = []
    winners.settings.update(settings)
    return winners, winners.sampler


def equal(a: Candidates, b: Candidates) -> bool:
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def test_only_what_is_missing_is_made_and_nothing_depends_on_what_was_there(tmp_path: Path) -> None:
    def pool(names: str, size: int, store: Store | None) -> tuple[Candidates, Fake]:
        winners, sampler = of_kind(Pool, store, pool_size=size)
        return winners.candidates(group_of(names))(), sampler

    store = Store(tmp_path / FOLDER, {})
    assert not store.folder.exists()
    for names, size, made in (("ab", 4, 8), ("ab", 2, 0), ("a", 6, 2), ("abc", 3, 3), ("abc", 6, 6)):
        # Of the last b lacks 4 and 5, c lacks 3, 4 and 5: both are made in 3, 4 and 5.
        found, sampler = pool(names, size, store)
        assert equal(found, pool(names, size, None)[0])
        assert len(sampler.drawn) == made
    assert (store.made, store.read) == (8 + 2 + 3 + 6, 0 + 4 + 4 + 6 + 12)
    again = Store(tmp_path / FOLDER, {})  # another command
    assert equal(pool("cab", 6, again)[0], pool("cab", 6, None)[0]) and again.counts() == (0, 18)

    def recon(pixels: float, strengths: tuple[int, ...]) -> list[int]:
        winners, sampler = of_kind(Reconstruction, again, winner="sdrecon", strengths=strengths)
        winners.candidates(group_of("ab", pixels))()
        return [number for _, number in sampler.drawn]

    assert recon(0.0, (4, 5)) == [4, 4, 5, 5] and recon(0.0, (1, 4, 5)) == [1, 1]
    assert recon(0.5, (1, 5)) == [1, 1, 5, 5]  # of other pixels
    moved = group_of("a")._replace(photographs=[Photograph("a", Path(), "another caption")])
    winners, sampler = of_kind(Pool, again, pool_size=2)
    winners.candidates(moved)()
    assert len(sampler.drawn) == 2


def test_candidates_of_something_else_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    folder, config = tmp_path / FOLDER, configuration.default()
    inputs = {"content of model.base": "a" * 64, "content of pairs.scorer": "b" * 64}
    assert open_store(config, tmp_path, inputs) is None
    config.pairs.keep_candidates = True
    winners, _ = of_kind(Pool, open_store(config, tmp_path, inputs), pool_size=2)
    winners.candidates(group_of("a"))()
    config.pairs.pool_size, config.pairs.batch, config.pairs.strengths = 4, 32, (1,)  # of a stage, not of the store
    assert open_store(config, tmp_path, inputs) is not None
    for change, line in (
        (
            {"content of model.base": "c" * 64},
            r"content of model\.base=sha256 c{12}…: .*candidates was made with",
        ),
        ({"content of pairs.scorer": "c" * 64}, r"content of pairs\.scorer=sha256"),
    ):
        with pytest.raises(UserError, match=line):
            open_store(config, tmp_path, inputs | change)
    for key, value in (
        ("steps", 9),
        ("guidance", 1.5),
        ("sampler", "ddim"),
        ("negative_prompt", "blurry"),
        ("guidance_interval", (200, 800)),
    ):
        other = config.copy_and_resolve_references()
        other.pairs[key] = value
        shown = re.escape(repr([*value] if isinstance(value, tuple) else value))
        line = rf"pairs\.{key}={shown}: .*candidates was made with .*leave out pairs\.keep_candidates"
        with pytest.raises(UserError, match=line):
            open_store(other, tmp_path, inputs)
    (path,) = folder.glob("*.safetensors")
    assert file_hash(path) == path.stem
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x01")
    winners, _ = of_kind(Pool, open_store(config, tmp_path, inputs), pool_size=2)
    with pytest.raises(UserError, match="truncated or altered.*remove it, and its candidates are made again"):
        winners.candidates(group_of("a"))()
    path.write_bytes(content[:40])
    with pytest.raises(UserError, match="is not as it was written.*remove it, and its candidates are made again"):
        open_store(config, tmp_path, inputs)
    (folder / "made_from.json").unlink()
    with pytest.raises(UserError, match=r"made_from\.json: is missing"):
        open_store(config, tmp_path, inputs)
    with pytest.raises(UserError, match="pairs.keep_candidates=True: does nothing here"):
        load_config("configs/given.py:sd15", ["pairs.keep_candidates=true"])


def test_a_score_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / FOLDER, {})
    winners, sampler = of_kind(Pool, store, pool_size=2)
    drawn = sampler.candidates
    sampler.candidates = lambda *given: (drawn(*given)[0], np.array([0.0, np.nan]))  # type: ignore[method-assign]
    with pytest.raises(UserError, match="prompt 'caption of a' of a: its score is NaN"):
        winners.candidates(group_of("a"))()
    assert not store.folder.exists()
