"""The config is checked once, and every complaint names the key."""

from pathlib import Path

import pytest

from hgdpo_jax import config
from hgdpo_jax.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
STAGES = ["stage0_sft", "stage1", "stage2", "stage3", "text_encoder", "personalise"]


@pytest.mark.parametrize("variant", ["sd15", "sdxl", "portraits"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_shipped_config_is_valid(stage: str, variant: str) -> None:
    config.load(f"{CONFIGS / stage}.py:{variant}")


def test_overrides_keep_the_type_of_the_setting() -> None:
    loaded = config.load(
        f"{CONFIGS}/stage1.py", ["train.lr=1e-4", "train.steps=7", "pairs.strengths=1,2", "mesh.fsdp=2"]
    )
    assert (loaded.train.lr, loaded.train.steps, loaded.pairs.strengths, loaded.mesh.fsdp) == (1e-4, 7, (1, 2), 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "config key train.lrr: unknown; did you mean train.lr?"),
        ("train.steps=many", "train.steps=many: expects int"),
        ("train=3", "train: is a group"),
        ("train.steps", "write --config.key=value"),
        ("train.steps=0", "train.steps=0: must be positive"),
        ("train.accumulate=3", "must divide train.batch"),
        ("objective=ppo", "objective='ppo': expects one of dpo, sft"),
        ("pairs.strengths=11", "expects numbers from 1 to 10"),
    ],
)
def test_a_bad_override_is_one_line_that_names_it(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        config.load(f"{CONFIGS}/stage1.py", [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_or_misspelt_key_in_a_config_file_is_named(tmp_path: Path) -> None:
    body = "from hgdpo_jax.config import default\ndef get_config():\n    c = default()\n    {}\n    return c\n"
    for line, message in [
        ("del c.train['beta']", "train.beta: missing"),
        ("c.train.bta = 1.0", "train.bta: unknown; did you mean train.beta?"),
    ]:
        path = tmp_path / "stage.py"
        path.write_text(body.format(line))
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            config.load(str(path))


def test_the_hash_is_of_the_content() -> None:
    first, second = (config.load(f"{CONFIGS}/stage1.py") for _ in range(2))
    other = config.load(f"{CONFIGS}/stage1.py", ["seed=1"])
    assert config.content_hash(first) == config.content_hash(second) != config.content_hash(other)
