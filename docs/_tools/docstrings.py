"""A griffe extension: docstrings are plain text, and Markdown needs a list where they have one line an argument."""

import importlib
import inspect
import re
from typing import Any

from griffe import Docstring, Extension, Object

# "x: (rows, cols)" or "weight, bias: (C,) or None"
ARGUMENT = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)")
CODE = re.compile(r"(`[^`]*`)")


class PlainDocstrings(Extension):
    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is None and obj.is_class:  # a docstring that is computed: only the import knows it
            text = vars(getattr(importlib.import_module(obj.module.path), obj.name, None) or object).get("__doc__")
            if isinstance(text, str):
                obj.docstring = Docstring(inspect.cleandoc(text), parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """A paragraph that begins with an argument is a list of them. What Markdown takes for markup is escaped."""
    return "\n\n".join(map(_paragraph, re.split(r"\n\s*\n", text.strip())))


def _paragraph(text: str) -> str:
    lines, is_list = [], ARGUMENT.match(text) is not None
    for line in text.splitlines():
        argument = ARGUMENT.fullmatch(line) if is_list else None
        if argument:
            names = ", ".join(f"`{name}`" for name in argument[1].split(", "))
            lines.append(f"- {names}: {_escaped(argument[2])}")
        else:
            lines.append(f"    {_escaped(line.strip())}" if is_list else _escaped(line))
    return "\n".join(lines)


def _escaped(text: str) -> str:
    def escape(part: str) -> str:
        return re.sub(r"([*_])", r"\\\1", part).replace("<", "&lt;")

    return "".join(part if part.startswith("`") else escape(part) for part in CODE.split(text))
