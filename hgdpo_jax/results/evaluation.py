"""The evaluation of a run: every model draws the same prompts from the same seeds and is measured on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.selection import require_finite
from hgdpo_jax.data.photographs import Photograph, list_examples, load_images
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.faces.embedding import FaceEmbedder
from hgdpo_jax.models.convert import folder_hash
from hgdpo_jax.pictures.write import to_uint8
from hgdpo_jax.results import report
from hgdpo_jax.run import processes, provenance
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import atomic_path, json_hash, write_json
from hgdpo_jax.run.folder import CURRICULUM, GIVEN, NAIVE, TEXT_ENCODER, blocks_of, require_plain, stage_config
from hgdpo_jax.run.index import Index, first_process_first, index_of_run
from hgdpo_jax.run.locks import lock_for_all
from hgdpo_jax.scoring import personalised
from hgdpo_jax.scoring.comparison import METRICS, Seen, compare, differences, to_json
from hgdpo_jax.scoring.judges import VIEWS, Judges, views
from hgdpo_jax.training.checkpoints import tree_hash
from hgdpo_jax.training.finished import finished_policy, require_base, with_trained_adapter
from hgdpo_jax.training.policy import load_trainable, policy_of


class Model(NamedTuple):
    """What draws: the policies of these stages together, under the recipe, as `sample` does, or as trained."""

    stages: tuple[str, ...]
    recipe: bool = True


_HARD, _BEST = CURRICULUM["hard"], "hard + text encoder"
MODELS: dict[str, Model] = {
    "base": Model(()),
    **{name: Model((stage,)) for name, stage in CURRICULUM.items()},
    _BEST: Model((_HARD, TEXT_ENCODER)),
    "naive": Model((NAIVE,)),
    "given": Model((GIVEN,)),
    **{f"{name}, whole": Model((stage,), recipe=False) for name, stage in CURRICULUM.items()},
    "naive, whole": Model((NAIVE,), recipe=False),
    "given, whole": Model((GIVEN,), recipe=False),
}
KEPT = 20  # pictures of each model that stay, one of each person
SHOWN_STAGES = CURRICULUM | {"naive": NAIVE, "given": GIVEN}
_READ = 256  # photographs that are in memory at once

# Differences with intervals of their own: what the stages and the curriculum are to bring.
DIFFERENCES = (("hard", "base"), ("normal", "easy"), ("hard", "easy"), ("hard", "naive"))


def _asked(config: ConfigDict, workdir: Path, model: Model) -> bool:
    """Whether a model is to be measured: no stage of the curriculum beyond the config's, the others where they were
    trained; as trained beside the recipe only where there is one, for LoRA."""
    for stage in model.stages:
        in_curriculum = stage in CURRICULUM.values()
        asked = stage <= config.stage if in_curriculum else (workdir / stage / "config.json").is_file()
        if not asked or not (model.recipe or stage_config(workdir, stage).train.params == "lora"):
            return False
    return True


def _as_drawn(config: ConfigDict, stage: str, policy: Any, model: Model) -> Any:
    """A stage's policy as a model draws with it."""
    if not model.recipe or config.train.params == "all":
        return policy
    return recipe.as_drawn(policy, blocks_of(stage))


def evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Draws, measures and writes results.json and report.html; returns what results.json holds.

    Raises:
        UserError: a stage up to `config.stage` is not finished or has another base, an input is missing, a score is not
            finite, or another command evaluates this run.
    """
    require_plain(workdir)
    with lock_for_all(workdir / "evaluation"):
        return _evaluate(config, workdir)


def _evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    if not config.pairs.scorer and config.pairs.loser != "given":
        raise UserError("config key pairs.scorer: is empty; set it to the folder of a CLIPModel such as PickScore v1")
    stage_config(workdir, config.stage)  # raises where it was not trained
    settings, mesh, index = config.evaluate, local_mesh(), index_of_run(workdir)
    models = {name: model for name, model in MODELS.items() if _asked(config, workdir, model)}
    configs = {stage: stage_config(workdir, stage) for model in models.values() for stage in model.stages}
    base = pipelines.base_hash(config.model.base, config.model.vae, config.model.lora, index)
    for stage in configs:
        require_base(workdir, stage, base)
    pipeline = load_trainable(config, mesh, *(c for stage, c in configs.items() if stage == TEXT_ENCODER))
    pipeline, encoder = with_trained_adapter(pipeline, config.adapter, workdir, mesh)
    sampler = Sampler.from_config(pipeline, mesh, settings, config.seed)
    trained = {
        stage: finished_policy(workdir, stage, policy_of(pipeline, c), c if stage == TEXT_ENCODER else config)
        for stage, c in configs.items()
    }
    acting = {
        name: [_as_drawn(configs[stage], stage, trained[stage], model) for stage in model.stages]
        for name, model in models.items()
    }
    held = first_process_first(index, lambda: _heldout(config, index))
    size = next(iter(configuration.resolutions(config).values()))
    judges, inputs = Judges(config.pairs.scorer, settings.scorer, mesh), _inputs(config, base, held, index)
    index.save()
    drawn = {}
    for name, using in acting.items():
        mark = json_hash([[tree_hash(policy) for policy in using], inputs])
        sampler.use_policies(*using)
        drawn[name] = _draw(config, sampler, pipeline, judges, held, workdir / "evaluation" / f"{name}.npz", mark, name)
    seen = {name: model.seen for name, model in drawn.items()}
    compared = compare(seen, _measure_photographs(sampler, pipeline, judges, held, size))
    results = {
        "models": {name: to_json(measures) for name, measures in compared.items()},
        "differences": {name: to_json(found) for name, found in differences(compared, DIFFERENCES).items()},
        "people": len(held),
        "images_per_model": len(held) * settings.images_per_prompt,
        "seed": config.seed,
        "config": configuration.to_json(config)["evaluate"],
    }
    people: dict[str, personalised.PeoplePictures] = {}
    if encoder:
        identity, last = FaceEmbedder(config.adapter.identity), [name for name in acting if models[name].recipe][-1]
        chosen = {name: acting[name] for name in ("base", _BEST if _BEST in acting else last)}
        people = personalised.draw(pipeline, sampler, encoder, identity, held, size, settings.concept_prompts, chosen)
        results["personalised"] = personalised.measures(people)
    stages = {name: report.read_stage(workdir, s, sampler) for name, s in SHOWN_STAGES.items() if s in trained}
    if processes.is_first():
        write_json(workdir / "results.json", results)
        first, images = load_images(held[: report.COLUMNS], size)
        page = _page(results, drawn, stages, first, images, _persons(people, first, images, settings.concept_prompts))
        with atomic_path(workdir / "report.html") as temporary:
            temporary.write_text(page)
    return results


def _heldout(config: ConfigDict, index: Index) -> list[Photograph]:
    """The photographs that are held out and can be read. Their pixels would not fit in memory: each is read where it is
    looked at.

    Raises:
        UserError: fewer than two can be read.
    """
    size = next(iter(configuration.resolutions(config).values()))
    (listed,) = list_examples(config, "heldout", index=index)
    plain = [p for p in listed if not p.mirrored]
    begins = range(0, len(plain), _READ)
    bar = tqdm(begins, desc="photographs", unit="batch", leave=False, disable=len(begins) < 2)
    held = [p for begin in bar for p in load_images(plain[begin : begin + _READ], size)[0]]
    if len(held) < 2:
        raise UserError(f"photographs {config.data.photographs}: of those held out {len(held)} can be read; evaluation "
                        "needs two")  # fmt: skip
    return held


def _inputs(config: ConfigDict, base: str, held: Sequence[Photograph], index: Index) -> dict[str, Any]:
    """What pictures and their measures are made from, beside policies."""
    keys = ["seed", "model.dtype", "data.resolutions", "evaluate.sampler", "evaluate.steps", "evaluate.guidance",
            "evaluate.images_per_prompt"]  # fmt: skip
    keys += ["evaluate.negative_prompt"] if config.evaluate.negative_prompt else []
    contents = {"model.base": base, "captions.jsonl": [[p.id, p.caption] for p in held]}
    for name, folder in (("pairs.scorer", config.pairs.scorer), ("evaluate.scorer", config.evaluate.scorer)):
        contents[name] = processes.broadcast(lambda folder=folder: folder_hash(folder, index) if folder else "")
    return provenance.settings(config, keys) | {provenance.content_key(name): value for name, value in contents.items()}


class ModelPictures(NamedTuple):
    """What the judges saw of a model's pictures, [n people, k, ...], and the first picture of the first people."""

    seen: Seen
    pictures: np.ndarray


