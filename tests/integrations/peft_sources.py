"""PEFT's own tests, from its released sources. They are fetched into the environment, never into the repository.

``make test`` fetches them (see FETCH); without network that step fails and the tests skip.
"""

import hashlib
import importlib.util
import sys
import tarfile
import types
from pathlib import Path

VERSION = "0.21.2"
ARCHIVE = f"peft-{VERSION}.tar.gz"
SHA256 = "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"
#: Where the sources lie: in the environment that runs the tests.
CACHE = Path(sys.prefix) / "test-sources"
FETCH = f"pip download --no-deps --no-binary :all: -d {CACHE} peft=={VERSION}"
#: The tests of the sources import these packages, which the tests used here never call.
UNUSED = {"diffusers": ["StableDiffusionPipeline"], "datasets": ["load_dataset"]}


def reason_to_skip() -> str | None:
    """Why PEFT's tests cannot run here; None if they can."""
    import peft

    if peft.__version__ != VERSION:
        return f"PEFT's own tests are those of {VERSION}, installed is {peft.__version__}"
    archive = CACHE / ARCHIVE
    if not archive.is_file():
        return f"PEFT's own tests are not fetched: {FETCH}"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        return f"{archive} has SHA-256 {digest}, expected {SHA256}: delete it and fetch it again"
    return None


def load(folder: Path) -> types.ModuleType:
    """PEFT's ``tests/test_custom_models.py`` as a module of the package ``peft_released_tests``.

    Args:
        folder: an empty folder to unpack the tests into.
    """
    with tarfile.open(CACHE / ARCHIVE) as archive:
        members = [m for m in archive.getmembers() if m.name.startswith(f"peft-{VERSION}/tests/")]
        archive.extractall(folder, members, filter="data")
    package = types.ModuleType("peft_released_tests")
    package.__path__ = [str(folder / f"peft-{VERSION}" / "tests")]
    sys.modules[package.__name__] = package
    stubs = {}
    for name, attributes in UNUSED.items():
        if importlib.util.find_spec(name) is None:
            stubs[name] = types.ModuleType(name)
            for attribute in attributes:
                setattr(stubs[name], attribute, type(attribute, (), {}))
    sys.modules |= stubs
    try:
        return importlib.import_module("peft_released_tests.test_custom_models")
    finally:
        for name in stubs:
            del sys.modules[name]
