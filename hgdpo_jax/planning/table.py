"""Plans as people read them."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.planning.figures import Largest, Plan
from hgdpo_jax.planning.topologies import extra_of

_GIB = 2**30
_ESTIMATED = (
    "estimated, for the compiler is not installed (pip install -e '.[{extra}]'): beside compilers a LoRA step's memory "
    "in all was 11 % too low to 18 % too high, its time 2 % too low to 5 % too high, on a T4 35 % too high; full "
    "fine-tuning's memory nearly twice too high; drawing took up to 1.3 GiB more (docs/plan.md)"
)


def hours(plan: Plan, share: float, config: ConfigDict) -> float:
    """Hours of the config's steps, where a share of the roofline is reached."""
    return config.train.steps * plan.examples / plan.rate(share) / 3600


def images_per_second(drawing: tuple[Plan, Plan], share: float) -> float:
    """Images drawn and decoded a second, where a share of the roofline is reached."""
    return 1 / sum(1 / plan.rate(share) for plan in drawing)


Rows = list[tuple[str, list[str]]]  # name, and a cell for each topology


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
    rows = [*_memory(plans), *_resources(plans), *_speed(plans, share, config), *_batches(found)]
    if drawings:
        rows += _drawn(drawings, share, config.pairs.steps)
    programs = [*plans, *(plan for drawing in drawings for plan in drawing)]
    return "\n".join([_title(config, base), *_aligned(rows), *_limits(plans), *_remarks(programs, config.model.dtype)])


def _unit(config: ConfigDict) -> str:
    return "pairs" if config.train.objective != "sft" else "photographs"


def _title(config: ConfigDict, base: str) -> str:
    train, sizes = config.train, configuration.resolutions(config)
    largest = max(sizes, key=lambda name: math.prod(sizes[name]))  # which the step was compiled for
    about = f"{config.stage}: {base}, {train.batch} {_unit(config)} a step of {largest} (height x width), "
    return about + f"trains {train.params}, checkpointing {train.checkpointing}; of each device:"


def _row(name: str, plans: Sequence[Plan], cell: Callable[[Plan], str]) -> tuple[str, list[str]]:
    return name, [cell(plan) for plan in plans]


def _memory(plans: Sequence[Plan]) -> Rows:
    return [
        _row("", plans, lambda plan: f"{plan.devices} x {plan.topology.partition(':')[0]}"),
        _row("model.dtype", plans, lambda plan: plan.dtype),
        *(_row(name, plans, lambda plan, name=name: _bytes(plan.held[name])) for name in plans[0].held),  # type: ignore[misc]
        _row("temporaries", plans, lambda plan: plan.compiled.refused and "–" or _bytes(plan.compiled.temporaries)),
        _row("in all", plans, lambda plan: plan.compiled.refused and "–" or _bytes(plan.total)),
        _row("may fill", plans, lambda plan: _bytes(plan.memory)),
        _row("fits", plans, lambda plan: "yes" if plan.fits else "NO"),
    ]


def _resources(plans: Sequence[Plan]) -> Rows:
    kinds = sorted({kind for plan in plans for kind in plan.compiled.collectives or {}})
    return [
        _row("operations", plans, lambda plan: _short(plan.operations, "FLOP")),
        _row("memory traffic", plans, lambda plan: _short(plan.compiled.traffic, "B")),
        *(_row(kind, plans, partial(_exchanged, kind)) for kind in kinds),
        *(_row(f"{resource} takes", plans, partial(_takes, resource)) for resource in plans[0].seconds),
        _row("bound by", plans, lambda plan: plan.bound),
    ]


def _speed(plans: Sequence[Plan], share: float, config: ConfigDict) -> Rows:
    return [
        _row(f"{_unit(config)} a second at {share:.0%}", plans, lambda plan: _number(plan.rate(share))),
        _row(f"hours for {config.train.steps:,} steps", plans, lambda plan: _number(hours(plan, share, config))),
        _row("compiled in", plans, lambda plan: "estimated" if plan.estimated else f"{plan.compiled.seconds:,.0f} s"),
    ]


def _batches(found: Sequence[Sequence[Largest]]) -> Rows:
    """A row for each way of checkpointing."""
    ways = zip(*found, strict=True)
    return [(f"largest batch, {each[0].checkpointing}", [_largest(one) for one in each]) for each in ways]


def _drawn(drawings: Sequence[tuple[Plan, Plan]], share: float, steps: int) -> Rows:
    rows = []
    for name, plans in zip((f"drawing in {steps} steps", "decoding"), zip(*drawings, strict=True), strict=True):
        rows.append(_row(name, plans, _occupied))
        rows.append(_row("takes", plans, lambda plan: f"{_takes(plan.bound, plan)} ({plan.bound})"))
    return [*rows, (f"images a second at {share:.0%}", [_number(images_per_second(each, share)) for each in drawings])]


def _limits(plans: Sequence[Plan]) -> list[str]:
    """What bounds the topologies, once for those that have the same limits."""
    units, limits = {"arithmetic": "FLOP"}, dict[str, list[str]]()
    for plan in plans:
        speeds = (f"{name} {_short(peak, units.get(name, 'B'))}/s" for name, peak in plan.peaks.items() if peak)
        limits.setdefault(f"{', '.join(speeds)} ({plan.source})", []).append(plan.topology)
    return [f"{', '.join(names)}: {limit}" for limit, names in limits.items()]


def _remarks(plans: Sequence[Plan], dtype: str) -> list[str]:
    """What a reader has to know of single plans, each once."""
    missing: dict[str, dict[str, None]] = {}  # extra that has the compiler → its topologies
    for plan in plans:
        if plan.estimated:
            missing.setdefault(extra_of(plan.topology), {})[plan.topology] = None
    lines = [f"{', '.join(names)}: {_ESTIMATED.format(extra=extra)}" for extra, names in missing.items()]
    for plan in plans:
        if dtype == "bfloat16" and plan.dtype == "float16":
            lines.append(f"{plan.topology}: has no bfloat16; planned, and to be trained, with model.dtype=float16")
        if plan.compiled.refused:
            lines.append(f"{plan.topology}: the compiler says {plan.compiled.refused}")
        if plan.compiled.loops:
            lines.append(
                f"{plan.topology}: {plan.compiled.loops} loops count once, for their length is not written down"
            )
    return list(dict.fromkeys(lines))


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


def _takes(resource: str, plan: Plan) -> str:
    seconds = plan.seconds[resource]
    return f"{_number(1e3 * seconds)} ms" if seconds else "–"


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
