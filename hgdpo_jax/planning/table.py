"""Plans as people read them."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.planning.figures import Largest, Plan

_GIB = 2**30


def hours(plan: Plan, share: float, config: ConfigDict) -> float:
    """Hours of the config's steps, where a share of the roofline is reached."""
    return config.train.steps * plan.examples / plan.rate(share) / 3600


def images_per_second(drawing: tuple[Plan, Plan], share: float) -> float:
    """Images drawn and decoded a second, where a share of the roofline is reached."""
    return 1 / sum(1 / plan.rate(share) for plan in drawing)


def describe(
    config: ConfigDict,
    base: str,
    plans: Sequence[Plan],
    found: Sequence[Sequence[Largest]],
    drawings: Sequence[tuple[Plan, Plan]],
    share: float,
) -> str:
    """The table: a column for each topology.

    Args:
        config, base: what was planned, and the name of its ε_base.
        plans: of the step, one for each topology.
        found: the largest batches on each topology.
        drawings: (drawing, decoding) on each topology, if they were planned.
        share: of the roofline that is reached.
    """
    train = config.train
    unit = "pairs" if config.objective == "dpo" else "photographs"
    sizes = configuration.resolutions(config)
    largest = max(sizes, key=lambda name: math.prod(sizes[name]))  # which the step was compiled for
    about = f"{config.stage}: {base}, {train.batch} {unit} a step of {largest}, "
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
    row(f"hours for {train.steps:,} steps", lambda plan: _number(hours(plan, share, config)))
    row("compiled in", lambda plan: f"{plan.compiled.seconds:,.0f} s")
    for position in range(len(found[0])):
        name = f"largest batch, {found[0][position].checkpointing}"
        rows.append((name, [_largest(each[position]) for each in found]))
    for part, name in enumerate(("drawing", "decoding")) if drawings else ():
        some = [drawing[part] for drawing in drawings]
        count = f" in {config.pairs.steps} steps" if name == "drawing" else ""
        rows.append((f"{name}{count}", [_occupied(plan) for plan in some]))
        rows.append(("takes", [f"{_milliseconds(plan.seconds[plan.bound])} ({plan.bound})" for plan in some]))
    if drawings:
        rows.append(
            (f"images a second at {share:.0%}", [_number(images_per_second(drawing, share)) for drawing in drawings])
        )
    lines = [about, *_aligned(rows)]
    limits: dict[str, list[str]] = {}
    for plan in plans:
        limits.setdefault(_limits(plan), []).append(plan.topology)
    lines += [f"{', '.join(names)}: {limit}" for limit, names in limits.items()]
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


def _limits(plan: Plan) -> str:
    units = {"arithmetic": "FLOP"}
    speeds = (f"{name} {_short(peak, units.get(name, 'B'))}/s" for name, peak in plan.peaks.items() if peak)
    return f"{', '.join(speeds)} ({plan.source})"


def _exchanged(kind: str, plan: Plan) -> str:
    found = (plan.compiled.collectives or {}).get(kind)
    return f"{found['count']} of {_short(found['bytes'], 'B')}" if found else "–"


def _largest(found: Largest) -> str:
    return f"{found.each} each, {found.batch} in all" if found.plan else "does not fit"


def _occupied(plan: Plan) -> str:
    return f"{plan.examples} images, " + ("do not fit" if not plan.fits else _bytes(plan.total))


def _bytes(count: float) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.2f} MiB"


def _short(count: float, unit: str) -> str:
    """Three digits and a prefix: 20.3 TFLOP."""
    power = min(int(math.log(count, 1000)), 5) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {' kMGTP'[power].strip()}{unit}"


def _number(value: float) -> str:
    return "below 0.01" if value < 0.01 else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _milliseconds(seconds: float) -> str:
    return f"{_number(1e3 * seconds)} ms" if seconds else "–"
