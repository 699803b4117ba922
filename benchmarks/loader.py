"""Pairs per second that the loader brings from the page cache, at the size of SD1.5 at 512x512.

python -m benchmarks.loader [--records 2000] [--batch 64] [--batches 100] [--rounds 5]

Writes records of random latents to a temporary folder, reads every file once, so that the page cache holds it, and
times batches after a first pass that does not count. JSON to stdout.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from hgdpo_jax import runtime
from hgdpo_jax.data import pairs as shards
from hgdpo_jax.data.loader import PairLoader

LATENT, TOKENS, SHARD, NAME = (64, 64, 4), 77, 500, "512x512"


def write(folder: Path, count: int) -> None:
    """Finished shards of `count` pairs to train on and one held out."""
    rng = np.random.default_rng(0)

    def record(name: str) -> shards.Record:
        latents = {role: rng.standard_normal(LATENT, np.float32).astype(np.float16) for role in ("winner", "loser")}
        common = {"id": name, "caption": f"a photograph of a person, number {name}", "winner_number": 0}
        ids = rng.integers(0, 49408, TOKENS).astype(np.int32)
        return common | latents | {"input_ids": ids, "winner_score": 1.0, "loser_score": 0.0}

    schema, paths = shards.features(LATENT[-1], TOKENS, loser=True), {}
    shards.begin(folder, {})
    for role, records in (("train", count), ("heldout", 1)):
        sizes = [min(SHARD, records - begin) for begin in range(0, records, SHARD)]
        split = f"{role}_{NAME}"
        paths[split] = [shards.shard_path(folder, split, i, len(sizes)) for i in range(len(sizes))]
        for path, size in zip(paths[split], sizes, strict=True):
            shards.write_shard(path, schema, [record(f"{path.name}-{n}") for n in range(size)])
    shards.finish(folder, schema, paths, {NAME: LATENT})


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the loader.")
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    mesh, seconds = runtime.local_mesh(), {"loader": [], "loader and transfer": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pairs"
        write(folder, given.records)
        found = shards.open_pairs(folder, "")  # reads every byte, for its hash
        loader = PairLoader(found.sources["train"], given.batch, seed=0)
        for round_ in range(given.rounds + 1):
            for name, times in seconds.items():
                begin = time.perf_counter()
                for _ in range(given.batches):
                    batch = next(loader)
                    if name != "loader":
                        jax.block_until_ready(runtime.to_devices(batch, mesh))
                if round_:
                    times.append(time.perf_counter() - begin)
    rates = {name: sorted(given.batch * given.batches / s for s in times) for name, times in seconds.items()}
    pairs_per_second = {
        name: {"median": round(statistics.median(r)), "lowest": round(r[0]), "highest": round(r[-1])}
        for name, r in rates.items()
    }
    print(json.dumps({"latent": LATENT, **vars(given), "cores": os.cpu_count(), "pairs_per_second": pairs_per_second}))


if __name__ == "__main__":
    main()
