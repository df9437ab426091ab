"""Sources -> prompts -> answers -> shards, each stage resumable, behind one class.

What lies in a dataset's folder, in the order in which it appears:

    recipe.json             the settings and the target: other ones are refused
    prompts.jsonl           conversations, read, without duplicates and without those too long
    respond.jsonl.partial   answers as they come (.part-* from jobs that share the work);
                            respond.jsonl when all are there
    train/, val/            token shards, then shards of features and signals
    manifest.json           written last: a folder with one is finished

This file only puts the stages in order; each stage is a file of its own. It is longer than most
because every stage is announced with its cost before it runs.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.console import say
from data_prep.chat import prompt_tokens
from data_prep.conversation import Conversation, prompt_id, spread
from data_prep.doctor import Doctor
from data_prep.folder import DatasetFolder
from data_prep.generate import Request
from data_prep.journal import JOURNAL, answered_by
from data_prep.manifest import (
    MANIFEST,
    SPLITS,
    Split,
    describe_target,
    draftsmith_version,
    read_manifest,
    verify,
    verify_tokens,
    write_json,
)
from data_prep.progress import clock
from data_prep.prompts import Prompt
from data_prep.recipe import require_same_recipe
from data_prep.server.base import Server
from data_prep.shards import Example, ShardReader, write_tokens
from data_prep.source import Source
from data_prep.source.self_written import SelfWritten
from data_prep.stage.capture import FEATURES, Capture
from data_prep.stage.collect import PROMPTS, REPORT, Collected, collect, load
from data_prep.stage.estimate import Estimate, estimate
from data_prep.stage.respond import Respond
from data_prep.stage.tokenize import Tokenize
from models.target import Target

EXAMPLES_PER_SHARD = 4096
GUESSED_PROMPT = 48
"""Tokens of a prompt that the target has not written yet, for estimates only."""


class Dataset:
    """What to read, how to get answers, and where it is kept.

    Exactly one of `respond` (the target answers) and `tokenize` (the data's own answers) is given.
    `holdout` prompts, those with the lowest hash of their id, become the validation split. With a
    `server` the target answers there.
    """

    def __init__(
        self,
        *,
        name: str,
        root: str,
        sources: list[Source],
        holdout: int,
        max_prompt_tokens: int,
        respond: Respond | None = None,
        tokenize: Tokenize | None = None,
        capture: Capture | None = None,
        server: Server | None = None,
    ) -> None:
        if (respond is None) == (tokenize is None):
            raise ValueError(
                f"dataset '{name}' has {'both' if respond else 'neither'} of respond and tokenize; "
                "expected exactly one, because answers come either from the target (respond) or "
                "from the data (tokenize). Set the other to null."
            )
        if server is not None and respond is None:
            raise ValueError(
                f"dataset '{name}' takes the data's own answers (tokenize), so there is nothing "
                "for a server to answer; leave server out."
            )
        for source in sources:
            if source.benchmark:
                raise ValueError(
                    f"dataset '{name}' may not contain the source {type(source).__name__}: "
                    f"{source.benchmark}, and a drafter must not be trained on what it is measured "
                    "with; use it in a benchmark (conf/bench) and take other prompts here."
                )
        self.name, self.folder = name, Path(root).expanduser() / name
        self.sources, self.holdout, self.max_prompt_tokens = sources, holdout, max_prompt_tokens
        self.respond, self.tokenize, self.capture = respond, tokenize, capture
        self.server = server

    # --- commands --------------------------------------------------------------------------------

    def prepare(self, target: Target) -> DatasetFolder:
        """Run the stages that are missing, and return the finished folder.

        Several processes may call this at once: the others wait for the first.
        """
        with self._lock():
            if (self.folder / MANIFEST).exists() and not self._made_again():
                folder = DatasetFolder(self.folder)
                folder.check(target)
                require_same_recipe(self.folder, self._recipe(target))
                verify(self.folder, folder.manifest, hashes=False)
                folder.check(target, layers=self._layers)
                missing = self.capture.missing(folder.manifest) if self.capture else None
                return self._add(target, folder, missing) if missing else folder
            say(f"Dataset '{self.name}' is prepared in {self.folder}:")
            require_same_recipe(self.folder, self._recipe(target))
            conversations = self._conversations(target)
            self._announce(target, conversations, self.capture)
            examples = self._examples(target, conversations)
            Doctor(target).examine(examples, f"dataset '{self.name}'")
            return self._write(target, conversations, examples)

    def _made_again(self) -> bool:
        """True when a token shard is damaged and everything behind the answers is to be written
        anew. The answers are still there, so the dataset becomes the same as before."""
        try:
            verify_tokens(self.folder, read_manifest(self.folder))
        except ValueError as error:
            if not (self._answered or self.tokenize):
                raise
            say(f"Warning: {error} The answers are there: all shards are written anew.")
            (self.folder / MANIFEST).unlink()
            for split in SPLITS:
                shutil.rmtree(self.folder / split, ignore_errors=True)
            return True
        return False

    def prepare_part(self, target: Target, *, part: int, parts: int) -> None:
        """Answer part `part` (0-based) of `parts` beside other jobs; `prepare` joins them."""
        if not 0 <= part < parts:
            raise ValueError(
                f"part={part} of parts={parts} does not exist: parts are counted from 0, so give "
                f"part=0 to part={max(0, parts - 1)}."
            )
        if self.respond is None:
            raise ValueError(
                f"dataset '{self.name}' takes the data's own answers (tokenize), so there is "
                "nothing to share; prepare it without part."
            )
        with self._lock():
            if self._answered:
                say(f"Dataset '{self.name}': all answers are there already.")
                return
            require_same_recipe(self.folder, self._recipe(target))
            conversations = self._conversations(target)
        prompts = self._prompts(target, conversations)
        count = self.respond.run_part(
            target, prompts, self.folder, part=part, parts=parts, server=self.server
        )
        say(f"Dataset '{self.name}': part {part} of {parts} has its {count:,} answers.")

    def estimate(self, target: Target) -> Estimate:
        """Tokens, disk and time of everything still to do, writing nothing."""
        if (self.folder / PROMPTS).exists():
            conversations, waiting = load(self.folder), []
        else:
            waiting = [s for s in self.sources if isinstance(s, SelfWritten)]
            ready = [s for s in self.sources if not isinstance(s, SelfWritten)]
            conversations = self._collect(target, ready).conversations
        return self._estimate(target, conversations, waiting, self.capture, compare=True)

    def signals(self) -> tuple[str, ...]:
        """Names of the signals that are there, or will be when it is prepared."""
        there = self.folder / MANIFEST
        names = set(read_manifest(self.folder).get("signals", {}) if there.exists() else {})
        if self.capture and self.capture.signal:
            names.add(self.capture.signal.name)
        return tuple(sorted(names))

    # --- stages ----------------------------------------------------------------------------------

    def _conversations(self, target: Target) -> list[Conversation]:
        """Read every source once; what was kept lies in prompts.jsonl from then on."""
        if not (self.folder / PROMPTS).exists():
            writers = [s for s in self.sources if isinstance(s, SelfWritten)]
            if writers:
                write = [r for s in writers for r in s.requests(target, 0, s.count)]
                expected = estimate(
                    target=target, folder=self.folder, answer=None, write=write, capture=None
                )
                say(
                    f"1. prompts: the target writes {len(write):,} of them itself, about "
                    f"{clock(expected.respond_seconds)}."
                )
            collected = self._collect(target, self.sources)
            self._check_holdout(len(collected.conversations))
            collected.save(self.folder)
        conversations = load(self.folder)
        say(f"1. prompts: {len(conversations):,}, of which {self.holdout:,} are held out.")
        return conversations

    def _collect(self, target: Target, sources: list[Source]) -> Collected:
        return collect(
            sources,
            target,
            max_prompt_tokens=self.max_prompt_tokens,
            turn=self.respond.turn if self.respond else None,
        )

    def _prompts(self, target: Target, conversations: list[Conversation]) -> list[Prompt]:
        assert self.respond is not None
        turn = self.respond.turn
        return [
            Prompt(c.id, prompt_tokens(target.tokenizer, c.prompt(turn)), c.label)
            for c in conversations
        ]

    def _announce(
        self, target: Target, conversations: list[Conversation], capture: Capture | None
    ) -> None:
        """Say what comes and how long it takes; refuse when the disk cannot hold it."""
        expected = self._estimate(target, conversations, [], capture)
        if self._answered:
            say("2. respond: all answers are there already.")
        elif self.respond:
            how = "in " + clock(expected.respond_seconds) if self.server is None else "on a server"
            say(f"2. respond: the target answers, at most {expected.answer_tokens:,} tokens {how}.")
        else:
            say(f"2. tokenize: {expected.prompt_tokens:,} tokens of the data's own answers.")
        if capture:
            say(
                f"3. capture: {' and '.join(capture.parts)} of at most "
                f"{expected.capture_bytes / 1e9:.3g} GB, {clock(expected.capture_seconds)}."
            )
        expected.refuse_without_room(self.folder)

    def _estimate(
        self,
        target: Target,
        conversations: list[Conversation],
        waiting: list[SelfWritten],
        capture: Capture | None,
        *,
        compare: bool = False,
    ) -> Estimate:
        if self.tokenize or self._answered:
            return estimate(
                target=target,
                folder=self.folder,
                answer=None,
                examples=self._examples(target, conversations),
                conversations=len(conversations),
                capture=capture,
                compare=compare,
            )
        assert self.respond is not None
        prompts = self._prompts(target, conversations)
        write: list[Request] = []
        for source in waiting:
            asked = source.requests(target, 0, source.count)
            write += asked
            prompts += [Prompt(r.id, r.tokens + [0] * GUESSED_PROMPT, "") for r in asked]
        return estimate(
            target=target,
            folder=self.folder,
            answer=(self.respond.generator(target), self.respond.requests(prompts)),
            write=write,
            conversations=len(conversations),
            capture=capture,
            compare=compare,
            elsewhere=self.server is not None,
        )

    def _examples(self, target: Target, conversations: list[Conversation]) -> list[Example]:
        if self.tokenize:
            return self.tokenize.run(target, conversations)
        assert self.respond is not None
        prompts = self._prompts(target, conversations)
        return self.respond.run(target, prompts, self.folder, server=self.server)

    def _write(
        self, target: Target, conversations: list[Conversation], examples: list[Example]
    ) -> DatasetFolder:
        """Token shards, what the target computed, manifest."""
        held = {c.id for c in spread(conversations, self.holdout)}
        splits: dict[str, dict[str, Any]] = {}
        for split in SPLITS:
            # All samples of a prompt (#0, #1) and all pieces of a text (+1, +2) stay together.
            part = [e for e in examples if (prompt_id(e.id) in held) == (split == "val")]
            splits[split] = {
                "examples": len(part),
                "positions": sum(len(e.tokens) for e in part),
                "learned": sum(int(e.learn.sum()) for e in part),
                "finished": sum(e.finish_reason == "eos" for e in part),
                "tokens": write_tokens(self.folder / split, part, EXAMPLES_PER_SHARD),
                "features": [],
                "signals": {},
            }
        report = json.loads((self.folder / REPORT).read_text(encoding="utf-8"))
        manifest = {
            "draftsmith": draftsmith_version(),
            "name": self.name,
            "target": describe_target(target),
            "recipe": self._recipe(target),
            "sources": report,
            "answers": answered_by(self.folder / JOURNAL) if self.respond else [],
            "features": None,
            "signals": {},
            "splits": splits,
        }
        return self._finish(target, manifest, self.capture)

    def _add(self, target: Target, folder: DatasetFolder, missing: Capture) -> DatasetFolder:
        """Features or a signal for token shards that are there already."""
        say(f"Dataset '{self.name}' gets {' and '.join(missing.parts)}.")
        self._announce(target, load(self.folder), missing)
        return self._finish(target, folder.manifest, missing)

    def _finish(
        self, target: Target, manifest: dict[str, Any], capture: Capture | None
    ) -> DatasetFolder:
        if capture:
            readers: dict[Split, ShardReader] = {
                split: ShardReader(self.folder, split, manifest) for split in SPLITS
            }
            for split, parts in capture.run(target, self.folder, readers).items():
                part = manifest["splits"][split]
                part["features"] = parts.pop(FEATURES, part["features"])
                part["signals"] = part.get("signals", {}) | parts
            if capture.features:
                manifest["features"] = capture.about()
            if capture.signal:
                signals = manifest.get("signals", {})
                manifest["signals"] = signals | {capture.signal.name: capture.signal.about()}
        write_json(self.folder / MANIFEST, manifest)
        folder = DatasetFolder(self.folder)
        counts = ", ".join(
            f"{split} {p['examples']:,} examples with {p['learned']:,} tokens to learn"
            for split, p in manifest["splits"].items()
        )
        say(f"Dataset '{self.name}' is ready: {counts}; hash {folder.hash[:12]}.")
        return folder

    # --- what makes two datasets the same --------------------------------------------------------

    @property
    def _answered(self) -> bool:
        return self.respond is not None and (self.folder / JOURNAL).exists()

    @property
    def _layers(self) -> tuple[int, ...] | None:
        return tuple(self.capture.layers) if self.capture and self.capture.features else None

    def _recipe(self, target: Target) -> dict[str, Any]:
        """Everything that decides the examples (features may be added later)."""
        return {
            "target": {
                "fingerprint": target.fingerprint(),
                "template_hash": target.template_hash(),
            },
            "sources": [source.settings() for source in self.sources],
            "holdout": self.holdout,
            "max_prompt_tokens": self.max_prompt_tokens,
            "respond": asdict(self.respond) if self.respond else None,
            "tokenize": asdict(self.tokenize) if self.tokenize else None,
        }

    def _check_holdout(self, count: int) -> None:
        if count <= self.holdout:
            raise ValueError(
                f"dataset '{self.name}' has {count} prompts after leaving out long ones and "
                f"duplicates, and holdout={self.holdout} would leave none to train on; hold out "
                "fewer, allow longer prompts (max_prompt_tokens), or add sources."
            )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"Another process is preparing {self.folder}; waiting for it.")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
