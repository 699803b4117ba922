"""Plans of a config on devices that are not here: its step, its drawing, its largest batch."""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hgdpo_jax.config import CHECKPOINTING
from hgdpo_jax.devices.mesh import make_mesh
from hgdpo_jax.devices.xla import settle_dtype, use_precision
from hgdpo_jax.diffusion.source import Source
from hgdpo_jax.planning import figures, program, table, topologies
from hgdpo_jax.planning.figures import Largest, Plan
from hgdpo_jax.planning.isolation import in_subprocess
from hgdpo_jax.planning.topologies import Topology
from hgdpo_jax.run.progress import Progress
from hgdpo_jax.run.settings import load_config

T = TypeVar("T")


def plan_step(spec: str, overrides: Sequence[str], name: str) -> Plan:
    """The plan of a config's optimizer step on a topology."""
    config, source, topology, mesh = _open(spec, overrides, name)
    step = program.step(config, source, mesh)
    if not topology.compiler:
        step = program.of_one_device(step, program.step(*share_of_one(config, source, mesh)), mesh)
    return figures.plan_program(step, topology, mesh, config.model.dtype, config.train.batch)


def plan_drawing(spec: str, overrides: Sequence[str], name: str) -> tuple[Plan, Plan]:
    """The plans of drawing a batch of the pool's images, and of decoding it."""
    config, source, topology, mesh = _open(spec, overrides, name)
    draw, decode = program.drawing(config, source, mesh)
    if not topology.compiler:
        draw_one, decode_one = program.drawing(*share_of_one(config, source, mesh))
        draw, decode = (program.of_one_device(*both, mesh) for both in ((draw, draw_one), (decode, decode_one)))
    dtype, ways = config.model.dtype, program.ways(mesh)
    examples = -(-config.pairs.batch // ways) * ways
    vae = "float32" if dtype == "float32" else "tf32"  # see hgdpo_jax.devices.xla.use_precision
    return (
        figures.plan_program(draw, topology, mesh, dtype, examples),
        figures.plan_program(decode, topology, mesh, vae, examples),
    )


def plan_largest(spec: str, overrides: Sequence[str], topology: Topology, kept: str, bar: Progress) -> Largest:
    """The largest batch with one way of checkpointing; each program that is tried is one of the bar's."""
    config = load_config(spec, overrides)
    mesh = make_mesh(config.mesh, topology.devices)
    ways = program.ways(mesh) * config.train.accumulate

    def at(count: int) -> Plan:
        changed = [*overrides, f"train.batch={count * ways}", f"train.checkpointing={kept}"]
        return _made(bar, plan_step, spec, changed, topology)

    count, plan = figures.largest(at)
    return Largest(kept, count * config.train.accumulate, count * ways, plan)


def _made(bar: Progress, make: Callable[..., T], spec: str, overrides: Sequence[str], topology: Topology) -> T:
    """What `make` gives; where a compiler works for it, which does not end by itself, in a process of its own."""
    bar.set_description(" ".join([topology.name, *overrides[-2:]]))
    run = partial(in_subprocess, make) if topology.compiler else make
    made = run(spec, overrides, topology.name)
    bar.update()
    return made


def _open(spec: str, overrides: Sequence[str], name: str) -> tuple[ConfigDict, Source, Topology, Mesh]:
    topologies.prepare_compilers([name])
    config, topology = load_config(spec, overrides), topologies.describe_topology(name)
    settle_dtype(config.model, topology.chip.platform)
    if config.model.dtype == "bfloat16" and not topology.chip.has_bfloat16:
        config.model.dtype = "float16"
    use_precision(config.model.dtype)
    return config, _source(spec, config), topology, make_mesh(config.mesh, topology.devices)


def share_of_one(config: ConfigDict, source: Source, mesh: Mesh) -> tuple[ConfigDict, Source, Mesh]:
    """What one device of a mesh computes, as if it were alone."""
    share, ways = config.copy_and_resolve_references(), program.ways(mesh)
    share.train.batch = config.train.batch // ways
    share.pairs.batch = -(-config.pairs.batch // ways)
    alone = np.array(mesh.devices.flat[:1]).reshape(1, 1, 1)
    return share, source, Mesh(alone, mesh.axis_names, axis_types=mesh.axis_types)


def _source(spec: str, config: ConfigDict) -> Source:
    variant = re.search(r":([\w-]+)$", spec)
    return program.open_architecture(config, variant[1] if variant else "")


def plan(given: argparse.Namespace, config: ConfigDict, overrides: Sequence[str]) -> str:
    """What a config's step needs on some topologies, as a table or as JSON.

    Args:
        given: arguments of :mod:`hgdpo_jax.plan`.
        config, overrides: of `given.config`, and what it was changed by.

    Raises:
        UserError: a topology that does not exist; a config that does not fit it.
    """
    spec, names = given.config, given.topology or ["cpu"]
    topologies.prepare_compilers(names)
    source, described = _source(spec, config), [topologies.describe_topology(name) for name in names]
    modes = () if given.largest is None else given.largest or CHECKPOINTING
    with Progress(unit="program", leave=False) as bar:
        plans = [_made(bar, plan_step, spec, overrides, one) for one in described]
        found = [[plan_largest(spec, overrides, one, kept, bar) for kept in modes] for one in described]
        drawings = [_made(bar, plan_drawing, spec, overrides, one) for one in described] if given.drawing else []
    if given.json:
        each = zip_longest(plans, found, drawings)
        return json.dumps([_json(config, given.share, *one) for one in each], indent=2)
    return table.describe(config, source.name, plans, found, drawings, given.share)


def _json(
    config: ConfigDict, share: float, plan: Plan, found: Sequence[Largest], drawing: tuple[Plan, Plan] | None
) -> dict[str, Any]:
    result = plan.to_json() | {"share": share, "examples_per_second": plan.rate(share)}
    result["hours"] = table.hours(plan, share, config)
    result["largest"] = [each._asdict() | {"plan": each.plan and each.plan.to_json()} for each in found]
    if drawing:
        result |= {"drawing": drawing[0].to_json(), "decoding": drawing[1].to_json()}
        result["images_per_second"] = table.images_per_second(drawing, share)
    return result
