"""Where the compiler for TPUs expects a step's time to go: its estimate of each kernel, beside what arithmetic takes.

python -m benchmarks.tpu_compiled step --topology v5e [--most 30] [--config.train.batch=4 ...]
python -m benchmarks.tpu_compiled attention --topology v5e 4096x8x40 11264x8x40 4096x10x64

Needs no TPU but its compiler (`docs/plan.md`). `step` compiles the optimizer step of `configs/stage3.py:sd15` and adds
up the cycles that the optimised program states for each kernel; of Pallas' kernels it states none. `attention` compiles
these alone, forwards and for the gradient, for one image of tokens x heads x width: the instructions of a block, as
scheduled, times the blocks; what runs only where a row of blocks begins or ends is counted in each.

These are estimates of a compiler: nobody has held them against a TPU.
"""

import argparse
import math
import os
import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp

from hgdpo_jax.devices.mesh import make_mesh
from hgdpo_jax.devices.xla import settle_dtype, use_precision
from hgdpo_jax.models import attend
from hgdpo_jax.planning import hlo, program, topologies
from hgdpo_jax.planning.hlo import Computation, Instruction
from hgdpo_jax.run.settings import load_config

UNITS = {"v5e": 4, "v5p": 8, "v6e": 16}  # of 128 x 128 products, a v6e's being four each


def clock(topology: topologies.Topology) -> float:
    """Cycles a second, from the peak in bfloat16."""
    return topology.chip.peak["bfloat16"] / (UNITS[topology.name.partition(":")[0]] * 2 * 128**2)


def products(text: hlo.HloModule, computation: Computation, instruction: Instruction) -> list[tuple[str, int]]:
    """(shapes, operations) of the convolutions and products that a kernel computes."""
    if instruction.opcode == "fusion":
        inside = text.computations[instruction.called("calls")]
        return [found for inner in inside.instructions.values() for found in products(text, inside, inner)]
    if instruction.opcode != "convolution":  # which products are too
        return []
    out, left, right = (
        [int(n) for n in re.findall(r"\d+", type_[type_.index("[") : type_.index("]")])]
        for type_ in (instruction.type, *(computation.instructions[name].type for name in instruction.operands))
    )
    window = re.search(r"window=\{size=([\dx]+)", instruction.attributes)
    taps = math.prod(map(int, window[1].split("x"))) if window else 1
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    assert labels
    count = 2 * math.prod(out) * taps * right[labels[1].index("i")]
    return [(f"{left} * {right} -> {out}", count)]


def print_step(name: str, overrides: list[str], most: int) -> None:
    """Prints the estimate of a step, by kind of kernel, and the kernels that take longest beyond their arithmetic."""
    config = load_config("configs/stage3.py:sd15", overrides)
    settle_dtype(config.model, "tpu")
    topologies.prepare_compilers([name])
    use_precision(config.model.dtype)
    topology = topologies.describe_topology(name)
    mesh = make_mesh(config.mesh, topology.devices)
    lowered = program.step(config, program.open_architecture(config, "sd15"), mesh).lowered
    text = hlo.HloModule(lowered.compile(compiler_options=topology.options).as_text(), devices=mesh.size)
    peak, second = topology.chip.peak[config.model.dtype], clock(topology)
    kinds: Counter[str] = Counter()
    rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for computation, instruction, times in text.executed(text.entry):
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        found = products(text, computation, instruction)
        if not cycles or not int(cycles[1]):
            kinds["Pallas' kernels, of unknown time"] += instruction.is_kernel("tpu_custom_call")
            continue
        kind = "convolutions and products" if found else instruction.opcode
        takes, least = times * int(cycles[1]) / second, times * sum(count for _, count in found) / peak
        kinds[kind] += 1e3 * takes
        row = rows[kind, found[0][0] if found else re.sub(r"\{[^}]*\}", "", instruction.type)[:100]]
        row[:] = row[0] + takes, row[1] + least, row[2] + times
    for kind, value in kinds.most_common(8):
        print(f"{kind:40} {value:8.2f}")
    print("\nms, of these arithmetic, kernels")
    for (kind, about), (takes, least, times) in sorted(rows.items(), key=lambda row: row[1][1] - row[1][0])[:most]:
        print(f"{1e3 * takes:7.2f} {1e3 * least:7.2f} {times:5.0f}  {kind}: {about}")


def print_attention(name: str, shapes: list[str]) -> None:
    """Prints the estimate of splash, forwards and for the gradient, beside its operations at the peak."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        topologies.prepare_compilers([name])
        use_precision("bfloat16")
        topology = topologies.describe_topology(name)
        here = jax.sharding.SingleDeviceSharding(topology.devices[0])
        gradient = jax.grad(lambda *x: jnp.square(attend.splash(*x).astype(jnp.float32)).sum(), (0, 1, 2))
        for shape in shapes:
            tokens, heads, width = map(int, shape.split("x"))
            x = jax.ShapeDtypeStruct((1, tokens, heads, width), jnp.bfloat16, sharding=here)
            jax.jit(gradient).lower(x, x, x).compile(compiler_options=topology.options)
            for part, products in (("fwd", 2), ("dkv", 5)):
                path = next(Path(folder).glob(f"*splash_mha_{part}*schedule-analysis_final_bundles.txt"))
                bundles = int(re.search(r"total scheduled bundles: *(\d+)", path.read_text())[1])
                m = tokens + -tokens % 128
                block, keys = attend._keys(m, width, 2, gradient=part == "dkv")
                steps = heads * (m // attend._divisor(m)) * (m // keys)
                takes, least = steps * bundles / clock(topology), products * 2 * heads * tokens**2 * width
                print(f"{shape} {part}: {1e3 * takes:.3f} ms, {1e3 * least / topology.chip.peak['bfloat16']:.3f} of "
                      f"arithmetic; blocks of {keys} keys, products of {block}", flush=True)  # fmt: skip
            for path in Path(folder).iterdir():
                path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("step", "attention"))
    parser.add_argument("shapes", nargs="*", metavar="TOKENSxHEADSxWIDTH")
    parser.add_argument("--topology", default="v5e")
    parser.add_argument("--most", type=int, default=30, help="kernels to list")
    given, rest = parser.parse_known_args()
    if given.what == "step":
        print_step(given.topology, [argument.removeprefix("--config.") for argument in rest], given.most)
    else:
        print_attention(given.topology, given.shapes or ["4096x8x40", "1024x8x80"])


if __name__ == "__main__":
    main()
