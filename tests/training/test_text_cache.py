"""Text embeddings, computed once: the losses and drawings they give, what is computed again, what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hgdpo_jax.data.loader import first_records, stack_records
from hgdpo_jax.data.pairs import Pairs, open_stages
from hgdpo_jax.devices.sharding import parameter_placer, path_name
from hgdpo_jax.diffusion.pipeline import load_pipeline, text_of
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.models.text import KeptText
from hgdpo_jax.planning import program
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import file_hash
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.settings import load_config
from hgdpo_jax.training import inputs as stage_inputs
from hgdpo_jax.training import kept, text_cache
from hgdpo_jax.training.inputs import Inputs
from hgdpo_jax.training.optimizer import numbers_of
from tests import klein, tiny
from tests.rounding import NETWORK, assert_close

CACHE = Path("stage1") / "text_cache"
RECORDS = 24


def klein_ids(rng: np.random.Generator) -> np.ndarray:
    """A prompt of some bytes, and behind it what scorers read, which is not for the text encoder."""
    ids = np.full(klein.TOKENS + 77, klein.tokenizer().pad_token_id, np.int32)
    ids[:30] = rng.integers(0, 256, 30)
    ids[klein.TOKENS :] = rng.integers(0, 256, 77)
    return ids


def both(workdir: Path, config: ConfigDict) -> tuple[Inputs, Inputs]:
    """The inputs of a stage without embeddings, and with them."""
    kept_config = config.copy_and_resolve_references()
    kept_config.train.text_cache = True
    return tuple(stage_inputs.read(each, workdir, Index()) for each in (config, kept_config))  # type: ignore[return-value]


def total(inputs: Inputs, config: ConfigDict, numbers: list[int]) -> tuple[float, Any, set[str]]:
    """(loss, metrics, arguments of the program by name) of some records, for a policy that has learnt something."""
    batch = jax.tree.map(jnp.asarray, stack_records(inputs.pairs.sources["train"][0], numbers))
    batch["key"] = jax.random.split(jax.random.key(7), len(numbers))
    policy = jax.tree.map(lambda x: x + 0.1, inputs.policy)
    arguments = (policy, inputs.policy, inputs.frozen, batch, numbers_of(config, 0))
    lowered = jax.jit(inputs.loss).lower(*arguments)
    value, metrics = lowered.compile()(*arguments)
    names = {path_name(path) for path, _ in jax.tree.leaves_with_path(inputs.frozen)}
    return float(value), jax.device_get(metrics), names


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs alone."""
    folder = tmp_path_factory.mktemp("run")
    tiny.write_pairs(folder / "stage1" / "pairs", RECORDS)
    return folder


@pytest.fixture
def begun(workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workdir with those pairs, whose captions fill several files."""
    monkeypatch.setattr(text_cache, "_CAPTIONS", 16)
    shutil.copytree(workdir / "stage1" / "pairs", tmp_path / "stage1" / "pairs")
    return tmp_path


def test_margins_are_those_of_a_text_encoder_in_the_step(workdir: Path, base: Path) -> None:
    config = tiny.config(base)
    without, inputs = both(workdir, config)
    expected, metrics, names = total(without, config, [0, 5, 11, 23])
    found, others, _ = total(inputs, config, [0, 5, 11, 23])
    size = 0.5 * config.train.beta * float(metrics["error/winner"] + metrics["error/loser"])
    assert_close(found, expected, NETWORK, size=size)
    assert_close(others["dpo/margin"], metrics["dpo/margin"], NETWORK, size=size)
    assert any("text_encoder" in name for name in names)


def test_a_step_of_klein_has_no_text_encoder(tmp_path: Path) -> None:
    """Fine-tuning, which needs the empty caption too."""
    config = tiny.config(klein.write(tmp_path / "klein"))
    config.train.objective, config.data.caption_dropout = "sft", 0.5
    tiny.write_pairs(tmp_path / "stage1" / "pairs", 4, 2, (8, 8, 16), caption=klein_ids)
    without, inputs = both(tmp_path, config)
    (expected, *_), (found, _, names) = (total(each, config, [0, 1, 2, 3]) for each in (without, inputs))
    assert_close(found, expected, NETWORK)
    assert not any("text_encoder" in name for name in names)
    row = stack_records(inputs.pairs.sources["train"][0], [0])
    assert row["encoder_hidden_states"].shape == (1, klein.TOKENS, 96)

    config.train.text_cache = True
    planned = program.step(config, open_source(config.model.base), tiny.mesh()).held
    kept_rows = 9 * 4 * klein.TOKENS * (96 + 1)  # embeddings and token ids of looks' captions
    assert planned["weights"] == kept_rows + sum(x.nbytes for x in jax.tree.leaves(inputs.frozen["transformer"]))


def attached(config: ConfigDict, workdir: Path, base: str = "a base", prompts: Any = ()) -> tuple[Pairs, KeptText]:
    pairs = open_stages(workdir, ["stage1"], Index())
    return text_cache.attach(config, workdir / "stage1", pairs, prompts, base, tiny.mesh(), Index())


def test_it_goes_on_with_what_is_kept(begun: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed within the second of three files; one of the two that are missing is lost again."""
    finite, seen = kept.require_finite, []

    def killed(values: np.ndarray, *about: str) -> np.ndarray:
        seen.append(len(values))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return finite(values, *about)

    config = tiny.config(base)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kept, "require_finite", killed)
        attached(config, begun)
    assert seen == [8, 8, 8, 8]
    assert sorted(path.name for path in (begun / CACHE).iterdir()) == [
        "captions-00000-of-00002.npy",
        "captions-00000-of-00002.npy.json",
        "ids.npy",
        "ids.npy.json",
        "made_from.json",
    ]
    written, write = [], kept.written
    monkeypatch.setattr(kept, "written", lambda rows, *x: written.append(rows.path.name[:8]) or write(rows, *x))
    with monkeypatch.context() as patch:
        patch.setattr(text_cache, "_distinct", None)  # pairs are not read for their captions again
        pairs, _ = attached(config, begun)
    assert written == ["captions", "looks-" + written[1][6:]]
    last = begun / CACHE / "captions-00001-of-00002.npy"
    before = file_hash(last)
    last.unlink()
    last.with_name(f"{last.name}.json").unlink()
    attached(config, begun, prompts=["a person"])  # whose looks need a file of their own
    assert written[2] == "captions" and written[3] != written[1] and file_hash(last) == before
    text = text_of(open_source(str(base)), "float32", parameter_placer(tiny.mesh()))
    sizes = [np.load(path).nbytes for path in (begun / CACHE).glob("captions-*.npy")]
    planned = text_cache.bytes_of_captions(open_stages(begun, ["stage1"], Index()), text)
    assert len(sizes) == 2 and sum(sizes) == planned
    batch = stack_records(pairs.sources["train"][0], range(RECORDS))
    wanted = jax.jit(text.encode)(jnp.asarray(batch["input_ids"])).encoder_hidden_states
    assert_close(batch["encoder_hidden_states"], wanted, NETWORK)


