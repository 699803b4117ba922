"""The embedded portraits with fewer people to learn from: python -m tools.reproduction.people COUNT FILE.jsonl"""

import json
import sys
from pathlib import Path

from hgdpo_jax.config import ASSETS
from hgdpo_jax.run.files import atomic_path


def write(count: int, path: Path) -> None:
    """Captions of the first so many people to train on, and of all that are held out, with absolute paths."""
    folder = ASSETS / "portraits"
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"][:count]
    kept = train + [line for line in lines if line["split"] != "train"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line | {"file": str(folder / line["file"])}) + "\n" for line in kept))


if __name__ == "__main__":
    write(int(sys.argv[1]), Path(sys.argv[2]))
