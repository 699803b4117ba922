"""The evaluation of a run: every model draws the same prompts from the same seeds and is measured on them."""

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.winners import require_finite_scores
from hgdpo_jax.data.photographs import Photograph, list_examples
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.data.resolutions import settled
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.faces.embedding import FaceEmbedder
from hgdpo_jax.pictures.write import to_uint8
from hgdpo_jax.results import facts, portrait, report
from hgdpo_jax.results.measured import BEST, Drawing, differing, drawing_of, groups, measured, single
from hgdpo_jax.results.report import ConceptPerson, Pictures, Report
from hgdpo_jax.run import processes, provenance
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import atomic_path, json_hash, retried, write_json
from hgdpo_jax.run.folder import stage_config
from hgdpo_jax.run.index import Index, first_process_first, index_of_run
from hgdpo_jax.run.locks import lock_for_all
from hgdpo_jax.run.places import SCORERS
from hgdpo_jax.run.progress import Progress
from hgdpo_jax.run.settings import get_setting, named
from hgdpo_jax.scoring import personalised, sets
from hgdpo_jax.scoring.comparison import SCORED, Seen, columns, compare, differences, to_json
from hgdpo_jax.scoring.judges import VIEWS, Judges, views
from hgdpo_jax.scoring.personalised import PeoplePictures, PersonalisedDrawing
from hgdpo_jax.scoring.scorers import not_given, scorers_hash
from hgdpo_jax.scoring.sets import SetFeatures
from hgdpo_jax.training.checkpoints import tree_hash
from hgdpo_jax.training.finished import require_base

KEPT = 20  # pictures of each model that stay, one of each person
_READ = 256  # photographs that are in memory at once


def evaluate(config: ConfigDict, workdir: Path, step: str | None = None) -> dict[str, Any]:
    """Draws, measures, writes results.json, report.html and portrait.png, and persons.png where an adapter is measured;
    returns what results.json holds.

    Args:
        config: of a stage.
        workdir: of the run.
        step: of that stage, see :func:`hgdpo_jax.training.finished.finished_policy`.

    Raises:
        UserError: a stage up to `config.stage` is not finished or has another base, an input is missing, a score is not
            finite, or another command evaluates this run.
    """
    with lock_for_all(workdir / "evaluation"):
        return _evaluate(config, workdir, step)


def _evaluate(config: ConfigDict, workdir: Path, step: str | None) -> dict[str, Any]:
    if not config.pairs.scorer and config.pairs.loser != "given":
        raise UserError("config key pairs.scorer: is empty; set it to the folder of a CLIPModel such as PickScore v1")
    stage_config(workdir, config.stage)  # raises where it was not trained
    config = settled(config, workdir)
    settings, index = config.evaluate, index_of_run(workdir)
    models = measured(config, workdir)
    configs = {stage: stage_config(workdir, stage) for stages in models.values() for stage in stages}
    base = pipelines.base_hash(config.model.base, config.model.vae, config.model.lora, index)
    for stage in configs:
        require_base(workdir, stage, base)
    held = first_process_first(index, lambda: heldout(config, index))
    inputs, drawn = inputs_of(config, base, held, index), {}
    judges = Judges(config.pairs.scorer, settings.scorer, settings.other_scorer, settings.scorers, local_mesh())
    features = SetFeatures(config, local_mesh()) if sets.given(config) else None
    index.save()
    best = BEST if BEST in models else [*models][-1]
    shown = None
    for group in groups(models, configs):
        drawing = drawing_of(config, workdir, group, configs, step)
        shown = drawing if best in group else shown
        evaluator = Evaluator(config, drawing.pipeline, drawing.sampler, judges, held, features)
        for name, used in drawing.policies.items():
            mark = json_hash([[tree_hash(policy) for policy in used], inputs])
            drawing.sampler.use_policies(*used)
            drawn[name] = evaluator.draw(name, workdir / "evaluation" / f"{name}.npz", mark)
    drawn = {name: drawn[name] for name in models}
    compared = compare({name: model.seen for name, model in drawn.items()}, evaluator.measure_photographs())
    between = differences(compared, differing(config))
    people = _with_adapter(config, shown, best, held) if shown else {}
    results: dict[str, Any] = {
        "models": {name: to_json(measures) for name, measures in compared.items()},
        "differences": {name: to_json(found) for name, found in between.items()},
        "people": len(held),
        "images_per_model": len(held) * settings.images_per_prompt,
        "seed": config.seed,
        "config": configuration.to_json(config)["evaluate"],
        "not_measured": not_given(*(get_setting(config, key) for key in SCORERS)),
        **({"personalised": personalised.measures(people)} if people else {}),
    }
    singles = single(models)
    learnt = {name: stage for name in singles for stage in models[name] if configs[stage].train.objective != "sft"}
    stages = {name: report.read_stage(workdir, stage, evaluator.sampler) for name, stage in learnt.items()}
    if processes.is_first():
        write_json(workdir / "results.json", results)
        first, images = load_images(held[: report.COLUMNS], evaluator.size)
        kept = {name: model.pictures for name, model in drawn.items()}
        found = Report(
            head=facts.head(config, base, len(held), len(first), configs, step),
            lines=facts.model_lines(models, configs),
            models=compared,
            differences=between,
            pictures={name: kept[name][: report.COLUMNS].astype(np.float32) / 127.5 - 1.0 for name in kept},
            captions=[photograph.caption for photograph in first],
            photographs=images,
            stages=stages,
            compared=("base", facts.first_beside_base(singles, config.stage if config.stage in singles else "")),
            people=_persons(people, first, images, settings.concept_prompts),
            measured=personalised.lines(results.get("personalised", {})),
            not_measured=results["not_measured"] if settings.scorers else (),
        )
        with atomic_path(workdir / "report.html") as temporary:
            temporary.write_text(report.page(found))
        captions = [photograph.caption for photograph in held[:KEPT]]
        portrait.write(workdir, {name: kept[name] for name in singles}, captions)
        portrait.write_people(workdir, people, images, len(settings.concept_prompts))
    return results