def test_other_embeddings_are_refused(begun: Path, base: Path) -> None:
    attached(tiny.config(base), begun)
    with pytest.raises(UserError, match="content of model.base=sha256 another…: .*text_cache was made with sha256 a b"):
        attached(tiny.config(base), begun, "another")
    damaged = begun / CACHE / "captions-00000-of-00002.npy"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=f"{damaged}: missing or altered .* remove it and its note, and it is computed"):
        attached(tiny.config(base), begun)


def test_drawings_are_those_of_a_text_encoder(begun: Path, base: Path) -> None:
    """With guidance away from a negative prompt. Of a caption that no look draws nothing is made up."""
    config = tiny.config(base)
    config.evaluate.update(guidance=3.0, negative_prompt="a cat", batch=1)
    pairs, text = attached(config, begun)
    whole, latents = load_pipeline(base), []
    ids = np.stack([record["input_ids"] for record in first_records(pairs.sources["heldout"], 2)])
    for pipeline in (whole, replace(whole, text=text)):
        sampler = Sampler.from_config(pipeline, tiny.mesh(), config.evaluate, 0)
        latents.append(sampler.generate(ids, sampler.keys("samples", ["a", "b"], [0, 0]), (32, 32), "a look"))
    assert_close(latents[1], latents[0], 2 * config.evaluate.steps * NETWORK)
    stranger = sampler.generate(sampler.tokenize(["a dog"]), sampler.keys("s", ["a"], [0]), (32, 32), "a look")
    assert np.isnan(stranger).all()


def test_xl_keeps_the_pooled_text_too_and_its_empty_caption_is_zero(begun: Path, tmp_path: Path) -> None:
    base = tiny.write_sdxl(tmp_path / "xl")
    pairs, kept_text = attached(tiny.config(base), begun)
    text = text_of(open_source(str(base)), "float32", parameter_placer(tiny.mesh()))
    assert text.zero_empty
    ids = jnp.stack([record["input_ids"] for record in first_records(pairs.sources["heldout"], 2)])
    for found, wanted in (
        (kept_text(ids, (32, 64)), jax.jit(text.__call__, static_argnums=1)(ids, (32, 64))),
        (kept_text.empty(2, (32, 64)), jax.tree.map(jnp.zeros_like, kept_text(ids, (32, 64)))),
    ):
        assert_close(found.encoder_hidden_states, wanted.encoder_hidden_states, NETWORK, size=1.0)
        assert_close(found.added_cond["text_embeds"], wanted.added_cond["text_embeds"], NETWORK, size=1.0)
        assert found.added_cond["time_ids"].tolist() == [[32, 64, 0, 0, 32, 64]] * 2
    record = pairs.sources["heldout"][0][1]
    assert_close(record["text_embeds"], kept_text(ids, (32, 64)).added_cond["text_embeds"][1], 0.0)


def test_a_text_encoder_that_learns_is_not_kept() -> None:
    with pytest.raises(
        UserError, match="train.text_cache=True: does nothing here, it goes with train.params=lora, all"
    ):
        load_config("configs/text_encoder.py:portraits", ["train.text_cache=true"])
