"""The rows of the reproduction: every command is one that this package takes, and every row trains what it is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from hgdpo_jax.run.command import add_name, parse, run_parser
from hgdpo_jax.run.folder import pair_stages, stage_folder
from hgdpo_jax.scoring.reproduction import read_paper
from tools.reproduction.cost import examples_of, pictures_of
from tools.reproduction.document import document
from tools.reproduction.rows import command_lines, rows


@pytest.mark.parametrize("variant", ["portraits", "sd15", "sdxl"])
def test_each_row_is_trained_after_what_it_needs(variant: str) -> None:
    built, trained = set(), {"base"}
    for line in command_lines(variant):
        command, spec, *arguments = line.split()
        parser = run_parser("")
        if command == "main":
            add_name(parser)
        config, _ = parse(parser, ["--config", spec, "--workdir", "W", *arguments])
        if command == "pairs":
            needed = {config.pairs.loser} - {"pool", "sdrecon", "given", "none"}
            assert needed <= built, line
            built.add(config.stage)
        else:
            assert {*pair_stages(config)} <= built and config.train.start in trained, line
            trained.add(config.stage)
    found = [row for part in rows(variant).values() for row in part]
    assert {stage_folder(row.drawn.split("+")[0]) for row in found} <= trained
    names, paper = [row.name for row in found], read_paper()
    assert len({*names}) == len(names) and {*paper.rows} <= {*names}


def test_the_first_pool_is_the_largest() -> None:
    """So that all others are read from it."""
    pools = [line for line in command_lines("sd15") if line.startswith("pairs ") and "stage1.py" in line]
    assert pools == [command_lines("sd15")[0]] and "--config.pairs.pool_size=20" in pools[0]


def test_the_cost_counts_each_candidate_once_and_every_step() -> None:
    assert pictures_of("sd15") == 20 + (1 + 2 + 4 + 5 + 6 + 7) / 10 + 1  # RealAlign's face is a whole trajectory
    of_objectives = 10 * 16 * 20_000
    of_lengths = 16 * (0.5 + 2 + 4) * (300_000 + 20_000 + 20_000)
    assert examples_of("sd15") > of_objectives + of_lengths


def test_a_page_of_parts_has_the_tables_of_what_all_seeds_have(tmp_path: Path) -> None:
    """`hard` is not the hard stage of fewer people."""
    for seed in (0, 1):
        of_people = {f"{tmp_path}/{seed}:base": 0.0, f"{tmp_path}/{seed}:hard": 3.0}
        of_people |= {f"{tmp_path}/{seed}-people-{count}:hard": count for count in (8, 16, 32, 64)}
        write_resamples(tmp_path, f"{seed}/rows/people", of_people)
        if seed == 0:
            write_resamples(tmp_path, "0/rows/lengths", {f"{tmp_path}/0:base": 0.0, f"{tmp_path}/0:steps_2_hard": 9.0})
    page = document("portraits", tmp_path)
    assert "## Fewer people" in page and "| 8 people | 8 [8, 8] |" in page and "| all, 108 | 3 [3, 3] |" in page
    assert "paper" not in page and "times the steps" not in page  # of one seed alone


def write_resamples(folder: Path, part: str, rows: dict[str, float]) -> None:
    (folder / part).mkdir(parents=True)
    np.savez(
        folder / part / "resamples.npz",
        **{json.dumps([row, "sharpness"]): np.full(5, value) for row, value in rows.items()},
    )
