"""One table over the decoding reports of several runs, in Markdown.

python -m scripts.results runs/hydra_heads/latest runs/medusa/latest
python -m scripts.results runs/*/latest --out docs/table.md

Every row is one `python -m decode` (or the decoding at the end of training) and carries what its
number depends on: prompts, temperature, draft shape, seed, interval.
"""

import argparse
import json
from pathlib import Path
from typing import Any

HEADER = (
    "run",
    "drafter",
    "trained",
    "bench",
    "prompts x tokens",
    "T",
    "shape",
    "tokens per step (bonus included)",
    "accepted by depth",
    "speed-up",
    "draft + target ms a round",
)


def rows(run: Path) -> list[tuple[str, ...]]:
    """One row for every report in a run folder, benchmarks in order."""
    facts = json.loads((run / "run.json").read_text())
    reports = sorted((run / "decode").glob("*/results.json"))
    return [_row(run, facts, json.loads(path.read_text())) for path in reports]


def _row(run: Path, facts: dict[str, Any], report: dict[str, Any]) -> tuple[str, ...]:
    drafter = facts["drafter"]
    alpha = " ".join(f"{a:.2f}" for a in report["alpha_by_depth"])
    return (
        run.resolve().parent.name,
        f"{drafter['class']} {drafter['parameters'] / 1e6:.1f} M",
        f"{facts['results']['train_seconds'] / 60:.1f} min",
        report["bench"],
        f"{report['prompts']} x {report['max_new_tokens']}",
        f"{report['temperature']:g}",
        report["shape"],
        _interval(report["tau"]),
        alpha,
        _interval(report["speedup"]) if report["speedup"] else "",
        f"{report['draft_ms']:.1f} + {report['target_ms']:.1f}",
    )


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def table(runs: list[Path]) -> str:
    """The Markdown table."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(row) + " |" for run in runs for row in rows(run)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, or write it to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, help="write here instead of printing")
    arguments = parser.parse_args()
    missing = [str(run) for run in arguments.runs if not (run / "run.json").is_file()]
    if missing:
        parser.error(
            f"{', '.join(missing)} is not a run folder (run.json is missing); give folders made by "
            "`python -m train`, for example runs/hydra_heads/latest"
        )
    text = table(arguments.runs)
    if arguments.out is None:
        print(text, end="")
    else:
        arguments.out.write_text(text)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description."""


if __name__ == "__main__":
    main()
