"""The config is checked once, and every complaint names the key."""

import re
import shutil
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.run import provenance
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.settings import CONFIGS, config_from_json, load_config, named, read_config

ROOT = Path(__file__).parent.parent.parent


def load(*overrides: str) -> ConfigDict:
    return load_config(f"{CONFIGS}/stage1.py", overrides)


def test_overrides_keep_the_type_of_the_setting() -> None:
    loaded = load("train.lr=1e-4", "train.steps=7", "train.adam=0,0.5", "mesh.fsdp=2")
    assert loaded.is_locked
    assert (loaded.train.lr, loaded.train.steps, loaded.train.adam, loaded.mesh.fsdp) == (1e-4, 7, (0.0, 0.5), 2)


def test_a_list_may_hold_commas() -> None:
    loaded = load('evaluate.concept_prompts=["{subject}, in a park", "a bust of {subject}"]', "train.adam=[0.8, 0.99]")
    assert loaded.evaluate.concept_prompts == ("{subject}, in a park", "a bust of {subject}")
    assert loaded.train.adam == (0.8, 0.99)
    assert load("data.resolutions=[64x64]").data.resolutions == ("64x64",)
    assert load("data.resolutions=64x64,128x64").data.resolutions == ("64x64", "128x64")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "config key train.lrr: unknown; did you mean train.lr?"),
        ("train.steps=many", "train.steps=many: expects int"),
        ("train=3", "train: is a group"),
        ("train.steps", "write --config.key=value"),
        ("train.steps=0", "train.steps=0: expects a whole number from 1"),
        ("train.accumulate=3", "must divide train.batch"),
        ("train.objective=ppo", "train.objective='ppo': expects one of dpo, hinge, ipo, kto, dspo, mapo, smpo, sft"),
        ("objective=hinge", "config key objective: unknown; did you mean train.objective"),
        ("pairs.strengths=11", "pairs.strengths=11: expects a whole number from 1 to 10"),
        ("pairs.strengths=", "pairs.strengths: is empty"),
        ("mesh.fsdp=0", "mesh.fsdp=0: expects a whole number from 1, or -1"),
        ("mesh.tensor=-2", "mesh.tensor=-2: expects a whole number from 1, or -1"),
        ("mesh.fsdp=-1", "only one of them may be -1"),
        ("train.lora_rank=0", "train.lora_rank=0: expects a whole number from 1"),
        ("train.adam=0.9", "train.adam=(0.9,): expects two numbers"),
        ("train.adam=0.9,0.99,0.999", "expects two numbers"),
        ("train.adam=0.9,1.0", "train.adam=1.0: expects a number from 0 to below 1"),
        ("seed=-1", "seed=-1: expects a whole number from 0 to 4294967295"),
        ("seed=4294967296", "seed=4294967296: expects a whole number from 0 to 4294967295"),
        ("train.ema=1", "train.ema=1.0: expects a number from 0 to below 1"),
        ("pairs.pool_size=1", "winner and loser both come from the pool"),
        ("pairs.loser=none", "pairs.loser=none: pool is chosen against a loser"),
        ("train.objective=sft", "train.objective=sft and pairs.loser=pool: sft learns from photographs without losers"),
        ("train.lambda_stat=-1", "train.lambda_stat=-1.0: expects a number from 0"),
        ("train.warmup=-1", "train.warmup=-1: expects a whole number from 0"),
        ("data.caption_dropout=1.1", "data.caption_dropout=1.1: expects a number from 0 to 1"),
        ("data.concept_dropout=-0.1", "data.concept_dropout=-0.1: expects a number from 0 to 1"),
        ("pairs.guidance=inf", "pairs.guidance=inf: expects a number from 0"),
        ("evaluate.guidance=nan", "evaluate.guidance=nan: expects a number from 0"),
        ("train.lr=nan", "train.lr=nan: expects a number above 0"),
        ("train.lr=0", "train.lr=0.0: expects a number above 0"),
        ("train.clip_norm=-1", "train.clip_norm=-1.0: expects a number from 0"),
        ("stage=a/b", "stage='a/b': expects a name of a folder"),
        ("stage=..", "stage='..': expects a name of a folder"),
        ("stage=", "stage='': expects a name of a folder"),
        (
            "data.resolutions=64",
            "data.resolutions='64': expects HEIGHTxWIDTH in pixels, the height first, like 1024x704",
        ),
        ("data.resolutions=auto,64x64", "data.resolutions=auto,64x64: auto stands alone"),
        ("data.area=64x64", "data.area=64x64: does nothing here, it goes with data.resolutions=auto"),
        ("pairs.race=0.3 pairs.draft_steps=4", "s pairs.race=0.3 and pairs.draft_steps=4: are two ways to do the same"),
        ("pairs.race=0.3 pairs.bucket=1", "pairs.bucket=1: needs the ranks of the whole pool; goes without pairs.race"),
        ("pairs.draft_steps=9 pairs.keep_candidates=true", "keeps whole pools; goes without pairs.draft_steps=9"),
        ("pairs.race=0.3 pairs.finalists=10", "pairs.finalists=10: so many of the highest and of the lowest are all"),
        ("pairs.draft_steps=9 pairs.sampler=ddpm", "pairs.draft_steps=9: in other steps ddpm draws other pictures"),
        ("pairs.finalists=3", "pairs.finalists=3: does nothing here, it goes with pairs.race or pairs.draft_steps"),
        ("pairs.draft_steps=50", "pairs.draft_steps=50: these are all of pairs.steps=50; expects fewer"),
        ("pairs.race=0.995", "pairs.race=0.995: these are all of pairs.steps=50; expects fewer"),
        ("pairs.guidance_interval=800,200", "pairs.guidance_interval=(800, 200): expects two timesteps, the lower one"),
        ("pairs.guidance_interval=200", "pairs.guidance_interval=(200,): expects two timesteps"),
        ("pairs.guidance=1 pairs.guidance_interval=0,800", "does nothing here, it goes with pairs.guidance above 1"),
        ("data.area=4096", "data.area='4096': expects HEIGHTxWIDTH in pixels, the height first"),
    ],
)
def test_a_bad_override_is_one_line_that_names_it(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(*override.split(" "))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("variant", "area"), [("sd15", (1024, 704)), ("sdxl", (1024, 1024)), ("portraits", (96, 96))])
def test_until_a_run_has_chosen_its_resolutions_their_area_stands_for_them(variant: str, area: tuple[int, int]) -> None:
    """That is the largest that may be chosen, which a plan is made for."""
    config = load_config(f"configs/stage1.py:{variant}", ["data.resolutions=auto"])
    assert configuration.is_auto(config) and [*configuration.resolutions(config).values()] == [area]
    config = load_config(f"configs/stage1.py:{variant}", ["data.area=256x512", "data.resolutions=auto"])
    assert configuration.resolutions(config) == {"256x512": (256, 512)}
    assert not configuration.is_auto(load_config(f"configs/stage1.py:{variant}"))


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (
            "stage1",
            "data.caption_dropout=0.1",
            "data.caption_dropout=0.1: does nothing here, it goes with train.objective=sft",
        ),
        (
            "stage2",
            "data.concept_dropout=0.1",
            "data.concept_dropout=0.1: does nothing here, it goes with train.params=",
        ),
        (
            "stage0_sft",
            "train.lambda_stat=1",
            "train.lambda_stat=1.0: does nothing here, it goes with a train.objective with a reference",
        ),
        ("stage0_sft", "train.beta=10", "train.beta=10.0: does nothing here"),
        ("personalise", "train.reference=base", "train.reference=base: does nothing here"),
        (
            "stage1",
            "pairs.strengths=1,2",
            "pairs.strengths=(1, 2): does nothing here, it goes with pairs.winner=sdrecon",
        ),
        ("naive", "pairs.strengths=1", "pairs.strengths=(1,): does nothing here"),
        (
            "stage1",
            "pairs.keep_if_winner_scores_higher=true",
            "does nothing here, it goes with a winner that is chosen",
        ),
        ("given", "pairs.keep_if_winner_scores_higher=true", "does nothing here"),
        ("stage3", "evaluate.scorer=a,hps=b", "evaluate.scorer=a,hps=b: is one judge; name further scorers in"),
        (
            "stage3",
            "data.pairs=pairs.jsonl",
            "data.pairs=pairs.jsonl: does nothing here, it goes with pairs.winner=given",
        ),
        ("stage1", "train.optimizer=adafactor train.adam=0.5,0.9", "train.adam=(0.5, 0.9): does nothing here"),
        (
            "stage0_sft",
            "train.lora_dropout=0.1",
            "train.lora_dropout=0.1: does nothing here, it goes with train.params=lora or text_lora",
        ),
        ("stage0_sft", "train.quantize=int8", "train.quantize=int8: does nothing here, it goes with train.params=lora"),
        ("stage1", "train.optimizer=adamw8bit", "train.optimizer=adamw8bit: goes with train.params=all or adapter"),
        ("stage1", "train.optimizer=prodigy", "train.lr=1e-05: with train.optimizer=prodigy it multiplies the rate"),
        ("stage2", "pairs.strengths=5,5,7", "pairs.strengths: 5 stands there twice; expects each once"),
        ("stage1", "data.resolutions=64x64,96x64,64x64", "data.resolutions: 64x64 stands there twice"),
        ("stage1", 'evaluate.concept_prompts=["a","b","b"]', "evaluate.concept_prompts: b stands there twice"),
        ("stage2", "train.start=easy", "train.start=easy: the easy stage is called stage1 in settings"),
        ("text_encoder", "train.pairs=hard", "train.pairs=hard: the hard stage is called stage3 in settings"),
        ("stage2", "train.start=stage2", "train.start=stage2: is this stage itself; expects another one"),
        ("stage1", "train.pairs=stage1", "train.pairs=stage1: is this stage itself"),
        ("stage1", "stage=evaluation", "stage=evaluation: has another meaning in a run; choose another name"),
        ("stage1", "stage=hard", "stage=hard: has another meaning"),
    ],
)
def test_what_does_nothing_or_means_something_else_is_refused(config: str, overrides: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(f"{CONFIGS}/{config}.py", overrides.split(" "))


def test_a_mistake_in_what_a_setting_names_is_said_of_the_setting() -> None:
    with pytest.raises(UserError, match=r"config key pairs\.scorer=X: X: no weights"), named("pairs.scorer", "X"):
        raise UserError("X: no weights")
    with pytest.raises(UserError, match="^config key seed: wrong"), named("pairs.scorer", "X"):
        raise UserError("config key seed: wrong")


def test_blocks_that_do_not_learn_do_not_decay() -> None:
    with pytest.raises(UserError, match="train.weight_decay=0.1: with train.blocks=up the blocks below would decay"):
        load("train.blocks=up", "train.weight_decay=0.1")


@pytest.mark.parametrize("setting", configuration.SETTINGS, ids=lambda setting: setting.key)
def test_every_number_has_a_range_with_its_default_inside_and_refuses_what_is_no_number(
    setting: configuration.Setting,
) -> None:
    numbers = setting.default if isinstance(setting.default, tuple) else (setting.default,)
    if isinstance(numbers[0], bool) or not isinstance(numbers[0], int | float):
        return
    assert isinstance(setting.allowed, configuration.Range)
    assert all(number in setting.allowed for number in numbers)
    for value in (float("nan"), float("inf"), True, "1"):
        assert value not in setting.allowed


def test_the_documented_settings_are_those_of_the_program() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == configuration.as_markdown()


def test_what_is_wrong_in_a_config_file_is_one_line_with_file_and_line(tmp_path: Path) -> None:
    body = "from hgdpo_jax.config import default\ndef get_config():\n    c = default()\n    {}\n    return c\n"
    path = tmp_path / "stage.py"
    for line, message in [
        ("c.train.lr = 'fast'", r"stage.py line 4: TypeError: .*train|stage.py line 4: TypeError"),
        ("raise KeyError('x')", "stage.py line 4: KeyError: 'x'"),
        ("c.stage = ", "stage.py line 4: SyntaxError"),
        ("from . import absent", "stage.py line 4: ImportError"),
        ("return {}", "returned no ConfigDict"),
    ]:
        path.write_text(body.format(line))
        with pytest.raises(UserError, match=message) as error:
            load_config(str(path))
        assert "\n" not in str(error.value)


def test_the_packages_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/stage3.py:portraits").stage == "stage3"
    for path in ("configs/stage9.py", "/no/such/folder/configs/stage1.py", "runs/configs/stage1.py"):
        with pytest.raises(UserError, match=f"config {path}: no such file"):
            load_config(path)


def test_a_folder_configs_of_the_users_own_is_taken_whole_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "configs"
    own.mkdir()
    with pytest.raises(UserError, match=r"your folder configs has no stage3.py; copy or give .*stage3.py"):
        load_config("configs/stage3.py:portraits")
    shutil.copyfile(CONFIGS / "stage3.py", own / "stage3.py")
    with pytest.raises(UserError, match="ImportError: cannot import name 'common'"):  # not that of the package
        load_config("configs/stage3.py:portraits")
    (own / "common.py").write_text((CONFIGS / "common.py").read_text().replace("pool_size = 4", "pool_size = 6"))
    assert load_config("configs/stage3.py:portraits").pairs.pool_size == 6
    assert load_config(f"{CONFIGS}/stage3.py:portraits").pairs.pool_size == 4


def test_a_missing_or_misspelt_key_in_a_config_file_is_named(tmp_path: Path) -> None:
    body = "from hgdpo_jax.config import default\ndef get_config():\n    c = default()\n    {}\n    return c\n"
    for line, message in [
        ("del c.train['beta']", "train.beta: missing"),
        ("c.train.bta = 1.0", "train.bta: unknown; did you mean train.beta?"),
    ]:
        path = tmp_path / "stage.py"
        path.write_text(body.format(line))
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            load_config(str(path))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        '{"train": 3}',
        '{"train": {"lr": "x"}}',
        '{"data": {"resolutions": [[1]]}}',
        '{"seed": null}',
    ],
)
def test_a_config_that_a_run_kept_and_that_was_damaged_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"{path}: is not as it was written \(.*\); put back") as error:
        read_config(path)
    assert "\n" not in str(error.value)


def test_the_hash_is_of_the_content() -> None:
    first, second = (load_config(f"{CONFIGS}/stage1.py") for _ in range(2))
    other = load_config(f"{CONFIGS}/stage1.py", ["seed=1"])
    assert configuration.config_hash(first) == configuration.config_hash(second) != configuration.config_hash(other)


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_a_config_of_an_earlier_version_is_read_and_its_training_goes_on(objective: str) -> None:
    """`train.objective` was `objective`, beside which later settings were not there."""
    now = load_config("configs/stage0_sft.py:portraits" if objective == "sft" else "configs/stage1.py:portraits")
    values = configuration.to_json(now)
    values["objective"] = values["train"].pop("objective")
    del values["train"]["safeguard"]
    assert configuration.to_json(config_from_json(values)) == configuration.to_json(now)
    was = {"objective": objective, "train.lr": now.train.lr}
    assert not provenance.differences(was, {"train.objective": objective, "train.lr": now.train.lr})
