"""Says what a config's step needs on devices that are not here, by compiling it for them.

python -m hgdpo_jax.plan --config configs/stage3.py[:variant] --topology v5e:4x4 --topology h100:8 [--largest]

See docs/plan.md.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from hgdpo_jax import command, runtime
from hgdpo_jax import config as configuration
from hgdpo_jax.diffusion.source import Source
from hgdpo_jax.planning import devices, figures, program, table
from hgdpo_jax.planning.apart import apart
from hgdpo_jax.planning.devices import Topology
from hgdpo_jax.planning.figures import Largest, Plan

T = TypeVar("T")
_CHECKPOINTING = ("none", "blocks", "everything")


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """(what was asked for, overrides of the config)."""
    parser = argparse.ArgumentParser(
        description="Compiles a config's step for devices that are not here and says what it needs.",
        epilog="Any setting: --config.train.batch=8 (python -m hgdpo_jax.config lists them).",
    )
    parser.add_argument("--config", required=True, help="config file with its variant, configs/stage3.py:sd15")
    parser.add_argument("--topology", action="append", help="v5e:4x4, v5p:2x2x2, v6e:8x8, h100:8, h100:64, h200:8, "
                        "b200:8, cpu; may be given more than once; default cpu")  # fmt: skip
    parser.add_argument("--largest", nargs="*", choices=_CHECKPOINTING, metavar="CHECKPOINTING",
                        help="also find the largest batch, with none, blocks and everything or with these")  # fmt: skip
    parser.add_argument("--drawing", action="store_true", help="also plan what draws and decodes the pool's images")
    parser.add_argument("--share", type=_share, default=0.4, help="of the roofline that is reached; default 0.4")
    parser.add_argument("--json", action="store_true", help="print JSON")
    known, rest = parser.parse_known_args(arguments)
    return known, command.overrides(rest)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError("above 0, up to 1")
    return float(text)


def of_step(spec: str, overrides: Sequence[str], name: str) -> Plan:
    """The plan of a config's optimizer step on a topology."""
    config, source, topology, mesh = _about(spec, overrides, name)
    return figures.plan(program.step(config, source, mesh), topology, mesh, config.model.dtype, config.train.batch)


def of_drawing(spec: str, overrides: Sequence[str], name: str) -> tuple[Plan, Plan]:
    """The plans of drawing a batch of the pool's images, and of decoding it."""
    config, source, topology, mesh = _about(spec, overrides, name)
    ways, steps = mesh.shape["data"] * mesh.shape["fsdp"], config.pairs.steps
    examples = -(-config.pairs.batch // ways) * ways
    draw, decode = program.drawing(config, source, mesh)
    vae = "float32" if config.model.dtype == "float32" else "tf32"  # see runtime.use_precision
    return (
        figures.plan(draw, topology, mesh, config.model.dtype, examples, steps),
        figures.plan(decode, topology, mesh, vae, examples),
    )


def largest(spec: str, overrides: Sequence[str], topology: Topology, kept: str, bar: tqdm) -> Largest:
    """The largest batch with one way of checkpointing; each program that is tried is one of the bar's."""
    config = configuration.load(spec, overrides)
    mesh = runtime.make_mesh(config.mesh, topology.devices)
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.accumulate

    def at(count: int) -> Plan:
        changed = [*overrides, f"train.batch={count * ways}", f"train.checkpointing={kept}"]
        return _shown(bar, of_step, spec, changed, topology.name)

    count, plan = figures.largest(at)
    return Largest(kept, count * config.train.accumulate, count * ways, plan)


def _shown(bar: tqdm, make: Callable[..., T], spec: str, overrides: Sequence[str], name: str) -> T:
    bar.set_description(" ".join([name, *overrides[-2:]]))
    made = apart(make, spec, overrides, name)
    bar.update()
    return made


def _about(spec: str, overrides: Sequence[str], name: str) -> tuple[ConfigDict, Source, Topology, Mesh]:
    devices.prepare([name])
    config = configuration.load(spec, overrides)
    runtime.use_precision(config.model.dtype)
    topology = devices.describe(name)
    return config, _source(spec, config), topology, runtime.make_mesh(config.mesh, topology.devices)


def _source(spec: str, config: ConfigDict) -> Source:
    variant = re.search(r":(\w+)$", spec)
    return program.source_of(config, variant[1] if variant else "")


def main() -> None:
    asked, overrides = parse()
    config = configuration.load(asked.config, overrides)
    names = asked.topology or ["cpu"]
    devices.prepare(names)
    source, topologies = _source(asked.config, config), [devices.describe(name) for name in names]
    modes = () if asked.largest is None else asked.largest or _CHECKPOINTING
    with tqdm(unit="program", leave=False, disable=None) as bar:
        make = partial(_shown, bar)
        plans = [make(of_step, asked.config, overrides, name) for name in names]
        found = [[largest(asked.config, overrides, one, kept, bar) for kept in modes] for one in topologies]
        drawings = [make(of_drawing, asked.config, overrides, name) for name in names] if asked.drawing else []
    if asked.json:
        each = zip(plans, found, drawings or [None] * len(plans), strict=True)
        print(json.dumps([_json(config, asked.share, *one) for one in each], indent=2))
    else:
        print(table.describe(config, source, plans, found, drawings, asked.share))


def _json(
    config: ConfigDict, share: float, plan: Plan, found: Sequence[Largest], drawing: tuple[Plan, Plan] | None
) -> dict[str, Any]:
    result = plan.to_json() | {"share": share, "examples_per_second": plan.rate(share)}
    result["hours"] = table.hours(plan, share, config)
    result["largest"] = [each._asdict() | {"plan": each.plan and each.plan.to_json()} for each in found]
    if drawing:
        result |= {"drawing": drawing[0].to_json(), "decoding": drawing[1].to_json()}
        result["images_per_second"] = table.images(drawing, share)
    return result


if __name__ == "__main__":
    command.run(main)
