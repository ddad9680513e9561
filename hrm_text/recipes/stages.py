"""Work in stages: each is done once, leaves its result on the disk, and is found again by the next run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_text.contracts import UserError
from hrm_text.files import read_json, write_json
from hrm_text.recipes.display import Display


@dataclass(frozen=True)
class Stage:
    """One piece of work. ``work`` returns a line that says what it made; it may itself continue what was begun."""

    name: str
    work: Callable[[Display], str]


class Progress:
    """Which stages of a folder are finished, and the settings they were made with: ``progress.json``."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / "progress.json"
        self.finished: dict[str, dict[str, Any]] = {}
        self.spent: dict[str, float] = {}
        self.settings = dict(settings)
        if self.path.exists():
            saved = read_json(self.path)
            differences = [
                f"{key} was {saved['settings'].get(key)!r} and is {value!r}"
                for key, value in self.settings.items()
                if saved["settings"].get(key) != value
            ]
            if differences:
                raise UserError(
                    f"{folder} holds a run with other settings: {'; '.join(differences)}. "
                    "Choose another folder with --out, or delete this one."
                )
            self.finished, self.spent = saved["finished"], saved["spent"]
        elif folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; choose another place for the folder with --out")
        elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(
                f"{folder} is not empty and holds no run of the quickstart; choose another folder with --out"
            )

    def run(self, stages: Sequence[Stage], display: Display) -> None:
        """Do what is not finished, in order."""
        for stage in stages:
            if stage.name in self.finished:
                done = self.finished[stage.name]
                display.end(stage.name, done["seconds"], done["detail"], reused=True)
                continue
            self._save()
            display.begin(stage.name)
            started = time.monotonic()
            before = self.spent.get(stage.name, 0.0)
            try:
                detail = stage.work(display)
            finally:
                # An interrupted stage remembers the time it took so far, so that the report adds up.
                self.spent[stage.name] = before + time.monotonic() - started
                self._save()
            self.finished[stage.name] = {"seconds": self.spent[stage.name], "detail": detail}
            self._save()
            display.end(stage.name, self.spent[stage.name], detail)

    def _save(self) -> None:
        write_json(self.path, {"settings": self.settings, "finished": self.finished, "spent": self.spent})
