"""What was read, in a few lines, before anything is drawn: photographs, how they are cut, captions."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.plan import ShardPlan
from hgdpo_jax.data.photographs import Photograph, form_of, shapes_of
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.run.files import Member
from hgdpo_jax.run.index import Index

_COUNTED = 5000  # captions, at least, whose tokens are counted
_CROPPED = 0.1  # of a photograph's view
_SHOWN = 80  # characters of a caption


def summarise(config: ConfigDict, plan: Sequence[ShardPlan], pipeline: Pipeline, index: Index) -> list[str]:
    """Three lines: photographs and splits, resolutions and what is cut off, captions and their tokens.

    Args:
        config: of the stage.
        plan: all its shards.
        pipeline: whose tokenizers read the captions.
        index: knows the shapes of the photographs.
    """
    captions = [photograph for part in plan for photograph in part.photographs]
    return [_counted(config, plan), _cut(config, plan, index), _said(config, captions, pipeline)]


def _pictures(plan: Sequence[ShardPlan], **wanted: str) -> dict[Path | Member, None]:
    """The pictures of the shards of a role or a resolution, each once."""
    parts = [part for part in plan if all(getattr(part, name) == value for name, value in wanted.items())]
    return {photograph.picture: None for part in parts for photograph in part.photographs}


def _counted(config: ConfigDict, plan: Sequence[ShardPlan]) -> str:
    pictures, examples = len(_pictures(plan)), sum(len(part.photographs) for part in plan)
    kind = "pairs" if config.pairs.loser == "given" else "photographs"
    splits = (("train", config.data.split), ("heldout", "held out"))
    roles = ", ".join(f"{len(_pictures(plan, role=role)):,} {name}" for role, name in splits)
    more = "mirror images" if config.data.mirror else "further captions"
    more = f"; {examples:,} examples with {more}" if examples != pictures else ""
    return f"{pictures:,} {kind}, captions from {form_of(config)}; {roles}{more}"


def _cut(config: ConfigDict, plan: Sequence[ShardPlan], index: Index) -> str:
    sizes, counts = configuration.resolutions(config), {part.resolution: 0 for part in plan}
    shapes = shapes_of([photograph for part in plan for photograph in part.photographs], index)
    enlarged = cropped = 0
    for name in counts:
        found = [shape for picture in _pictures(plan, resolution=name) if (shape := shapes[picture])]
        scales = np.array(found, np.float64).reshape(-1, 2) / sizes[name]
        low, high = np.sort(scales, axis=1).T
        counts[name] = len(_pictures(plan, resolution=name))
        enlarged, cropped = enlarged + int(np.sum(low < 1)), cropped + int(np.sum(low / high < 1 - _CROPPED))
    (first, count), *others = Counter(counts).most_common()
    listed = [f"{first} (height x width): {count:,}", *(f"{name}: {count:,}" for name, count in others)]
    return f"{', '.join(listed)}; {enlarged:,} enlarged, {cropped:,} cropped by more than {_CROPPED:.0%}"


def _said(config: ConfigDict, photographs: Sequence[Photograph], pipeline: Pipeline) -> str:
    """Also warns of captions with more tokens than are read, of which the first are used. Of many captions it counts
    the tokens of some: those of 300,000 would take a core 20 s and gigabytes at every start."""
    some = photographs[:: max(1, len(photographs) // _COUNTED)]
    most, prefix = pipeline.positions, config.data.caption_prefix
    counts = pipeline.count_tokens([photograph.caption for photograph in some])
    longest, over = int(np.argmax(counts)), sum(count > most for count in counts)
    if over:
        logging.warning("%d of %d captions (%d in all) have more than %d tokens, the first of which are used; that of "
                        "%s has %d", over, len(counts), len(photographs), most, some[longest].id,
                        counts[longest])  # fmt: skip
    around, with_prefix = pipeline.count_tokens(["", prefix])  # what begins and ends every caption
    own = f", {with_prefix - around} of them of data.caption_prefix" if prefix else ""
    first = " ".join(some[0].caption.split())
    shown = first if len(first) <= _SHOWN else f"{first[:_SHOWN]}…"
    return f"captions of {min(counts)} to {max(counts)} tokens ({most} fit){own}, such as {shown!r}"
