"""What a `_target_` names: the class or function, its annotations, and whether a value fits one."""

import importlib
import inspect
import json
import types
import typing
from collections.abc import Callable
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

OUR_PACKAGES = ("models", "data_prep", "decode", "train", "export")
LIBRARIES = ("torch", "lightning", "transformers")
"""Where a `_target_` may point: a config may come from a download and must not call anything."""


class ConfigError(ValueError):
    """One or more problems in a config, each in a line of the message."""


def locate(path: str) -> Callable[..., Any]:
    """The class or function at a dotted path. Raises ValueError with the reason."""
    allowed = (*OUR_PACKAGES, *LIBRARIES)
    if path.partition(".")[0] not in allowed:
        raise ConfigError(
            f"_target_ '{path}' is outside of what a config may call; it must start with one of "
            + ", ".join(allowed)
        )
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # Only "this prefix is no module" means: try a shorter one. A module that is there but
            # cannot be imported (a missing dependency) is a different fault and must be seen.
            if error.name and (module_name + ".").startswith(error.name + "."):
                continue
            raise ConfigError(f"_target_ '{path}' cannot be imported: {error}") from error
        for name in parts[cut:]:
            found = getattr(found, name, None)
        # Where it was defined counts, not where it can be reached: torch.os.system is no part of
        # torch.
        if callable(found) and str(found.__module__).partition(".")[0] in allowed:
            return found
        break
    raise ConfigError(f"_target_ '{path}' does not exist")


def type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the arguments; empty where a library's cannot be evaluated."""
    holder: Any = function.__init__ if inspect.isclass(function) else function
    try:
        return typing.get_type_hints(inspect.unwrap(holder))
    except (NameError, TypeError, AttributeError):
        return {}


def type_complaint(value: Any, hint: Any) -> str | None:
    """Why `value` cannot be what `hint` says; None when it can.

    Strict JSON rules: a list may fill a tuple, an int a float and a string a path, but neither
    "3" nor true is an int.
    """
    if _contains_node(value):
        return _container_complaint(value, hint)
    try:
        # Pydantic models and typed dicts bring their own config and refuse another.
        adapter: TypeAdapter[Any] = TypeAdapter(
            hint, config=ConfigDict(arbitrary_types_allowed=True)
        )
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        reasons = {
            e["msg"]
            .removeprefix("Input ")
            .replace("an object", "a mapping")
            .replace("array", "list")
            for e in error.errors()
            if not _is_opaque(e)
        }
        return " or ".join(sorted(reasons)) or "has the wrong type"
    except (PydanticUserError, TypeError, NameError):
        return None  # a library's annotation that pydantic cannot read
    return None


def _is_opaque(error: Any) -> bool:
    """True for "should be an instance of X": X cannot be written in YAML, so it is no advice."""
    return error["type"] in ("is_instance_of", "needs_python_object")


def _contains_node(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(_contains_node(v) for v in value.values())
    return isinstance(value, list) and any(_contains_node(v) for v in value)


def _container_complaint(value: Any, hint: Any) -> str | None:
    """A value with nodes in it is an object only once built: compare its class with the hint."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if isinstance(value, dict) and "_target_" in value:
        made = _made_by(str(value["_target_"]))
        classes = [typing.get_origin(o) or o for o in options]
        decided = made is not None and all(inspect.isclass(c) for c in classes)
        # Protocols are duck-typed and a plain dict means that the node is kept as data.
        if not decided or any(getattr(c, "_is_protocol", False) or c is dict for c in classes):
            return None
        assert made is not None
        if any(issubclass(made, c) for c in classes):
            return None
        return f"should be a {' or '.join(c.__name__ for c in classes)}, not a {made.__name__}"
    kinds = {typing.get_origin(o) or o for o in options}
    if isinstance(value, dict) and kinds == {list}:
        return "should be a list (a `- ` in front of each entry)"
    return None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _made_by(target: str) -> type | None:
    """The class that a node's callable makes, if it says so."""
    try:
        function = locate(target)
    except ConfigError:
        return None  # reported where the node itself is checked
    made = function if inspect.isclass(function) else type_hints(function).get("return")
    return made if inspect.isclass(made) else None
