"""The model card of an upload: the export's own card when there is one, and the licences."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from export.card import facts_table, numbers
from models.run import Run


@dataclass(frozen=True)
class Licences:
    """In the Hub's words for the drafter; as their owners say for what it was made of."""

    drafter: str
    target: str
    data: str


def upload_card(run: Run, licences: Licences, known: str | None) -> str:
    """README.md. `known` is the card an exporter wrote, which says how the engine loads it."""
    fields, body = _split(known) if known else ({}, _own(run))
    tags = {"library_name": "draftsmith", "tags": ["speculative-decoding", "draft-model"]}
    fields = tags | fields | {"license": licences.drafter}
    name = str(run.config.target.name)
    table = facts_table(
        [
            ("this drafter", licences.drafter),
            (f"the target, `{_public(name)}`", licences.target),
            (f"the prompts, dataset `{run.config.dataset.name}`", licences.data),
        ]
    )
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n\n{body}\n## Licences\n\n{table}\n"


def _own(run: Run) -> str:
    facts, target = run.facts, _public(str(run.config.target.name))
    drafter = facts["drafter"]
    rows = [
        ("target", f"`{target}`, fingerprint `{facts['target']['fingerprint']}`"),
        ("family", f"{drafter['class']}, {drafter['depths']} depths"),
        ("own parameters", f"{drafter['parameters']:,}"),
        ("dataset hash", f"`{facts['dataset']['hash']}`"),
        ("revision", f"`{facts['revision'] or 'not recorded'}`"),
    ]
    return "\n\n".join(
        [
            f"# {drafter['class']} drafter for {target}",
            f"A draft model for speculative decoding of `{target}`, trained with Draftsmith. It "
            "proposes tokens that the target then checks in one forward; the output stays the "
            "target's.",
            "## Facts",
            facts_table(rows),
            "## Numbers",
            numbers(run.path),
        ]
    )


def _public(name: str) -> str:
    """A folder of this machine says nothing to others."""
    return Path(name).name if Path(name).is_absolute() else name


def _split(card: str) -> tuple[dict[str, object], str]:
    if not card.startswith("---\n"):
        return {}, card
    head, _, body = card[4:].partition("---\n")
    return yaml.safe_load(head) or {}, body.lstrip()
