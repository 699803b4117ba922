"""All that the pairs of a stage are made of, read and checked before anything is drawn or written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.missing import require_photographs
from hgdpo_jax.curriculum.plan import Photographs, ShardPlan, made_from, plan_shards, require_captions
from hgdpo_jax.curriculum.rated import Rated, read_rated
from hgdpo_jax.data import resolutions
from hgdpo_jax.data.pairs import Pairs, open_stage
from hgdpo_jax.data.photographs import choose_resolutions, list_examples
from hgdpo_jax.run import processes, provenance
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.folder import BASE_STAGE, pair_stages
from hgdpo_jax.run.index import Index, first_process_first
from hgdpo_jax.training.finished import BASE, policy_hash, require_base


class Prepared(NamedTuple):
    """What the pairs of a stage are made of.

    Attributes:
        config: of the stage, with the resolutions of the run.
        workdir: of the run.
        photographs: by their role.
        plan: all shards.
        earlier: the pairs whose winners lose here.
        inputs: what the pairs are made from, see :mod:`hgdpo_jax.run.provenance`.
        rated: ratings by hand, if any.
    """

    config: ConfigDict
    workdir: Path
    photographs: Photographs
    plan: Sequence[ShardPlan]
    earlier: Pairs | None
    inputs: dict[str, Any]
    rated: Rated | None


def require_own(config: ConfigDict) -> None:
    """Raises UserError where a stage has no pairs of its own, or nothing that chooses them."""
    if config.stage not in pair_stages(config):
        raise UserError(f"{config.stage} learns from the pairs of {config.train.pairs}: build those")
    if config.pairs.loser not in ("none", "given") and not config.pairs.scorer:
        raise UserError("config key pairs.scorer: is empty; set it to the folder of a CLIPModel such as PickScore v1")


def earlier_pairs(config: ConfigDict, workdir: Path, index: Index) -> Pairs | None:
    """The pairs whose winners lose in this stage; None where they come from elsewhere. Raises UserError where they are
    not finished."""
    loser = config.pairs.loser
    return None if loser in configuration.NO_STAGE else open_stage(workdir, loser, index)


def read_photographs(config: ConfigDict, workdir: Path, index: Index) -> tuple[ConfigDict, Photographs]:
    """The config with the resolutions of the run, and the photographs of the stage.

    Raises:
        UserError: they cannot be listed, or none can be opened.
    """
    if configuration.is_auto(config):
        config = resolutions.with_resolutions(config, processes.broadcast(lambda: _resolutions(config, workdir, index)))
    listed = first_process_first(index, lambda: list_examples(config, config.data.split, "heldout", index=index))
    photographs: Photographs = dict(zip(("train", "heldout"), listed, strict=True))
    processes.broadcast(lambda: require_photographs(photographs, index))
    return config, photographs


def _resolutions(config: ConfigDict, workdir: Path, index: Index) -> list[str]:
    """Those that the run has, or those that suit its photographs."""
    found = resolutions.found_in(workdir, config.data.area)
    return found or choose_resolutions(config, config.data.split, "heldout", index=index)


def inputs_of(
    asked: ConfigDict,
    config: ConfigDict,
    workdir: Path,
    photographs: Photographs,
    earlier: Pairs | None,
    index: Index,
) -> dict[str, Any]:
    """What the pairs are made from; of resolutions that the run chooses, also `data.area`, by which the other stages of
    the run find them.

    Args:
        asked: the config as it was given.
        config: with the resolutions of the run.
        workdir: of the run.
        photographs, earlier, index: see :func:`hgdpo_jax.curriculum.plan.made_from`.
    """
    inputs, drawer = made_from(config, photographs, earlier, index), config.pairs.policy
    if drawer != BASE_STAGE:
        require_base(workdir, drawer, inputs[BASE])
        inputs[provenance.content_key(f"the policy of {drawer}")] = policy_hash(workdir, drawer)
    return inputs | ({"data.area": config.data.area} if configuration.is_auto(asked) else {})


def require_fit(config: ConfigDict, plan: Sequence[ShardPlan], earlier: Pairs, inputs: Mapping[str, Any]) -> None:
    """Raises UserError where the pairs whose winners lose here have another base, scorer or caption, or none of these
    photographs.

    Args:
        config: of the stage.
        plan: all shards.
        earlier: those pairs.
        inputs: see :func:`inputs_of`.
    """
    earlier.require_from({name: inputs[provenance.content_key(name)] for name in ("model.base", "pairs.scorer")})
    if not earlier.is_from({"captions.jsonl": inputs[provenance.content_key("captions.jsonl")]}):
        processes.broadcast(lambda: require_captions(plan, earlier))
    if not plan:
        raise UserError(f"photographs {config.data.photographs}: none has a pair in {earlier.folder}, from where "
                        f"{config.pairs.loser} takes the losers; give those that it was built from")  # fmt: skip


def prepare(config: ConfigDict, workdir: Path, index: Index) -> Prepared:
    """Reads all that the pairs of `config.stage` are made of; only the index is written.

    Raises:
        UserError: an input is missing or broken, or does not fit the pairs that the stage goes on from.
    """
    require_own(config)
    asked, earlier = config, earlier_pairs(config, workdir, index)
    config, photographs = read_photographs(config, workdir, index)
    rated = processes.broadcast(lambda: read_rated(config, {p.id for found in photographs.values() for p in found}))
    inputs = inputs_of(asked, config, workdir, photographs, earlier, index)
    folder = workdir / config.stage / "pairs"
    plan = first_process_first(index, lambda: plan_shards(config, folder, photographs, earlier, index))
    if earlier:
        require_fit(config, plan, earlier, inputs)
    return Prepared(config, workdir, photographs, plan, earlier, inputs, rated)
