"""metrics.csv in the run folder, one file over all resumptions."""

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

METRICS = "metrics.csv"


class RunCSV(CSVLogger):
    """Lightning's CSVLogger, writing `metrics.csv` into the run folder itself.

    Lightning's deletes an existing file when a run is resumed; this one goes on after `resume_step`
    finished steps, and drops later rows (they are about to be made again) and half-written ones.
    """

    def __init__(self, *, run_dir: Path, resume_step: int = 0) -> None:
        super().__init__(save_dir=run_dir, name="", version="", flush_logs_every_n_steps=1)
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


def _rows_until(path: Path, step: int) -> tuple[list[dict[str, str]], list[str]]:
    """Whole rows of at most `step` finished steps, and the column names."""
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        columns = list(table.fieldnames or [])
        whole = [row for row in table if None not in row and None not in row.values()]
    return [r for r in whole if r["step"].isdigit() and int(r["step"]) <= step], columns
