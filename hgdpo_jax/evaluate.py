"""Base, easy, normal and hard on the held-out captions: a table, W/results.json and W/report.html.

python -m hgdpo_jax.evaluate --config configs/stage3.py[:variant] --workdir W

Every model draws the same prompts from the same seeds. What a model drew is kept in W/evaluation and not drawn again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from hgdpo_jax import command, files, provenance, runtime
from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.selection import require_finite
from hgdpo_jax.data.photographs import SPLITS, list_photographs, load_images
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.painter import Painter
from hgdpo_jax.files import json_hash, whole, write_json
from hgdpo_jax.models.convert import folder_hash
from hgdpo_jax.scoring import personalised, report
from hgdpo_jax.scoring.appearance import hue_distance, hue_vector, sharpness
from hgdpo_jax.scoring.distance import frechet_distance, kernel_distance
from hgdpo_jax.scoring.identity import Identity
from hgdpo_jax.scoring.preference import Scorer
from hgdpo_jax.training import policy as policies
from hgdpo_jax.training.checkpoints import tree_hash

# Model → the stages whose policies draw together.
MODELS: dict[str, tuple[str, ...]] = {
    "base": (),
    **{name: (stage,) for name, stage in policies.CURRICULUM.items()},
    "hard + text encoder": (policies.CURRICULUM["hard"], policies.TEXT_ENCODER),
}
METRICS = {
    "preference_score": "preference score ↑",
    "win_rate": "win rate over base ↑",
    "frechet_distance": "Fréchet distance ↓",
    "kernel_distance": "kernel distance ↓",
    "sharpness": "sharpness ↑",
    "hue_distance": "hue distance to base",
}
Drawn = dict[str, np.ndarray]


def compare(drawn: dict[str, Drawn], photographs: Drawn, heldout: np.ndarray) -> dict[str, dict[str, float]]:
    """Metrics of each model.

    Args:
        drawn: model → {score [n], embedding [n, p], sharpness [n], hue [n, 2]}, the same prompts and seeds in each;
            `base` is among them.
        photographs: the same of the photographs and their mirror images.
        heldout: whether a photograph is held out, bool.
    """
    base = drawn["base"]
    return {
        name: {
            "preference_score": float(model["score"].mean(dtype=np.float64)),
            "win_rate": float(np.mean(0.5 + 0.5 * np.sign(model["score"] - base["score"]))),
            "frechet_distance": frechet_distance(model["embedding"], photographs["embedding"]),
            "kernel_distance": kernel_distance(model["embedding"], photographs["embedding"][heldout]),
            "sharpness": float(model["sharpness"].mean(dtype=np.float64)),
            "hue_distance": hue_distance(model["hue"], base["hue"]),
        }
        for name, model in drawn.items()
    }


def _asked(config: ConfigDict, workdir: Path, stages: Sequence[str]) -> bool:
    """Whether a model is to be measured: no stage of the curriculum beyond the config's, the text encoder where it was
    trained."""
    return all(
        (workdir / stage / "config.json").is_file() if stage == policies.TEXT_ENCODER else stage <= config.stage
        for stage in stages
    )


def evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Draws, measures and writes results.json and report.html; returns what results.json holds.

    Raises:
        UserError: a stage up to `config.stage` is not finished or has another base, an input is missing, a score is not
            finite, or another command evaluates this run.
    """
    files.require_plain(workdir)
    with runtime.owned(workdir / "evaluation"):
        return _evaluate(config, workdir)


