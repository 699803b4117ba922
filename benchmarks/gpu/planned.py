"""What `hgdpo_jax.plan` estimates of the steps that are measured, on the processor and beside the compilers."""

import argparse
import os

from benchmarks.gpu.parts import PLANNED
from benchmarks.gpu.processes import end_with_parent, say
from benchmarks.gpu.results import LEFT_OUT


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    is_small = parser.parse_args().small
    end_with_parent()
    try:
        from benchmarks.gpu.programs import config_of, source_of
        from hgdpo_jax.devices.mesh import local_mesh
        from hgdpo_jax.devices.xla import use_precision
        from hgdpo_jax.planning import program
        from hgdpo_jax.planning.chips import CHIPS
        from hgdpo_jax.planning.estimated import estimate
    except ModuleNotFoundError as error:
        return say(failed=f"{LEFT_OUT}{error}; estimates need the packages that training needs")
    device, mesh = os.environ["BENCHMARKED_DEVICE"], local_mesh()
    name, chip = next(((name, chip) for name, chip in CHIPS.items() if chip.kind == device), ("h100", CHIPS["h100"]))
    found = {}
    for step in PLANNED:
        config = config_of(step, is_small)
        use_precision(step.dtype)
        planned = program.step(config, source_of(step.model, is_small), mesh)
        made = estimate(planned, chip, mesh)
        found[str(step)] = {
            "arguments": made.arguments,
            "temporaries": made.temporaries,
            "memory_seconds": made.traffic / chip.bandwidth,
            "operations_per_second": chip.peak[step.dtype],
        }
    say(topology=name, steps=found)


if __name__ == "__main__":
    main()
