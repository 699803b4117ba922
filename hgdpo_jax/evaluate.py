"""Base, easy, normal and hard on the held-out captions: a table, W/results.json, W/report.html and W/portrait.png.

python -m hgdpo_jax.evaluate --config configs/stage3.py[:variant] --workdir W
python -m hgdpo_jax.evaluate --config configs/stage3.py[:variant] --workdir W --study FILE …     what people answered
python -m hgdpo_jax.evaluate --runs A B:easy … --prompts FILE --seeds 10 --out DIR                several runs

Every model draws the same prompts from the same seeds. What a model drew is kept in W/evaluation and not drawn again.
With `--study` nothing is drawn: the files are answers that people saved on a page of `hgdpo_jax.browse --study`.
With `--runs` each run draws the same prompts from the same seeds: DIR/results.json and DIR/report.html compare them.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hgdpo_jax.run import command
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.folder import local_folder
from hgdpo_jax.run.remembered import remembering


def print_table(results: dict[str, Any]) -> None:
    """A row for each model: what the judges say that chose nothing, then the rest; lines about people, if any."""
    from hgdpo_jax.scoring import personalised

    count, people = results["images_per_model"], results["people"]
    _print_rows(results["models"], f"{count} images per model for {people} held-out people, the same seeds")
    for line in personalised.lines(results.get("personalised", {})):
        print(line)


def _print_rows(models: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """A row for each model."""
    from rich.console import Console
    from rich.table import Table

    from hgdpo_jax.results.tables import measured_titles

    titles, table = measured_titles(models), Table(title=title)
    table.add_column("", overflow="fold")
    for heading in titles.values():
        table.add_column(heading, justify="right")
    for model, row in models.items():
        table.add_row(model, *(f"{row[name]:.3f}" for name in titles))
    Console(width=190).print(table)


def _print_runs(results: dict[str, Any]) -> None:
    """A row for each run; each difference to the first that is beyond chance; what was not measured."""
    from hgdpo_jax.results.runs import by_reason
    from hgdpo_jax.scoring.comparison import title_of

    first, count = next(iter(results["models"])), len(results["seeds"])
    _print_rows(results["models"], f"{results['prompts']} prompts, {count} seeds each; base is {first}")
    for pair, row in results["differences"].items():
        print(f"{pair}, beyond chance:")
        for name in (name for name in row if f"{name}_interval" in row):
            low, high = row[f"{name}_interval"]
            if low * high > 0:
                print(f"  {title_of(name)}: {row[name]:+.3f} [{low:.3f}, {high:.3f}]")
    for reason, titles in by_reason(results["absent"]).items():
        print(f"not measured, {reason}: {', '.join(titles)}")


def _several() -> None:
    """`--runs`."""
    parser = argparse.ArgumentParser(
        description="Compares runs: each draws the same prompts from the same seeds, as the first run's config says.",
        epilog="How is drawn and measured: --config.evaluate.steps=20 (python -m hgdpo_jax.config lists them).",
    )
    parser.add_argument("--runs", nargs="+", required=True, metavar="WORKDIR[:STAGE]", help="the others are compared "
                        "with the first. STAGE: base, easy, normal, hard, or its folder, with +text_encoder, +lan, "
                        "+0.5 (its LoRA's weight), +all or +up (blocks) behind it; what sample draws unless "
                        "given")  # fmt: skip
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line; the first run's held-out "
                        "captions unless given")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each prompt, from seeds 0, 1, …")
    parser.add_argument("--out", type=local_folder, required=True, help="folder for the comparison")
    parser.add_argument("--base", help="where the runs' base model is now, if it was moved")
    given, rest = parser.parse_known_args()
    overrides = command.overrides(rest)

    from hgdpo_jax.devices.start import start
    from hgdpo_jax.results.runs import compare_runs

    start(given.out, vars(given) | {"overrides": overrides})
    _print_runs(compare_runs(given.runs, given.prompts, given.seeds, given.out, overrides, given.base))
    print(given.out / "results.json", given.out / "report.html", sep=", ")


def main() -> None:
    if "--runs" in sys.argv[1:]:
        _several()
        return
    parser = command.run_parser("Measures base and every stage, writes results.json, report.html and portrait.png. "
                                "With --runs instead it compares runs, see --runs --help.")  # fmt: skip
    command.add_name(parser)
    what = parser.add_mutually_exclusive_group()
    command.add_step(what)
    what.add_argument("--study", nargs="+", type=Path, metavar="FILE", help="answers of people in a study, see "
                      "hgdpo_jax.browse: prints how often the second model won, with intervals")  # fmt: skip
    config, given = command.parse(parser)
    if given.study and given.name is not None:
        raise UserError(f"--as {given.name}: does nothing here, --study measures no stage")
    if given.study:
        from hgdpo_jax.browsing.study import print_answers

        print_answers(given.workdir, given.study)
        return

    from hgdpo_jax.devices.start import start
    from hgdpo_jax.results import portrait
    from hgdpo_jax.results.evaluation import evaluate
    from hgdpo_jax.run.processes import is_first

    start(given.workdir, command.as_arguments(config) | {"--step": given.step}, config.model)
    with remembering(given.workdir, config, given.given, is_first()):
        results = evaluate(config, given.workdir, given.step)
    print_table(results)
    if results["not_measured"]:
        print(f"not measured, no weights are given: {', '.join(results['not_measured'])}; see docs/scorers.md")
    files = ["results.json", "report.html", portrait.PORTRAIT]
    files += [portrait.PERSONS] if "personalised" in results else []
    print(*(given.workdir / file for file in files), sep=", ")


def cli() -> None:
    command.run(main)


if __name__ == "__main__":
    cli()