def _evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    settings, resolution = config.evaluate, next(iter(configuration.resolutions(config).values()))
    mesh, index = runtime.local_mesh(), runtime.index_of(workdir)
    models = {name: stages for name, stages in MODELS.items() if _asked(config, workdir, stages)}
    configs = {stage: policies.stage_config(workdir, stage) for stages in models.values() for stage in stages}
    base = pipelines.content_hash(config.model.base, config.model.vae, index)
    for stage in configs:
        policies.require_base(workdir, stage, base)
    pipeline = policies.load(config, mesh, *(c for stage, c in configs.items() if stage == policies.TEXT_ENCODER))
    pipeline, encoder = policies.with_trained_adapter(pipeline, config.adapter, workdir, mesh)
    painter = Painter(
        pipeline,
        mesh,
        sampler=settings.sampler,
        steps=settings.steps,
        guidance=settings.guidance,
        batch=settings.batch,
        seed=config.seed,
    )
    scorer = Scorer(config.pairs.scorer, mesh)
    trained = {stage: policies.finished(workdir, stage, policies.of(pipeline, c)) for stage, c in configs.items()}

    def look(images: jax.Array, input_ids: jax.Array) -> Drawn:
        judgement = scorer(images, input_ids)
        return {
            "score": judgement.score,
            "embedding": judgement.embedding,
            "sharpness": sharpness(images),
            "hue": hue_vector(images),
        }

    held = list_photographs(config.data.photographs, "heldout")
    prompts = [p for p in held for _ in range(settings.images_per_prompt)]
    numbers = [i for _ in held for i in range(settings.images_per_prompt)]
    ids = pipeline.tokenize([p.caption for p in prompts])
    keys = painter.keys("evaluate", [p.id for p in prompts], numbers)
    shown = np.arange(0, len(prompts), settings.images_per_prompt)[: report.COLUMNS]
    (workdir / "evaluation").mkdir(parents=True, exist_ok=True)
    settings_of_drawing = ("seed", "model.dtype", "data.resolutions", "evaluate.sampler", "evaluate.steps",
                           "evaluate.guidance", "evaluate.images_per_prompt")  # fmt: skip
    inputs = provenance.settings(config, settings_of_drawing) | {
        provenance.content("model.base"): base,
        provenance.content("pairs.scorer"): folder_hash(config.pairs.scorer, index),
        provenance.content("captions.jsonl"): [[p.id, p.caption] for p in held],
    }
    index.save()
    drawn: dict[str, Drawn] = {}
    for name, stages in models.items():
        mark = json_hash([[tree_hash(trained[stage]) for stage in stages], inputs])
        path = workdir / "evaluation" / f"{name}.npz"
        found = dict(np.load(path)) if path.is_file() else {}
        if str(found.get("mark")) != mark:
            painter.use(*(trained[stage] for stage in stages))
            latents = painter.generate(ids, keys, resolution, f"draw {name}")
            found = painter.measure(latents, {"input_ids": ids}, look, f"measure {name}")
            require_finite(found["score"], prompts, config.pairs.scorer)
            found |= {"pictures": painter.decode(latents[shown], "decode"), "mark": np.array(mark)}
            with whole(path) as temporary:
                np.savez(temporary, **found)
        drawn[name] = found

    photographs, heldout = _photographs(config, resolution, painter, look, pipeline)
    measured = compare(drawn, photographs, heldout)
    results = {
        "models": measured,
        "photographs": {
            "preference_score": float(photographs["score"][heldout].mean(dtype=np.float64)),
            "sharpness": float(photographs["sharpness"].mean(dtype=np.float64)),
        },
        "images_per_model": len(prompts),
        "seed": config.seed,
        "config": configuration.to_json(config)["evaluate"],
    }
    shown_people: list[report.Person] = []
    if encoder:
        faces, images = load_images(held, resolution)
        chosen = {name: [trained[s] for s in models[name]] for name in ("base", list(models)[-1])}
        identity, templates = Identity(config.adapter.identity), settings.concept_prompts
        people = personalised.draw(pipeline, painter, encoder, identity, faces, images, templates, chosen)
        results["personalised"] = {name: found.measures() for name, found in people.items()}
        for i, person in enumerate(faces[: personalised.SHOWN]):
            heads = personalised.prompts_of(person, templates)
            row = slice(i * len(heads), (i + 1) * len(heads))
            drawn_of = {f"{name} + adapter": found.pictures[row] for name, found in people.items()}
            shown_people.append(report.Person(images[i], heads, drawn_of))
    write_json(workdir / "results.json", results)
    page = report.page(
        models=measured,
        titles=METRICS,
        pictures={name: model["pictures"] for name, model in drawn.items()},
        captions=[prompts[i].caption for i in shown],
        photographs=load_images([prompts[i] for i in shown], resolution)[1],
        stages=[
            (name, report.stage(workdir, stage, painter))
            for name, stage in policies.CURRICULUM.items()
            if stage in trained
        ],
        people=shown_people,
        distances=results.get("personalised", {}),
    )
    with whole(workdir / "report.html") as temporary:
        temporary.write_text(page)
    return results


def _photographs(
    config: ConfigDict, resolution: tuple[int, int], painter: Painter, look: Any, pipeline: Any
) -> tuple[Drawn, np.ndarray]:
    """The photographs and their mirror images, measured like the models' images; and which are held out."""
    batch = config.evaluate.batch
    measured: list[Drawn] = []
    heldout: list[bool] = []
    listed = list_photographs(config.data.photographs, *SPLITS, mirror=True)
    for begin in range(0, len(listed), batch):
        part, images = load_images(listed[begin : begin + batch], resolution)
        rows = np.minimum(np.arange(batch), len(part) - 1)
        ids = pipeline.tokenize([p.caption for p in part])
        arrays = runtime.to_devices({"images": images[rows], "ids": ids[rows]}, painter.mesh)
        found = look(arrays["images"], arrays["ids"])
        measured.append({name: np.asarray(value)[: len(part)] for name, value in found.items()})
        heldout += [p.split == "heldout" for p in part]
    return {name: np.concatenate([m[name] for m in measured]) for name in measured[0]}, np.array(heldout)


def show(results: dict[str, Any]) -> None:
    """The table in the terminal."""
    table = Table(title=f"{results['images_per_model']} images per model, held-out captions, the same seeds")
    table.add_column("")
    for title in METRICS.values():
        table.add_column(title, justify="right")
    for name, row in results["models"].items():
        table.add_row(name, *(f"{row[key]:.3f}" for key in METRICS))
    console = Console(width=140)
    console.print(table)
    for name, row in results.get("personalised", {}).items():
        distance = f"{row['identity_distance']:.3f} ± {row['identity_standard_error']:.3f}"
        other, faces = f"{row['distance_to_another_person']:.3f}", f"{row['faces_found']:.0%}"
        console.print(f"{name} + adapter: identity distance {distance}, to another person {other}; faces in {faces}")


def main() -> None:
    config, workdir = command.parse("Measures base and every stage, writes results.json and report.html.")
    show(evaluate(config, workdir))
    print(f"{workdir / 'results.json'}, {workdir / 'report.html'}")


if __name__ == "__main__":
    command.run(main)
