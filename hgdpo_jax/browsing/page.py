"""The pages: one HTML file each, whose templates, style and scripts lie in assets/browse.

W/browse/index.html     the pairs of a run's stages; its pictures lie beside it
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from hgdpo_jax.browsing.pictures import Decoder, Pictures
from hgdpo_jax.browsing.reconstructions import Reconstructor
from hgdpo_jax.browsing.stages import Sources, describe, open_stages, photographs_of
from hgdpo_jax.config import ASSETS, to_json
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import atomic_path, json_hash
from hgdpo_jax.run.index import index_of_run
from hgdpo_jax.run.locks import lock

_FOLDER = ASSETS / "browse"
PAIRS = ("common.js", "viewer.js", "ratings.js", "histogram.js", "pairs.js")


def render(template: str, scripts: Sequence[str], data: Mapping[str, Any]) -> str:
    """The HTML of a page.

    Args:
        template: its file.
        scripts: their files, in order.
        data: what the scripts show.
    """
    text = {name: (_FOLDER / name).read_text(encoding="utf-8") for name in (template, "page.css", *scripts)}
    # No caption ends the element that holds the data.
    embedded = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    script = "\n".join(text[name] for name in scripts)
    return Template(text[template]).substitute(style=text["page.css"], script=script, data=embedded)


def write_page(path: Path, content: str) -> None:
    """Writes a page whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


class PairsPage:
    """The page of a run's pairs, to be written whenever there are more of them.

    Args:
        workdir: of the run.
        reconstructions: draws again all reconstructions of which a stage's winner is the best.
    """

    def __init__(self, workdir: Path, reconstructions: bool = False) -> None:
        self._workdir, self._reconstructions = workdir, reconstructions
        self._decoders: dict[Any, Decoder] = {}  # the stages of a run mostly share them
        self._listed: dict[str, Mapping[str, Photograph]] = {}  # so they do the photographs
        self._due = 0.0

    def write(self) -> Path:
        """Writes the page of all pairs, finished or not, and the pictures that it has not yet; returns its path.

        Raises:
            UserError: see :func:`hgdpo_jax.browsing.stages.open_stages`; a shard is damaged, or another command writes
                the page.
        """
        folder, index = self._workdir / "browse", index_of_run(self._workdir)
        with lock(folder):
            stages = open_stages(self._workdir, index)
            pictures = Pictures(folder / "pictures", index)
            shown = []
            for stage in stages:
                data = json_hash([to_json(stage.config)["data"], stage.has_photographs])
                if stage.base not in self._decoders:
                    self._decoders[stage.base] = Decoder(stage.config)
                if data not in self._listed:
                    self._listed[data] = photographs_of(stage, index)
                reconstructor = Reconstructor(stage.config) if self._reconstructions else None
                sources = Sources(self._decoders[stage.base], self._listed[data], reconstructor)
                shown.append(describe(stage, sources, pictures))
            path = folder / "index.html"
            write_page(path, render("pairs.html", PAIRS, {"run": self._workdir.resolve().name, "stages": shown}))
            pictures.remove_others()
            index.save()
        return path

    def keep_up(self) -> None:
        """Writes the page while pairs are made, as often as it takes a tenth of the time. Where it cannot be written,
        that is logged: it is no reason to stop making pairs."""
        begun = time.monotonic()
        if begun < self._due:
            return
        try:
            self.write()
        except UserError as error:
            logging.warning("%s; the page of pairs waits, pairs go on", error)
        ended = time.monotonic()
        self._due = ended + 9 * (ended - begun)
