"""Several runs compared (`evaluate --runs`): each draws the same prompts from the same seeds and is measured."""

import datetime
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from hgdpo_jax import __version__
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.data.resolutions import settled
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.results import images, report
from hgdpo_jax.results.evaluation import Evaluator, ModelPictures, heldout, inputs_of
from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import atomic_path, is_empty, json_hash, write_json
from hgdpo_jax.run.folder import BASE_STAGE, PERSONALISE, TEXT_ENCODER, last_stage, stage_config, stage_folder
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.locks import lock_for_all
from hgdpo_jax.run.prompts import read_prompts
from hgdpo_jax.run.settings import get_setting, overridden
from hgdpo_jax.scoring import reproduction, sets
from hgdpo_jax.scoring.comparison import METRICS, OF_PHOTOGRAPHS, Measures, Seen, compare, differences, to_json
from hgdpo_jax.scoring.judges import Judges

_DRAWN = "drawn"  # folder of what was drawn, which no command draws again
_ALSO = ("text_encoder", "lan", "all", "up")  # behind a stage; or a number, the weight of its LoRA
# What an override may change: how is drawn and measured. The rest is what the runs were trained with.
_CHANGED = ("evaluate.", "pairs.scorer", "data.photographs")
_SCORERS = {"preference_score": "pairs.scorer", "win_rate": "pairs.scorer", "second_score": "evaluate.scorer"}
_SCORERS |= {"second_win_rate": "evaluate.scorer", "third_score": "evaluate.other_scorer"}
_SCORERS |= {"third_win_rate": "evaluate.other_scorer", "kernel_distance": "pairs.scorer"}
_SCORERS |= {"frechet_distance": "pairs.scorer"}


class Run(NamedTuple):
    """A row of the comparison.

    Attributes:
        name: as it was asked for.
        workdir: of the run.
        stage: its folder in there, or `base`.
        text_encoder: draws with the text encoder's LoRA too.
        normalise: draws with latent adaptive normalisation.
        weight, blocks: of its LoRA, see :func:`hgdpo_jax.results.images.from_run`; the recipe's where None.
    """

    name: str
    workdir: Path
    stage: str
    text_encoder: bool
    normalise: bool
    weight: float | None = None
    blocks: str | None = None

    @property
    def config(self) -> ConfigDict:
        """That of its stage; of the last one for the base."""
        stage = last_stage(self.workdir) if self.stage == BASE_STAGE else self.stage
        return settled(stage_config(self.workdir, stage), self.workdir)


def parse_run(text: str) -> Run:
    """`WORKDIR[:STAGE[+text_encoder][+lan][+WEIGHT][+all|up]]`. STAGE is base, easy, normal, hard or a stage's folder;
    without it what `sample` draws: the last stage, with the text encoder where it was trained.

    Raises:
        UserError: no stage was trained in such a folder, or not that one.
    """
    folder, stage = (text, "") if Path(text).is_dir() or ":" not in text else text.rsplit(":", 1)
    workdir, (name, *also) = Path(folder), stage.split("+")
    weights = [float(part) for part in also if re.fullmatch(r"\d+(\.\d+)?", part)]
    blocks = [part for part in also if part in ("all", "up")]
    unknown = [part for part in also if part not in _ALSO and not re.fullmatch(r"\d+(\.\d+)?", part)]
    if unknown or len(weights) > 1 or len(blocks) > 1:
        wrong = f"+{unknown[0]} is unknown" if unknown else "one weight and one kind of blocks are enough"
        raise UserError(f"--runs {text}: {wrong}; expects {', '.join(f'+{x}' for x in _ALSO)} or a weight such as +0.5")
    found = stage_folder(name) if name else last_stage(workdir)
    if found == PERSONALISE:
        raise UserError(f"--runs {text}: {PERSONALISE} draws people from photographs; choose another stage")
    if found != BASE_STAGE:
        stage_config(workdir, found)
    if "text_encoder" in also:
        stage_config(workdir, TEXT_ENCODER)
    with_text = not name or "text_encoder" in also
    weight, where = weights[0] if weights else None, blocks[0] if blocks else None
    return Run(text.rstrip("/"), workdir, found, with_text, "lan" in also, weight, where)


