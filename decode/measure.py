"""Measures what a drafter gives, beside plain decoding and methods that need no training.

Definitions stand in decode/measurement.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from decode.bandwidth import count_reads
from decode.baselines.base import Baseline
from decode.measurement import Measurement, compare_with, summarise
from decode.prompts import Prompt
from decode.session import Decoder, Generation
from decode.siblings import SiblingWatch
from decode.verifier.base import Verifier
from decode.verifier.block import Block
from decode.verifier.sampling import Sampling
from decode.verifier.spectr import SpecTr
from models.drafter.base import Drafter, Policy
from models.target import Target


def measure(
    *,
    target: Target,
    drafter: Drafter,
    policy: Policy,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    baseline: bool = True,
    baselines: Mapping[str, Baseline] | None = None,
    shape: str = "",
    on_prompt: Callable[[int, float], None] | None = None,
) -> Measurement:
    """Decode every prompt with the drafter, for a baseline without, and with methods that need no
    training (`baselines`, each bound to the target).

    Which goes first rotates from prompt to prompt, so that a machine that slows down or speeds up
    favours none. `on_prompt(done, tau so far)` reports progress.
    """
    if not prompts:
        raise ValueError(
            "There is no prompt to measure on, expected at least one, because the benchmark holds "
            "none (a data set with dataset.holdout=0, plain text) or all are longer than "
            "max_prompt_tokens; raise that or choose another bench."
        )
    common: dict[str, Any] = {
        "target": target,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    watch = None if verifier.lossy else SiblingWatch(verifier)
    drafted = Decoder(drafter=drafter, policy=policy, verifier=watch or verifier, **common)
    plain = Decoder(drafter=None, policy=None, verifier=verifier, **common) if baseline else None
    methods = dict(baselines or {})
    # Methods without training choose their drafts, and some rules judge drawn ones only.
    judge = Sampling() if isinstance(verifier, Block | SpecTr) else verifier
    others = {
        name: Decoder(drafter=method, policy=None, verifier=judge, **common)
        for name, method in methods.items()
    }
    draft_bytes = warm_up(drafted, plain, drafter, prompts[0])
    for name, method in methods.items():
        others[name].generate(prompts[0].tokens[:32], max_new_tokens=8, stop_at_eos=False)
        method.forget()
    if watch is not None:
        watch.take(discard=True)

    decoders = [drafted, *([plain] if plain else []), *others.values()]
    made: dict[Decoder, list[Generation]] = {decoder: [] for decoder in decoders}
    for i, prompt in enumerate(prompts):
        first = i % len(decoders)
        for decoder in decoders[first:] + decoders[:first]:
            made[decoder].append(decoder.generate(prompt.tokens, max_new_tokens=max_new_tokens))
        if watch is not None:
            watch.take()
        if on_prompt is not None:
            rounds = [r for answer in made[drafted] for r in answer.rounds]
            on_prompt(i + 1, sum(r.produced for r in rounds) / max(1, len(rounds)))

    about: dict[str, Any] = {
        "prompts": prompts,
        "plain": made[plain] if plain else None,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    name = shape or str(getattr(policy, "name", type(policy).__name__))
    found = summarise(drafted, shape=name, draft_bytes=draft_bytes, made=made[drafted], **about)
    for key, decoder in others.items():
        name = methods[key].name
        other = summarise(decoder, shape=name, draft_bytes=0.0, made=made[decoder], **about)
        found.beside[key] = compare_with(found, other)
    return found if watch is None else replace(found, siblings=watch.result())


def warm_up(drafted: Decoder, plain: Decoder | None, drafter: Drafter, prompt: Prompt) -> float:
    """Pay one-time costs before the clock runs; the weight bytes one draft reads, on the way."""
    tokens = prompt.tokens[:32]
    with count_reads(drafter) as counter:
        before = drafted.generate(tokens, max_new_tokens=1, stop_at_eos=False)
        start = counter.read
        rounds = drafted.generate(tokens, max_new_tokens=8, stop_at_eos=False).rounds
        assert not before.rounds
        read = counter.read - 2 * start
    if plain is not None:
        plain.generate(tokens, max_new_tokens=4, stop_at_eos=False)
    return read / len(rounds)
