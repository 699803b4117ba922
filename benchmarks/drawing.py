"""How far pairs of less drawing agree with those of whole pools, and what they save.

python -m benchmarks.drawing OUT.jsonl [--config configs/stage1.py:portraits] [--prompts 24] [--pool 20]
    [--drafts 4,6,8] [--after 4,6,8] [--solvers ddpm,dpmpp_2m] [--intervals 0-800] [--config.KEY=VALUE ...]
python -m benchmarks.drawing OUT.jsonl --table [--pools 8,20]

The first draws a pool for each of the first captions with every solver: whole, with the scores of the pictures that are
predicted after some of the steps; as drafts of fewer steps from the same noise; and with guidance in some intervals of
timesteps only. It writes a line of scores for each caption and goes on where it was stopped.

The second tells, of the first pictures of each pool, whom racing, drafts and intervals choose: how often winner and
loser are those of the whole pool, how much of the gap between their scores is left (mean over prompts, with its
standard error), and forward passes beside the whole pool's. The last steps of a race are those of the whole drawing, so
that its choice follows from these scores.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

CORES = os.cpu_count() or 1
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={min(CORES, 4)}")  # as in launch/setup.sh

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jaxtyping import Float, Int, Key  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from hgdpo_jax import config as configuration  # noqa: E402
from hgdpo_jax.config import ALWAYS  # noqa: E402
from hgdpo_jax.curriculum.candidates import finalists  # noqa: E402
from hgdpo_jax.curriculum.forwards import pool_forwards  # noqa: E402
from hgdpo_jax.data.photographs import list_photographs  # noqa: E402
from hgdpo_jax.devices.mesh import local_mesh  # noqa: E402
from hgdpo_jax.devices.sharding import parameter_placer  # noqa: E402
from hgdpo_jax.devices.start import start  # noqa: E402
from hgdpo_jax.devices.xla import settle_dtype, use_precision  # noqa: E402
from hgdpo_jax.diffusion import pipeline as pipelines  # noqa: E402
from hgdpo_jax.diffusion.sampler import Sampler  # noqa: E402
from hgdpo_jax.diffusion.schedule import NoiseSchedule  # noqa: E402
from hgdpo_jax.diffusion.source import open_source  # noqa: E402
from hgdpo_jax.run.settings import load_config  # noqa: E402
from hgdpo_jax.scoring.scorers import open_scorers  # noqa: E402

Scores = Float[np.ndarray, "m"]
Pool = tuple[Int[np.ndarray, "m s"], Key[jax.Array, "m"]]  # token ids and keys
FINALISTS = (1, 2, 3, 4)


def measure(given: argparse.Namespace, config: ConfigDict) -> None:
    """Writes the scores of each caption's pictures."""
    done, pairs = {line["id"] for line in read(given.out)}, config.pairs
    model = config.model
    start()
    settle_dtype(model, jax.default_backend())
    use_precision(model.dtype)
    mesh, (size,), count = local_mesh(), configuration.resolutions(config).values(), given.pool
    others = {"vae": model.vae, "lora": model.lora, "param_dtype": model.dtype}
    pipeline = pipelines.load_pipeline(model.base, model.dtype, **others, place=parameter_placer(mesh))
    (scorer,) = open_scorers(config.pairs.scorer, mesh)

    def score(images: jax.Array, ids: jax.Array) -> jax.Array:
        return scorer.score(images, ids)

    def sampler(solver: str, interval: Sequence[int]) -> Sampler:
        return Sampler(pipeline, mesh, solver=solver, steps=pairs.steps, guidance=pairs.guidance, batch=count,
                       seed=config.seed, negative=pairs.negative_prompt, interval=interval)  # fmt: skip

    def whole(drawer: Sampler, pool: Pool, after: Sequence[int] = ()) -> dict[str, Scores]:
        state, found, first = drawer.start(count, size), {}, 0
        for steps in sorted(after):
            state, found[f"after {steps}"] = drawer.part_way(*pool, state, (first, steps), score, "")
            first = steps
        return found | {"whole": np.asarray(drawer.rest(*pool, state, first, score, "")[1])}

    samplers = {solver: sampler(solver, ALWAYS) for solver in given.solvers}
    within = {name: sampler(pairs.sampler, interval(name)) for name in given.intervals}
    for photograph in list_photographs(config.data.photographs, "train")[: given.prompts]:
        if photograph.id in done:
            continue
        ids = np.repeat(pipeline.tokenize([photograph.caption]), count, axis=0)
        pool = ids, samplers[pairs.sampler].keys("pool", [photograph.id] * count, [*range(count)])
        found = {solver: whole(drawer, pool, given.after) for solver, drawer in samplers.items()}
        for solver, drawer in samplers.items():
            found[solver] |= {f"draft {n}": drawer.drafts(*pool, size, n, score, "") for n in given.drafts}
        for name, drawer in within.items():
            found[pairs.sampler][f"interval {name}"] = whole(drawer, pool)["whole"]
        scores = {solver: {name: [*map(float, x)] for name, x in each.items()} for solver, each in found.items()}
        with given.out.open("a") as file:
            file.write(json.dumps({"id": photograph.id, "scores": scores}) + "\n")


