"""For the site: files outside of docs/ that pages link to (examples, configurations, the changelog)
become pages of it.

Links in our Markdown are those that work on a forge, relative in the repository:
``../examples/custom_rule.py``. Here the file becomes the page ``examples/custom_rule.py.md``, and
the link leads to it. A notebook becomes its text, code and pictures.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "configs/**/*.yaml",
    "examples/**/*.py",
    "examples/**/*.md",
    "examples/**/*.yaml",
    "examples/**/*.sbatch",
    "examples/*.ipynb",
]
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sbatch": "bash"}
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)((?:#[^)\s]*)?\))")

_pages: dict[str, str] = {}
"""Path in the repository: path of its page."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages (an event of mkdocs)."""
    _pages.clear()
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        _pages[name] = name if name.endswith(".md") else f"{name}.md"
        for uri, content in _page(path, _pages[name]).items():
            files.append(File.generated(config, uri, content=content))
    return files


def _page(path: Path, uri: str) -> dict[str, str | bytes]:
    """The page for a file, and what it shows."""
    if path.suffix == ".md":
        return {uri: path.read_text()}
    if path.suffix == ".ipynb":
        text, resources = MarkdownExporter().from_notebook_node(nbformat.read(path, as_version=4))
        pictures = {f"{path.stem}_{name}": data for name, data in resources["outputs"].items()}
        for name in resources["outputs"]:
            text = text.replace(f"({name})", f"({path.stem}_{name})")
        return {
            uri: text,
            **{
                posixpath.join(posixpath.dirname(uri), name): data
                for name, data in pictures.items()
            },
        }
    title = f"---\ntitle: {path.name}\n---\n\n# {path.relative_to(ROOT).as_posix()}"
    return {uri: f"{title}\n\n````{LANGUAGES[path.suffix]}\n{path.read_text()}````\n"}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leads a page's links there (an event of mkdocs)."""
    uri = page.file.src_uri
    here = posixpath.dirname(uri if uri in _pages.values() else f"docs/{uri}")  # in the repository

    def follow(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[2]))
        target = posixpath.join(target, "README.md") if (ROOT / target).is_dir() else target
        there = target.removeprefix("docs/") if target.startswith("docs/") else _pages.get(target)
        if there is None:
            return match[0]  # mkdocs says that it leads nowhere
        return match[1] + posixpath.relpath(there, posixpath.dirname(uri) or ".") + match[3]

    return LINK.sub(follow, markdown)
