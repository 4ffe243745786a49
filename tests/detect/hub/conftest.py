import pytest
from masm_detect.hub import DetectorForImageClassification


@pytest.fixture
def model(tiny_run):
    """The detector of a tiny run as a model of transformers."""
    return DetectorForImageClassification.from_run(tiny_run)
