"""The target answers elsewhere: in one or several OpenAI-compatible servers.

Before the first request every server must prove itself: the model's name and room, and on a few of
the prompts its greedy answers and their log-probabilities against those of our own target. One that
cannot be reached then is asked again later; when none can, nothing starts. Temperature, top-p and
each request's seed are the recipe's. A sampled answer is a draw from the same distribution as here,
with the server's noise in the place of ours.
"""

import asyncio
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from conf.console import say
from data_prep.generate import Answer, Request
from data_prep.server.pool import Pool, reasons
from data_prep.server.proof import Judge, probes
from data_prep.server.protocol import Unavailable
from data_prep.server.replica import Replica
from models.target import Target


@dataclass(kw_only=True)
class Server(ABC):
    """Settings common to all servers.

    `model` is the name they serve the target under (None: the only one), `concurrency` the requests
    in flight at each, `retries` how often one request may fail, `timeout_seconds` how long one may
    take, `patience_seconds` how long all may be silent. `probe_prompts` are compared with our
    target within `tolerance` nats a token. `logprobs` asks for each token's log p and keeps it in
    the journal. `key_from` names an environment variable that holds the servers' key.
    """

    model: str | None = None
    concurrency: int = 64
    retries: int = 5
    timeout_seconds: float = 600.0
    patience_seconds: float = 300.0
    probe_prompts: int = 4
    tolerance: float = 0.1
    logprobs: bool = False
    key_from: str | None = None

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.probe_prompts < 1 or self.retries < 0:
            raise ValueError(
                f"server.concurrency={self.concurrency}, probe_prompts={self.probe_prompts} and "
                f"retries={self.retries} were given; expected at least 1, 1 and 0."
            )
        if self.key_from is not None and not os.environ.get(self.key_from):
            raise ValueError(
                f"server.key_from={self.key_from} was given, but there is no such environment "
                "variable; put the servers' key in it, or leave key_from out."
            )

    @abstractmethod
    def running(self, target: Target, longest: int) -> AbstractContextManager[list[str]]:
        """The addresses, while they may be used; prompt and answer are `longest` tokens at most."""

    def answer(
        self,
        target: Target,
        requests: Sequence[Request],
        *,
        on_start: Callable[[], None],
        on_answers: Callable[[list[Answer]], None],
    ) -> None:
        """Answer every request, in any order; `on_answers` receives them as they come, the first
        after `on_start`."""
        if not requests:
            return
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request
        longest = max(len(r.tokens) + r.max_new_tokens for r in requests)
        with self.running(target, longest) as urls:
            asyncio.run(self._answer(target, requests, urls, longest, on_start, on_answers))

    async def _answer(
        self,
        target: Target,
        requests: Sequence[Request],
        urls: Sequence[str],
        longest: int,
        on_start: Callable[[], None],
        on_answers: Callable[[list[Answer]], None],
    ) -> None:
        judge = Judge(target, tolerance=self.tolerance)
        asked = probes(requests, self.probe_prompts)

        async def prove(replica: Replica) -> None:
            await replica.meet(longest)
            answers = [await replica.ask(request, logprobs=True) for request in asked]
            proof = judge.judge(asked, answers, replica.url)
            say(f"{replica.url}: {replica.engine} serves '{replica.name}'; {proof}.")

        replicas = [self._replica(url, target) for url in urls]
        try:
            for replica in replicas:
                try:
                    await prove(replica)
                    replica.up.set()
                except Unavailable as error:
                    replica.error = str(error)
            if not any(r.up.is_set() for r in replicas):
                raise ValueError(
                    f"No server answers: {reasons(replicas)}. Expected the target '{target.name}' "
                    "at one of these addresses at least; start it (vllm serve <model>), or correct "
                    "server.urls."
                )
            pool = Pool(
                replicas,
                prove=prove,
                concurrency=self.concurrency,
                retries=self.retries,
                patience_seconds=self.patience_seconds,
            )
            on_start()
            await pool.answer(requests, on_answers)
        finally:
            for replica in replicas:
                await replica.close()

    def _replica(self, url: str, target: Target) -> Replica:
        return Replica(
            url,
            target=target,
            model=self.model,
            logprobs=self.logprobs,
            connections=self.concurrency,
            timeout_seconds=self.timeout_seconds,
            key=None if self.key_from is None else os.environ[self.key_from],
        )
