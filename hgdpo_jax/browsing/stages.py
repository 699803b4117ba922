"""The pairs of a run's stages, finished or not, as their page shows them."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hgdpo_jax.browsing.pictures import Decoder, Pictures
from hgdpo_jax.browsing.reconstructions import Reconstructor, strengths_of
from hgdpo_jax.curriculum.missing import FILTERED, why_no_record
from hgdpo_jax.data.built import files_of, list_shards, read_shard, split_of
from hgdpo_jax.data.photographs import Photograph, list_all
from hgdpo_jax.data.ratings import Ratings, pair_hash, read_kept
from hgdpo_jax.data.record import Record
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import as_written, file_hash, json_hash
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.progress import Progress
from hgdpo_jax.run.provenance import content_key, require_same
from hgdpo_jax.run.settings import CURRICULUM, read_config

BASE = content_key("model.base")
_TITLES = {stage: name for name, stage in CURRICULUM.items()}


class Stage(NamedTuple):
    """A stage of which some pairs are there: its name, W/NAME/pairs, the settings, what the pairs are made from, and
    how people rated them."""

    name: str
    folder: Path
    config: ConfigDict
    made_from: Mapping[str, Any]
    ratings: Ratings

    @property
    def finished(self) -> bool:
        """Whether all its pairs are there."""
        return (self.folder / "manifest.json").is_file()

    @property
    def key(self) -> str:
        """Tells what its pairs are made from."""
        return json_hash(dict(self.made_from))[:16]

    @property
    def base(self) -> tuple[str, str, str]:
        """Where its base, another VAE and a LoRA lie."""
        model = self.config.model
        return model.base, model.vae, model.lora

    @property
    def has_photographs(self) -> bool:
        """Whether photographs belong beside its pairs: not where they are the winners themselves."""
        return self.config.pairs.winner not in ("photograph", "given")


def open_stages(workdir: Path, index: Index) -> list[Stage]:
    """The stages of a run that have pairs with losers, in the order of the curriculum.

    Args:
        workdir: of the run.
        index: spares reading the base.

    Raises:
        UserError: there is none; one does not say with which settings it is built, or its base is another now.
    """
    names = sorted(path.parent.parent.name for path in workdir.glob("*/pairs/building.json"))
    stages = [_open(workdir, name) for name in sorted(names, key=lambda n: (n not in _TITLES, n))]
    stages = [stage for stage in stages if stage.config.pairs.loser != "none"]
    if not stages:
        raise UserError(f"{workdir}: no stage has a pair yet; run python -m hgdpo_jax.pairs first")
    bases = {stage.base: "" for stage in stages}
    for base in bases:
        bases[base] = pipelines.base_hash(*base, index=index)
    for stage in stages:
        require_same({BASE: stage.made_from[BASE]}, {BASE: bases[stage.base]}, str(stage.folder), "use that base")
    return stages


def _open(workdir: Path, name: str) -> Stage:
    folder = workdir / name / "pairs"
    settings = [path for path in (folder / "config.json", workdir / name / "config.json") if path.is_file()]
    if not settings:
        raise UserError(f"{folder}: does not say with which settings it is built; run pairs again with those, which "
                        "changes nothing else")  # fmt: skip
    with as_written(folder / "building.json", "remove the folder, and its shards are made again"):
        made_from = {**json.loads((folder / "building.json").read_text())}
        made_from[BASE] = str(made_from[BASE])
    manifest = folder / "manifest.json"
    ratings = read_kept(folder, file_hash(manifest)) if manifest.is_file() else Ratings()
    return Stage(name, folder, read_config(settings[0]), made_from, ratings)


class Sources(NamedTuple):
    """What the pictures of a stage are made of: the VAE, the photographs beside the pairs, by their ids, and what draws
    their reconstructions, or None."""

    decoder: Decoder
    photographs: Mapping[str, Photograph]
    reconstructor: Reconstructor | None = None


def photographs_of(stage: Stage, index: Index) -> dict[str, Photograph]:
    """id → photograph, of what belongs beside a stage's pairs; none, and a warning, where they cannot be listed.

    Args:
        stage: with its settings.
        index: spares opening those that it knows.
    """
    if not stage.has_photographs:
        return {}
    try:
        _, listed = list_all(stage.config, stage.config.data.split, "heldout", index=index)
    except UserError as error:
        logging.warning("%s; the page of %s shows no photographs", error, stage.name)
        return {}
    return {photograph.id: photograph for photograph in listed}


def describe(stage: Stage, sources: Sources, pictures: Pictures) -> dict[str, Any]:
    """What the page says of a stage, as JSON; makes the pictures.

    Each of its `rows` is a pair: [id, caption, split, the pictures of winner, loser and photograph, the scores of
    winner and loser, the winner's number, hash of the pair, which of it people rated as better, the pictures of the
    reconstructions at the stage's `strengths`, if any]; "" stands for nothing.
    """
    config, pairs, shards = stage.config, stage.config.pairs, list_shards(stage.folder)
    rows: list[list[Any]] = []
    reasons: dict[str, str] = {}
    total = sum(len(note.records) for shard in shards for note in files_of(shard).values())
    with Progress(total=total, desc=f"{stage.name} pictures", unit="pair") as bar:
        for shard in shards:
            built = read_shard(shard)
            reasons |= why_no_record(config, built.examples, [record["id"] for record in built.records])
            rows += _rows(stage, split_of(shard), built.records, sources, pictures)
            bar.update(len(built.records))
    written = stage.folder / "without_pair.json"
    if stage.finished and written.is_file():
        with as_written(written, "run pairs again, which writes it"):
            reasons = {name: str(reason) for name, reason in json.loads(written.read_text()).items()}
    there = {row[0] for row in rows}
    filtered = sum(reason.endswith(FILTERED) for name, reason in reasons.items() if name not in there)
    without = Counter(reason for name, reason in reasons.items() if name not in there)
    return {
        "name": stage.name,
        "title": _TITLES.get(stage.name, stage.name),
        "key": stage.key,
        "finished": stage.finished,
        "scored": pairs.loser != "given",
        "winner": pairs.winner,
        "loser": pairs.loser,
        "pool": pairs.pool_size,
        "strengths": strengths_of(config),
        "kept": len(rows) / (len(rows) + filtered) if rows and pairs.keep_if_winner_scores_higher else None,
        "without": dict(without.most_common()),
        "rows": rows,
    }


def _rows(
    stage: Stage, split: str, records: Sequence[Record], sources: Sources, pictures: Pictures
) -> Iterator[list[Any]]:
    """The rows of a shard."""
    height, width = map(int, split.partition("_")[2].split("x"))
    latents = [record[side] for side in ("winner", "loser") for record in records]
    what = [f"{side} of {record['id']}" for side in ("winner", "loser") for record in records]
    base = stage.made_from[BASE]
    names = pictures.of_latents(latents, sources.decoder, base, what)
    shown = [sources.photographs[record["id"]] for record in records if record["id"] in sources.photographs]
    beside = pictures.of_photographs(shown, (height, width))
    drawn: dict[str, list[str]] = {}
    if strengths := strengths_of(stage.config):
        there = [photograph for photograph in shown if photograph.id in beside]
        drawn = pictures.of_reconstructions(there, (height, width), stage.key, strengths, sources.reconstructor)
    for record, winner, loser in zip(records, names, names[len(records) :], strict=False):
        scores = [float(f"{record[side]:.5g}") for side in ("winner_score", "loser_score")]
        photograph, rated = beside.get(record["id"], ""), stage.ratings.better.get(record["id"], "")
        common = [record["id"], record["caption"], split, winner, loser, photograph]
        number, hashed = int(record["winner_number"]), pair_hash(record)
        yield [*common, *scores, number, hashed, rated, drawn.get(record["id"], [])]
