"""Results of benchmarks/on_gpu.sh: one file of JSON, written anew after each part, and tables for people."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import atomic_path

NAME, SUMMARY, LEFT_OUT = "results.json", "summary.md", "left out: "
_GIB = 2**30


@dataclass
class Results:
    """What was measured so far in a folder, and what failed in this run.

    Attributes:
        about: device and versions; empty before the first worker said it.
        parts: name → result, in the order of measuring.
        failed: name → why.
    """

    folder: Path
    is_small: bool
    about: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, is_small: bool) -> "Results":
        """Raises UserError where the folder holds something else than results of this kind."""
        file, other = folder / NAME, "give another folder, or take the file away"
        if not file.exists():
            return cls(folder, is_small)
        try:
            found = json.loads(file.read_text())
            results = cls(folder, found["small"], found["about"], found["parts"], found["failed"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: cannot be read ({error}); {other}") from error
        if results.is_small != is_small:
            raise UserError(f"{file}: was written with{'' if results.is_small else 'out'} --small; {other}")
        return results

    def set_about(self, about: dict[str, Any]) -> None:
        """Raises UserError where earlier results are of another device or of other versions."""
        if self.parts and any(self.about[name] != about[name] for name in ("device", "versions")):
            raise UserError(f"{self.folder / NAME}: is of {_device(self.about)}, this is {_device(about)}; give "
                            "another folder, or take the file away")  # fmt: skip
        self.about = about
        self.write()

    def add(self, name: str, result: dict[str, Any]) -> None:
        """A part's result."""
        self.parts[name] = result
        self.failed.pop(name, None)
        self.write()

    def fail(self, name: str, why: str) -> None:
        """Why a part has no result; the next run tries it again, after all others."""
        self.failed[name] = why
        self.write()

    def left(self) -> list[str]:
        """Parts without a result."""
        return [name for name in PARTS if name not in self.parts]

    def lacking(self) -> list[str]:
        """Parts without a result that should have one: all but those for which a package is not there."""
        return [name for name in self.left() if not self.failed.get(name, "").startswith(LEFT_OUT)]

    def write(self) -> None:
        about = {"small": self.is_small, "about": self.about, "parts": self.parts, "failed": self.failed}
        for name, text in ((NAME, json.dumps(about, indent=1) + "\n"), (SUMMARY, self.summary())):
            with atomic_path(self.folder / name) as path:
                path.write_text(text)

    def summary(self) -> str:
        """Tables in Markdown."""
        steps = [f"# {_device(self.about)}{', small' if self.is_small else ''}", ""]
        steps += [*self._steps(), *self._memory(), *self._pool(), *self._attention(), *self._peers()]
        same = self.parts.get("deterministic", {}).get("same_bits", {})
        steps += [
            f"Three steps twice, {name}: {'the same' if found else 'other'} bits." for name, found in same.items()
        ]
        steps += [""] if same else []
        missing = [f"- {name}: {self.failed.get(name, 'not yet measured')}" for name in self.left()]
        return "\n".join(
            [*steps, *(["Without a result:", "", *missing] if missing else ["All parts have a result."]), ""]
        )

    def _peak(self, dtype: str) -> float | None:
        found = self.parts.get("products", {}).get("operations_per_second", {}).get(dtype)
        return None if found is None else float(found)

    def _share(self, operations: float, dtype: str) -> str:
        """Operations a second as a share of the measured peak."""
        peak = self._peak(dtype)
        return f"{operations / peak:.1%}" if peak else "–"

    def _step_parts(self) -> dict[str, dict[str, Any]]:
        return {name: found for name, found in self.parts.items() if "gradient_norm" in found}

    def _steps(self) -> list[str]:
        rows = []
        for found in self._step_parts().values():
            (name, seconds), *others = found["seconds"].items()
            pairs, count = found["pairs"][name], found["operations"][name]
            beside = [
                f"{other}: {_ms(each['median'])}, {seconds['median'] / each['median']:.2f}" for other, each in others
            ]
            rows.append([
                name, _ms(seconds["median"]), f"{_ms(seconds['lowest'])} to {_ms(seconds['highest'])}",
                f"{pairs / seconds['median']:.1f}", f"{count / seconds['median'] / 1e12:.0f}",
                self._share(count / seconds["median"], found["dtype"][name]), f"{found['compile_seconds'][name]:.0f} s",
                "; ".join(beside),
            ])  # fmt: skip
        peaks = [
            f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype in ("bfloat16", "float16") if (rate := self._peak(dtype))
        ]
        head = ["step", "median", "range", "pairs/s", "TFLOP/s", "share of the peak", "compiled in",
                "alternately with; ratio"]  # fmt: skip
        return [*([f"Measured peak: {', '.join(peaks)}.", ""] if peaks else []), *_table(head, rows)]

    def _memory(self) -> list[str]:
        planned = self.parts.get("plan", {}).get("steps", {})
        rows = []
        for found in self._step_parts().values():
            name, memory = next(iter(found["seconds"])), found["memory"]
            plan = planned.get(name, {})
            least = "–"
            if plan:
                least = _ms(max(plan["memory_seconds"], found["operations"][name] / plan["operations_per_second"]))
            sizes = memory["arguments"], memory["temporaries"], memory["temporaries_measured"], plan.get("temporaries")
            rows.append([name, *map(_gib, sizes), least])
        head = ["memory of a step", "arguments", "temporaries: compiler", "on the device", "plan's estimate",
                "least time by its data sheet"]  # fmt: skip
        return _table(head, rows)

    def _pool(self) -> list[str]:
        rows = []
        for found in self.parts.values():
            if "images_per_second" in found:
                ((name, seconds),) = found["seconds"].items()
                rate = sum(found["operations"].values()) / seconds["median"]
                rows.append([name, f"{seconds['median']:.3g} s", f"{found['images_per_second']:.2f}",
                             f"{rate / 1e12:.0f}", self._share(rate, found["dtype"])])  # fmt: skip
        return _table(["drawing and decoding", "a batch", "images/s", "TFLOP/s", "share of the peak"], rows)

    def _attention(self) -> list[str]:
        rows = []
        for name, found in self.parts.get("attention", {}).items():
            own, chunks = (found["seconds"][kernel]["median"] for kernel in (found["own"], "in_chunks"))
            rows.append([name, found["own"], _ms(own), _ms(chunks), f"{chunks / own:.2f}",
                         f"{found['operations_per_second'][found['own']] / 1e12:.0f}"])  # fmt: skip
        head = ["attention, four pairs, both ways", "kernel", "its time", "in chunks", "ratio", "its TFLOP/s"]
        return _table(head, rows)

    def _peers(self) -> list[str]:
        rows = []
        for part, found in self.parts.items():
            if "ratio" in found:
                for name, each in found["seconds"].items():
                    ratio = f"{found['ratio'][name]:.2f}"
                    rows.append(
                        [part, name, _ms(each["median"]), f"{found['pairs_or_images'] / each['median']:.2f}", ratio]
                    )
        return _table(["alternately", "", "median", "pairs or images/s", "times ours"], rows)


def _device(about: dict[str, Any]) -> str:
    """Device and versions in words."""
    if not about:
        return "No device yet"
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    return f"{about['device']}, {about['cores']} cores, {versions}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _gib(size: float | None) -> str:
    return "–" if size is None else f"{size / _GIB:.2f} GiB"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    return [*("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)), ""]