def interval(name: str) -> tuple[int, int]:
    """The ends of `200-800`."""
    low, high = map(int, name.split("-"))
    return low, high


def read(path: Path) -> list[dict]:
    """The lines that were written."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def kept(early: Scores, final: Scores, each: int) -> tuple[bool, bool, float]:
    """Whether the best and the worst are among those that go on, and how much of the gap between them is left."""
    (places,) = finalists(early[None], each)
    gap = final[places].max() - final[places].min()
    return final.argmax() in places, final.argmin() in places, float(gap / (final.max() - final.min()))


def table(given: argparse.Namespace, config: ConfigDict) -> str:
    """What follows from the scores, in Markdown."""
    lines = read(given.out)
    schedule = NoiseSchedule.from_config(open_source(config.model.base).scheduler)
    rows = [f"{len(lines)} prompts", "", "| pool | solver | | finalists | same winner | same loser | gap | forwards |"]
    rows += ["|---|---|---|---|---|---|---|---|"]

    def forwards(**settings: object) -> float:
        changed = config.copy_and_resolve_references()
        changed.pairs.update(settings)
        return pool_forwards(changed, schedule)

    def add(pool: int, solver: str, name: str, each: int, choose: Callable[..., tuple[bool, bool, float]]) -> None:
        found = [{k: np.array(x)[:pool] for k, x in line["scores"][solver].items()} for line in lines]
        won, lost, gap = np.array([choose(one[name], one["whole"]) for one in found], float).T
        kind, _, value = name.partition(" ")
        changes = {
            "after": {"race": float(value) / config.pairs.steps} if kind == "after" else {},
            "draft": {"draft_steps": int(value) if kind == "draft" else 0},
            "interval": {"guidance_interval": interval(value) if kind == "interval" else ALWAYS},
        }[kind]
        plain = {"pool_size": pool, "sampler": solver}
        share = forwards(**plain, **changes, **({"finalists": each} if each else {})) / forwards(**plain)
        error = gap.std(ddof=1) / len(gap) ** 0.5
        rows.append(f"| {pool} | {solver} | {name} | {each or ''} | {won.mean():.0%} | {lost.mean():.0%} | "
                    f"{gap.mean():.1%} ± {error:.1%} | {share:.0%} |")  # fmt: skip

    def own(early: Scores, final: Scores) -> tuple[bool, bool, float]:
        same = early.argmax() == final.argmax(), early.argmin() == final.argmin()
        return *same, float(np.ptp(early) / np.ptp(final))

    for pool in given.pools:
        for solver, names in lines[0]["scores"].items():
            for name in names:
                if name.startswith("interval"):
                    add(pool, solver, name, 0, own)
                for each in FINALISTS:
                    if name.startswith(("after", "draft")) and 2 * each < pool:
                        add(pool, solver, name, each, lambda early, final, each=each: kept(early, final, each))
    return "\n".join(rows)


def main() -> None:
    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    def numbers(text: str) -> list[int]:
        return [int(part) for part in names(text)]

    parser = argparse.ArgumentParser(description="Compares pairs of less drawing with those of whole pools.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="configs/stage1.py:portraits")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--pool", type=int, default=20)
    parser.add_argument("--solvers", type=names, default=["ddpm", "dpmpp_2m"])
    parser.add_argument("--after", type=numbers, default=[4, 6, 8])
    parser.add_argument("--drafts", type=numbers, default=[4, 6, 8])
    parser.add_argument("--intervals", type=names, default=["0-800", "250-1000"])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--pools", type=numbers, default=[8, 20])
    given, overrides = parser.parse_known_args()
    config = load_config(given.config, [text.removeprefix("--config.") for text in overrides])
    if given.table:
        print(table(given, config) if given.out.is_file() else f"{given.out}: no such file; measure first")
    else:
        measure(given, config)


if __name__ == "__main__":
    main()
