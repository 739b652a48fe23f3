"""A griffe extension: docstrings are plain text, and Markdown needs a list where they have one line an argument."""

import importlib
import inspect
import re
from typing import Any

from griffe import Docstring, Extension, Object

# "x: (rows, cols)" or "weight, bias: (C,) or None", at the margin
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
    """Arguments become list items, and their further lines belong to them; what Markdown would take for markup is
    escaped."""
    lines: list[str] = []
    in_list = False
    for line in text.splitlines():
        argument = ARGUMENT.fullmatch(line)
        if argument and not in_list and lines and lines[-1]:
            lines.append("")
        if argument:
            in_list = True
            names = ", ".join(f"`{name}`" for name in argument[1].split(", "))
            lines.append(f"- {names}: {_escaped(argument[2])}")
        elif in_list and line.startswith("    "):
            lines.append(f"    {_escaped(line.strip())}")
        else:
            if in_list and line:
                lines += [] if not lines[-1] else [""]
                in_list = False
            lines.append(_escaped(line))
    return "\n".join(lines)


def _escaped(text: str) -> str:
    parts = CODE.split(text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<])", r"\\\1", part) for part in parts)
