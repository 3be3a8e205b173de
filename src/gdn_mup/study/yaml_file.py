"""YAML without surprises: what a file says is read as it stands, or not at all.

PyYAML by itself takes the last of two equal keys, and, as YAML 1.1 says, `010` for 8, `1:30` for 90, `on` for true.
Here a key stands once, and a scalar that is not written as in JSON (but for `1_000` and the floats of YAML) is text. So
a number that two readers of YAML would read differently is refused where a number is needed.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from gdn_mup.errors import UserError

LARGEST_FILE = 100_000  # values, those behind aliases counted each time

_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{f"{sign}.{word}": float(f"{sign}inf") for sign in ("", "+", "-") for word in ("inf", "Inf", "INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


class _Loader(yaml.SafeLoader):
    """Leaves every scalar as the text that it is."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: dictionaries with text for keys, tuples, and scalars.

    Raises UserError, one line with the path, for what is not YAML, for a key that stands twice, and for tags.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
        return _Reader(path).value(node, "") if node is not None else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
        reason = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(error).split()))
        raise UserError(f"{path}: not valid YAML: {reason}") from None


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = 0

    def value(self, node: yaml.Node, key: str) -> Any:
        """What stands under a key."""
        self.values += 1
        if self.values > LARGEST_FILE:
            raise UserError(f"{self.path}: more than {LARGEST_FILE} values; write fewer, without aliases (`*name`)")
        if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise UserError(f"{self.path}: {key or 'the file'}: the tag {tag!r} is not read; leave it out")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.value(item, f"{key}[{i}]") for i, item in enumerate(node.value))
        assert isinstance(node, yaml.ScalarNode)
        return node.value if node.style else _scalar(node.value)

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name, inner in node.value:
            if name.value == "<<" and not name.style:
                merged = self._merged(inner, key) | merged
                continue
            if not isinstance(name, yaml.ScalarNode):
                raise UserError(f"{self.path}: {key or 'the file'}: a key that is no text, in line {_line(name)}")
            inner_key = f"{key}.{name.value}".lstrip(".")
            if name.value in mapping:
                shown = inner_key if inner_key.isprintable() else repr(inner_key)
                raise UserError(
                    f"{self.path}: {shown}: written twice, in lines {lines[name.value]} and {_line(name)}; keep one"
                )
            lines[name.value] = _line(name)
            mapping[name.value] = self.value(inner, inner_key)
        return merged | mapping

    def _merged(self, node: yaml.Node, key: str) -> dict[str, Any]:
        """The mapping, or the list of mappings, of which the one here has the keys that it does not write itself."""
        value = self.value(node, f"{key}.<<".lstrip("."))
        parts = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(part, dict) for part in parts):
            raise UserError(f"{self.path}: {key or 'the file'}: `<<` names no mapping, in line {_line(node)}")
        return {name: inner for part in reversed(parts) for name, inner in part.items()}


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _scalar(text: str) -> Any:
    """A scalar without quotes."""
    if text in _WORDS:
        return _WORDS[text]
    try:
        if _WHOLE.fullmatch(text):
            return int(text)
        if _DECIMAL.fullmatch(text):
            number = float(text)
            return int(number) if number.is_integer() and abs(number) < 2**53 else number
    except ValueError:  # more digits than Python takes
        pass
    return text
