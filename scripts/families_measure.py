"""The cells of one entry: a run, or a method that needs no training.

A cell is one bench, temperature and shape. Chains are replayed with drafts sampled at the serving
temperature (decode/rounds.py); trees are drafted greedily at every temperature and walked along
the same recorded answers (decode/walk.py). A method that learns from refused drafts is decoded.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.check import build
from conf.console import say
from data_prep.conversation import spread
from decode.answers import LONGEST, Recording, record
from decode.baselines.base import Baseline
from decode.measurement import Measurement, summarise
from decode.prompts import Bench, Prompt
from decode.replay import replay, time_shape
from decode.replay_trees import replay_tree
from decode.session import Decoder
from decode.tree.chain import Chain
from decode.verifier.sampling import Sampling
from models.drafter.base import Drafter, Policy
from models.target import Target
from scripts.families_cells import OWN, Store, digest, write_json
from scripts.families_entry import Entry, describe

TIMED_TOKENS = 32


def shapes_of(cfg: DictConfig, entry: Entry) -> dict[str, Any]:
    """Shape names and what they are made of."""
    if entry.method is not None:
        return {OWN: {}}
    chain = {} if cfg.gamma is None else {"chain": {"gamma": cfg.gamma}}
    nodes: Any = OmegaConf.to_container(cfg.shapes or OmegaConf.create({}), resolve=True)
    return chain | nodes


class Measurer:
    """Makes what is missing of one entry; the target and the drafter are loaded when needed."""

    def __init__(self, cfg: DictConfig, entry: Entry, store: Store) -> None:
        self.cfg, self.entry, self.store = cfg, entry, store
        self.failed: list[str] = []
        self.busy: list[str] = []
        self._stamp = entry.stamp
        self._models: tuple[Target, Drafter | Baseline] | None = None
        self._prompts: dict[str, list[Prompt]] = {}

    def planned(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Every cell's name, what it is made of and what it measures: scores, then timings."""
        cfg, shapes = self.cfg, shapes_of(self.cfg, self.entry)
        for bench in [*cfg.benches, *([None] if cfg.timed_prompts > 0 else [])]:
            for temperature in cfg.temperatures:
                for shape, node in shapes.items():
                    about = {"shape": node, "stamp": self._stamp}
                    what = {"bench": bench, "temperature": temperature, "shape": shape}
                    yield f"{bench or 'time'}-T{temperature:g}-{shape}", about, what

    def check(self) -> None:
        """Refuse a folder whose cells are of something else, before anything is measured."""
        for name, about, _ in self.planned():
            self.store.read(self.entry.label, name, about)

    def run(self) -> None:
        """Make what is missing."""
        for name, about, what in self.planned():
            self._make(name, about, what)

    def _make(self, name: str, about: dict[str, Any], what: dict[str, Any]) -> None:
        """One cell, unless it is there or another process is at it."""
        label = self.entry.label
        if self.store.read(label, name, about) is not None:
            return
        with self.store.claimed(f"{label}--{name}") as mine:
            if not mine:
                self.busy.append(f"{label} {name}")
                return
            if self.store.read(label, name, about) is not None:
                return
            try:
                made = self._time(**what) if what["bench"] is None else self._score(**what)
            except ValueError as error:
                self.failed.append(f"{label} {name}: {error}")
                say(f"{label}, {name}: NOT measured. {error}")
                return
            write_json(self.store.file(label, name), {"about": about, **what, **made})
        tau = made.get("result", {}).get("tau")
        said = f"{tau['value']:.3f} tokens per step" if tau else "timed"
        say(f"{label}, {name}: {said}")

    # --- what cells are made of -------------------------------------------------------------------

    def _score(self, *, bench: str, temperature: float, shape: str) -> dict[str, Any]:
        prompts, cfg = self._asked(bench), self.cfg
        target, drafter = self._loaded()
        if isinstance(drafter, Baseline) and type(drafter).read is not Baseline.read:
            measured = decode_method(
                target, drafter, prompts, temperature=temperature, cfg=cfg, plain=False
            )
            return {"drafts": drafter.name, "samples": 1, "result": measured.as_dict()}
        recording = self._recording(bench, temperature)
        policy = self._policy(shape, temperature)
        samples = recording.samples
        if isinstance(drafter, Drafter) and shape == "chain":
            assert isinstance(policy, Chain)
            made = replay(
                target=target, drafter=drafter, recording=recording, gammas=[policy.gamma]
            )
            result = asdict(made.chain(policy.gamma)) | {
                "prompts": made.prompts,
                "tokens": made.tokens,
                "acceptance": asdict(made.acceptance),
            }
            return {"drafts": policy.name, "samples": samples, "result": result}
        walked = replay_tree(target=target, drafter=drafter, policy=policy, recording=recording)
        return {"drafts": walked.shape, "samples": samples, "result": walked.as_dict()}

    def _time(self, *, bench: None, temperature: float, shape: str) -> dict[str, Any]:
        """Short real decodings, spread over the first bench."""
        cfg = self.cfg
        prompts = spread(self._asked(next(iter(cfg.benches))), cfg.timed_prompts)
        target, drafter = self._loaded()
        if isinstance(drafter, Baseline):
            m = decode_method(
                target, drafter, prompts, temperature=temperature, cfg=cfg, plain=True
            )
            timing = {
                k: getattr(m, k)
                for k in ("draft_ms", "target_ms", "verify_ms", "plain_ms", "plain_target_ms")
            }
            return {"timing": timing, "timed_prompts": len(prompts)}
        policy = self._policy(shape, temperature)
        assert policy is not None
        found = time_shape(
            target=target,
            drafter=drafter,
            policy=policy,
            prompts=prompts,
            temperature=temperature,
            max_new_tokens=TIMED_TOKENS,
        )
        return {"timing": None if found is None else asdict(found), "timed_prompts": len(prompts)}

    def _policy(self, shape: str, temperature: float) -> Policy | None:
        """Chains draft as they are served; other shapes greedily, at every temperature."""
        if shape == OWN:
            return None
        _, drafter = self._loaded()
        assert isinstance(drafter, Drafter)
        if shape == "chain":
            gamma = min(self.cfg.gamma, LONGEST, drafter.max_depth or LONGEST)
            return Chain(gamma=gamma, temperature=temperature, seed=self.cfg.seed)
        run = self.entry.run
        ranks = run.rank_accuracy() if (run.path / "rank_accuracy.json").is_file() else None
        return build(
            self.cfg.shapes[shape],
            accuracy_KR=ranks,
            target=self._loaded()[0],
            drafter=drafter,
            run=run,
            temperature=0.0,
            top_p=1.0,
            seed=self.cfg.seed,
        )

    def _loaded(self) -> tuple[Target, Drafter | Baseline]:
        if self._models is None:
            entry = self.entry
            say(f"Loading {entry.label}.")
            target = entry.run.load_target(self.cfg.dtype)
            drafter: Drafter | Baseline
            if entry.method is None:
                drafter = entry.run.load_drafter(target)
            else:
                drafter = build(entry.method).bind(target)
            write_json(self.store.file(entry.label, "entry"), describe(entry, target, drafter))
            self._models = target, drafter
        return self._models

    def _asked(self, bench: str) -> list[Prompt]:
        """The prompts of a bench, which must be the same for all entries."""
        if bench not in self._prompts:
            target, _ = self._loaded()
            node = self.entry.run.config.dataset
            built: Bench = build(
                self.cfg.benches[bench],
                tokenizer=target.tokenizer,
                dataset_folder=Path(node.root) / node.name,
            )
            prompts = built.prompts(
                limit=self.cfg.limit, max_prompt_tokens=self.cfg.max_prompt_tokens
            )
            self._same_prompts(bench, prompts)
            self._prompts[bench] = prompts
        return self._prompts[bench]

    def _same_prompts(self, bench: str, prompts: list[Prompt]) -> None:
        stamp = digest(json.dumps([[p.id, p.tokens] for p in prompts]).encode())
        file = self.store.out / "prompts" / f"{bench}.json"
        with self.store.waiting(f"prompts-{bench}"):
            if not file.is_file():
                write_json(file, {"count": len(prompts), "stamp": stamp})
        if json.loads(file.read_text())["stamp"] != stamp:
            raise ValueError(
                f"bench={bench} asks other prompts of '{self.entry.label}' than of the runs before "
                "(another data set, template or file), so their numbers are not comparable; leave "
                "that bench or that run out, or give another out=<folder>."
            )

    def _recording(self, bench: str, temperature: float) -> Recording:
        target, _ = self._loaded()
        with self.store.waiting(f"answers-{bench}-T{temperature:g}"):
            return record(
                target,
                self._asked(bench),
                bench=bench,
                max_new_tokens=self.cfg.max_new_tokens,
                temperature=temperature,
                seed=self.cfg.seed,
                samples=self.cfg.samples if temperature > 0 else 1,
            )


def decode_method(
    target: Target,
    method: Baseline,
    prompts: list[Prompt],
    *,
    temperature: float,
    cfg: DictConfig,
    plain: bool,
) -> Measurement:
    """Decode every prompt with a method that needs no training and, for times, without any."""
    common: dict[str, Any] = {"target": target, "policy": None, "verifier": Sampling()}
    common |= {"temperature": temperature, "seed": cfg.seed}
    drafted, without = Decoder(drafter=method, **common), Decoder(drafter=None, **common)
    length = TIMED_TOKENS if plain else cfg.max_new_tokens
    for decoder in (drafted, without) if plain else ():
        decoder.generate(prompts[0].tokens[:32], max_new_tokens=8, stop_at_eos=False)
    method.forget()

    def answers(decoder: Decoder) -> Iterator[Any]:
        for prompt in prompts:
            yield decoder.generate(prompt.tokens, max_new_tokens=length)

    return summarise(
        drafted,
        shape=method.name,
        draft_bytes=0.0,
        prompts=prompts,
        made=list(answers(drafted)),
        plain=list(answers(without)) if plain else None,
        max_new_tokens=length,
        seed=cfg.seed,
    )
