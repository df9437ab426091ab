"""A composed config against the signatures it will call; and the one way to build from a config.

A node is a mapping with a `_target_` (dotted path of a class or function) and keyword arguments.
`check` looks at every node before anything heavy is loaded and reports all problems at once: Hydra
itself lets a key misspelt in an experiment file, `num_heads=three` or a wrong choice pass until the
node is called, which may be minutes later.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import schema
from conf.console import console
from conf.signature import ConfigError, locate, type_complaint, type_hints

__all__ = ["ConfigError", "build", "check", "friendly_errors", "schema"]

RUNTIME_NAMES = frozenset(
    {
        "hidden_size",
        "vocab_size",
        "target_shape",
        "target_config",
        "target",
        "tokenizer",
        "drafter",
        "params",
        "optimizer",
        "total_steps",
        "run",
    }
)
"""Required arguments that a command supplies itself, so that a config may leave them out."""

PLAIN_UNDER_DRAFTER = "head"
"""A drafter's head stays plain data: the drafter stores it in its config.json and builds it."""

CONTROL_KEYS = ("_target_", "_partial_")


def check(cfg: DictConfig, *, runtime: frozenset[str] | set[str] = RUNTIME_NAMES) -> None:
    """Compare every node of `cfg` with the signature it names; raise one ConfigError for all.

    `runtime` are the argument names that may be missing because the command supplies them.
    """
    problems = _unknown_root_keys(cfg)
    plain = _to_plain(cfg, "", problems)
    _check_value(plain, "", frozenset(runtime), problems)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"The config has {count}:\n" + "\n".join(f"  - {p}" for p in problems))


def build(node: Any, **runtime: Any) -> Any:
    """Call what `node` names, sub-nodes first.

    `runtime` values are passed to each callable whose signature names them and whose node does not
    set them. Everything arrives as plain Python (`dict`, `list`), never as an OmegaConf container:
    those would be stored as null in a drafter's config.json.
    """
    if isinstance(node, (DictConfig, ListConfig)):
        node = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    if isinstance(node, list):
        return [build(item, **runtime) for item in node]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {key: build(value, **runtime) for key, value in node.items()}
    path = str(node["_target_"])
    function = locate(path)
    arguments = {
        key: value if _stays_plain(path, key) else build(value, **runtime)
        for key, value in node.items()
        if key not in CONTROL_KEYS
    }
    named = inspect.signature(function).parameters
    arguments |= {k: v for k, v in runtime.items() if k in named and k not in arguments}
    if node.get("_partial_"):
        return functools.partial(function, **arguments)
    return function(**arguments)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """A ValueError is the user's: print its sentence and exit with 2, without a traceback.

    HYDRA_FULL_ERROR=1 shows the traceback.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        console.print("error:", style="bold red", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from error


def _unknown_root_keys(cfg: DictConfig) -> list[str]:
    """Keys that the command's schema does not have: `+sed=1` adds one past Hydra's own check."""
    root = OmegaConf.get_type(cfg)
    if root is None or not dataclasses.is_dataclass(root):
        return []
    known = [field.name for field in dataclasses.fields(root)]
    return [
        f"{key}: there is no such key{_near(str(key), known)}" for key in cfg if key not in known
    ]


def _to_plain(node: Any, path: str, problems: list[str]) -> Any:
    """A resolved copy in plain containers. Missing values and broken references are reported."""
    if isinstance(node, DictConfig):
        if node._is_none():
            return None
        keys: list[Any] = list(node.keys())
    elif isinstance(node, ListConfig):
        if node._is_none():
            return None
        keys = list(range(len(node)))
    else:
        return node
    plain: dict[Any, Any] = {}
    for key in keys:
        where = f"{path}.{key}".lstrip(".")
        if OmegaConf.is_missing(node, key):
            problems.append(f"{where} has no value; give one: {where}=...")
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            problems.append(f"{where} cannot be resolved: {str(error).splitlines()[0]}")
            continue
        plain[key] = _to_plain(value, where, problems)
    return plain if isinstance(node, DictConfig) else list(plain.values())


def _check_value(value: Any, path: str, runtime: frozenset[str], problems: list[str]) -> None:
    """Check `value` and everything below it."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_value(item, f"{path}[{index}]", runtime, problems)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_value(item, f"{path}.{key}".lstrip("."), runtime, problems)
        if "_target_" in value:
            _check_node(value, path, runtime, problems)


def _check_node(
    node: dict[str, Any], path: str, runtime: frozenset[str], problems: list[str]
) -> None:
    """Compare one node's keys and values with the signature of its `_target_`."""
    target = str(node["_target_"])
    try:
        function = locate(target)
    except ConfigError as error:
        problems.append(f"{path}: {error}")
        return
    parameters = inspect.signature(function).parameters
    by_name = {
        name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = type_hints(function)
    for key, value in node.items():
        if key in CONTROL_KEYS:
            continue
        where = f"{path}.{key}".lstrip(".")
        if key not in by_name:
            if not open_ended:
                problems.append(f"{where}: {target} has no argument '{key}'{_near(key, by_name)}")
            continue
        if key in hints:
            complaint = type_complaint(value, hints[key])
            if complaint:
                problems.append(f"{where}={_short(value)}: {complaint} ({target})")
    if node.get("_partial_"):
        return
    for name, parameter in by_name.items():
        if parameter.default is parameter.empty and name not in node and name not in runtime:
            where = f"{path}.{name}".lstrip(".")
            problems.append(f"{where} is missing: {target} needs it; give one: +{where}=...")


def _stays_plain(target: str, key: str) -> bool:
    """Whether a sub-node is handed over as data instead of being built."""
    return key == PLAIN_UNDER_DRAFTER and target.startswith("models.drafter.")


def _near(key: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(names), n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    known = sorted(names)
    return f"; it has {', '.join(known)}" if len(known) <= 12 else ""


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