def compare_runs(
    asked: Sequence[str],
    prompts: Path | None,
    seeds: int,
    out: Path,
    overrides: Sequence[str] = (),
    base: str | None = None,
) -> dict[str, Any]:
    """Draws, measures, writes results.json, report.html and resamples.npz; returns what results.json holds.

    How is drawn and measured is what the first run's config says, and `overrides`; each run draws with its own base and
    its own LoRA, as its recipe says. What was drawn is kept in OUT/drawn by what it was made from.

    Args:
        asked: see :func:`parse_run`; the others are compared with the first.
        prompts: file with a prompt a line; the first run's held-out captions unless given.
        seeds: how many, from 0; of each prompt.
        out: folder of the comparison.
        overrides: `key=value` of settings.
        base: where the runs' base model is, if it was moved.

    Raises:
        UserError: a run is not as it should be, the folder holds something else, or see
            :func:`hgdpo_jax.results.evaluation.evaluate`.
    """
    runs = [parse_run(text) for text in asked]
    _require(runs, seeds, overrides)
    if processes.is_first() and out.exists() and not (out / _DRAWN).is_dir() and not (out.is_dir() and is_empty(out)):
        raise UserError(f"--out {out}: holds something else; choose another folder")
    config = overridden(runs[0].config, overrides)
    config.evaluate.images_per_prompt = 1
    with lock_for_all(out / _DRAWN):
        return _compare(runs, config, prompts, seeds, out, base)


def _require(runs: Sequence[Run], seeds: int, overrides: Sequence[str]) -> None:
    names = [run.name for run in runs]
    if len(set(names)) < max(2, len(names)):
        raise UserError(f"--runs {' '.join(names)}: expects two or more runs, each once")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: expects a number of seeds from 1")
    for override in overrides:
        key = override.partition("=")[0]
        if key in ("evaluate.images_per_prompt", "evaluate.concept_prompts"):
            raise UserError(f"override {override}: does nothing with --runs, which draws each prompt once from each of "
                            "--seeds")  # fmt: skip
        if not override.startswith(_CHANGED):
            raise UserError(f"override {override}: does nothing with --runs; the runs were trained with their own")


def _compare(
    runs: Sequence[Run], config: ConfigDict, prompts: Path | None, seeds: int, out: Path, base: str | None
) -> dict[str, Any]:
    index = Index()
    held = [Photograph(text, Path(), text) for text in read_prompts(prompts, "--prompts ")] if prompts else []
    held = held or heldout(config, index)
    if len(held) < 2:
        raise UserError(f"--prompts {prompts}: holds one prompt; intervals are over prompts, give two or more")
    asked = config.evaluate
    judges = Judges(config.pairs.scorer, asked.scorer, asked.other_scorer, asked.scorers, local_mesh())
    features = sets.SetFeatures(config, local_mesh()) if sets.given(config) else None
    drawn: dict[str, Seen] = {}
    pictures: dict[str, np.ndarray] = {}
    about: dict[str, dict[str, Any]] = {}
    for run in runs:
        source, evaluator = _evaluator(run, config, base, held, judges, features)
        about[run.name] = source.settings
        found = [_drawn(run, source, evaluator, seed, out, index) for seed in range(seeds)]
        keys = found[0].seen.keys()
        drawn[run.name] = {key: np.concatenate([model.seen[key] for model in found], axis=1) for key in keys}
        pictures[run.name] = found[0].pictures
    photographs = None if prompts else evaluator.measure_photographs()
    compared = compare(drawn, photographs)
    between = differences(compared, [(run.name, runs[0].name) for run in runs[1:]])
    results = {
        "runs": about,
        "models": {name: to_json(measures) for name, measures in compared.items()},
        "differences": {name: to_json(found) for name, found in between.items()},
        "absent": absent(compared[runs[0].name], config, photographs is not None),
        "prompts": len(held),
        "seeds": list(range(seeds)),
        "config": config.evaluate.to_dict(),
    }
    if processes.is_first():
        write_json(out / "results.json", results)
        reproduction.write_resamples(out / "resamples.npz", compared)
        page = _page(results, compared, between, pictures, held, None if prompts else evaluator.size)
        with atomic_path(out / "report.html") as temporary:
            temporary.write_text(page)
    return results


