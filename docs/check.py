"""What the built site must hold: `python -m docs.check site`, which `make docs` runs after the build.

Pages load nothing from another host, and the search finds what people look for. The generator checks the links.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

REMOTE = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link[^>]*rel=["']?(?:stylesheet|icon|preload|preconnect|modulepreload)\b[^>]*href=["']?(?:https?:)?//"""
)
SOUGHT = ("cold start", "lora", "filters", "train.compact.loss", "rollback", "gradcache")
"""What a search must find, in lower case."""


def problems(site: Path) -> list[str]:
    """One line for each thing that is wrong with a built site."""
    pages = sorted(site.rglob("*.html"))
    found = [f"{page.relative_to(site)} loads something from another host" for page in pages if _remote(page)]
    found += [f"{page.relative_to(site)} holds a part that was not generated" for page in pages if _left(page)]
    texts = [
        re.sub(r"<[^>]+>|\s+", " ", f"{entry['title']} {entry['text']}").lower()
        for entry in json.loads((site / "search.json").read_text())["items"]
    ]
    found += [f"the search does not know {words!r}" for words in SOUGHT if not any(words in text for text in texts)]
    return found if len(pages) > 20 else [*found, f"{site} holds {len(pages)} pages"]


def _remote(page: Path) -> bool:
    return REMOTE.search(page.read_text()) is not None


def _left(page: Path) -> bool:
    return "<!-- generated:" in page.read_text()


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    print("\n".join(wrong) or "the site is complete", file=sys.stderr)
    sys.exit(bool(wrong))
