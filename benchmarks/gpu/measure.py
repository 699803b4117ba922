"""How each kind of part is measured; every function gives what is written down of its part."""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.gpu.parts import Part, Program, Step
from benchmarks.gpu.processes import Process
from benchmarks.gpu.programs import CompiledDrawing, CompiledStep
from hgdpo_jax.models import attend

Prepared = Mapping[Program, Any]
_ROUNDS, _LONG_ENOUGH = 7, 0.4  # seconds of a round


def alternate(runs: Mapping[str, Callable[[int], Any]], is_small: bool, rounds: int = _ROUNDS) -> dict[str, Any]:
    """Seconds that each takes once, median and range over rounds in which all take their turn.

    Args:
        runs: name → runs so often, and waits for the end. Once or twice in advance, which does not count.
        is_small: once in a round, and two rounds.
        rounds: otherwise.
    """
    times = {}
    for name, run in runs.items():
        first = _seconds(run, 1)  # which may have to load the program
        seconds = first if is_small or first > 5 * _LONG_ENOUGH else _seconds(run, 1)
        times[name] = 1 if is_small else max(1, min(300, round(_LONG_ENOUGH / seconds)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2 if is_small else rounds):
        for name, run in runs.items():
            found[name].append(_seconds(run, times[name]) / times[name])
    return {name: peers.summary(values, 9) | {"rounds": len(values)} for name, values in found.items()}


def _seconds(run: Callable[[int], Any], count: int) -> float:
    begin = time.perf_counter()
    run(count)
    return time.perf_counter() - begin


def products(part: Part, prepared: Prepared, is_small: bool) -> dict[str, Any]:
    """Products of large square matrices of random numbers: the peak that steps are held against."""
    size = 256 if is_small else 8192
    numbers = jax.random.normal(jax.random.key(0), (2, size, size))
    runs = {}
    for dtype in ("bfloat16", "float16"):
        a, b = numbers.astype(dtype)
        program = jax.jit(jnp.matmul).lower(a, b).compile()
        runs[dtype] = partial(_repeat, program, (a, b))
    seconds = alternate(runs, is_small)
    rates = {name: 2 * size**3 / each["median"] for name, each in seconds.items()}
    return {"size": size, "seconds": seconds, "operations_per_second": rates}


def _repeat(program: Callable[..., Any], arguments: Iterable[Any], count: int) -> None:
    for _ in range(count):
        out = program(*arguments)
    jax.block_until_ready(out)


def attention(part: Part, prepared: Prepared, is_small: bool) -> dict[str, Any]:
    """The self-attention of four pairs at 64x64 and 32x32 latents, forwards and backwards: the device's own kernel, and
    XLA in chunks."""
    found: dict[str, Any] = {}
    for tokens, width in ((128, 8), (64, 16)) if is_small else ((4096, 40), (1024, 80)):
        shape = (8, tokens, 8, width)
        for dtype in ("bfloat16", "float16"):
            q, k, v = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(3))
            own, runs = attend.kernel(jax.devices()[0], q, k), {}
            for name, kernel in {own.__name__: own, "in_chunks": attend.in_chunks}.items():
                gradient = jax.grad(lambda q, k, v, kernel=kernel: kernel(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
                runs[name] = partial(_repeat, jax.jit(gradient).lower(q, k, v).compile(), (q, k, v))
            seconds = alternate(runs, is_small)
            # Two products forwards, five backwards.
            count = 7 * 2 * shape[0] * shape[2] * tokens**2 * width
            rates = {name: count / each["median"] for name, each in seconds.items()}
            found[f"{tokens} tokens, heads of {width}, {dtype}"] = {
                "own": own.__name__,
                "seconds": seconds,
                "operations_per_second": rates,
            }
    return found


def _held() -> dict[str, int]:
    return jax.devices()[0].memory_stats() or {}


def steps(part: Part, prepared: Prepared, is_small: bool) -> dict[str, Any]:
    """Steps, alternately where there are several. The first one's memory: of its temporaries what the compiler says,
    and by how much the device's peak exceeds what lay there before, where no earlier program needed more."""
    programs = {program: prepared[program] for program in part.programs}
    first, measured = next(iter(programs.values())), None
    before = _held()
    first.run(1)
    if _held().get("peak_bytes_in_use", 0) > before.get("peak_bytes_in_use", 0):
        measured = _held()["peak_bytes_in_use"] - before["bytes_in_use"]
    said = first.program.memory_analysis()
    seconds = alternate({str(name): each.run for name, each in programs.items()}, is_small)
    return {
        "seconds": seconds,
        "pairs": {str(program): program.pairs for program in programs},
        "dtype": {str(program): program.dtype for program in programs},
        "operations": {str(program): each.operations for program, each in programs.items()},
        "compile_seconds": {str(program): round(each.seconds, 1) for program, each in programs.items()},
        "memory": {
            "arguments": said.argument_size_in_bytes,
            "temporaries": said.temp_size_in_bytes,
            "temporaries_measured": measured,
        },
        "gradient_norm": float(first.run(1)["gradient_norm"]),
    }


def deterministic(part: Part, prepared: Prepared, is_small: bool) -> dict[str, Any]:
    """Steps with and without the flag; and whether three steps twice from the same state give the same bits."""
    found = steps(part, prepared, is_small)
    found["same_bits"] = {str(program): _same_bits(prepared[program]) for program in part.programs}
    return found


def _same_bits(step: CompiledStep) -> bool:
    kept, ends = step.state, []
    for _ in range(2):
        step.state = jax.tree.map(jnp.copy, kept)
        step.run(3)
        ends.append([np.asarray(leaf) for leaf in jax.tree.leaves(step.state)])
    return all(np.array_equal(*pair, equal_nan=True) for pair in zip(*ends, strict=True))


def pool(part: Part, prepared: Prepared, is_small: bool) -> dict[str, Any]:
    """Images of a pool, drawn and decoded, without scoring."""
    (program,) = part.programs
    drawing: CompiledDrawing = prepared[program]
    seconds = alternate({str(program): drawing.run}, is_small, 3)
    return {
        "seconds": seconds,
        "images": drawing.sampler.batch,
        "dtype": program.dtype,
        "operations": dict(zip(("draw", "decode"), drawing.operations, strict=True)),
        "images_per_second": drawing.sampler.batch / seconds[str(program)]["median"],
        "compile_seconds": {str(program): round(drawing.seconds, 1)},
    }


def plan(part: Part, prepared: Prepared, is_small: bool) -> dict[str, Any]:
    """The estimates of memory that `hgdpo_jax.plan` makes without a compiler."""
    (program,) = part.programs
    return prepared[program].answer


def peer(part: Part, prepared: Prepared, is_small: bool) -> dict[str, Any]:
    """Ours beside diffusers, as it is and compiled."""
    ours, theirs = part.programs
    process: Process = prepared[theirs]
    runs = {"hgdpo_jax": prepared[ours].run}
    runs |= {f"diffusers, {name}": partial(process.ask, name) for name in process.answer["modes"]}
    seconds = alternate(runs, is_small, 5 if isinstance(ours, Step) else 2)
    medians = {name: each["median"] for name, each in seconds.items()}
    count = ours.pairs if isinstance(ours, Step) else ours.images
    return {
        "seconds": seconds,
        "pairs_or_images": count,
        "versions": process.answer["versions"],
        "ratio": {name: x / medians["hgdpo_jax"] for name, x in medians.items()},
    }


KINDS = {each.__name__: each for each in (products, attention, steps, deterministic, pool, plan, peer)}
