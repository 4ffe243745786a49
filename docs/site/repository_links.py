"""Hook of mkdocs: links from a page to files of the repository work on the site as they do in a checkout.

A file outside docs/ that a page links to is copied to repository/ on the site; a Markdown file becomes a page there. A
link to a folder becomes text. A link to nothing is a warning, which is an error under --strict.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
COPIES = "repository"
LINK = re.compile(r"(!?\[[^\]]*\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(\))")
log = logging.getLogger("mkdocs.hooks.repository_links")


def on_files(files, config):
    """Add every file outside docs/ that a page, or such a file, links to."""
    docs = Path(config.docs_dir)
    waiting = [docs / file.src_uri for file in files.documentation_pages()]
    known = set()
    while waiting:
        page = waiting.pop()
        for match in LINK.finditer(page.read_text()):
            target = (page.parent / match[2]).resolve()
            if target in known or not target.is_file() or target.is_relative_to(docs):
                continue
            known.add(target)
            uri = f"{COPIES}/{target.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, uri, abs_src_path=str(target)))
            if target.suffix == ".md":
                waiting.append(target)
    return files


def on_page_markdown(markdown, page, config, files):
    """Point the links of a page to the copies."""
    docs = Path(config.docs_dir)
    uri = page.file.src_uri
    source = ROOT / uri.removeprefix(f"{COPIES}/") if uri.startswith(f"{COPIES}/") else docs / uri

    def rewrite(match):
        target = (source.parent / match[2]).resolve()
        if target.is_dir():
            return match[1].lstrip("!")[1:-2]  # the text alone
        if not target.is_file():
            log.warning("%s links to %s, which does not exist", uri, match[2])
            return match[0]
        inside = target.is_relative_to(docs)
        place = target.relative_to(docs).as_posix() if inside else f"{COPIES}/{target.relative_to(ROOT).as_posix()}"
        return f"{match[1]}{posixpath.relpath(place, posixpath.dirname(uri) or '.')}{match[3] or ''}{match[4]}"

    return LINK.sub(rewrite, markdown)
