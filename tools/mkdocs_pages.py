"""MkDocs hook: put README.md, CONTRIBUTING.md and CHANGELOG.md on the site, with links that work there.

The pages of docs/ and the files of the root link to each other as GitHub resolves links. Here they move to one folder,
so a link to `docs/data.md` becomes `data.md`, and one to `../README.md` becomes `index.md`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FILES = ("LICENSE", "CITATION.cff")  # linked from the pages and served as they are
_LINK = re.compile(r"(\]\()([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository's root as pages."""
    from mkdocs.structure.files import File  # here, so that the tests need no MkDocs

    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=site_links(text, from_root=True)))
    for name in FILES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change the links of a page of docs/ that lead to the repository's root."""
    return markdown if page.file.src_uri in PAGES.values() else site_links(markdown, from_root=False)


def site_links(markdown: str, *, from_root: bool) -> str:
    """Replace the targets of links and images by those on the site.

    Args:
        markdown: a page as it is in the repository.
        from_root: whether it is a file of the root; otherwise it is one of docs/.
    """

    def target(link: re.Match[str]) -> str:
        path = link[2] if from_root else link[2].removeprefix("../")
        moved = path != link[2] or from_root
        if moved and path in PAGES:
            path = PAGES[path]
        elif from_root:
            path = path.removeprefix("docs/")
        else:
            path = link[2]
        return link[1] + path

    return _LINK.sub(target, markdown)
