"""Requests for several servers at once, any of which may die and come back.

Each replica has a bounded number of requests in flight. A request that fails goes back to the
others at once, while the replica rests for a time that doubles with every failure in a row (with
jitter: replicas and clients must not come back in step). One that cannot be reached, or has failed
three times in a row, is set aside, and asked again after such times until it proves itself anew.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from conf.console import say
from data_prep.generate import Answer, Request
from data_prep.progress import clock
from data_prep.server.protocol import Unavailable
from data_prep.server.replica import Replica

FIRST_SECONDS, LAST_SECONDS = 0.5, 30.0
IN_A_ROW = 3
LINGER_SECONDS = 0.05
"""Answers that come together are handed over (and written) together."""


def rest_seconds(failures: int) -> float:
    """Between half and all of 0.5 s * 2^failures, at most 30 s."""
    longest = min(LAST_SECONDS, FIRST_SECONDS * 2 ** min(failures, 16))
    return random.uniform(0.5, 1.0) * longest


class Pool:
    """`prove` looks at a replica that has come back and raises what `Replica.ask` raises."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        prove: Callable[[Replica], Awaitable[None]],
        concurrency: int,
        retries: int,
        patience_seconds: float,
    ) -> None:
        self.replicas, self.prove = replicas, prove
        self.concurrency, self.retries = concurrency, retries
        self.patience_seconds = patience_seconds
        self._waiting: asyncio.Queue[Request] = asyncio.Queue()
        self._failed: Counter[str] = Counter()
        self._made: list[Answer] = []
        self._arrived = asyncio.Event()
        self._reviving: set[asyncio.Task[None]] = set()
        self._last_answer = time.monotonic()

    async def answer(
        self, requests: Sequence[Request], take: Callable[[list[Answer]], None]
    ) -> None:
        """Give all requests to replicas that are up; `take` gets the answers in any order.

        Raises ValueError when a request fails for good, or when no replica has answered for
        `patience_seconds`; what was answered until then has been taken.
        """
        for request in requests:
            self._waiting.put_nowait(request)
        left = len(requests)
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for replica in self.replicas:
                    if not replica.up.is_set():
                        self._set_aside(replica)
                workers = [
                    self._tasks.create_task(self._work(replica))
                    for replica in self.replicas
                    for _ in range(min(self.concurrency, len(requests)))
                ]
                try:
                    while left:
                        await self._arrived.wait()
                        await asyncio.sleep(LINGER_SECONDS)
                        left -= self._hand_over(take)
                finally:
                    self._hand_over(take)
                for task in (*workers, *self._reviving):
                    task.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from None

    def _hand_over(self, take: Callable[[list[Answer]], None]) -> int:
        made, self._made = self._made, []
        self._arrived.clear()
        if made:
            take(made)
        return len(made)

    async def _work(self, replica: Replica) -> None:
        """One request at a time, while the replica is up."""
        while True:
            await replica.up.wait()
            request = await self._waiting.get()
            if not replica.up.is_set():  # it fell while this worker waited for a request
                self._waiting.put_nowait(request)
                continue
            try:
                answer = await replica.ask(request)
            except Unavailable as error:
                self._waiting.put_nowait(request)
                self._count(request, replica, error)
                await self._rest(replica, error)
            else:
                replica.failures = replica.falls = 0
                self._last_answer = time.monotonic()
                self._made.append(answer)
                self._arrived.set()

    def _count(self, request: Request, replica: Replica, error: Unavailable) -> None:
        self._failed[request.id] += 1
        if self._failed[request.id] > self.retries:
            raise ValueError(
                f"The prompt '{request.id}' failed {self._failed[request.id]} times, last at "
                f"{replica.url} ({error}), while others were answered or servers fell with it; see "
                "the server's log. The answers so far are kept: the same command continues, and "
                "server.retries allows more."
            )

    async def _rest(self, replica: Replica, error: Unavailable) -> None:
        """After a failure: wait, or set the replica aside."""
        replica.error = str(error)
        if not replica.up.is_set():
            return  # another of its requests has done so
        replica.failures += 1
        if error.gone or replica.failures >= IN_A_ROW:
            self._set_aside(replica)
        else:
            await asyncio.sleep(rest_seconds(replica.failures))

    def _set_aside(self, replica: Replica) -> None:
        replica.up.clear()
        replica.failures = 0
        others = sum(r.up.is_set() for r in self.replicas)
        say(
            f"Warning: the server at {replica.url} is set aside ({replica.error}); "
            + (f"{others} others go on." if others else "waiting for it.")
        )
        task = self._tasks.create_task(self._revive(replica))
        self._reviving.add(task)
        task.add_done_callback(self._reviving.discard)

    async def _revive(self, replica: Replica) -> None:
        """Ask again until it proves itself; give up when nothing else answers either."""
        while True:
            replica.falls += 1
            await asyncio.sleep(rest_seconds(replica.falls))
            try:
                await self.prove(replica)
            except Unavailable as error:
                replica.error = str(error)
            else:
                say(f"The server at {replica.url} answers again.")
                self._last_answer = time.monotonic()
                replica.up.set()
                return
            silent = time.monotonic() - self._last_answer
            if silent > self.patience_seconds and not any(r.up.is_set() for r in self.replicas):
                raise ValueError(
                    f"No server has answered for {clock(silent)}: {reasons(self.replicas)}. The "
                    "answers so far are kept: start a server and give the same command again."
                )


def reasons(replicas: Sequence[Replica]) -> str:
    """Each address with what it last failed of."""
    return "; ".join(f"{r.url} ({r.error})" for r in replicas)


def _first(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
