"""W/run.json: what later commands of a run need not be told, and `--settings`."""

import json
from pathlib import Path

import pytest

from hgdpo_jax.run import command
from hgdpo_jax.run.errors import Stopped, UserError
from hgdpo_jax.run.remembered import FILE, KEYS, remembering
from hgdpo_jax.run.settings import get_setting


def parsed(workdir: Path, *rest: str, config: str = "configs/stage1.py:portraits"):
    return command.parse(command.run_parser(""), ["--config", config, "--workdir", str(workdir), *rest])


def used(workdir: Path, *rest: str, error: Exception | None = None) -> None:
    """A command that does its work, or ends with an error."""
    config, given = parsed(workdir, *rest)
    with remembering(workdir, config, given.given, writes=True):
        if error:
            raise error


def test_a_later_command_needs_the_workdir_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    used(tmp_path / "W", "--config.data.photographs=mine", "--config.data.resolutions=64x64,64x96",
         "--config.data.smallest=0.5", "--config.train.lr=1e-6", "--config.seed=3")  # fmt: skip
    monkeypatch.chdir("/")
    config, given = parsed(tmp_path / "W", config="configs/stage2.py:sd15")
    assert config.data.photographs == str(tmp_path / "mine")  # though in another folder
    assert config.data.resolutions == ("64x64", "64x96") and config.data.smallest == 0.5 and config.seed == 3
    assert config.train.lr == parsed(tmp_path / "other", config="configs/stage2.py:sd15")[0].train.lr
    config, _ = parsed(tmp_path / "W", "--config.data.photographs=/elsewhere")
    assert config.data.photographs == "/elsewhere" and config.seed == 3


def test_a_stage_is_trained_once_more_under_another_name_from_the_same_pairs(tmp_path: Path) -> None:
    parser = command.run_parser("")
    command.add_name(parser)
    given = ["--workdir", str(tmp_path), "--as", "slow", "--config.train.lr=1e-6", "--config"]
    config, _ = command.parse(parser, [*given, "configs/stage3.py:portraits"])
    assert (config.stage, config.train.pairs, config.train.start, config.train.lr) == ("slow", "stage3", "stage2", 1e-6)
    config, _ = command.parse(parser, [*given, "configs/text_encoder.py:portraits"])
    assert (config.stage, config.train.pairs) == ("slow", "stage1")
    for name, message in (
        ("stage3", "--as stage3: is the folder of a stage of its own; choose another name"),
        ("text_encoder", "--as text_encoder: is the folder of a stage of its own"),
        ("", "config key stage='': expects a name of a folder"),  # such as that of a variable that is not set
    ):
        with pytest.raises(UserError, match=message):
            command.parse(parser, ["--workdir", str(tmp_path), "--as", name, "--config", "configs/stage3.py:portraits"])


def test_the_area_by_which_a_run_chose_its_resolutions_is_remembered_with_them(tmp_path: Path) -> None:
    used(tmp_path / "W", "--config.data.resolutions=auto", "--config.data.area=128x128")
    assert parsed(tmp_path / "W", "--config.data.resolutions=auto")[0].data.area == "128x128"
    config, given = parsed(tmp_path / "W", "--config.data.resolutions=64x64")  # which have no area
    assert config.data.area == "96x96" and "data.area" not in given.given


def test_what_is_remembered_is_a_file_of_settings(tmp_path: Path) -> None:
    used(tmp_path / "W", "--config.pairs.scorer=a scorer, with = and [x]", "--config.data.resolutions=64x64")
    other, _ = parsed(tmp_path / "V", "--settings", str(tmp_path / "W" / FILE))
    same, _ = parsed(tmp_path / "W")
    assert other.to_dict() == same.to_dict() and same.pairs.scorer == "a scorer, with = and [x]"
    used(tmp_path / "V", "--settings", str(tmp_path / "W" / FILE))
    assert (tmp_path / "V" / FILE).read_text() == (tmp_path / "W" / FILE).read_text()


def test_a_file_of_settings_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('seed = 7\n[data]\nmirror = false\nresolutions = ["64x64"]\n[train]\nlr = 2e-4\n')
    config, _ = parsed(tmp_path / "W", "--settings", str(path), "--config.train.lr=3e-4")
    assert (config.seed, config.data.mirror, config.data.resolutions) == (7, False, ("64x64",))
    assert config.train.lr == 3e-4  # the command line comes last
    used(tmp_path / "W", "--settings", str(path))
    assert json.loads((tmp_path / "W" / FILE).read_text()) == {"seed": 7, "data": {"resolutions": ["64x64"]}}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.toml", None, "no such file"),
        ("a.yaml", "seed: 1", "expects a .toml or .json file"),
        ("a.toml", "seed = ", "cannot be read"),
        ("a.json", "[1]", "expects tables"),
        ("a.json", '{"data": {"foto": "x"}}', "config key data.foto: unknown"),
        ("a.toml", "[data]\nheldout = 'all'", "override data.heldout=all: expects float"),
    ],
)
def test_other_files_of_settings_are_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        parsed(tmp_path / "W", "--settings", str(tmp_path / name))


@pytest.mark.parametrize("text", ["{", "[]", '{"train": {"lr": 1}}', '{"seed": [1]}'])
def test_a_damaged_memory_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError):
        parsed(tmp_path)
    assert (tmp_path / FILE).read_text() == text


def test_a_refused_command_is_not_remembered_a_stopped_one_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refused"):
        used(tmp_path / "W", "--config.seed=3", error=UserError("refused"))
    assert not (tmp_path / "W").exists()
    with pytest.raises(Stopped):
        used(tmp_path / "W", "--config.seed=3", error=Stopped(75))
    assert parsed(tmp_path / "W")[0].seed == 3


def test_every_key_is_a_setting() -> None:
    config, _ = parsed(Path("W"))
    for key in KEYS:
        get_setting(config, key)
