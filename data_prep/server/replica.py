"""One server: how it is reached, what it serves, and what is known of its health."""

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx

from data_prep.generate import Answer, Request
from data_prep.server.protocol import Unavailable, question, read_answer
from models.target import Target

KEEPALIVE_SECONDS = 2.0
"""Idle connections are closed by us: servers close theirs after 5 s, in the middle of a request."""
CONNECT_SECONDS = 10.0
AGAIN = frozenset({408, 425, 429})
"""Refusals that are for now, beside all from 500 on."""


class Replica:
    """`up` is set while it is given requests. `failures` in a row since the last answer, `falls`
    how often it was set aside since then."""

    def __init__(
        self,
        url: str,
        *,
        target: Target,
        model: str | None,
        logprobs: bool,
        connections: int,
        timeout_seconds: float,
        key: str | None,
    ) -> None:
        self.url = base_url(url)
        self.target, self.model, self.logprobs = target, model, logprobs
        self.engine = ""
        self.up = asyncio.Event()
        self.failures = self.falls = 0
        self.error = ""
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS),
            limits=httpx.Limits(
                max_connections=connections + 1, keepalive_expiry=KEEPALIVE_SECONDS
            ),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=False,  # a proxy for the internet is none for a server next door
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def meet(self, longest: int) -> None:
        """Learn what is served there, and by which engine.

        Raises ValueError when it is the wrong model by name, or has no room for `longest` tokens.
        """
        listed = (await self._call("GET", f"{self.url}/models"))["data"]
        names = [card["id"] for card in listed]
        if self.model is None and len(names) != 1:
            raise ValueError(
                f"The server at {self.url} serves {len(names)} models ({', '.join(names)}); name "
                "the target among them: server.model=<name>."
            )
        name = self.model or names[0]
        if name not in names:
            raise ValueError(
                f"server.model={name} was asked for, but {self.url} serves {', '.join(names)}."
            )
        card = listed[names.index(name)]
        room = card.get("max_model_len")
        if room is not None and room < longest:
            raise ValueError(
                f"The server at {self.url} has room for {room} tokens, and the longest prompt with "
                f"its answer takes {longest}; serve the target with a longer context "
                "(--max-model-len), or ask for less (dataset.max_prompt_tokens, "
                "dataset.respond.max_new_tokens)."
            )
        self.name = name
        self.engine = f"{card.get('owned_by') or 'unknown'} {await self._version()}".strip()

    async def ask(self, request: Request, *, logprobs: bool | None = None) -> Answer:
        """One request, one answer. Raises Unavailable or ValueError."""
        ends = self.target.eos_ids
        wanted = self.logprobs if logprobs is None else logprobs
        body = await self._call(
            "POST",
            f"{self.url}/completions",
            question(request, model=self.name, ends=ends, logprobs=wanted),
        )
        return read_answer(
            body,
            request,
            ends=ends,
            vocab_size=self.target.vocab_size,
            engine=self.engine,
            url=self.url,
        )

    async def _version(self) -> str:
        """Of the engine: vLLM says it under /version, SGLang under /server_info."""
        root = self.url.removesuffix("/v1")
        for place in ("version", "server_info"):
            try:
                body = await self._call("GET", f"{root}/{place}")
            except ValueError:
                continue  # no such place
            if isinstance(body, dict) and body.get("version"):
                return str(body["version"])
        return ""

    async def _call(self, method: str, url: str, content: Any = None) -> Any:
        try:
            response = await self._client.request(method, url, json=content)
        except httpx.TransportError as error:
            raise Unavailable(str(error) or type(error).__name__, gone=True) from error
        status = response.status_code
        if status in AGAIN or status >= 500:
            raise Unavailable(f"HTTP {status}: {_brief(response.text)}")
        if status in (401, 403):
            raise ValueError(
                f"The server at {self.url} wants a key (HTTP {status}); put it in an environment "
                "variable and name that: server.key_from=<VARIABLE>."
            )
        if status != 200:
            raise ValueError(
                f"The server at {self.url} refused {method} {urlsplit(url).path} with HTTP "
                f"{status}: {_brief(response.text)}. Expected an OpenAI-compatible server of the "
                "target (vLLM, SGLang)."
            )
        try:
            return response.json()
        except json.JSONDecodeError as error:
            raise ValueError(
                f"The server at {self.url} answered {urlsplit(url).path} with what is no JSON: "
                f"{_brief(response.text)}. Expected an OpenAI-compatible server (vLLM, SGLang)."
            ) from error


def base_url(url: str) -> str:
    """http://host:8000 and http://host:8000/v1/ are both http://host:8000/v1."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(
            f"'{url}' is no address of a server; expected one like http://localhost:8000/v1."
        )
    return url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"


def _brief(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 200 else words[:197] + "..."
