"""Objects that a YAML names: only from allowed packages, only what is really defined there, only known arguments.

A YAML is code all the same: this is a seat belt, not a sandbox (docs/SECURITY.md).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ruamel.yaml.comments import CommentedMap, TaggedScalar

from speechllm_prune.runtime import UserError
from speechllm_prune.yaml_text import line_of, tag_of

ALLOWED_MODULES = (
    "speechllm_prune",
    "recipes",
    "speechbrain",
    "torch",
    "torchaudio",
    "transformers",
    "peft",
)
"""Packages that a YAML may take objects from."""

KINDS = {
    "opt_class": "torch.optim.Optimizer",
    "activation": "torch.nn.Module",
    "projector_class": "torch.nn.Module",
}
"""What a class at an extension point must be derived from. (A function that returns one is taken on trust.)"""

_OBJECTS = ("!new:", "!name:")
_HARMLESS = ("!ref", "!copy", "!tuple", "!PLACEHOLDER")


def check_objects(key: str, node: Any, modules: Sequence[str], where: str) -> None:
    """Check every object in a node, before any of them is built.

    Arguments
    ---------
    key : str
        Key of the YAML.
    node : Any
        Its value in the tree.
    modules : sequence of str
        Allowed packages.
    where : str
        File and line of the key.

    Raises
    ------
    UserError
    """
    tag = tag_of(node)
    if tag and tag.startswith(_OBJECTS):
        _check_object(key, node, modules, where)
    elif tag and tag.startswith(("!apply:", "!applyref:", "!module:", "!include:")):
        raise UserError(
            f"{where}: '{key}': {tag} is not allowed: it would run code or read files while the YAML is loaded"
        )
    elif tag and tag not in _HARMLESS:
        raise UserError(f"{where}: '{key}': the tag {tag} is not allowed")
    below = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    for item in below:
        check_objects(key, item, modules, where)


def _check_object(key: str, node: Any, modules: Sequence[str], where: str) -> None:
    name = str(tag_of(node)).split(":", 1)[1]
    found = locate(name, modules, f"{where}: '{key}'")
    if not callable(found):
        raise UserError(f"{where}: '{key}': {name} is neither a class nor a function")
    if isinstance(node, list) or (isinstance(node, TaggedScalar) and str(node.value).strip()):
        raise UserError(f"{where}: '{key}': arguments of {name} are named, one `key: value` a line")
    if isinstance(node, CommentedMap):
        _check_arguments(key, name, found, node, where)


def _check_arguments(
    key: str, name: str, found: Callable[..., Any], node: CommentedMap, where: str
) -> None:
    try:
        parameters = inspect.signature(found).parameters
    except (ValueError, TypeError):  # some builtins do not say
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for argument in node:
        if argument not in parameters:
            near = difflib.get_close_matches(str(argument), list(parameters), 1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else f"; it takes {', '.join(parameters)}"
            place = line_of(node, argument, where.rpartition(", line ")[0])
            raise UserError(
                f"{place}: '{key}': {name} has no argument '{argument}' (unknown key){hint}"
            )


def check_kind(key: str, node: Any, modules: Sequence[str], where: str) -> None:
    """Refuse a class at an extension point that is of another kind than the point takes.

    What `--allow_module` lets in is taken on trust.
    """
    wanted, name = KINDS.get(key), str(tag_of(node)).split(":", 1)[1]
    if wanted is None or name.split(".")[0] not in ALLOWED_MODULES:
        return
    found = locate(name, modules, f"{where}: '{key}'")
    if inspect.isclass(found) and not issubclass(found, locate(wanted, ALLOWED_MODULES, where)):
        raise UserError(f"{where}: '{key}' takes a class derived from {wanted}, {name} is none")


def locate(name: str, modules: Sequence[str], where: str) -> Any:
    """The object with a dotted name, if it is defined in an allowed package.

    `torch.os.system` is not: the way to it leaves torch.

    Raises
    ------
    UserError
        If it is elsewhere, or not there.

    Example
    -------
    >>> locate("speechllm_prune.tasks.TASKS", ["speechllm_prune"], "here")["asr"].metric
    'wer'
    >>> locate("speechllm_prune.runtime.os.system", ["speechllm_prune"], "here")
    Traceback (most recent call last):
    speechllm_prune.runtime.UserError: here takes an object from 'speechllm_prune.runtime.os.system'; ...
    """
    top, *parts = name.split(".")

    def outside(package: str) -> UserError:
        return UserError(
            f"{where} takes an object from {name!r}; a YAML is code, so only what is defined in these packages is "
            f"allowed: {', '.join(modules)}. --allow_module {package or 'PACKAGE'} allows it for this run"
        )

    if top not in modules:
        raise outside(top)
    found = _module(top, name, where)
    for number, part in enumerate(parts):
        step = _step(found, part, name, where)
        is_module = inspect.ismodule(step)
        home = step.__name__ if is_module else getattr(step, "__module__", None)
        package = home.split(".")[0] if isinstance(home, str) else top
        last = number == len(parts) - 1
        if part.startswith("__") or ((is_module or last) and package not in modules):
            raise outside(package)
        found = step
    return found


def _step(parent: Any, part: str, name: str, where: str) -> Any:
    if inspect.ismodule(parent) and hasattr(parent, "__path__"):
        full = f"{parent.__name__}.{part}"
        try:
            return importlib.import_module(full)
        except ModuleNotFoundError as error:
            if error.name != full:
                raise UserError(f"{where}: {full} cannot be imported: {error}") from None
        except Exception as error:  # whatever a module does when it is imported
            raise UserError(
                f"{where}: {full} cannot be imported: {type(error).__name__}: {error}"
            ) from None
    try:
        return getattr(parent, part)
    except AttributeError:
        names = {item.lower(): item for item in dir(parent)}
        near = difflib.get_close_matches(part.lower(), names, 1)
        hint = f"; did you mean {names[near[0]]}?" if near else ""
        raise UserError(f"{where}: cannot find {name!r}{hint}") from None


def _module(top: str, name: str, where: str) -> Any:
    try:
        return importlib.import_module(top)
    except Exception as error:
        raise UserError(f"{where}: cannot find {name!r}: {error}") from None


def find_callable(dotted: str, allow_modules: Sequence[str] = ()) -> Callable[..., Any]:
    """The function that the key `prepare` names, from an allowed package.

    Raises
    ------
    UserError
    """
    modules = (*ALLOWED_MODULES, *allow_modules)
    if dotted.split(".")[0] not in modules:
        raise UserError(f"prepare: {dotted!r} is not in an allowed package ({', '.join(modules)})")
    found = locate(dotted, modules, "prepare")
    if not callable(found):
        raise UserError(f"prepare: {dotted!r} is no function")
    return found
