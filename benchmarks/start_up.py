"""How long `main` takes until its first step: imports, loading, compilation of the step, with and without a cache of
compiled programs.

python -m benchmarks.start_up [--config configs/stage1.py:portraits] [--rounds 5]

Whole processes, one after the other; of two with one cache the first finds it empty. The batch is of zeros. JSON to
stdout.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from benchmarks import peers

BEGIN = time.perf_counter()


def measure(name: str) -> dict[str, float]:
    """Seconds of each part, in this process."""
    import jax
    import numpy as np

    from hgdpo_jax import config as configuration
    from hgdpo_jax.devices.mesh import make_mesh
    from hgdpo_jax.devices.sharding import tree_shardings
    from hgdpo_jax.devices.start import start
    from hgdpo_jax.devices.transfer import to_devices
    from hgdpo_jax.diffusion.stable_diffusion import POSITIONS
    from hgdpo_jax.run.settings import load_config
    from hgdpo_jax.training import loop  # noqa: F401  # all that the command imports
    from hgdpo_jax.training import step as steps
    from hgdpo_jax.training.optimizer import make_optimizer, numbers_of
    from hgdpo_jax.training.policy import load_trainable

    times = [BEGIN, time.perf_counter()]
    config = load_config(name, [])
    start(model=config.model)
    settings, mesh = config.train, make_mesh(config.mesh)
    pipeline = load_trainable(config, mesh)
    denoiser, policy, frozen = steps.split_params(pipeline, settings.params)
    jax.block_until_ready(frozen)
    times.append(time.perf_counter())
    tx = make_optimizer(settings)
    placed = tree_shardings(jax.eval_shape(lambda p: steps.init_state(p, tx, settings.ema), policy), mesh)
    state = jax.jit(lambda p: steps.init_state(p, tx, settings.ema), out_shardings=placed)(policy)
    loss = steps.preference_loss(denoiser, pipeline.schedule, settings.blocks)
    step = steps.make_step(loss, tx, settings.accumulate, placed)
    latent = pipeline.latent_shape(next(iter(configuration.resolutions(config).values())))
    batch = {role: np.zeros((settings.batch, *latent), np.float16) for role in ("winner", "loser")}
    batch["input_ids"] = np.full((settings.batch, POSITIONS), 49407, np.int32)
    inputs = (state, policy, frozen, to_devices(batch, mesh), numbers_of(config, 0))
    compiled = step.lower(*inputs).compile()
    times.append(time.perf_counter())
    jax.block_until_ready(compiled(*inputs))
    times.append(time.perf_counter())
    parts = ("import", "load", "compile", "first step")
    return {part: after - before for part, before, after in zip(parts, times[:-1], times[1:], strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the start of main.")
    parser.add_argument("--config", default="configs/stage1.py:portraits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="store_true", help="is how each process is started")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.config)))
        return
    command = [sys.executable, "-m", "benchmarks.start_up", "--config", given.config, "--only"]
    rows: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for found in rows.values():
                begin, environment = time.perf_counter(), os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
                found.append(json.loads(output.splitlines()[-1]) | {"process": time.perf_counter() - begin})
    seconds = {
        name: {part: peers.summary([row[part] for row in found], 2) for part in found[0]}
        for name, found in rows.items()
    }
    about = {"config": given.config, "rounds": given.rounds, "cores": os.cpu_count()}
    print(json.dumps(about | {"seconds": seconds}, indent=2))


if __name__ == "__main__":
    main()
