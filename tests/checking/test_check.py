"""`--check`: what it finds before a command is paid for. What it says of a run is in tests/curriculum/test_build.py and
tests/test_runs.py, where runs are."""

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from hgdpo_jax import pairs
from hgdpo_jax.checking import check, cost, disk
from hgdpo_jax.checking.check import check_pairs, check_training
from hgdpo_jax.curriculum.plan import ShardPlan
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.devices import start
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import save_model
from hgdpo_jax.planning.chips import CHIPS
from hgdpo_jax.planning.compiled import Compiled
from hgdpo_jax.planning.figures import Plan
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import write_json
from tests import tiny

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture
def config(one_level: Path, tmp_path: Path) -> ConfigDict:
    result = tiny.config(one_level)
    result.data.photographs = str(tiny.write_photographs(tmp_path / "photographs", train=4, heldout=2))
    result.pairs.scorer = str(tiny.write_scorer(tmp_path / "scorer"))
    result.pairs.update(pool_size=3, steps=4, batch=8)
    return result


def test_all_that_only_a_later_command_would_have_found_is_one_line(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config.evaluate.scorer = str(tmp_path / "judge")
    config.evaluate.steps = 5000
    config.adapter.weights = str(tmp_path / "adapter.safetensors")
    config.train.update(batch=12, prompts=str(tmp_path / "prompts.txt"))
    config.mesh.tensor = 3
    config.data.resolutions = ("36x36",)
    with pytest.raises(UserError) as error:
        check_pairs(config, tmp_path / "run")
    found = str(error.value).split("; also: ")
    assert [line.partition(":")[0] for line in found] == [
        "config key evaluate.steps=5000",
        f"config key evaluate.scorer={tmp_path / 'judge'}",
        f"config key adapter.weights={tmp_path / 'adapter.safetensors'}",
        "config key mesh",
        f"config key train.prompts={tmp_path / 'prompts.txt'}",
        "resolution 36x36",
    ]
    assert "stage1 pairs: data: 6 photographs, captions from captions.jsonl; 4 train, 2 held out" in (
        capsys.readouterr().out
    )
    config.data.photographs = str(tmp_path / "nowhere")
    config.mesh.tensor = 1
    with pytest.raises(UserError, match=r"nowhere: no such file.*train\.batch / train\.accumulate=12: must be a multi"):
        check_pairs(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_of_several_processes_the_first_fault_ends_all(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 0 would wait for the others, which wait for what it has not made."""
    monkeypatch.setattr(check.processes, "is_alone", lambda: False)
    config.mesh.tensor, config.data.photographs = 3, str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere: no such file or folder; set --config\.data\.photographs$"):
        check_pairs(config, tmp_path / "run")


def test_a_full_disk_is_known_before(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Of pairs and of checkpoints; what must come before is no fault, and the rest is said all the same."""
    config.stage, config.pairs.winner, config.pairs.loser = "stage2", "photograph", "stage1"
    config.train.start = "stage1"
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    for checked, what in ((check_pairs, "the pairs"), (check_training, "checkpoints")):
        with pytest.raises(UserError, match=rf"^{tmp_path}: 1e-05 MB free, {what} will need [^;]* MB; free [^;]*$"):
            checked(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    shown = capsys.readouterr().out
    for line in ("stage2 pairs: before: the pairs of stage1 come first: python -m hgdpo_jax.pairs --config configs/st",
                 "stage2 main: before: the pairs of stage2 come first: python -m hgdpo_jax.pairs --config configs/st",
                 "stage2 main: before: the training of stage1 comes first: python -m hgdpo_jax.main --config configs",
                 "stage2 main: memory: a step of 8 needs less than 0.1 GiB of each device, which has ",
                 "stage2 main: hours: below 0.01 for 4 steps, at 100% of what 8 x cpu can do"):  # fmt: skip
        assert line in shown


def test_scorers_are_looked_into_without_reading_their_weights(config: ConfigDict, tmp_path: Path) -> None:
    config.pairs.update(winner="photograph", loser="stage1")  # nothing is drawn: the check is quick
    whole = json.loads((tmp_path / "scorer" / "config.json").read_text())
    write_json(tmp_path / "scorer" / "config.json", whole | {"projection_dim": 9})
    with pytest.raises(
        UserError, match=r"pairs\.scorer=.*scorer: .*weight .* is \(\d+.*\), not \(\d+.*\); does not fit"
    ):
        check_pairs(config, tmp_path / "run")
    for changed, line in (
        ({"max_position_embeddings": 40}, "reads 40 tokens of a caption, the base 77"),
        ({"vocab_size": 400}, "does not know all tokens of the caption 'a portrait photograph of"),
    ):
        other = whole | {"text_config": whole["text_config"] | changed}
        save_model(tiny.random_model(CLIPModel, other, 0), tmp_path / "scorer")
        with pytest.raises(UserError, match=f"pairs.scorer=.*scorer: {line}"):
            check_pairs(config, tmp_path / "run")


def test_hours_grow_with_images_and_pixels_and_are_unknown_without_a_peak(config: ConfigDict) -> None:
    def drawn(seconds: float) -> tuple[Plan, Plan]:
        about = dict.fromkeys(("topology", "compiler", "source", "dtype"), "")
        about |= {"devices": 1, "held": {}, "beside": 0, "memory": 0.0, "operations": 0.0, "peaks": {}}
        one = Plan(**about, examples=2, compiled=Compiled(), seconds={"arithmetic": seconds})
        return one, one

    config.data.resolutions = ("32x32", "64x64")
    one = Photograph("a.png", Path("a.png"), "a")
    parts = [ShardPlan(Path(), "train", "64x64", [one] * 5), ShardPlan(Path(), "train", "32x32", [one] * 4)]
    each = 2 / (2 * 0.4) / 3600  # hours of an image: drawn, and decoded, two in a second at best
    assert cost.hours_of_pairs(config, parts, drawn(1.0), 0.4) == pytest.approx(3 * (5 + 4 / 4) * each)
    config.pairs.update(winner="sdrecon", loser="stage1", strengths=(4, 6))
    assert cost.hours_of_pairs(config, parts, drawn(1.0), 0.4) == pytest.approx((0.4 + 0.6) * 6 * each)
    assert cost.hours_of_pairs(config, parts, drawn(0.0), 0.4) is None


@pytest.mark.parametrize(
    ("kind", "gib", "chip"),
    [
        ("NVIDIA A100-SXM4-40GB", 30, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 60, "a100-80gb"),
        ("NVIDIA H200", 105, "h200"),
        ("TPU v5 lite", 15, "v5e"),
    ],
)
def test_a_device_that_is_here_is_one_that_plans_know(kind: str, gib: int, chip: str) -> None:
    device = SimpleNamespace(device_kind=kind, platform="gpu", memory_stats=lambda: {"bytes_limit": gib * 2**30})
    assert cost.chip_of(device) is CHIPS[chip]


def test_of_an_unknown_device_memory_is_known_and_hours_are_not() -> None:
    device = SimpleNamespace(device_kind="NVIDIA RTX 6000", platform="gpu", compute_capability="8.9")
    device.memory_stats = lambda: {"bytes_limit": 30 * 2**30}
    chip = cost.chip_of(device)
    assert (chip.platform, chip.memory, chip.gpu) == ("cuda", 30 * 2**30, {"major": "8", "minor": "9"})
    assert set(chip.peak.values()) == {0.0} and chip.bandwidth == 0


def test_the_documented_check_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lines = (DOCS / "your-data.md").read_text().splitlines()
    line = next(line.strip() for line in lines if line.endswith("--workdir runs/look --check"))
    python, _, module, *arguments = shlex.split(line)
    assert (python, module) == ("python", "hgdpo_jax.pairs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "start", lambda *_, **__: None)
    monkeypatch.setattr("sys.argv", ["pairs", *arguments])
    pairs.main()
    shown = capsys.readouterr().out.splitlines()
    documented = [line.strip() for line in lines if line.strip().startswith("stage1 pairs: data: ")]
    assert documented and documented == [line for line in shown if line.startswith("stage1 pairs: data: ")]
    assert not list(tmp_path.iterdir())
