"""The reference's predictions, which a run keeps."""

import contextlib
import io
from pathlib import Path

from hgdpo_jax.run.index import Index
from hgdpo_jax.training import inputs as stage_inputs
from hgdpo_jax.training import reference_cache
from hgdpo_jax.training.start import Start
from tests import tiny
from tests.mutations.case import Case, written

_DRAWS = 2


def cases(place: Path) -> dict[str, Case]:
    """All of them by name; `place` gets the base and the pairs that they are of."""
    config = tiny.config(tiny.write_base(place / "base of a run", tiny.ONE_LEVEL), reference_cache=_DRAWS)
    tiny.write_pairs(place / "run" / "stage1" / "pairs", 4, 2)
    inputs = stage_inputs.read(config, place / "run", Index())
    start = Start(state=None, reference=inputs.policy, reference_hash="0" * 64, position=0)

    def read(folder: Path) -> bool:
        """As a training begins, which computes what is missing."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            (source,) = reference_cache.attach(config, folder, inputs, start, Index()).pairs.sources["train"]
        assert all(source[i]["reference"].shape == (2, *tiny.LATENT) for i in range(len(source)))
        return len(source) == _DRAWS * 4

    files = written(read)
    return {"reference cache": Case(files, list(files), read)}
