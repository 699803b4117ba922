"""Pairs per second that the loader brings from the page cache, at the size of SD1.5 at 512x512, and what a step waits.

python -m benchmarks.loader [--records 2000] [--batch 64] [--batches 40] [--rounds 5] [--rate 500]

Writes records of random latents to a temporary folder, reads every file once, so that the page cache holds it, and
times batches; a first round does not count. The stall is how much longer steps take with the loader than with one batch
for all of them, in the order of `hgdpo_jax.training.loop`, on a device that computes `rate` pairs a second and takes
nothing of the processor, which sleeps meanwhile. JSON to stdout.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import jax
import numpy as np

from benchmarks import peers
from hgdpo_jax.data import shards
from hgdpo_jax.data.loader import Batch, PairLoader
from hgdpo_jax.data.pairs import open_pairs
from hgdpo_jax.data.record import Record, features
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.devices.transfer import to_devices

LATENT, TOKENS, SHARD, NAME = (64, 64, 4), 77, 500, "512x512"


def write(folder: Path, count: int) -> None:
    """Finished shards of `count` pairs to train on and one held out."""
    rng = np.random.default_rng(0)

    def record(name: str) -> Record:
        latents = {role: rng.standard_normal(LATENT, np.float32).astype(np.float16) for role in ("winner", "loser")}
        common = {"id": name, "caption": f"a photograph of a person, number {name}", "winner_number": 0}
        ids = rng.integers(0, 49408, TOKENS).astype(np.int32)
        return common | latents | {"input_ids": ids, "winner_score": 1.0, "loser_score": 0.0}

    schema, paths = features(LATENT[-1], TOKENS, loser=True), {}
    shards.begin(folder, {})
    for role, records in (("train", count), ("heldout", 1)):
        sizes = [min(SHARD, records - begin) for begin in range(0, records, SHARD)]
        split = f"{role}_{NAME}"
        paths[split] = [shards.shard_path(folder, split, i, len(sizes)) for i in range(len(sizes))]
        for path, size in zip(paths[split], sizes, strict=True):
            shards.write_shard(path, schema, [record(f"{path.name}-{n}") for n in range(size)])
    shards.finish(folder, schema, paths, {NAME: LATENT})


def step_seconds(batches: Iterator[Batch], count: int, seconds: float) -> float:
    """The median step, each of which is waited for, as where every step is logged. A median, since other programs may
    take the processor now and then."""
    mesh, found = local_mesh(), []
    batch = to_devices(next(batches), mesh)
    for _ in range(count):
        begin = time.perf_counter()
        jax.block_until_ready(batch)
        end = time.perf_counter() + seconds  # of the step that now begins
        batch = to_devices(next(batches), mesh)
        time.sleep(max(0.0, end - time.perf_counter()))
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the loader.")
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=500.0)
    given = parser.parse_args()
    rates, stalls, seconds = [], [], given.batch / given.rate
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary) / "pairs", given.records)
        found = open_pairs(Path(temporary) / "pairs", "")  # reads every byte, for its hash
        loader = PairLoader(found.sources["train"], given.batch, seed=0)
        one = repeat(next(loader))
        for _ in range(given.rounds + 1):
            begin = time.perf_counter()
            for _ in range(given.batches):
                next(loader)
            rates.append(given.batch * given.batches / (time.perf_counter() - begin))
            stalls.append(step_seconds(loader, given.batches, seconds) / step_seconds(one, given.batches, seconds) - 1)
    figures = {"pairs_per_second": peers.summary(rates[1:], 0), "stall": peers.summary(stalls[1:], 4)}
    print(json.dumps({"latent": LATENT, **vars(given), "cores": os.cpu_count(), **figures}))


if __name__ == "__main__":
    main()
