"""A dry run: the first prompts of a stage's pairs are drawn, to see how long all would take. Nothing is kept."""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.build import Builder
from hgdpo_jax.curriculum.plan import ShardPlan
from hgdpo_jax.curriculum.prepared import prepare
from hgdpo_jax.curriculum.winners import images_per_prompt
from hgdpo_jax.data.record import Record
from hgdpo_jax.pictures.sheet import sheet
from hgdpo_jax.pictures.write import to_uint8, write_png
from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.folder import require_plain
from hgdpo_jax.run.index import index_of_run

_SHOWN = 8  # pairs on the sheet


def dry_run(config: ConfigDict, workdir: Path, count: int, picture: Path | None = None) -> None:
    """Makes the pairs of the first prompts in memory, on the devices of process 0, and says how long all would take.

    Args:
        config: of the stage.
        workdir: of the run, which is only read.
        count: of prompts; as many more are drawn as fill whole batches.
        picture: a PNG file that shows winners and losers.

    Raises:
        UserError: see :func:`hgdpo_jax.curriculum.build.build`; or the PNG cannot be written there.
    """
    require_plain(workdir)
    if picture and not (picture.suffix.lower() == ".png" and picture.absolute().parent.is_dir()):
        raise UserError(f"--sheet {picture}: expects a .png file in a folder that exists")
    index = index_of_run(workdir, writes=False)
    prepared = prepare(config, workdir, index)
    if not processes.is_first():
        return
    config, plan = prepared.config, prepared.plan
    builder = Builder(prepared, None)
    builder.summarise(index)
    groups = grouped(plan, builder.size, count)
    begin = time.perf_counter()
    for part in {part.resolution: part for part, _ in groups}.values():  # compiles
        builder.draw(part, part.photographs[:1])
    compiled = time.perf_counter()
    records = [record for part, begin_at in groups
               for record in builder.draw(part, part.photographs[begin_at : begin_at + builder.size])]  # fmt: skip
    seconds = time.perf_counter() - compiled
    report(config, plan, groups, builder.size, seconds, compiled - begin)
    if picture:
        _show(builder, records, picture)


def grouped(plan: Sequence[ShardPlan], size: int, count: int) -> list[tuple[ShardPlan, int]]:
    """The first groups of prompts, `count` prompts or more: their shards, and where in them they begin."""
    found, prompts = [], 0
    for part in plan:
        for begin in range(0, len(part.photographs), size):
            if prompts < count:
                found.append((part, begin))
                prompts += min(size, len(part.photographs) - begin)
    return found


def report(
    config: ConfigDict,
    plan: Sequence[ShardPlan],
    groups: Sequence[tuple[ShardPlan, int]],
    size: int,
    seconds: float,
    compiling: float,
) -> None:
    """Prints what was measured, and hours for all prompts: of several resolutions, in proportion to their pixels."""
    pixels = {name: height * width for name, (height, width) in configuration.resolutions(config).items()}
    prompts = [(part, min(size, len(part.photographs) - begin)) for part, begin in groups]
    drawn, total = sum(n for _, n in prompts), sum(len(part.photographs) for part in plan)
    work = sum(len(part.photographs) * pixels[part.resolution] for part in plan)
    hours = seconds / 3600 * work / sum(n * pixels[part.resolution] for part, n in prompts) / jax.process_count()
    name, images = f"{config.stage} pairs: dry run", drawn * images_per_prompt(config)
    print(f"{name}: {drawn} prompts in {seconds:.3g} s, {seconds / images:.3g} s for each of {images} images")
    print(f"{name}: compiling took {compiling:.3g} s before that")
    print(f"{name}: all {total:,} prompts take about {_in_words(hours)} here")
    memory = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())
    if memory:
        print(f"{name}: a device held {memory / 2**30:.3g} GiB at most")


def _in_words(hours: float) -> str:
    return f"{hours:,.2g} hours" if hours >= 0.1 else f"{60 * hours:.2g} minutes"


def _show(builder: Builder, records: Sequence[Record], picture: Path) -> None:
    """Writes winners and losers of one resolution side by side."""
    alike = [record for record in records if record["winner"].shape == records[0]["winner"].shape][:_SHOWN]
    if not alike:
        raise UserError(f"--sheet {picture}: none of the prompts drawn has a pair; draw more of them")
    rows: dict[str, np.ndarray] = {}
    for role in ("winner", "loser"):
        if role in alike[0]:
            latents = np.stack([record[role] for record in alike]).astype(np.float32)
            rows[role] = to_uint8(builder.sampler.decode(latents, role))
    write_png(picture, sheet(rows), {})
    print(f"{picture}: {len(alike)} pairs")