def _with_adapter(
    config: ConfigDict, drawing: Drawing, best: str, held: Sequence[Photograph]
) -> dict[str, PeoplePictures]:
    """Held-out people as base and the best model draw them with an adapter; none where the drawing has no adapter."""
    if drawing.encoder is None:
        return {}
    with named("adapter.identity", config.adapter.identity):
        identity = FaceEmbedder(config.adapter.identity)
    size, prompts = next(iter(configuration.resolutions(config).values())), config.evaluate.concept_prompts
    chosen = {"base": [], best: drawing.policies[best]}
    return PersonalisedDrawing(drawing.sampler, drawing.encoder, identity, held, size, prompts).draw(chosen)


def heldout(config: ConfigDict, index: Index) -> list[Photograph]:
    """The held-out photographs that can be read. Their pixels would not fit in memory: each is read where it is used.

    Raises:
        UserError: fewer than two can be read.
    """
    size = next(iter(configuration.resolutions(config).values()))
    (listed,) = list_examples(config, "heldout", index=index)
    plain = [p for p in listed if not p.mirrored]
    begins = range(0, len(plain), _READ)
    bar = Progress(begins, desc="photographs", unit="batch", leave=False, disable=len(begins) < 2)
    held = [p for begin in bar for p in load_images(plain[begin : begin + _READ], size)[0]]
    if len(held) < 2:
        raise UserError(f"photographs {config.data.photographs}: of those held out {len(held)} can be read; evaluation "
                        "needs two")  # fmt: skip
    return held


def inputs_of(config: ConfigDict, base: str, held: Sequence[Photograph], index: Index) -> dict[str, Any]:
    """What pictures and their measures are made from, beside policies."""
    keys = ["seed", "model.dtype", "data.resolutions", "evaluate.sampler", "evaluate.steps", "evaluate.guidance",
            "evaluate.images_per_prompt"]  # fmt: skip
    keys += ["evaluate.negative_prompt"] if config.evaluate.negative_prompt else []

    def content(key: str) -> str:
        scorers = get_setting(config, key)
        with named(key, scorers):
            return processes.broadcast(lambda: scorers_hash(scorers, index)) if scorers else ""

    contents = {"model.base": base, "captions.jsonl": [[p.id, p.caption] for p in held]}
    contents |= {"pairs.scorer": content("pairs.scorer"), "evaluate.scorer": content("evaluate.scorer")}
    others = [name for name in ("other_scorer", "scorers") if config.evaluate[name]]
    contents |= {f"evaluate.{name}": content(f"evaluate.{name}") for name in others}
    contents |= processes.broadcast(lambda: sets.content(config, index))
    return provenance.settings(config, keys) | {provenance.content_key(name): value for name, value in contents.items()}


class ModelPictures(NamedTuple):
    """What the judges saw of a model's pictures, [n people, k, ...], and the first picture of the first people, at most
    :data:`KEPT`."""

    seen: Seen
    pictures: UInt8[np.ndarray, "s H W 3"]


def drawn_before(path: Path, mark: str) -> ModelPictures | None:
    """What is kept in a file; None where there is none, it has another mark or is damaged: then it is drawn again.

    Raises:
        UserError: the disk or the file server does not answer.
    """
    try:
        found = retried(lambda: dict(np.load(path)), path)
        found.pop("captions", None)  # which a study shows
        return ModelPictures(found, found.pop("pictures")) if str(found.pop("mark")) == mark else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


