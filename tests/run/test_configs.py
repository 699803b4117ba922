"""Every config that is shipped, in all its variants: the stages, the ablations and the baselines."""

import re
from pathlib import Path

import pytest

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.folder import pair_stages, stage_command
from hgdpo_jax.run.settings import CONFIGS, load_config

ROOT = Path(__file__).parents[2]
VARIANTS = ("sd15", "sdxl", "klein", "portraits", "portraits-flow")
# What a row takes after its variant: values that have other ways through the file.
VALUES = {
    "pool_size": ("2", "8", "16"),
    "lambda_stat": ("0", "1e6"),
    "beta": ("25000",),
    "without_easy": ("normal", "hard"),
    "sft": ("base", "easy", "normal"),
    "winner": ("0", "4"),
    "reference": ("normal", "hard"),
    "filter": ("normal", "hard"),
    "curriculum_dpo": ("1", "2", "3"),
    "spin": ("1", "2"),
}
ROWS = sorted(path for path in CONFIGS.glob("*/*.py") if path.stem != "__init__")


def specs(path: Path, variant: str) -> list[str]:
    values = VALUES.get(path.stem, ())
    return [f"{path}:{variant},{value}" for value in values] or [f"{path}:{variant}"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_row_is_valid_and_has_its_own_folder_beside_the_stages(variant: str) -> None:
    left_out = ("personalise", "text_encoder") if variant in ("klein", "portraits-flow") else ()
    plain = [path for path in CONFIGS.glob("*.py") if path.stem not in ("__init__", "common", *left_out)]
    configs = [load_config(spec) for path in [*plain, *ROWS] for spec in specs(path, variant)]
    stages = [config.stage for config in configs]
    assert len(ROWS) >= 12 and len(set(stages)) == len(stages) > 25
    # Whatever a row needs of another is a folder that one of the configs makes.
    for config in configs:
        needed = {config.train.start, config.pairs.loser, *pair_stages(config)}
        assert needed - {"base", "pool", "given", "none", "sdrecon"} <= set(stages), config.stage
        owns = config.stage in pair_stages(config)
        scored = config.pairs.loser not in ("given", "none")
        row = config.stage not in [path.stem for path in plain] and not config.stage.startswith("spin")
        assert config.pairs.keep_candidates == (owns and scored and row), config.stage  # shared pools are drawn once


@pytest.mark.parametrize("stage", ["personalise", "text_encoder"])
@pytest.mark.parametrize("variant", ["klein", "portraits-flow"])
def test_what_a_flow_model_cannot_train_is_no_config(stage: str, variant: str) -> None:
    with pytest.raises(UserError, match=f"^config variant {variant}: of a flow model neither an adapter nor the text "):
        load_config(f"configs/{stage}.py:{variant}")


def test_a_row_takes_its_numbers_from_its_name_and_the_rest_from_its_stage() -> None:
    easy, hard = (load_config(f"configs/{name}.py:portraits") for name in ("stage1", "stage3"))
    small = load_config("configs/ablations/pool_size.py:portraits,2")
    assert (small.stage, small.pairs.pool_size, small.train.lr) == ("pool_2", 2, easy.train.lr)
    for row in ("winner.py:sd15,4", "filter.py:sd15,hard"):  # drawn with as the hard stage is
        assert load_config(f"configs/ablations/{row}").recipe.blocks == "up"
    plain = load_config("configs/ablations/lambda_stat.py:sd15,0")
    assert (plain.train.lambda_stat, plain.train.beta, plain.train.pairs) == (0.0, 5000.0, "stage1")
    assert load_config("configs/ablations/beta.py:sd15,25000").train.beta == 25000.0
    every, naive = load_config("configs/ablations/all_pairs.py"), load_config("configs/naive.py")
    assert pair_stages(every) == ["stage1", "stage2", "stage3"] and every.train.steps == naive.train.steps == 340_000
    tuned = load_config("configs/ablations/sft.py:portraits,normal")
    assert (tuned.train.start, tuned.train.pairs, tuned.train.params) == ("stage2", "stage3", "lora")
    assert tuned.train.lr == hard.train.lr and tuned.train.steps == hard.train.steps and tuned.pairs.loser == "none"
    photograph, middle = (load_config(f"configs/ablations/winner.py:sd15,{n}").pairs for n in "05")
    assert photograph.winner == "photograph" and (middle.winner, middle.strengths) == ("sdrecon", (5,))
    other = load_config("configs/ablations/filter.py:sd15,hard")
    assert other.pairs.loser == other.train.start == "other_filter_normal"
    assert not load_config("configs/ablations/filter.py:sd15,normal").pairs.keep_if_winner_scores_higher
    third = load_config("configs/baselines/curriculum_dpo.py:sd15,3")
    assert pair_stages(third) == ["curriculum_dpo_1", "curriculum_dpo_2", "curriculum_dpo_3"]
    assert third.train.start == "curriculum_dpo_2" and third.train.reference == "base" and third.pairs.bucket == 3


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("ablations/pool_size.py:sd15", "config variant sd15: expects a whole number from 2 after it, such as sd15,2"),
        ("ablations/pool_size.py:sd15,many", "config variant sd15,many: expects a whole number from 2 after it"),
        ("ablations/filter.py:sd15,easy", "config variant sd15,easy: expects sd15,normal or sd15,hard"),
        ("ablations/filter.py:sd16,hard", "config variant sd16: unknown"),
        ("ablations/none.py", "no such file"),
        ("baselines/curriculum_dpo.py:sd15,6", r"pairs\.bucket=6: expects at most pairs\.buckets=5"),
    ],
)
def test_a_row_that_there_is_not_is_refused_in_one_line(spec: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        load_config(f"configs/{spec}")


def test_a_row_is_found_where_there_is_no_folder_of_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/ablations/pool_size.py:sd15,8").stage == "pool_8"
    assert "configs/baselines/realalign.py[:variant]" in stage_command("main", "realalign", tmp_path)
    (tmp_path / "configs").mkdir()
    with pytest.raises(UserError, match=r"your folder configs has no ablations/pool_size\.py; copy or give"):
        load_config("configs/ablations/pool_size.py:sd15,8")


def test_the_page_of_rows_names_each_of_them() -> None:
    text = (ROOT / "docs" / "rows.md").read_text()
    for path in ROWS:
        assert re.search(rf"configs/{path.parent.name}/{path.name}:", text), path
    for spec in re.findall(r"configs/[\w/]+\.py:[\w,.]+", text):
        load_config(spec)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("train.pairs=stage1,easy", "the easy stage is called stage1 in settings"),
        ("train.pairs=stage2,stage2", "train.pairs=stage2,stage2: expects each stage once"),
        ("train.pairs=stage2,", "train.pairs=stage2,: expects each stage once"),
        ("train.pairs=stage1", "is this stage itself"),
        ("pairs.loser=normal", "the normal stage is called stage2 in settings"),
        ("pairs.loser=stage1", "pairs.loser=stage1: is this stage itself"),
        ("pairs.loser=sdrecon", "pairs.loser=sdrecon: goes with pairs.winner=photograph, not with pool"),
        ("pairs.bucket=9", r"pairs\.bucket=9: expects at most pairs\.buckets=5"),
        ("pairs.buckets=4", r"pairs\.buckets=4: does nothing here, it goes with pairs\.bucket from 1"),
        ("pairs.policy=stage1", "pairs.policy=stage1: is this stage itself"),
        ("pairs.redraw=face", r"pairs\.redraw=face: does nothing here"),
        ("pairs.least_gap=0.1", r"pairs\.least_gap=0\.1: does nothing here"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        load_config("configs/stage1.py:sd15", [change])


def test_what_a_policy_draws_is_not_kept_for_stages_of_the_base() -> None:
    for config, change in (("baselines/spin.py:sd15,2", "pairs.keep_candidates=true"), ("stage2.py", "pairs.policy=x")):
        with pytest.raises(UserError, match=r"pairs\.policy=\w+: (goes with neither|does nothing here)"):
            load_config(f"configs/{config}", [change])


def test_a_bucket_that_no_two_pictures_are_in_is_refused() -> None:
    with pytest.raises(UserError, match=r"pairs\.bucket=3: no two of 4 pictures are so far apart in rank"):
        load_config("configs/stage1.py:sd15", ["pairs.pool_size=4", "pairs.bucket=3"])
