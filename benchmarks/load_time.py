"""Disk to ready: this package against diffusers on one Stable Diffusion folder, whole processes, alternately.

python -m benchmarks.load_time FOLDER [--dtype bfloat16] [--rounds 5]

Ready means that every weight was read once: diffusers maps the file and would read it in the first forward.
"""

import argparse
import json
import statistics
import subprocess
import sys

OURS = """
from hgdpo_jax.diffusion.pipeline import load_pipeline
imported = time.perf_counter()
found = load_pipeline(folder, dtype, param_dtype=dtype)
loaded = time.perf_counter()
"""
THEIRS = """
import torch
from diffusers import StableDiffusionPipeline
imported = time.perf_counter()
found = StableDiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
loaded = time.perf_counter()
for model in (found.unet, found.vae, found.text_encoder):
    for parameter in model.parameters():
        parameter.view(-1)[:: 4096 // parameter.element_size()].sum().item()  # each page
"""
CHILD = """
import json, resource, sys, time
folder, dtype = sys.argv[1:]
begin = time.perf_counter()
{body}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps([imported - begin, loaded - imported, time.perf_counter() - begin, peak]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the loading of a Stable Diffusion folder.")
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    rows: dict[str, list[list[float]]] = {"hgdpo_jax": [], "diffusers": []}
    for _ in range(given.rounds):
        for name, body in (("hgdpo_jax", OURS), ("diffusers", THEIRS)):
            command = [sys.executable, "-c", CHILD.format(body=body), given.folder, given.dtype]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows[name].append(json.loads(output.splitlines()[-1]))
    for name, found in rows.items():
        imports, load, ready, peak = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name:10} import {imports:5.2f} s   load {load:5.2f} s   ready {ready:5.2f} s   peak {peak:5.2f} GiB")


if __name__ == "__main__":
    main()
