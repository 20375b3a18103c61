"""YAML as text and as a tree that constructs nothing: tags, comments, order and lines are kept.

What is wrong with a file is said with the file and the line.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, TaggedScalar
from ruamel.yaml.error import YAMLError

from speechllm_prune.redaction import holds_secret
from speechllm_prune.runtime import UserError


def _yaml() -> YAML:
    yaml = YAML()  # round trip
    yaml.width = 4096
    yaml.preserve_quotes = True
    return yaml


def dump(tree: CommentedMap) -> str:
    """The text of a tree."""
    stream = io.StringIO()
    _yaml().dump(tree, stream)
    return stream.getvalue()


def parse(text: str, source: str) -> CommentedMap:
    """The tree of a text; `source` names it in messages.

    Raises
    ------
    UserError
        If it is no YAML, or no mapping.
    """
    try:
        tree = _yaml().load(text)
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None
    except YAMLError as error:
        problem = str(getattr(error, "problem", None) or error).strip().splitlines()[0]
        number = _line_of_error(error, text)
        shown = text.splitlines()[number - 1].strip()[:60]
        raise UserError(
            f"{source}, line {number}: not valid YAML: {problem}, in `{shown}`"
        ) from None
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{source}, line 1: a mapping of keys to values is expected")
    if tree.merge:
        number = 1 + next(
            (n for n, line in enumerate(text.splitlines()) if line.lstrip().startswith("<<")), 0
        )
        raise UserError(
            f"{source}, line {number}: merge keys (<<) are not allowed; write the keys out"
        )
    return tree


def _line_of_error(error: YAMLError, text: str) -> int:
    """Number of the line that an error is about; where only the end was unexpected, of what was begun."""
    last = len(text.splitlines())
    position = getattr(error, "position", None)
    if isinstance(position, int):  # a character that may not be there
        return text.count("\n", 0, position) + 1
    marks = [getattr(error, name, None) for name in ("problem_mark", "context_mark")]
    lines = [mark.line + 1 for mark in marks if mark is not None]
    return min([line for line in lines[:1] if line <= last] or lines[1:] or [1])


def read_tree(path: Path) -> CommentedMap:
    """The tree of a file.

    Raises
    ------
    UserError
        If it cannot be read, is no YAML, or holds what looks like an access token.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        folder = path.parent
        near = (
            difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")], 1)
            if folder.is_dir()
            else []
        )
        hint = f"; did you mean {folder / near[0]}?" if near else ""
        raise UserError(f"{path} does not exist{hint}") from None
    except UnicodeDecodeError as error:
        at = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {at}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} is not a YAML file ({error.strerror})") from None
    for number, content in enumerate(text.splitlines(), start=1):
        if holds_secret(content):
            raise UserError(
                f"{path}, line {number}: this looks like an access token; a YAML is archived and shared, so a token "
                "belongs into the environment (HF_TOKEN) or into `hf auth login`"
            )
    return parse(text, str(path))


def line_of(tree: CommentedMap, key: Any, source: str | Path) -> str:
    """`source, line N` of a key.

    Example
    -------
    >>> line_of(parse("a: 1\\nb: 2\\n", "x"), "b", "x.yaml")
    'x.yaml, line 2'
    """
    return f"{source}, line {tree.lc.key(key)[0] + 1}"


def tag_of(node: Any) -> str | None:
    """The tag that a node was given, such as `!ref`; None for none.

    Example
    -------
    >>> tag_of(parse("a: !ref <b>\\n", "x")["a"]), tag_of("text")
    ('!ref', None)
    """
    value = getattr(getattr(node, "tag", None), "value", None)
    if value is None or (
        str(value).startswith("tag:yaml.org") and not isinstance(node, TaggedScalar)
    ):
        return None
    return str(value).replace("tag:yaml.org,2002:", "!!")


def nodes_of(node: Any) -> Iterator[Any]:
    """A node and everything below it."""
    yield node
    below = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    for item in below:
        yield from nodes_of(item)


def plain(node: Any) -> Any:
    """A node as JSON; objects appear as their tag and arguments."""
    tag = tag_of(node)
    if isinstance(node, TaggedScalar):
        return f"{tag} {node.value}".strip()
    if isinstance(node, Mapping):
        value: Any = {str(key): plain(item) for key, item in node.items()}
        return {"tag": tag, **value} if tag else value
    if isinstance(node, list):
        return [plain(item) for item in node]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float):  # ruamel's own scalar classes are no JSON
        if isinstance(node, kind):
            return kind(node)
    return str(node)