def _draw(
    config: ConfigDict,
    sampler: Sampler,
    pipeline: Pipeline,
    judges: Judges,
    held: Sequence[Photograph],
    path: Path,
    mark: str,
    name: str,
) -> ModelPictures:
    """Draws and measures with the policies that the sampler uses, each process a part; or reads what has this mark.

    Raises:
        UserError: a score is not finite.
    """
    k, resolution = config.evaluate.images_per_prompt, next(iter(configuration.resolutions(config).values()))

    def generate(people: Sequence[Photograph], k: int) -> tuple[np.ndarray, np.ndarray]:
        prompts, numbers = [p for p in people for _ in range(k)], [i for _ in people for i in range(k)]
        ids = pipeline.tokenize([p.caption for p in prompts])
        keys = sampler.keys("evaluate", [p.id for p in prompts], numbers)
        return ids, sampler.generate(ids, keys, resolution, f"draw {name}")

    shown: list[np.ndarray] = []  # latents of the first picture of process 0's people, who are the first

    def judge(numbers: np.ndarray) -> Seen:
        people = [held[number] for number in numbers]
        ids, latents = generate(people, k)
        seen = sampler.measure_latents(latents, {"input_ids": ids}, judges, f"measure {name}")
        for key, folder in (("score", config.pairs.scorer), ("second_score", config.evaluate.scorer)):
            if key in seen:
                require_finite(seen[key], [p for p in people for _ in range(k)], folder)
        shown.append(latents[::k][:KEPT])
        return {key: value.reshape(len(people), k, *value.shape[1:]) for key, value in seen.items()}

    if not processes.broadcast(lambda: path.is_file() and str(np.load(path)["mark"]) == mark):
        found = processes.map_over_processes(len(held), judge)
        if processes.is_first():
            others = held[len(shown[0]) : KEPT]
            first = np.concatenate([shown[0], generate(others, 1)[1]]) if others else shown[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                pictures = to_uint8(sampler.decode(first, "decode"))
                np.savez(temporary, **found, pictures=pictures, mark=np.array(mark))
        processes.barrier()
    found = dict(np.load(path))
    pictures = found.pop("pictures")[: report.COLUMNS].astype(np.float32) / 127.5 - 1.0
    return ModelPictures({key: value for key, value in found.items() if key != "mark"}, pictures)


def _measure_photographs(
    sampler: Sampler, pipeline: Pipeline, judges: Judges, held: Sequence[Photograph], resolution: tuple[int, int]
) -> Seen:
    """What the judges see in views of the held-out photographs, [n people, v, ...]."""

    def look(numbers: np.ndarray) -> Seen:
        people, images = load_images([held[number] for number in numbers], resolution)
        of_each = views(people, images)
        ids = np.repeat(pipeline.tokenize([p.caption for p in people]), of_each.shape[1], axis=0)
        seen = sampler.measure_images(of_each.reshape(-1, *of_each.shape[2:]), {"input_ids": ids}, judges, "views")
        return {key: value.reshape(len(numbers), -1, *value.shape[1:]) for key, value in seen.items()}

    return processes.map_over_processes(len(held), look, sampler.whole_batches(VIEWS), "photographs")


def _persons(
    people: Mapping[str, personalised.PeoplePictures],
    held: Sequence[Photograph],
    images: np.ndarray,
    templates: Sequence[str],
) -> list[report.ConceptPerson]:
    """The first people for the report."""
    shown = []
    for i, (person, image) in enumerate(zip(held[: personalised.SHOWN], images, strict=False) if people else ()):
        heads = personalised.prompts_of(person, templates)
        row = slice(i * len(heads), (i + 1) * len(heads))
        drawn = {f"{name} + adapter": found.pictures[row] for name, found in people.items()}
        if all(len(pictures) == len(heads) for pictures in drawn.values()):  # process 0 may have drawn fewer people
            shown.append(report.ConceptPerson(image, heads, drawn))
    return shown


def _page(
    results: Mapping[str, Any],
    drawn: Mapping[str, ModelPictures],
    stages: Mapping[str, report.Stage],
    held: Sequence[Photograph],
    images: np.ndarray,
    people: Sequence[report.ConceptPerson],
) -> str:
    """The report."""
    return report.page(
        models=results["models"],
        titles=_titles(results),
        pictures={name: model.pictures for name, model in drawn.items()},
        captions=[photograph.caption for photograph in held[: report.COLUMNS]],
        photographs=images[: report.COLUMNS],
        stages=list(stages.items()),
        compared=("base", [name for name in drawn if name in SHOWN_STAGES or name == "base"][-1]),
        people=people,
        measured=personalised.lines(results.get("personalised", {})),
    )


def _titles(results: Mapping[str, Any]) -> dict[str, str]:
    """Of the metrics that were measured."""
    return {name: title for name, title in METRICS.items() if name in results["models"]["base"]}


def show(results: dict[str, Any]) -> None:
    """The table in the terminal: what chose nothing, then the rest."""
    table = Table(
        title=f"{results['images_per_model']} images per model for {results['people']} held-out people, the same seeds"
    )
    table.add_column("")
    for title in _titles(results).values():
        table.add_column(title, justify="right")
    for model, row in results["models"].items():
        table.add_row(model, *(f"{row[name]:.3f}" for name in _titles(results)))
    console = Console(width=190)
    console.print(table)
    for line in personalised.lines(results.get("personalised", {})):
        console.print(line)
