"""What several processes agree on, as each of them sees it; tests/processes starts them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from hgdpo_jax.run import lifecycle, processes, provenance
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import write_json
from hgdpo_jax.run.folder import blocks_of, last_stage, stage_config, train_command
from hgdpo_jax.run.index import Index, first_process_first
from hgdpo_jax.run.locks import lock_for_all, lock_owner
from hgdpo_jax.run.settings import load_config


def test_each_process_works_on_its_part_a_few_at_once_and_all_get_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven things of two processes: the second one repeats the last."""
    worked: list[list[int]] = []

    def work(numbers: np.ndarray) -> dict[str, np.ndarray]:
        worked.append(numbers.tolist())
        return {"square": numbers**2}

    assert processes.map_over_processes(7, work, 3)["square"].tolist() == [0, 1, 4, 9, 16, 25, 36]
    assert worked == [[0, 1, 2], [3, 4, 5], [6]]

    def gather(mine: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert mine["square"].tolist() == [16, 25, 36, 36]
        return {"square": np.array([[0, 1, 4, 9], [16, 25, 36, 36]])}

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes, "is_alone", lambda: False)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    assert processes.map_over_processes(7, work)["square"].tolist() == [0, 1, 4, 9, 16, 25, 36]


def test_who_was_started_with_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.require_same({"seed": "1"})
    monkeypatch.setattr(processes, "broadcast", lambda _: ["first", {"seed": "1"}])
    with pytest.raises(UserError, match=r"process 0 on .*: its seed is 2, that of process 0 on first is 1; start all"):
        processes.require_same({"seed": "2"})


def test_process_0_looks_first_and_the_others_read_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, file = tmp_path / "content.json", tmp_path / "a"
    file.write_text("a")
    done: list[Any] = []
    monkeypatch.setattr(processes, "barrier", lambda: done.append(path.is_file()))
    first_process_first(index := Index(path), lambda: index.hash(file))
    monkeypatch.setattr(processes, "is_first", lambda: False)
    other = Index(tmp_path / "none")
    other._path = path
    first_process_first(other, lambda: done.append(dict(other._known)))
    assert done == [True, True, json.loads(path.read_text())]  # written before the others go on, who then know it


def test_commands_that_begin_on_one_folder_do_not_take_each_others_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "is_alone", lambda: False)
    monkeypatch.setattr(processes, "require_same", lambda _: None)
    monkeypatch.setattr(processes, "_VISIBLE", 0)
    begun: list[int] = []

    def meanwhile(decide: Callable[[], Any]) -> Any:
        decided = decide()
        begun.append(1)
        if len(begun) == 1:  # another command, from its beginning to its end
            processes.require_same_command(tmp_path, {})
        return decided

    monkeypatch.setattr(processes, "broadcast", meanwhile)
    monkeypatch.setattr(processes, "barrier", lambda: None)
    processes.require_same_command(tmp_path, {})
    assert len(begun) == 2 and not list(tmp_path.iterdir())


def test_a_folder_is_owned_for_all_by_process_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock_for_all(tmp_path / "run"):
        assert lock_owner(tmp_path / "run") is not None
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with lock_for_all(tmp_path / "run"):
        assert lock_owner(tmp_path / "run") is None


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, "config key b='nothing': the pairs was made with 2; build"),
        ({"train.lr": 1e-5}, {"train.lr": 1e-5, "train.ema": 0.9},
         "config key train.ema=0.9: the pairs was made with 0.0; build"),
        ({"a": 1}, {"a": 1, "b": 2}, "config key b=2: the pairs was made with 'nothing'; build"),
        ({"content of x": "0" * 64}, {"content of x": "1" * 64},
         f"content of x=sha256 {'1' * 12}…: the pairs was made with sha256 {'0' * 12}…; build"),
        ({"content of x": None}, {"content of x": "1" * 64},
         f"content of x=sha256 {'1' * 12}…: the pairs was made with sha256 None…; build"),
    ],
)  # fmt: skip
def test_the_first_difference_is_named_with_both_values(found: dict, wanted: dict, message: str) -> None:
    provenance.require_same(found, found, "the pairs", "build")
    with pytest.raises(UserError) as error:
        provenance.require_same(found, wanted, "the pairs", "build")
    assert str(error.value) == message


def test_what_a_run_folder_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no stage was trained in .*; run first: .*configs/stage1.py"):
        last_stage(tmp_path)
    for stage in ("stage0", "stage2", "text_encoder"):
        groups = ("model", "data", "pairs", "adapter", "train", "evaluate", "mesh")
        config = {"stage": stage} | {group: {} for group in groups}  # of before there were settings
        write_json(tmp_path / stage / "config.json", config)
    assert last_stage(tmp_path) == "stage2" and stage_config(tmp_path, "stage2").train.steps == 20_000
    with pytest.raises(UserError, match="stage3 was not trained in .*, stage0, stage2, text_encoder was; run first"):
        stage_config(tmp_path, "stage3")
    assert "configs/stage0_sft.py[:variant]" in train_command("stage0", tmp_path)


def test_the_paper_draws_the_hard_stage_with_the_up_blocks_under_whatever_name() -> None:
    hard = load_config("configs/stage3.py:portraits", [])
    again = load_config("configs/stage3.py:portraits", ["stage=slow", "train.pairs=stage3"])
    others = [load_config(f"configs/{name}.py:portraits", []) for name in ("stage1", "stage2", "naive")]
    assert [blocks_of(hard, blocks) for blocks in ("paper", "all", "up")] == ["up", "all", "up"]
    assert [blocks_of(config, "paper") for config in (again, *others)] == ["up", "all", "all", "up"]


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        *(({"JAX_COORDINATOR_ADDRESS": address}, f"JAX_COORDINATOR_ADDRESS={address}: expects HOST:PORT of process 0, ")
          for address in ("host", "10.0.0.1", "host:", ":1234", "host:http", "host:70000", "host:0", "::1",
                          "fe80::1:80", "http://host", "")),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: expects a number"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1: expects a number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: expects a number below JAX_NUM_"),
        ({"JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID=0: expects a number below JAX_NUM_"),
    ],
)  # fmt: skip
def test_where_processes_meet_is_checked_before_they_wait(
    variables: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("would wait"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        lifecycle._join()
    assert str(error.value).startswith(line)


@pytest.mark.parametrize("address", ["host:1234", "10.0.0.1:1", "[::1]:65535", "a.b-c.example:8476"])
def test_an_address_with_a_port_is_taken(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def initialize(*given: Any, **_: Any) -> None:
        asked.extend(given)
        raise ValueError("nobody there")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(lifecycle, "_catch_abort", lambda: None)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    with pytest.raises(UserError, match="the other processes are not found"):
        lifecycle._join()
    assert asked == [address, None, None]
    jax.config.update("jax_enable_preemption_service", True)


def test_processes_that_only_read_compare_what_they_see_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "stage1" / "config.json", {"a": 1})
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(processes, "is_alone", lambda: False)
    monkeypatch.setattr(processes, "require_same", lambda what: seen.append(dict(what)))
    monkeypatch.setattr(processes, "write_json", lambda *_: pytest.fail("writes"))
    for text in ('{"a": 1}', '{"a": 2}'):
        (tmp_path / "stage1" / "config.json").write_text(text)
        processes.require_same_command(tmp_path, {}, writes=False)
    first, second = (found[f"content of {tmp_path}"] for found in seen[1::2])
    assert first != second
