"""Puts the sources of the site together: `python -m docs.assemble FOLDER`, which `make docs` runs before the generator.

Pages in docs/ may link to any file of the repository by its relative path, as they read on GitHub. Here the files
outside docs/ that are linked to become pages below repository/ (Markdown as it is, sources in a code block), a
`<!-- generated: NAME -->` becomes what `generated` makes of the code, and formulas become MathML, which browsers draw
without a script. The generator gets plain Markdown.
"""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from latex2mathml.converter import convert

from docs.generated import GENERATED, openapi

ROOT = Path(__file__).parents[1]
LISTED = ("benchmarks/RESULTS.md", "benchmarks/LOG.md", "recipes/README.md", "CONTRIBUTING.md", "CHANGELOG.md")
"""Pages outside docs/ that the navigation names."""
LINK = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\(((?!https?:|mailto:|#)[^)#\s]+)(#[^)]*)?\)")
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)
UNSOUGHT = "---\nsearch:\n  exclude: true\n---\n\n"
"""What keeps a page out of the search."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash", ".json": "json"}


def assemble(folder: Path) -> None:
    """Write all pages and pictures of the site to `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pages = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
    known = {f"docs/{path.name}" for path in (ROOT / "docs").iterdir() if _as_it_is(f"docs/{path.name}")} - {*pages}
    for path in known:
        shutil.copy(ROOT / path, folder)
    pending = [*pages, *LISTED]
    while pending:
        path = pending.pop()
        if path in known:
            continue
        known.add(path)
        text = (ROOT / path).read_text()
        pending += targets(path, text) if path.endswith(".md") else []
        place = folder / on_site(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(page(path, text))
    (folder / "openapi.json").write_text(json.dumps(openapi(), indent=1) + "\n")


def page(path: str, text: str) -> str:
    """What the site shows of a file, `path` relative to the repository's root."""
    if not path.endswith(".md"):
        return f"{UNSOUGHT}# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}````\n"
    text = LINK.sub(lambda link: _relinked(link, path), text)
    if "$$" in text:
        text = "".join(p if CODE.fullmatch(p) else FORMULA.sub(_formula, p) for p in CODE.split(text))
    return MARKER.sub(lambda marker: GENERATED[marker[1]](), text)


def targets(path: str, text: str) -> list[str]:
    """The files that a page links to, relative to the repository's root."""
    return [found for link in LINK.finditer(text) if (found := _resolved(path, link[3])) and (ROOT / found).is_file()]


def on_site(path: str) -> str:
    """Where a file of the repository lies on the site."""
    if _as_it_is(path):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def _as_it_is(path: str) -> bool:
    """Whether a file is a page or a picture of docs/ itself, and no source."""
    return path.startswith("docs/") and path.count("/") == 1 and (ROOT / path).is_file() and not path.endswith(".py")


def _resolved(origin: str, link: str) -> str:
    """The file that a link of `origin` means; a folder's README or module stands for it."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return next((p for p in _standing_for(path) if (ROOT / p).is_file()), path)


def _standing_for(path: str) -> Iterator[str]:
    yield from (path, f"{path}/README.md", f"{path}/__init__.py")


def _relinked(link: re.Match[str], origin: str) -> str:
    picture, words, where, heading = link.groups()
    path = _resolved(origin, where)
    if (ROOT / path).is_dir():
        return words  # a folder has no page
    relative = posixpath.relpath(on_site(path), posixpath.dirname(on_site(origin)) or ".")
    return f"{picture}[{words}]({relative}{heading or ''})"


def _formula(found: re.Match[str]) -> str:
    if found[1]:
        return convert(found[1], display="block")
    return f"<span>{convert(found[2])}</span>"  # Markdown takes a line that begins with <math> for a block


if __name__ == "__main__":
    assemble(Path(sys.argv[1]))
