"""Launches of the scaling table from outside: torchrun, what its ranks say, and what becomes of cells that fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.scaling_plan import SAVED_AT, Cell, Cells, Launch, Line, affordable, launches, left_to_do

ROOT = Path(__file__).parents[1]
LAST_WORDS = 30
"""Lines of a failed launch that are kept."""
LAUNCHER_SAYS = "torch/distributed/elastic/multiprocessing"
"""How torchrun's own lines begin, when a rank has failed."""
ORPHANS_SECONDS = 4
"""Within which ranks see that their launcher is gone, and end."""

Say = Callable[[str], None]


def run_folder(work: Path, cell: Cell) -> Path:
    """Of the run that saves, and of the one that continues it."""
    return work / "runs" / f"{cell.size}_{cell.gpus}" / "run"


def has_checkpoint(work: Path, cell: Cell) -> bool:
    """Whether the run that is to be resumed has left its checkpoint here."""
    return (run_folder(work, cell) / "checkpoints" / f"step_{SAVED_AT:08}" / "state.json").exists()


class Measuring:
    """What one call of the command measures, until all is done or the time is over."""

    def __init__(self, work: Path, device: str, ends_at: float, made: dict[str, Any], say: Say) -> None:
        """ends_at: by ``time.time``. made: what every line is to say of the machine. say: tells people."""
        self.work, self.device, self.ends_at, self.made, self.say = work, device, ends_at, made, say
        self.cells = Cells(work)
        self.alone: frozenset[Cell] = frozenset()
        """Cells that failed in turns with others, and are tried by themselves."""

    def all(self, cells: Sequence[Cell], retry: bool) -> None:
        """Measure what has no line yet and fits; launches are planned anew after each of them."""
        before = self.cells.read()
        if retry:
            before = {cell: line for cell, line in before.items() if line.status == "done"}
        known: dict[Cell, Line] = before
        while True:
            wanted = left_to_do(cells, known, lambda cell: has_checkpoint(self.work, cell))
            chosen = affordable(wanted, self.ends_at - time.time(), self.alone)
            if not chosen:
                return
            first, *others = launches(chosen, self.alone)
            later = f", then {len(others)} more in about {sum(one.seconds for one in others):.0f}" if others else ""
            self.say(f"{sum(map(len, first.groups))} cells on {first.ranks} ranks, about {first.seconds:.0f} s{later}")
            known = known | self.launch(first)
            if time.time() >= self.ends_at:
                return

    def launch(self, launch: Launch) -> dict[Cell, Line]:
        """The lines that came of one launch, which are in the file by then."""
        first = launch.groups[0]
        if first[0].is_run:
            self._prepare_run(first[0])
        job = {
            "work": str(self.work),
            "device": self.device,
            "ends_at": self.ends_at,
            "groups": [[asdict(cell) for cell in group] for group in launch.groups],
        }
        path, log = self.work / "job.json", self.work / "stderr.txt"
        path.write_text(json.dumps(job), encoding="utf-8")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(launch.ranks),
            str(ROOT / "benchmarks" / "scaling_ranks.py"), str(path),
        ]  # fmt: skip
        found: dict[Cell, Line] = {}
        open_ = list(first)  # of the group under way; a launch that fails before any has begun fails in its first
        # Not for ever, should ranks wait for each other.
        most = min(self.ends_at - time.time(), 3 * launch.seconds + 120)
        with (
            log.open("w", encoding="utf-8") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            ) as process,
        ):
            assert process.stdout is not None
            timer = threading.Timer(max(most, 0.1), _end, [process])
            timer.start()
            try:
                for text in process.stdout:
                    said = json.loads(text) if text.startswith("{") else {}
                    if "made" in said:
                        self.made |= said["made"]
                    if "began" in said:
                        open_ = [Cell(**values) for values in said["began"]]
                    if "cell" in said:
                        cell = Cell(**said["cell"])
                        open_.remove(cell)
                        found[cell] = self._add(cell, "done", said["figures"])
                        if cell.kind == "resume":  # all that is left is to save its end, which nobody needs
                            _end(process)
                code = process.wait()
            finally:
                timer.cancel()
                _end(process)
        if code and open_ and time.time() < self.ends_at:
            found |= self._failed(open_, last_words(log.read_text(encoding="utf-8", errors="replace"), code))
        if first[0].kind == "resume" and first[0] in found:
            time.sleep(ORPHANS_SECONDS)
            shutil.rmtree(run_folder(self.work, first[0]).parent, ignore_errors=True)
        return found

    def _add(self, cell: Cell, status: Any, figures: dict[str, Any]) -> Line:
        line = Line(cell, status, figures, self.made | {"date": datetime.now(UTC).isoformat(timespec="seconds")})
        self.cells.add(line)
        self.say(f"{cell.name}: {status}{'' if status == 'done' else ', see ' + str(self.cells.path)}")
        return line

    def _failed(self, group: Sequence[Cell], words: str) -> dict[Cell, Line]:
        """Cells that took turns are tried one by one before they count as failed: one of them may be innocent."""
        if len(group) > 1:
            self.say(f"failed together, tried one by one: {', '.join(cell.name for cell in group)}")
            self.alone |= frozenset(group)
            return {}
        return {cell: self._add(cell, "failed", {"error": words}) for cell in group}

    def _prepare_run(self, cell: Cell) -> None:
        """Leave what the run is to start from: nothing, or the checkpoint in its middle."""
        folder = run_folder(self.work, cell)
        if cell.kind == "checkpoint":
            shutil.rmtree(folder.parent, ignore_errors=True)
            return
        for saved in (folder / "checkpoints").glob("step_*"):
            if saved.name != f"step_{SAVED_AT:08}":
                shutil.rmtree(saved)


def last_words(log: str, code: int) -> str:
    """What the ranks said last; torchrun's own account of their end, which hides it, left out."""
    lines = log.splitlines()
    said = next((index for index, line in enumerate(lines) if LAUNCHER_SAYS in line), len(lines))
    return "\n".join(lines[:said][-LAST_WORDS:] or lines[-LAST_WORDS:]) or f"exit code {code}, and no word"


def _end(process: subprocess.Popen[str]) -> None:
    """The launcher and its ranks, if they still run."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
