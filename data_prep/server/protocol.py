"""What is asked of an OpenAI-compatible server, and what of its answers is believed.

Prompts go out as token ids and answers come back as token ids: text that is tokenised again is not
always what the target sampled. `POST <url>/completions` with `return_token_ids` gives them in vLLM
0.32 and SGLang 0.5.23 (`choices[0].token_ids`). Everything that a server could fill in from its
model's generation_config (penalties, top-k, min-p) is sent, so that an answer is drawn from
softmax(logits / T) cut to the top-p nucleus and from nothing else.
"""

from typing import Any, Literal

from data_prep.generate import Answer, Request

PENALTIES: dict[str, float] = {
    "top_k": -1,  # no limit, in both engines
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
}
"""Values that change nothing."""


class Unavailable(Exception):
    """A server did not answer, or not now: ask again, or another. `gone`: it cannot be reached."""

    def __init__(self, why: str, *, gone: bool = False) -> None:
        super().__init__(why)
        self.gone = gone


def question(
    request: Request, *, model: str, ends: tuple[int, ...], logprobs: bool
) -> dict[str, Any]:
    """The body of a request. The seed is the request's own: the server's noise, not ours."""
    asked: dict[str, Any] = {
        "model": model,
        "prompt": request.tokens,
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stop_token_ids": list(ends),
        "return_token_ids": True,
        "skip_special_tokens": False,
        "n": 1,
        "stream": False,
        **PENALTIES,
    }
    if logprobs:
        asked["logprobs"] = 0  # of the token itself, and of no others
    return asked


def read_answer(
    body: Any,
    request: Request,
    *,
    ends: tuple[int, ...],
    vocab_size: int,
    engine: str,
    url: str,
) -> Answer:
    """The answer in a response.

    Raises ValueError where it is not what the target would have given: no token ids, another
    prompt, cut short, ended by something else. Raises Unavailable where the server gave up on it.
    """
    choice = body["choices"][0]
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise Unavailable(f"{url} gave up on a request ({reason})")
    tokens = choice.get("token_ids")
    if not tokens or not all(isinstance(t, int) for t in tokens):
        raise ValueError(
            f"The server at {url} ({engine}) returned text without token ids, expected them in "
            "'token_ids' because text that is tokenised again is not always what the target "
            "sampled. vLLM 0.32 and SGLang 0.5.23 return them (return_token_ids); serve the target "
            "with such a version, or leave server out so that it answers here."
        )
    seen = choice.get("prompt_token_ids")
    count = (body.get("usage") or {}).get("prompt_tokens", len(request.tokens))
    if (seen is not None and seen != request.tokens) or count != len(request.tokens):
        raise ValueError(
            f"The server at {url} ({engine}) read another prompt than it was sent for "
            f"'{request.id}': {len(seen) if seen is not None else count} tokens, expected these "
            f"{len(request.tokens)}; start it without options that cut or extend prompts."
        )
    inside = [t for t in tokens[:-1] if t in ends]
    ended = tokens[-1] in ends
    if inside or max(tokens) >= vocab_size or (reason == "stop" and not ended):
        raise ValueError(
            f"The server at {url} ({engine}) ended the answer to '{request.id}' with the id "
            f"{tokens[-1]} after {len(tokens)} tokens, expected it to end with one of {list(ends)} "
            "(the target's ends) or at the length limit. Serve the target itself, without stop "
            "words of its own."
        )
    if not ended and len(tokens) != request.max_new_tokens:
        raise ValueError(
            f"The server at {url} ({engine}) cut the answer to '{request.id}' off after "
            f"{len(tokens)} tokens, expected {request.max_new_tokens}; serve the target with room "
            f"for {len(request.tokens) + request.max_new_tokens} tokens, or ask for fewer "
            "(dataset.respond.max_new_tokens)."
        )
    finish: Literal["eos", "length"] = "eos" if ended else "length"
    return Answer(request.id, tokens, finish, engine=engine, logprobs=_logprobs(choice, tokens))


def _logprobs(choice: dict[str, Any], tokens: list[int]) -> list[float] | None:
    given = (choice.get("logprobs") or {}).get("token_logprobs")
    if not given or len(given) != len(tokens) or any(p is None for p in given):
        return None
    return [round(float(p), 5) for p in given]
