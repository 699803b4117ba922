"""Memory and hours of a stage on the devices that are here: estimated from its programs, which are not compiled."""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.forwards import pool_drawings
from hgdpo_jax.curriculum.plan import ShardPlan
from hgdpo_jax.devices.peaks import known_peak, peak
from hgdpo_jax.diffusion.source import Source
from hgdpo_jax.planning import figures, program, table
from hgdpo_jax.planning.chips import CHIPS, DTYPES, Chip
from hgdpo_jax.planning.figures import Plan
from hgdpo_jax.planning.plan import share_of_one
from hgdpo_jax.planning.topologies import Topology, describe_topology

_SHARE = 0.4  # of the roofline that is reached, as hgdpo_jax.plan assumes; of a processor its speed was measured
_GIB = 2**30


def topology_of(mesh: Mesh) -> Topology:
    """The devices of a mesh, whose programs are estimated."""
    devices = list(mesh.devices.flat)
    kind = devices[0].device_kind
    chip = describe_topology("cpu").chip if devices[0].platform == "cpu" else chip_of(devices[0])
    if devices[0].platform == "cpu":  # devices of one machine share it
        chip = Chip("cpu", "cpu", chip.memory / len(devices), {d: p / len(devices) for d, p in chip.peak.items()},
                    0, 0, 0, chip.source)  # fmt: skip
    return Topology(kind, chip, devices, {}, "")


def chip_of(device: Any) -> Chip:
    """An accelerator as the plans know it, by its name and memory; otherwise with no more than JAX tells of it."""
    kind, room = device.device_kind, (device.memory_stats() or {}).get("bytes_limit", 0)
    found = known_peak(kind)
    alike = [chip for chip in CHIPS.values() if found and known_peak(chip.kind) is found]
    if alike:
        return min(alike, key=lambda chip: abs(chip.memory - room))
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    gpu = {"major": major, "minor": minor} if minor else {}
    peaks = {dtype: peak(kind, dtype) or 0.0 for dtype in DTYPES}
    return Chip(kind, "cuda" if gpu else device.platform, room, peaks, 0, 0, 0, "", gpu=gpu)


def plan_drawing(config: ConfigDict, source: Source, mesh: Mesh) -> tuple[Plan, Plan]:
    """The estimates of drawing a batch of images, and of decoding it."""
    whole, parts = program.drawing(config, source, mesh), program.drawing(*share_of_one(config, source, mesh))
    draw, decode = (program.of_one_device(*both, mesh) for both in zip(whole, parts, strict=True))
    topology, ways = topology_of(mesh), program.ways(mesh)
    examples = -(-config.pairs.batch // ways) * ways
    dtypes = config.model.dtype, "float32" if config.model.dtype == "float32" else "tf32"  # as planning.plan has it
    return (
        figures.plan_program(draw, topology, mesh, dtypes[0], examples),
        figures.plan_program(decode, topology, mesh, dtypes[1], examples),
    )


def plan_step(config: ConfigDict, source: Source, mesh: Mesh) -> tuple[Plan, dict[str, int]]:
    """The estimate of an optimizer step; and name → bytes of what is trained, on all devices together."""
    part = program.step(*share_of_one(config, source, mesh))
    whole = program.of_one_device(program.step(config, source, mesh), part, mesh)
    return figures.plan_program(whole, topology_of(mesh), mesh, config.model.dtype, config.train.batch), part.held


def memory(what: str, plans: Sequence[Plan], mesh: Mesh) -> str:
    """What a device needs for one program after the other, and what it has."""
    needed = max(plan.total for plan in plans)
    limit = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit") or plans[0].memory
    shown = f"about {needed / _GIB:,.1f} GiB" if needed >= _GIB / 10 else "less than 0.1 GiB"
    line = f"{what} needs {shown} of each device, which has {limit / _GIB:,.1f}"
    return line if needed <= limit else f"{line}: it will hardly fit; docs/trouble.md says what to do"


def share_of(mesh: Mesh) -> float:
    """The share of the devices' peak that is reached."""
    return 1.0 if mesh.devices.flat[0].platform == "cpu" else _SHARE


def hours_of_pairs(
    config: ConfigDict, plan: Sequence[ShardPlan], drawing: tuple[Plan, Plan], share: float
) -> float | None:
    """Hours for the images of all shards, with guidance in all steps, without scoring them; None where the device's
    peak is unknown.

    Args:
        config: of the stage.
        plan: all shards.
        drawing: see :func:`plan_drawing`.
        share: of the peak.
    """
    pairs = config.pairs
    drawn = ("pool" in (pairs.winner, pairs.loser)) * pool_drawings(config)
    if "sdrecon" in (pairs.winner, pairs.loser):
        drawn += sum(pairs.strengths) / 10  # which is so much of a trajectory
    if not all(one.seconds[one.bound] for one in drawing):
        return None
    sizes = {name: height * width for name, (height, width) in configuration.resolutions(config).items()}
    images = drawn * sum(len(part.photographs) * sizes[part.resolution] for part in plan) / max(sizes.values())
    return images / table.images_per_second(drawing, share) / 3600


def hours_of_steps(config: ConfigDict, plan: Plan, share: float) -> float | None:
    """Hours for all steps; None where the device's peak is unknown."""
    return table.hours(plan, share, config) if plan.seconds[plan.bound] else None


def in_words(hours: float | None, what: str, mesh: Mesh) -> str:
    """Some hours, or that they are not known."""
    kind = mesh.devices.flat[0].device_kind
    if hours is None:
        return f"unknown, for the peak of {kind} is not known"
    shown = "below 0.01" if hours < 0.01 else f"about {hours:,.2g}" if hours < 100 else f"about {hours:,.0f}"
    return f"{shown} for {what}, at {share_of(mesh):.0%} of what {mesh.size} x {kind} can do"