def _evaluator(
    run: Run,
    config: ConfigDict,
    base: str | None,
    held: Sequence[Photograph],
    judges: Judges,
    features: sets.SetFeatures | None,
) -> tuple[images.Generator, Evaluator]:
    """What draws a run as the comparison's config says, and measures it."""
    source = images.from_run(run.workdir, run.stage, run.weight, run.blocks, run.text_encoder, base)
    asked, own = config.evaluate, config.copy_and_resolve_references()
    own.model.dtype = run.config.model.dtype
    given = {name: asked[name] for name in ("steps", "guidance", "batch")}
    sampler = Sampler(source.pipeline, local_mesh(), solver=asked.sampler, seed=0, negative=asked.negative_prompt,
                      normalise=run.normalise, **given)  # fmt: skip
    sampler.use_policies(*source.policies)
    return source, Evaluator(own, source.pipeline, sampler, judges, held, features)


def _drawn(
    run: Run, source: images.Generator, evaluator: Evaluator, seed: int, out: Path, index: Index
) -> ModelPictures:
    """A picture of each prompt from a seed, drawn now or before."""
    evaluator.config.seed = evaluator.sampler.seed = seed
    made_from = inputs_of(evaluator.config, source.settings["base"], evaluator.held, index)
    settings = {key: value for key, value in source.settings.items() if key not in ("model", "stage")}
    mark = json_hash([made_from, settings, run.normalise])
    return evaluator.draw(f"{run.name}, seed {seed}", out / _DRAWN / f"{mark[:24]}.npz", mark)


def absent(measured: Measures, config: ConfigDict, photographs: bool) -> dict[str, str]:
    """Metric → why it was not measured, of those that were not.

    Args:
        measured: what was.
        config: of the comparison.
        photographs: whether there are photographs of the prompts.
    """
    keys = _SCORERS | {metric: sets.NETWORKS[features].key for metric, features in sets.METRICS.items()}
    found = {}
    for name in METRICS:
        if name not in measured:
            if name in OF_PHOTOGRAPHS and not photographs:
                found[name] = "needs photographs of the prompts"
            else:
                key = keys[name]
                found[name] = f"{key} {'has no embeddings' if get_setting(config, key) else 'is not set'}"
    return found


def by_reason(absent: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason → titles of the metrics that were not measured for it, of what :func:`absent` returns."""
    found: dict[str, list[str]] = {}
    for name, reason in absent.items():
        found.setdefault(reason, []).append(METRICS[name].rstrip(" ↑↓"))
    return found


def _page(
    results: Mapping[str, Any],
    compared: Mapping[str, Measures],
    between: Mapping[str, Measures],
    pictures: Mapping[str, np.ndarray],
    held: Sequence[Photograph],
    size: tuple[int, int] | None,
) -> str:
    """The page; `size` is that of the photographs, where the prompts are their captions."""
    first, *others = compared
    bases = {about["base"]: name for name, about in results["runs"].items()}
    asked, count = results["config"], len(results["seeds"])
    height, width = next(iter(pictures.values())).shape[1:3]
    if len(bases) > 1:
        logging.warning("%s have other bases; each draws with its own", " and ".join(bases.values()))
    reasons = by_reason(results["absent"])
    head = {
        "Compared": f"{', '.join(others)} with {first}, which the headings call base",
        "Base": "the same" if len(bases) == 1 else f"{len(bases)} bases: each run draws with its own",
        "Evaluated": f"{datetime.date.today()}, hgdpo_jax {__version__}",
        "Pictures": f"{count * len(held):,} of each run, {height}×{width} (height × width): {len(held):,} prompts, "
        f"{count} seeds; intervals are over prompts",
        "Drawn with": f"{asked['sampler']}, {asked['steps']} steps, guidance {asked['guidance']:g}",
        "Not measured": "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items()),
    }
    shown = held[: report.COLUMNS]
    return report.page(
        report.Report(
            head={title: fact for title, fact in head.items() if fact},
            lines={name: _line(about) for name, about in results["runs"].items()},
            models=compared,
            differences=between,
            pictures={name: kept[: len(shown)].astype(np.float32) / 127.5 - 1.0 for name, kept in pictures.items()},
            captions=[photograph.caption for photograph in shown],
            photographs=load_images(shown, size)[1] if size else None,
            stages={},
            compared=(first, others[0]),
        )
    )


def _line(about: Mapping[str, Any]) -> str:
    """What a run draws with, in words."""
    words = [str(about["stage"]), f"base sha256 {about['base'][:12]}…"]
    words += [f"{key} {about[key]}" for key in ("LoRA weight", "LoRA blocks", "text encoder") if key in about]
    return ", ".join(words)
