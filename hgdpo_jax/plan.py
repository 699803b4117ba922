"""Says what a config's step needs on devices that are not here, by compiling it for them.

python -m hgdpo_jax.plan --config configs/stage3.py[:variant] --topology v5e:4x4 --topology h100:8 [--largest]

See docs/plan.md.
"""

import argparse
import json
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from hgdpo_jax import command, runtime
from hgdpo_jax import config as configuration
from hgdpo_jax.diffusion.source import Source
from hgdpo_jax.planning import devices, figures, program
from hgdpo_jax.planning.devices import Topology
from hgdpo_jax.planning.figures import Plan

_CHECKPOINTING = ("none", "blocks", "everything")
_GIB = 2**30


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """(what was asked for, overrides of the config)."""
    parser = argparse.ArgumentParser(
        description="Compiles a config's step for devices that are not here and says what it needs.",
        epilog="Any setting: --config.train.batch=8 (python -m hgdpo_jax.config lists them).",
    )
    parser.add_argument("--config", required=True, help="config file with its variant, configs/stage3.py:sd15")
    parser.add_argument("--topology", action="append", help="v5e:4x4, v5p:2x2x2, v6e:8x8, h100:8, h200:8, b200:8, cpu; "
                        "may be given more than once; default cpu")  # fmt: skip
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


def of_step(config: ConfigDict, source: Source, topology: Topology) -> Plan:
    """The plan of a config's optimizer step."""
    mesh = runtime.make_mesh(config.mesh, topology.devices)
    made = program.step(config, source, mesh)
    return figures.plan(made, topology, mesh, config.model.dtype, config.train.batch)


