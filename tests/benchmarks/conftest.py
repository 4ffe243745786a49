import sys

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def program(request):
    """The modules of benchmarks/speed and gpu_model are importable by name, as they are for the scripts in them."""
    folders = [str(request.config.rootpath / "benchmarks" / name) for name in ("gpu_model", "speed")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


@pytest.fixture
def layer_of():
    """name of a provider -> (provider, its layer of 24 x 32), every trained tensor off its start."""

    def build(name, rank=4, subspaces=2, dtype=torch.float32):
        import providers
        from suites.layer import OneLayer

        model = OneLayer((torch.randn(24, 32) / 6).to(dtype), torch.randn(24).to(dtype))
        provider = providers.PROVIDERS[name]
        provider.adapt(model, ["linear"], providers.Setting(rank, subspaces))
        providers.stir(provider.formula(model.linear))
        return provider, model.linear

    return build


@pytest.fixture
def layer_case():
    from cases import Case

    return Case("layer", "24x32/R4", "float32", "frozen", {"M": 20, "N": 24, "D": 32, "R": 4, "K": 2})


PARTS = ("compare", "cost", "differences", "factorial", "plan", "report", "runner", "spectrum", "study", "study_data")


@pytest.fixture(scope="module")
def parts(request):
    """The modules of benchmarks/generalization by name."""
    folder = request.config.rootpath / "benchmarks" / "generalization"
    others = {name: sys.modules.pop(name) for name in PARTS if name in sys.modules}
    sys.path.insert(0, str(folder))
    yield {name: __import__(name) for name in PARTS}
    sys.path.remove(str(folder))
    for name in PARTS:
        sys.modules.pop(name, None)
    sys.modules.update(others)


@pytest.fixture
def studies(request):
    return sorted((request.config.rootpath / "benchmarks" / "generalization" / "studies").glob("*.yaml"))
