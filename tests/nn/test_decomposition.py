import pytest
import torch

from masm_ext.decomposition import (
    SpectrumCache,
    choose_ranks,
    compute_spectra,
    spectra_of,
    weight_hash,
)
from masm_ext.registry import PARTITIONS


def test_interleaved_deals_round_robin_and_skips_full_subspaces():
    assert PARTITIONS["interleaved"]((2, 2, 2)) == [[0, 3], [1, 4], [2, 5]]
    assert PARTITIONS["interleaved"]((1, 3, 2)) == [[0], [1, 3, 5], [2, 4]]
    assert PARTITIONS["contiguous"]((1, 3, 2)) == [[0], [1, 2, 3], [4, 5]]


def test_energy_chooses_the_smallest_rank_that_holds_the_share():
    sigma = torch.tensor([4.0, 2.0, 1.0, 1.0])  # squares 16, 4, 1, 1 of 22
    assert choose_ranks(sigma, (9,), 1 / 22 - 1e-9) == (1,)
    assert choose_ranks(sigma, (9,), 2 / 22 - 1e-9) == (2,)
    assert choose_ranks(sigma, (9,), 3 / 22) == (3,)
    assert choose_ranks(sigma, (9, 9), 3 / 22) == (2, 2)  # rounded up to a multiple of K
    assert choose_ranks(sigma, (9, 9, 9), 0.9) == (2, 1, 1)  # there are no more than q


def test_batched_spectra_are_those_of_each_weight():
    weights = [torch.randn(12, 9) for _ in range(5)]
    for weight, spectrum in zip(weights, compute_spectra(weights, 4)):
        u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        assert torch.allclose(spectrum.sigma, sigma)
        tail = (u[:, -4:] * sigma[-4:]) @ vh[-4:]
        assert torch.allclose((spectrum.u.mT * spectrum.sigma[-4:]) @ spectrum.v, tail)


def test_hash_tells_values_shape_and_dtype_apart():
    w = torch.zeros(4, 6)
    hashes = {weight_hash(t) for t in (w, w.view(6, 4), w.double(), w + 1, w.to(torch.bfloat16))}
    assert len(hashes) == 5
    assert weight_hash(w.mT.contiguous().mT) == weight_hash(w)


def test_cache_avoids_the_svd(tmp_path, monkeypatch):
    weights = {"a": torch.randn(10, 8), "b": torch.randn(10, 8), "c": torch.randn(5, 8)}
    hashes = {n: weight_hash(w) for n, w in weights.items()}
    cache = SpectrumCache(tmp_path)
    done = []
    first = spectra_of(weights, hashes, 3, cache, done.append)
    assert sorted(done) == ["a", "b", "c"] and len(list(tmp_path.glob("*.safetensors"))) == 3
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("SVD"))
    again = spectra_of(weights, hashes, 5, cache)
    for name in weights:
        assert torch.equal(first[name].u, again[name].u)


def test_cache_with_too_few_directions_is_recomputed(tmp_path):
    w = torch.randn(100, 90)
    h = {"w": weight_hash(w)}
    cache = SpectrumCache(tmp_path)
    spectra_of({"w": w}, h, 3, cache)
    assert cache.get(h["w"], 64) is not None and cache.get(h["w"], 70) is None
    assert spectra_of({"w": w}, h, 70, cache)["w"].u.shape[0] == 70
    assert cache.get(h["w"], 70) is not None


def test_a_damaged_cache_file_is_named(tmp_path):
    w = torch.randn(6, 5)
    cache = SpectrumCache(tmp_path)
    spectra_of({"w": w}, {"w": weight_hash(w)}, 2, cache)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=path.name):
        cache.get(weight_hash(w), 2)