def of_drawing(config: ConfigDict, source: Source, topology: Topology) -> tuple[Plan, Plan]:
    """The plans of drawing a batch of the pool's images, and of decoding it."""
    mesh, steps = runtime.make_mesh(config.mesh, topology.devices), config.pairs.steps
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    examples = -(-config.pairs.batch // ways) * ways
    draw, decode = program.drawing(config, source, mesh)
    return (
        figures.plan(draw, topology, mesh, config.model.dtype, examples, steps),
        figures.plan(decode, topology, mesh, "float32", examples),
    )


def largest(spec: str, overrides: Sequence[str], source: Source, topology: Topology, kept: str) -> dict[str, Any]:
    """The largest batch with one way of checkpointing: examples a device, of all devices, and their plan."""
    config = configuration.load(spec, overrides)
    mesh = runtime.make_mesh(config.mesh, topology.devices)
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.accumulate

    def at(count: int) -> Plan:
        changed = [*overrides, f"train.batch={count * ways}", f"train.checkpointing={kept}"]
        return of_step(configuration.load(spec, changed), source, topology)

    count, plan = figures.largest(at)
    return {"checkpointing": kept, "each": count, "batch": count * ways, "plan": plan}


def main() -> None:
    asked, overrides = parse()
    config = configuration.load(asked.config, overrides)
    names = asked.topology or ["cpu"]
    devices.prepare(names)
    variant = re.search(r":(\w+)$", asked.config)
    source = program.source_of(config, variant[1] if variant else "")
    topologies = [devices.describe(name) for name in names]
    plans = [of_step(config, source, topology) for topology in topologies]
    modes = () if asked.largest is None else asked.largest or _CHECKPOINTING
    found = [[largest(asked.config, overrides, source, topology, kept) for kept in modes] for topology in topologies]
    drawings = [of_drawing(config, source, topology) for topology in topologies] if asked.drawing else []
    if asked.json:
        each = zip(plans, found, drawings or [None] * len(plans), strict=True)
        print(json.dumps([_json(config, asked.share, *one) for one in each], indent=2))
    else:
        print(describe(config, source, plans, found, drawings, asked.share))


def _json(
    config: ConfigDict, share: float, plan: Plan, found: list[dict[str, Any]], drawing: tuple[Plan, Plan] | None
) -> dict[str, Any]:
    result = plan.to_json() | {"share": share, "examples_per_second": plan.rate(share)}
    result["hours"] = _hours(plan, share, config)
    result["largest"] = [each | {"plan": each["plan"] and each["plan"].to_json()} for each in found]
    if drawing:
        result |= {"drawing": drawing[0].to_json(), "decoding": drawing[1].to_json()}
        result["images_per_second"] = _images(drawing, share)
    return result


def _hours(plan: Plan, share: float, config: ConfigDict) -> float:
    return config.train.steps * plan.examples / plan.rate(share) / 3600


def _images(drawing: tuple[Plan, Plan], share: float) -> float:
    return 1 / sum(1 / plan.rate(share) for plan in drawing)


def describe(
    config: ConfigDict,
    source: Source,
    plans: Sequence[Plan],
    found: Sequence[list[dict[str, Any]]],
    drawings: Sequence[tuple[Plan, Plan]],
    share: float,
) -> str:
    """The table: a column for each topology."""
    train = config.train
    unit = "pairs" if config.objective == "dpo" else "photographs"
    about = f"{config.stage}: {source.name}, {train.batch} {unit} a step of {' or '.join(config.data.resolutions)}, "
    about += f"{config.model.dtype}, trains {train.params}, checkpointing {train.checkpointing}; of each device:"
    rows: list[tuple[str, list[str]]] = [
        ("", [f"{plan.devices} x {plan.topology.partition(':')[0]}" for plan in plans])
    ]

    def row(name: str, cell: Any) -> None:
        rows.append((name, [cell(plan) for plan in plans]))

    for name in plans[0].held:
        row(name, lambda plan, name=name: _bytes(plan.held[name]))
    row("temporaries", lambda plan: plan.compiled.refused and "–" or _bytes(plan.compiled.temporaries))
    row("in all", lambda plan: plan.compiled.refused and "–" or _bytes(plan.total))
    row("may fill", lambda plan: _bytes(plan.memory))
    row("fits", lambda plan: "yes" if plan.fits else "NO")
    row("operations", lambda plan: _short(plan.operations, "FLOP"))
    row("memory traffic", lambda plan: _short(plan.compiled.traffic, "B"))
    for kind in sorted({kind for plan in plans for kind in plan.compiled.collectives or {}}):
        row(kind, partial(_exchanged, kind))
    for resource in plans[0].seconds:
        row(f"{resource} takes", lambda plan, resource=resource: _milliseconds(plan.seconds[resource]))
    row("bound by", lambda plan: plan.bound)
    row(f"{unit} a second at {share:.0%}", lambda plan: _number(plan.rate(share)))
    row(f"hours for {train.steps:,} steps", lambda plan: _number(_hours(plan, share, config)))
    row("compiled in", lambda plan: f"{plan.compiled.seconds:,.0f} s")
    for position in range(len(found[0])):
        name = f"largest batch, {found[0][position]['checkpointing']}"
        rows.append((name, [_largest(each[position]) for each in found]))
    for part, name in enumerate(("drawing", "decoding")) if drawings else ():
        some = [drawing[part] for drawing in drawings]
        count = f", {config.pairs.steps} steps" if name == "drawing" else ""
        rows.append((f"{name} {some[0].examples} images{count}", [_occupied(plan) for plan in some]))
        rows.append(("takes", [f"{_milliseconds(plan.seconds[plan.bound])} ({plan.bound})" for plan in some]))
    if drawings:
        rows.append((f"images a second at {share:.0%}", [_number(_images(drawing, share)) for drawing in drawings]))
    lines = [about, *_aligned(rows)]
    for kind, plan in {plan.topology.partition(":")[0]: plan for plan in plans}.items():
        units = {"arithmetic": "FLOP"}
        speeds = (f"{name} {_short(peak, units.get(name, 'B'))}/s" for name, peak in plan.peaks.items() if peak)
        lines.append(f"{kind}: {', '.join(speeds)} ({plan.source})")
    for plan in [*plans, *(plan for drawing in drawings for plan in drawing)]:
        if plan.compiled.refused:
            lines.append(f"{plan.topology}: the compiler says {plan.compiled.refused}")
        if plan.compiled.loops:
            lines.append(
                f"{plan.topology}: {plan.compiled.loops} loops count once, for their length is not written down"
            )
    return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(rows[0][1]))]
    first = max(len(name) for name, _ in rows)
    return [
        f"{name:{first}}  {'  '.join(f'{cell:>{w}}' for cell, w in zip(cells, widths, strict=True))}"
        for name, cells in rows
    ]


def _exchanged(kind: str, plan: Plan) -> str:
    found = (plan.compiled.collectives or {}).get(kind)
    return f"{found['count']} of {_short(found['bytes'], 'B')}" if found else "–"


def _largest(found: dict[str, Any]) -> str:
    if not found["plan"]:
        return "does not fit"
    return f"{found['each']} each, {found['batch']} in all"


def _occupied(plan: Plan) -> str:
    return "does not fit" if not plan.fits else _bytes(plan.total)


def _bytes(count: float) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 100 else f"{count / 2**20:.2f} MiB"


def _short(count: float, unit: str) -> str:
    """Three digits and a prefix: 20.3 TFLOP."""
    power = min(int(math.log(count, 1000)), 5) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {' kMGTP'[power].strip()}{unit}"


def _number(value: float) -> str:
    return "below 0.01" if value < 0.01 else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _milliseconds(seconds: float) -> str:
    return f"{_number(1e3 * seconds)} ms" if seconds else "–"


if __name__ == "__main__":
    command.run(main)
