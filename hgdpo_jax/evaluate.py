"""Base, easy, normal and hard on the held-out captions: a table, W/results.json and W/report.html.

python -m hgdpo_jax.evaluate --config configs/stage3.py[:variant] --workdir W

Every model draws the same prompts from the same seeds. What a model drew is kept in W/evaluation and not drawn again.
"""

from hgdpo_jax.run import command


def main() -> None:
    parser = command.run_parser("Measures base and every stage, writes results.json and report.html.")
    config, given = command.parse(parser)

    from hgdpo_jax.devices.start import start
    from hgdpo_jax.results.evaluation import evaluate, show

    start(given.workdir, command.as_arguments(config), config.model.dtype)
    show(evaluate(config, given.workdir))
    print(f"{given.workdir / 'results.json'}, {given.workdir / 'report.html'}")


def cli() -> None:
    command.run(main)


if __name__ == "__main__":
    cli()
