"""A study: people compare what two models drew for the same captions from the same seeds, without seeing whose it is.

    W/study/ID.html     one file with its pictures inside; ID tells the two models and what they drew

Each person saves a file of answers, in which the models are "first" and "second" as the command named them.
"""

import base64
import itertools
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from hgdpo_jax.browsing.page import render, write_page
from hgdpo_jax.browsing.pictures import is_small
from hgdpo_jax.pictures.write import jpeg, png
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import as_written, json_hash
from hgdpo_jax.scoring.bootstrap import Measure, mean, resamples

QUESTIONS = {"natural": "more natural", "text": "fits the text better"}
_WINS = {"first": 0.0, "equal": 0.5, "second": 1.0}  # of the second model
_SCRIPTS = ("common.js", "viewer.js", "study.js")


class Drawn(NamedTuple):
    """What a model drew for the first captions, and the mark of all that it drew."""

    pictures: UInt8[np.ndarray, "s H W 3"]
    captions: list[str]
    mark: str


def read_drawn(workdir: Path, model: str) -> Drawn:
    """What `evaluate` kept of a model's drawings.

    Raises:
        UserError: the model was not evaluated, its file is damaged, or it was written before captions were.
    """
    path = workdir / "evaluation" / f"{model}.npz"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.npz")))
        raise UserError(f"--study {model}: {f'expects two of {there}' if there else 'run evaluate first'}")
    found = _arrays(path, "pictures", "captions", "mark")
    return Drawn(found["pictures"], [str(caption) for caption in found["captions"]], str(found["mark"]))


def _arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Some of the arrays of a file. Raises UserError where they are not there, or damaged."""
    with as_written(path, "remove it, and run evaluate again"):
        try:
            with np.load(path) as file:
                return {name: file[name] for name in names}
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(error) from error


def _study_id(models: Sequence[str], marks: Sequence[str]) -> str:
    return json_hash([[*models], [*marks]])[:12]


def write_study(workdir: Path, first: str, second: str) -> Path:
    """Writes the page of a study; returns its path.

    Args:
        workdir: of an evaluated run.
        first, second: models, by the names that the report has for them.

    Raises:
        UserError: see :func:`read_drawn`; or they are one model, or drew for different captions.
    """
    drawn = [read_drawn(workdir, model) for model in (first, second)]
    if first == second:
        raise UserError(f"--study {first} {second}: expects two models")
    if drawn[0].captions != drawn[1].captions:
        raise UserError(f"--study {first} {second}: were drawn for different captions; run evaluate again")
    study = _study_id((first, second), [each.mark for each in drawn])
    pairs = [
        [caption, _source(a), _source(b)]
        for caption, a, b in zip(drawn[0].captions, drawn[0].pictures, drawn[1].pictures, strict=True)
    ]
    height, width = drawn[0].pictures.shape[1:3]
    path = workdir / "study" / f"{study}.html"
    write_page(path, render("study.html", _SCRIPTS, {"study": study, "size": [width, height], "pairs": pairs}))
    return path


def _source(image: UInt8[np.ndarray, "H W 3"]) -> str:
    kind, content = ("png", png(image)) if is_small(image.shape[:2]) else ("jpeg", jpeg(image))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _studies(workdir: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """ID and models of all studies that the run's drawings allow."""
    files = sorted((workdir / "evaluation").glob("*.npz"))
    marks = {path.stem: str(_arrays(path, "mark")["mark"]) for path in files}
    for models in itertools.permutations(marks, 2):
        yield _study_id(models, [marks[model] for model in models]), (models[0], models[1])


class Answers(NamedTuple):
    """What the people of a study answered: its models, and for each question the second model's wins, pair → person."""

    models: tuple[str, str]
    wins: Mapping[str, Mapping[str, Sequence[float]]]


def read_answers(workdir: Path, files: Sequence[Path]) -> Answers:
    """The answers of some people in one study.

    Raises:
        UserError: a file is none of answers, is of another study, or holds those of a person twice.
    """
    studies, people = dict(_studies(workdir)), dict[str, Path]()
    found: dict[str, dict[str, list[float]]] = {name: {} for name in QUESTIONS}
    study = None
    for path in files:
        if not path.is_file():
            raise UserError(f"--study {path}: no such file")
        with as_written(f"--study {path}", "give a file that the page of a study saved"):
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["hgdpo_jax"] != "answers":
                raise ValueError(f"it holds {content['hgdpo_jax']!r}, not 'answers'")
            own, person = str(content["study"]), str(content["person"])
            given = [
                (name, pair, _WINS[answer])
                for pair, of_pair in content["answers"].items()
                for name, answer in of_pair.items()
            ]
            for name, pair, win in given:
                found[name].setdefault(pair, []).append(win)
        if own not in studies:
            raise UserError(f"--study {path}: is of another study than of what is drawn in {workdir}; give that run")
        if study not in (None, own):
            raise UserError(f"--study {path}: is of another study than {files[0]}; give those of one")
        if person in people:
            raise UserError(f"--study {path}: holds the answers of {people[person]} again; give each once")
        study, people[person] = own, path
    assert study is not None
    return Answers(studies[study], found)


def win_rates(answers: Answers) -> dict[str, Measure]:
    """Question → how often the second model won, with an interval by bootstrap over the pairs; equal counts half.

    A pair counts once, however many people answered.

    Raises:
        UserError: fewer than two pairs have an answer.
    """
    found = {}
    for name, wins in answers.wins.items():
        if len(wins) < 2:
            raise UserError(f"--study: {len(wins)} pairs are answered by which is {QUESTIONS[name]}; expects two")
        values = np.array([[np.mean(each)] for _, each in sorted(wins.items())])
        found[name] = mean(values, resamples(len(values)), 0, 1)
    return found


def lines(answers: Answers) -> list[str]:
    """What a command prints of the answers of a study."""
    first, second = answers.models
    found = []
    for name, measure in win_rates(answers).items():
        given = [win for each in answers.wins[name].values() for win in each]
        low, high = measure.interval
        found.append(f"{second} over {first}, {QUESTIONS[name]}: {measure.value:.1%} (95 % interval {low:.1%} to "
                     f"{high:.1%}; {len(answers.wins[name])} pairs, {len(given)} answers, {given.count(0.5)} of them "
                     "equal)")  # fmt: skip
    return found


def print_answers(workdir: Path, files: Sequence[Path]) -> None:
    """Prints how often the second model of a study won; see :func:`read_answers`."""
    print(*lines(read_answers(workdir, files)), sep="\n")
