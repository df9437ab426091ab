"""Serving a stream of prompts while the shadow learns.

After every `interval` prompts there is a boundary:

1. the job that was started at the boundary before is waited for, and judged on the window;
2. everything is saved, so that a killed stream goes on from here and gives the same result;
3. the next job starts, on all that was served and not yet learned, but for the newest prompts that
   are held back so that the window has `window` prompts when this job is judged.

The window is therefore always made of the newest prompts, none of which the shadow has learned.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch

from data_prep.conversation import stable_hash
from data_prep.prompts import Prompt
from decode.session import Decoder, Generation
from models.drafter.base import Drafter
from train.online.acceptance import Rounds, Serving, chances, replay_rounds
from train.online.learner import Learned, Learner
from train.online.served import Listener, Served


@dataclass(frozen=True)
class Asked:
    """One prompt of the stream, and the benchmark it is from."""

    bench: str
    prompt: Prompt


@dataclass(frozen=True)
class Record:
    """One prompt as it was served.

    Counts end with the answer: drafts past its last token are not tested, so
    (tokens - 1) / rounds are the tokens per step (the first token belongs to the prompt's forward).
    `frozen` are the rounds that the first drafter would have needed. `version` is the number of
    swaps before. `seconds` is the decoding.
    """

    bench: str
    id: str
    category: str
    version: int
    tokens: int
    served: Rounds
    frozen: Rounds | None
    seconds: float


@dataclass(frozen=True)
class Event:
    """A job and what became of it, at the boundary behind `after` prompts. `seconds` is the job's
    own time and `waited` how long serving stood still for it."""

    after: int
    job: int
    decision: dict[str, Any]
    learned: Learned
    seconds: float
    waited: float


Job = tuple[Learned, float]
MakeDecoder = Callable[[Drafter, int], Decoder]


class Stream:
    """The stream, its buffers and its records."""

    def __init__(
        self,
        *,
        asked: Sequence[Asked],
        learner: Learner,
        frozen: Drafter | None,
        make_decoder: MakeDecoder,
        how: Serving,
        max_new_tokens: int,
        interval: int,
        window: int,
        background: bool,
        seed: int,
    ) -> None:
        """`make_decoder(drafter, seed)`; `frozen` is the first drafter, if it is to be compared."""
        check_window(interval, window)
        self.asked = asked
        self.learner = learner
        self.how = how
        self.interval = interval
        self.window = window
        self._frozen = frozen
        self._make_decoder = make_decoder
        self._max_new_tokens = max_new_tokens
        self._background = background
        self._seed = seed
        self.recent: list[Served] = []
        """Served and not learned yet, oldest first: at a boundary, the window."""
        self.ring: list[Served] = []
        """Learned from before, oldest first."""
        self.records: list[Record] = []
        self.events: list[Event] = []
        self.answers: list[list[int]] = []

    @property
    def swaps(self) -> int:
        return sum(e.decision["decision"] == "swapped" for e in self.events)

    def run(
        self, *, save: Callable[[], None], on_prompt: Callable[["Stream"], None] | None = None
    ) -> None:
        """Serve what is left. `save` is called at every boundary, with no job under way."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            # A stream that was resumed stands at a boundary: its next job has not begun.
            job = self._start(pool)
            while len(self.records) < len(self.asked):
                self._serve(self.asked[len(self.records)])
                if on_prompt is not None:
                    on_prompt(self)
                done = len(self.records)
                if done % self.interval == 0 or done == len(self.asked):
                    if job is not None:
                        self._decide(job)
                    save()
                    job = self._start(pool) if done < len(self.asked) else None

    def _serve(self, asked: Asked) -> None:
        """Decode one prompt and note what happened."""
        position = len(self.records)
        listener = Listener()
        decoder = self._make_decoder(
            self.learner.serving, stable_hash(f"{self._seed}/{position}") % 2**31
        )
        begin = perf_counter()
        made = decoder.generate(
            asked.prompt.tokens, max_new_tokens=self._max_new_tokens, on_read=listener
        )
        seconds = perf_counter() - begin
        served = listener.served(
            asked.prompt.tokens, made, whole=self.learner.serving.reads_features
        )
        frozen = None
        if self._frozen is not None:
            frozen = replay_rounds(chances(self._frozen, served, self.how))
        self.recent.append(served)
        self.answers.append(made.tokens)
        self.records.append(
            Record(
                bench=asked.bench,
                id=asked.prompt.id,
                category=asked.prompt.category,
                version=self.swaps,
                tokens=len(made.tokens),
                served=_counted(made),
                frozen=frozen,
                seconds=seconds,
            )
        )

    # --- jobs -------------------------------------------------------------------------------------

    def _start(self, pool: ThreadPoolExecutor) -> Future[Job] | None:
        """Begin the next job on what will not be in its window; None when there is nothing yet."""
        count = max(0, len(self.recent) - (self.window - self.interval))
        new, older = self.recent[:count], list(self.ring)
        if not new:
            return None
        self.recent = self.recent[count:]
        self.ring = (self.ring + new)[-self.learner.updates.ring :]
        number, threads = len(self.events), torch.get_num_threads()

        def job() -> Job:
            # A new thread has its own number of threads, and sums depend on it.
            torch.set_num_threads(threads)
            begin = perf_counter()
            return self.learner.learn(number, new, older), perf_counter() - begin

        if self._background:
            return pool.submit(job)
        done: Future[Job] = Future()
        done.set_result(job())
        return done

    def _decide(self, job: Future[Job]) -> None:
        begin = perf_counter()
        learned, seconds = job.result()
        decision = self.learner.judge(self.recent, self.how)
        self.events.append(
            Event(
                after=len(self.records),
                job=len(self.events),
                decision=decision.as_dict(),
                learned=learned,
                seconds=seconds,
                waited=perf_counter() - begin,
            )
        )

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {
            "learner": self.learner.state_dict(),
            "recent": [s.state_dict() for s in self.recent],
            "ring": [s.state_dict() for s in self.ring],
            "records": [asdict(r) for r in self.records],
            "events": [asdict(e) for e in self.events],
            "answers": self.answers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.recent = [Served(**s) for s in state["recent"]]
        self.ring = [Served(**s) for s in state["ring"]]
        self.records = [_record(r) for r in state["records"]]
        self.events = [Event(**(e | {"learned": Learned(**e["learned"])})) for e in state["events"]]
        self.answers = state["answers"]


def check_window(interval: int, window: int) -> None:
    """Refuse a window that the prompts between two boundaries do not fit in."""
    if not 1 <= interval <= window:
        raise ValueError(
            f"interval={interval} and window={window} were given, expected 1 <= interval <= "
            "window, because an update is judged on the `window` newest prompts and those served "
            "since it began are always among them; raise window."
        )


def _counted(made: Generation) -> Rounds:
    """Rounds of a real decoding, drafts past the end of the answer left out."""
    tested = accepted = 0
    i = 1  # y_0 came from the prompt's forward
    for done in made.rounds:
        left = len(made.tokens) - i
        tested += min(done.tested, left)
        accepted += min(done.accepted, left)
        i += done.produced
    return Rounds(len(made.rounds), tested, accepted)


def _record(plain: dict[str, Any]) -> Record:
    rounds: dict[str, Any] = {
        name: None if plain[name] is None else Rounds(**plain[name])
        for name in ("served", "frozen")
    }
    return Record(**(plain | rounds))
