"""Plans of a config on devices that are not here: its step, its drawing, its largest batch."""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from hgdpo_jax.config import CHECKPOINTING
from hgdpo_jax.devices.mesh import make_mesh
from hgdpo_jax.devices.xla import use_precision
from hgdpo_jax.diffusion.source import Source
from hgdpo_jax.planning import figures, program, table, topologies
from hgdpo_jax.planning.figures import Largest, Plan
from hgdpo_jax.planning.isolation import in_subprocess
from hgdpo_jax.planning.topologies import Topology
from hgdpo_jax.run.settings import load_config

T = TypeVar("T")


def plan_step(spec: str, overrides: Sequence[str], name: str) -> Plan:
    """The plan of a config's optimizer step on a topology."""
    config, source, topology, mesh = _open(spec, overrides, name)
    step = program.step(config, source, mesh)
    return figures.plan_program(step, topology, mesh, config.model.dtype, config.train.batch)


def plan_drawing(spec: str, overrides: Sequence[str], name: str) -> tuple[Plan, Plan]:
    """The plans of drawing a batch of the pool's images, and of decoding it."""
    config, source, topology, mesh = _open(spec, overrides, name)
    ways, steps, dtype = mesh.shape["data"] * mesh.shape["fsdp"], config.pairs.steps, config.model.dtype
    examples = -(-config.pairs.batch // ways) * ways
    draw, decode = program.drawing(config, source, mesh)
    vae = "float32" if dtype == "float32" else "tf32"  # see hgdpo_jax.devices.xla.use_precision
    return (
        figures.plan_program(draw, topology, mesh, dtype, examples, steps),
        figures.plan_program(decode, topology, mesh, vae, examples),
    )


def plan_largest(spec: str, overrides: Sequence[str], topology: Topology, kept: str, bar: tqdm) -> Largest:
    """The largest batch with one way of checkpointing; each program that is tried is one of the bar's."""
    config = load_config(spec, overrides)
    mesh = make_mesh(config.mesh, topology.devices)
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.accumulate

    def at(count: int) -> Plan:
        changed = [*overrides, f"train.batch={count * ways}", f"train.checkpointing={kept}"]
        return _in_subprocess(bar, plan_step, spec, changed, topology.name)

    count, plan = figures.largest(at)
    return Largest(kept, count * config.train.accumulate, count * ways, plan)


def _in_subprocess(bar: tqdm, make: Callable[..., T], spec: str, overrides: Sequence[str], name: str) -> T:
    bar.set_description(" ".join([name, *overrides[-2:]]))
    made = in_subprocess(make, spec, overrides, name)
    bar.update()
    return made


def _open(spec: str, overrides: Sequence[str], name: str) -> tuple[ConfigDict, Source, Topology, Mesh]:
    topologies.prepare_compilers([name])
    config = load_config(spec, overrides)
    use_precision(config.model.dtype)
    topology = topologies.describe_topology(name)
    return config, _source(spec, config), topology, make_mesh(config.mesh, topology.devices)


def _source(spec: str, config: ConfigDict) -> Source:
    variant = re.search(r":(\w+)$", spec)
    return program.open_architecture(config, variant[1] if variant else "")


def plan(given: argparse.Namespace, config: ConfigDict, overrides: Sequence[str]) -> str:
    """What a config's step needs on some topologies, as a table or as JSON.

    Args:
        given: arguments of :mod:`hgdpo_jax.plan`.
        config, overrides: of `given.config`, and what it was changed by.

    Raises:
        UserError: a topology that does not exist, or whose compiler is not installed; a config that does not fit it.
    """
    spec, names = given.config, given.topology or ["cpu"]
    topologies.prepare_compilers(names)
    source, described = _source(spec, config), [topologies.describe_topology(name) for name in names]
    modes = () if given.largest is None else given.largest or CHECKPOINTING
    with tqdm(unit="program", leave=False, disable=None) as bar:
        make = partial(_in_subprocess, bar)
        plans = [make(plan_step, spec, overrides, name) for name in names]
        found = [[plan_largest(spec, overrides, one, kept, bar) for kept in modes] for one in described]
        drawings = [make(plan_drawing, spec, overrides, name) for name in names] if given.drawing else []
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