@dataclass(frozen=True)
class Evaluator:
    """Draws for the held-out captions, with the policies that the sampler uses, and measures what was drawn.

    Attributes:
        config: of the run.
        pipeline, sampler: that draw.
        judges: gets images in [-1, 1] and `input_ids` and returns arrays, one row for each image.
        held: held-out photographs, with their captions.
        features: gets the images and returns what distances between sets compare; None: there are none.
    """

    config: ConfigDict
    pipeline: Pipeline
    sampler: Sampler
    judges: Callable[..., Any]
    held: Sequence[Photograph]
    features: Callable[..., dict[str, Any]] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what is drawn."""
        return next(iter(configuration.resolutions(self.config).values()))

    def draw(self, name: str, path: Path, mark: str) -> ModelPictures:
        """Draws and measures, each process a part; or reads `path`, where it has the same mark.

        Raises:
            UserError: a score is not finite.
        """
        if not processes.broadcast(lambda: drawn_before(path, mark) is not None):
            self._draw(name, path, mark)
        found = drawn_before(path, mark)
        if found is None:
            raise UserError(f"{path}: was written, but cannot be read; see to the disk or the file server")
        return found

    def _draw(self, name: str, path: Path, mark: str) -> None:
        config, k = self.config, self.config.evaluate.images_per_prompt
        scorers = {"score": config.pairs.scorer, "second_score": config.evaluate.scorer}
        scorers["third_score"] = config.evaluate.other_scorer
        scorers |= {SCORED + place.name: str(place) for place in columns(config.evaluate.scorers)}
        shown: list[np.ndarray] = []  # latents of the first picture of process 0's people, who are the first

        def measure(numbers: Int[np.ndarray, "n"]) -> Seen:
            people = [self.held[number] for number in numbers]
            ids, latents = self._generate(people, k, f"draw {name}")
            seen = self.sampler.measure_latents(latents, ids, self._measure, f"measure {name}")
            for key, scorer in scorers.items():
                if key in seen:
                    require_finite_scores(seen[key], [p for p in people for _ in range(k)], scorer)
            shown.append(latents[::k][:KEPT])
            return {key: value.reshape(len(people), k, *value.shape[1:]) for key, value in seen.items()}

        found = processes.map_over_processes(len(self.held), measure)
        if processes.is_first():
            others = self.held[len(shown[0]) : KEPT]
            first = np.concatenate([shown[0], self._generate(others, 1, f"draw {name}")[1]]) if others else shown[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                pictures = to_uint8(self.sampler.decode(first, "decode"))
                captions = np.array([person.caption for person in self.held[:KEPT]])
                np.savez(temporary, **found, pictures=pictures, captions=captions, mark=np.array(mark))
        processes.barrier()

    def _measure(self, images: Any, ids: Any) -> dict[str, Any]:
        return self.judges(images, ids) | (self.features(images) if self.features else {})

    def _generate(self, people: Sequence[Photograph], k: int, note: str) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, latents) of k pictures for each caption."""
        prompts, numbers = [p for p in people for _ in range(k)], [i for _ in people for i in range(k)]
        ids = self.pipeline.tokenize([p.caption for p in prompts])
        keys = self.sampler.keys("evaluate", [p.id for p in prompts], numbers)
        return ids, self.sampler.generate(ids, keys, self.size, note)

    def measure_photographs(self) -> Seen:
        """What the judges see in views of the held-out photographs, [n people, v, ...]."""

        def measure(numbers: Int[np.ndarray, "n"]) -> Seen:
            people, images = load_images([self.held[number] for number in numbers], self.size)
            found = views(people, images)
            ids = np.repeat(self.pipeline.tokenize([p.caption for p in people]), found.shape[1], axis=0)
            pictures = found.reshape(-1, *found.shape[2:])
            seen = self.sampler.measure_images(pictures, ids, self.judges, "views")
            if self.features:  # of the photographs alone, as published
                once, features = ids[:: found.shape[1]], self.features
                seen |= self.sampler.measure_images(images, once, lambda images, _: features(images), "features")
            return {key: value.reshape(len(numbers), -1, *value.shape[1:]) for key, value in seen.items()}

        return processes.map_over_processes(len(self.held), measure, self.sampler.whole_batches(VIEWS), "photographs")


def _persons(
    people: Mapping[str, PeoplePictures], held: Sequence[Photograph], images: Pictures, templates: Sequence[str]
) -> list[ConceptPerson]:
    """The first people for the report."""
    shown = []
    for i, (person, image) in enumerate(zip(held[: report.PEOPLE], images, strict=False) if people else ()):
        heads = personalised.prompts_of(person, templates)
        row = slice(i * len(heads), (i + 1) * len(heads))
        drawn = {f"{name} + adapter": found.pictures[row] for name, found in people.items()}
        if all(len(pictures) == len(heads) for pictures in drawn.values()):  # process 0 may have drawn fewer people
            shown.append(ConceptPerson(image, heads, drawn))
    return shown
