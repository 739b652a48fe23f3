"""A notebook as a page: its text, code and outputs in Markdown, its pictures as files."""

import base64
import json
from pathlib import Path

PICTURES = {"image/png": ".png", "image/svg+xml": ".svg"}


def to_markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """The page's text, and its pictures by their file names."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            parts.append(_output(output, path.stem, pictures))
    download = f"[The notebook]({path.name}): `examples/notebooks/{path.name}`."
    return "\n\n".join([*parts, download]) + "\n", pictures


def _output(output: dict, stem: str, pictures: dict[str, bytes]) -> str:
    data = output.get("data", {})
    for kind, suffix in PICTURES.items():
        if kind in data:
            name = f"{stem}-{len(pictures) + 1}{suffix}"
            content = "".join(data[kind])
            pictures[name] = base64.b64decode(content) if kind == "image/png" else content.encode()
            return f"![{''.join(data.get('text/plain', ''))}]({name})"
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f"```{{.text .output}}\n{text.rstrip()}\n```"
