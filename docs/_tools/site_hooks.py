"""MkDocs hooks: pages and files from outside of docs/, and the links to them.

A link in a page is the one that works in the repository, such as `../CONTRIBUTING.md` or
`../bench/results/codegen.md`. The site keeps the repository's paths for what lies outside of docs/: PAGES become
pages, notebooks too, and whatever else a page links to is copied.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote

import notebook_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "examples/stability/README.md")
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"(\]\()([^()\s#:]+)((?:#[^()\s]*)?\))")
IMAGE = re.compile(r'(?<!">)(<img [^>]*src="([^"]+)"[^>]*>)')
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for path in NOTEBOOKS:
        text, pictures = notebook_pages.to_markdown(path)
        files.append(File.generated(config, _uri(path), content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"{os.path.dirname(_uri(path))}/{name}", content=content))
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for file in list(files.documentation_pages()):
        for path in _linked(file.content_string, _source(file)):
            if path.is_file() and files.get_file_from_path(_uri(path)) is None:
                files.append(File.generated(config, _uri(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links from the repository's paths to the site's."""
    here = os.path.dirname(page.file.src_uri)

    def site_link(match: re.Match) -> str:
        path = _resolve(match[2], _source(page.file))
        is_own_notebook = path.suffix == ".ipynb" and _uri(path) == page.file.src_uri
        if is_own_notebook or not path.exists():  # what isn't there is an error, which MkDocs reports
            return match[0]
        return f"{match[1]}{os.path.relpath(_uri(path), here or '.')}{match[3]}"

    return _outside_code(LINK, site_link, markdown)


def on_page_content(html: str, **_: object) -> str:
    """A picture links to itself: a phone shows it small."""
    return IMAGE.sub(r'<a href="\2">\1</a>', html)


def _outside_code(pattern: re.Pattern, replace, text: str) -> str:
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [pattern.sub(replace, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, pattern.sub(replace, text[end:])])


def _linked(markdown: str, source: Path) -> list[Path]:
    """What a page links to outside of docs/."""
    paths = [_resolve(match[2], source) for match in LINK.finditer(CODE.sub("", markdown))]
    return [path for path in paths if path.is_relative_to(ROOT) and not path.is_relative_to(DOCS)]


def _source(file: File) -> Path:
    """Where a page's text lies in the repository."""
    inside = DOCS / file.src_uri
    return inside if inside.exists() else ROOT / file.src_uri


def _resolve(link: str, source: Path) -> Path:
    return Path(os.path.normpath(source.parent / unquote(link)))


def _uri(path: Path) -> str:
    """A file's path in the site. Of a notebook, its page's. Markdown that is no page is served as plain text."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    uri = path.relative_to(ROOT)
    if path in NOTEBOOKS:
        return uri.with_suffix(".md").as_posix()
    return f"{uri.as_posix()}.txt" if path.suffix == ".md" and uri.as_posix() not in PAGES else uri.as_posix()
