"""Read all sources into one list of conversations: short enough, and every prompt once."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from conf.console import say
from data_prep.chat import prompt_tokens
from data_prep.conversation import Conversation
from data_prep.manifest import write_json
from data_prep.source import Source
from models.target import Target

PROMPTS = "prompts.jsonl"
REPORT = "report.json"


@dataclass(frozen=True)
class Collected:
    """What was kept, and per source what was left out."""

    conversations: list[Conversation]
    report: list[dict[str, Any]]

    def save(self, folder: Path) -> None:
        """The report first: where the prompts are, it is there too."""
        write_json(folder / REPORT, self.report)
        temporary = folder / f"{PROMPTS}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            for c in self.conversations:
                file.write(json.dumps(asdict(c), ensure_ascii=False) + "\n")
        temporary.rename(folder / PROMPTS)


def load(folder: Path) -> list[Conversation]:
    """The conversations that `Collected.save` wrote."""
    with (folder / PROMPTS).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Conversation(c["id"], tuple(c["messages"]), c["category"]) for c in rows]


def collect(
    sources: Sequence[Source],
    target: Target,
    *,
    max_prompt_tokens: int,
    turn: Literal["first", "last"] | None,
) -> Collected:
    """Read every source. `turn` is the user turn to be answered; None keeps the data's answers.

    Two prompts are the same when they differ in case and white space only.
    """
    kept: dict[str, Conversation] = {}
    ids: set[str] = set()
    report = []
    for source in sources:
        settings = source.settings()
        label = str(settings.get("path") or settings.get("package") or type(source).__name__)
        read = long = same = 0
        for c in source.read_with(target):
            read += 1
            if c.id in ids:
                raise ValueError(
                    f"Two sources of the dataset both call a record '{c.id}'; give one of them "
                    "another name (source.name)."
                )
            ids.add(c.id)
            if _prompt_length(target, c, turn) > max_prompt_tokens:
                long += 1
            elif (key := _key(c, turn)) in kept:
                same += 1
            else:
                kept[key] = c
        say(
            f"   {label}: {read - long - same:,} of {read:,} prompts kept; left out: {long:,} "
            f"longer than {max_prompt_tokens} tokens, {same:,} that were there already, "
            f"{len(source.skipped):,} by the source"
        )
        report.append(
            {
                "source": label,
                "read": read,
                "too_long": long,
                "duplicates": same,
                "left_out": len(source.skipped),
                "left_out_first": source.skipped[:20],
            }
        )
    return Collected(list(kept.values()), report)


def _prompt_length(target: Target, c: Conversation, turn: Literal["first", "last"] | None) -> int:
    """Tokens of the prompt; plain text has none and is cut to length later."""
    if turn is None and c.is_text:
        return 0
    return len(prompt_tokens(target.tokenizer, c.prompt(turn or "first")))


def _key(c: Conversation, turn: Literal["first", "last"] | None) -> str:
    messages = c.messages if turn is None else c.prompt(turn)
    return "\n".join(f"{m['role']} {' '.join(m['content'].casefold().split())}" for m in messages)
