"""Hook of mkdocs: every argument of what the API pages show is documented. One that is not is a warning, so an error
under --strict.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[2]
SHOWN = re.compile(r"^::: (\S+)", re.MULTILINE)
log = logging.getLogger("mkdocs.hooks.documented_arguments")


def on_pre_build(config):
    """Warn of each argument of the API pages that its docstring leaves out."""
    for problem in undocumented(Path(config.docs_dir) / "api"):
        log.warning(problem)


def undocumented(pages: Path) -> Iterator[str]:
    """One line for each missing docstring, or argument that a docstring leaves out, of what the pages show."""
    loader = griffe.GriffeLoader(search_paths=[str(ROOT), str(ROOT / "python")])
    for name in sorted({name for page in pages.glob("*.md") for name in SHOWN.findall(page.read_text())}):
        loader.load(name.partition(".")[0])
        thing = loader.modules_collection[name]
        thing = thing.final_target if thing.is_alias else thing
        for member in _documented(thing):
            yield from _problems(member)


def _documented(thing) -> Iterator:
    """A function, a class and its public methods, or the public functions and classes of a module."""
    if thing.is_module:
        for member in thing.members.values():
            if not member.is_alias and not member.name.startswith("_") and (member.is_function or member.is_class):
                yield from _documented(member)
        return
    yield thing
    if thing.is_class:
        yield from (m for m in thing.members.values() if m.is_function and not m.name.startswith("_"))


def _problems(thing) -> Iterator[str]:
    where = f"{thing.path} ({Path(thing.filepath).relative_to(ROOT)}:{thing.lineno})"
    if thing.docstring is None:
        if thing.is_class or not thing.has_labels("property"):
            yield f"{where} has no docstring"
        return
    arguments = _arguments(thing)
    known = _named(thing)
    missing = [name for name in arguments if name not in known]
    if missing:
        yield f"{where} does not document {', '.join(missing)}"


def _arguments(thing) -> list[str]:
    if thing.is_class:
        if thing.has_labels("dataclass"):
            members = thing.attributes.values()  # properties and class variables among them
            fields = [m for m in members if m.annotation and "instance-attribute" in m.labels]
            return [m.name for m in fields if not m.name.startswith("_")]
        thing = thing.members.get("__init__")
        if thing is None or thing.is_alias:
            return []
    names = [p.name for p in thing.parameters if not p.name.startswith("_")]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def _named(thing) -> set[str]:
    found = set()
    docstrings = [thing.docstring]
    if thing.is_class and "__init__" in thing.members:
        docstrings.append(thing.members["__init__"].docstring)
    for docstring in filter(None, docstrings):
        for section in docstring.parse("google"):
            if section.kind.value in ("parameters", "other parameters", "attributes"):
                found |= {name.strip("* ") for item in section.value for name in item.name.split(",")}
    return found
