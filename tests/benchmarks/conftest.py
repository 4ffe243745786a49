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
