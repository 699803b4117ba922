"""python -m tests.mutations [COUNT=2000]"""

import collections
import logging
import os
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

# Not the environment of the tests: their checks of types would take the place of what users meet.
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
from tests import mutations
from tests.mutations import checkpoints, klein, models, photographs, reference, runs, xl

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    with tempfile.TemporaryDirectory() as common, tqdm(total=total, unit="file") as bar:
        cases = photographs.cases() | models.cases() | runs.cases()
        for subject in (checkpoints, xl, klein, reference):
            cases |= subject.cases(Path(common))
        mutations.sound(cases)
        found = mutations.run(cases, range(total), bar.update)
    rows = collections.defaultdict(collections.Counter)
    for (name, file, how), times in found.items():
        rows[f"{name}: {file}"][how] += times
    for row, counts in sorted(rows.items()):
        print(f"{row:70}", *(f"{counts[how]:4} {how}" for how in ("read", "named and left out", "refused")))
