"""Base, easy, normal and hard on the held-out captions: a table, W/results.json, W/report.html and W/portrait.png.

python -m hgdpo_jax.evaluate --config configs/stage3.py[:variant] --workdir W
python -m hgdpo_jax.evaluate --config configs/stage3.py[:variant] --workdir W --study FILE …     what people answered

Every model draws the same prompts from the same seeds. What a model drew is kept in W/evaluation and not drawn again.
With `--study` nothing is drawn: the files are answers that people saved on a page of `hgdpo_jax.browse --study`.
"""

from pathlib import Path
from typing import Any

from hgdpo_jax.run import command
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.remembered import remembering


def print_table(results: dict[str, Any]) -> None:
    """A row for each model: what the judges say that chose nothing, then the rest; lines about people, if any."""
    from rich.console import Console
    from rich.table import Table

    from hgdpo_jax.results.tables import measured_titles
    from hgdpo_jax.scoring import personalised

    titles = measured_titles(results["models"])
    count, people = results["images_per_model"], results["people"]
    table = Table("", title=f"{count} images per model for {people} held-out people, the same seeds")
    for title in titles.values():
        table.add_column(title, justify="right")
    for model, row in results["models"].items():
        table.add_row(model, *(f"{row[name]:.3f}" for name in titles))
    console = Console(width=190)
    console.print(table)
    for line in personalised.lines(results.get("personalised", {})):
        console.print(line)


def main() -> None:
    parser = command.run_parser("Measures base and every stage, writes results.json, report.html and portrait.png.")
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
    files = ["results.json", "report.html", portrait.PORTRAIT]
    files += [portrait.PERSONS] if "personalised" in results else []
    print(*(given.workdir / file for file in files), sep=", ")


def cli() -> None:
    command.run(main)


if __name__ == "__main__":
    cli()
