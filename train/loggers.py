"""metrics.csv in the run folder, one file over all resumptions."""

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger

from conf.console import is_first_process

METRICS = "metrics.csv"


class RunCSV(CSVLogger):
    """Lightning's CSVLogger, writing `metrics.csv` into the run folder itself.

    Lightning's deletes an existing file when a run is resumed; this one goes on after `resume_step`
    finished steps, drops later rows (they are about to be made again) and half-written ones, and
    writes no row twice: a run interrupted behind its last step validates again.
    """

    def __init__(self, *, run_dir: Path, resume_step: int = 0) -> None:
        super().__init__(save_dir=run_dir, name="", version="", flush_logs_every_n_steps=1)
        if not is_first_process():
            return  # only the first one writes
        path = Path(run_dir) / METRICS
        kept, columns = _rows_until(path, resume_step) if path.exists() else ([], [])
        # The writer refuses a folder that is not empty: it starts aside, then goes to its place.
        aside = Path(run_dir) / ".metrics"
        self._version = aside.name
        writer = self.experiment
        self._version = ""
        aside.rmdir()
        writer.log_dir = str(run_dir)
        writer.metrics_file_path = str(path)
        self._seen = {(int(r["step"]), _filled(r)) for r in kept}
        if kept:
            writer.metrics_keys = columns
            temporary = path.with_suffix(".tmp")
            with temporary.open("w", newline="") as file:
                table = csv.DictWriter(file, fieldnames=columns)
                table.writeheader()
                table.writerows(kept)
            temporary.replace(path)
        else:
            path.unlink(missing_ok=True)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        key = (step, _filled(metrics))
        if key not in self._seen:
            self._seen.add(key)  # type: ignore[arg-type]
            super().log_metrics(metrics, step)


def _filled(row: dict[str, Any]) -> frozenset[str]:
    """Which columns a row has."""
    return frozenset(name for name, value in row.items() if value != "" and name != "step")


def _rows_until(path: Path, step: int) -> tuple[list[dict[str, str]], list[str]]:
    """Whole rows of at most `step` finished steps, and the column names."""
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        columns = list(table.fieldnames or [])
        whole = [row for row in table if None not in row and None not in row.values()]
    return [r for r in whole if r["step"].isdigit() and int(r["step"]) <= step], columns
