"""What a report says of its run in words."""

import re
from pathlib import Path

import pytest

from hgdpo_jax.results.facts import first_beside_base, head, model_lines
from hgdpo_jax.results.measured import BEST
from tests import tiny


@pytest.mark.parametrize(
    "models, first",
    [
        (["base", "easy", "normal", "hard", "naive"], "hard"),
        (["base", "easy", "naive"], "easy"),
        (["base", "hard", "text_encoder"], "hard"),
        (["base", "naive", "mine"], "mine"),
        (["base", "given"], "given"),
        (["base"], "photograph"),
    ],
)
def test_a_report_first_shows_the_last_of_the_curriculum_beside_base(models: list[str], first: str) -> None:
    assert first_beside_base(models) == first
    assert first_beside_base(models, "slow") == "slow"


def test_each_model_says_what_it_is_and_how_it_was_trained(tmp_path: Path) -> None:
    configs = {stage: tiny.config(tmp_path, stage=stage) for stage in ("stage3", "text_encoder", "mine")}
    configs["stage3"].train.update(steps=20_000, batch=16, lora_rank=8, lr=1e-5, beta=500.0)
    configs["text_encoder"].train.update(params="text_lora", lora_rank=64)
    configs["mine"].train.objective, configs["mine"].train.params = "sft", "all"
    configs["slow"] = tiny.config(tmp_path, stage="slow")
    configs["slow"].train.pairs = "stage3"
    models = {"base": (), "hard": ("stage3",), BEST: ("stage3", "text_encoder"), "mine": ("mine",), "slow": ("slow",)}
    lines = model_lines(models, configs)
    assert list(lines) == [*models, "photograph"] and "steps" not in lines["base"]
    assert lines["hard"].endswith("20,000 steps of 16 pairs, LoRA of rank 8, learning rate 1e-05, β\xa0500")
    assert "LoRA of rank 64" in lines[BEST] and lines["slow"].startswith("trained on the pairs of hard. ")
    assert re.search(r"photographs, all parameters, learning rate \S+$", lines["mine"])


def test_the_head_names_the_run_but_no_place_on_the_machine(tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "base")
    config.model.base, config.data.photographs = "/home/somebody/models/sd15.safetensors", "people"
    config.pairs.scorer, config.evaluate.scorer, config.evaluate.other_scorer = (
        "/home/somebody/models/pickscore",
        "",
        "",
    )
    config.evaluate.update(images_per_prompt=4, steps=50, guidance=5.0)
    configs = {"stage1": tiny.config(tmp_path, steps=30_000), "text_encoder": tiny.config(tmp_path, steps=40)}
    facts = head(config, "7885ea90ffc87be8", 400, 10, configs, "best")
    assert facts["Base"] == "models/sd15.safetensors, sha256 7885ea90ffc8…" and "Judges" not in facts
    assert facts["Steps of training"] == f"easy 30,000, text encoder 40; {config.stage} is drawn at its checkpoint best"
    assert facts["Pictures"].startswith("1,600 of each model, 32×32") and "400 held-out captions" in facts["Pictures"]
    assert "50 steps, guidance 5, seed 0; LoRA at weight 0.5, in the paper's blocks" in facts["Drawn with"]
    assert "pickscore" in facts["Scorer"] and re.match(r"\d{4}-\d\d-\d\d, hgdpo_jax \d", facts["Evaluated"])
    assert "somebody" not in "".join(facts.values())
