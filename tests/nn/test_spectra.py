import pytest
import torch

from masm_ext.decomposition import leading, order_of, random_order, trailing
from masm_ext.hashing import weight_hash
from masm_ext.spectra import SpectrumCache, compute_spectra, spectra_of


def cached(weights, hashes, count, cache, order=trailing, directions="trailing", **more):
    return spectra_of(weights, hashes, count, cache, order, directions, **more)


def test_batched_spectra_are_those_of_each_weight():
    weights = [torch.randn(12, 9) for _ in range(5)]
    for weight, spectrum in zip(weights, compute_spectra(weights, 4, [trailing(9)] * 5)):
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
    first = cached(weights, hashes, 3, cache, on_done=done.append)
    assert sorted(done) == ["a", "b", "c"] and len(list(tmp_path.glob("*.safetensors"))) == 3
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("SVD"))
    again = cached(weights, hashes, 5, cache)
    for name in weights:
        assert torch.equal(first[name].u, again[name].u)


def test_cache_with_too_few_directions_is_recomputed(tmp_path):
    w = torch.randn(100, 90)
    h = {"w": weight_hash(w)}
    cache = SpectrumCache(tmp_path)
    cached({"w": w}, h, 3, cache)
    assert cache.get(h["w"], 64, trailing(90)) is not None and cache.get(h["w"], 70, trailing(90)) is None
    assert cached({"w": w}, h, 70, cache)["w"].u.shape[0] == 70
    assert cache.get(h["w"], 70, trailing(90)) is not None


def test_a_damaged_cache_file_is_named(tmp_path):
    w = torch.randn(6, 5)
    cache = SpectrumCache(tmp_path)
    cached({"w": w}, {"w": weight_hash(w)}, 2, cache)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=path.name):
        cache.get(weight_hash(w), 2, trailing(5))


def test_the_cache_keeps_choices_of_directions_apart(tmp_path, monkeypatch):
    w = torch.randn(90, 100)
    digest = weight_hash(w)
    cache = SpectrumCache(tmp_path)
    first = {}
    for name, order in (("trailing", trailing), ("leading", leading), ("random", random_order)):
        first[name] = cached({"w": w}, {"w": digest}, 3, cache, order, name)["w"]
        assert first[name].held == sorted(order(90, digest)[:64])
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("SVD"))
    for name, order in (("trailing", trailing), ("leading", leading), ("random", random_order)):
        again = cached({"w": w}, {"w": digest}, 3, cache, order, name)["w"]
        assert torch.equal(again.u, first[name].u) and again.held == first[name].held
    # an order that is not the one of the file, under its name, is not served from it
    assert cache.get(digest, 3, leading(90), "random") is None


def test_a_file_from_before_there_was_a_choice_is_trailing(tmp_path):
    import safetensors.torch

    w = torch.randn(10, 12)
    digest, cache = weight_hash(w), SpectrumCache(tmp_path)
    spectrum = cached({"w": w}, {"w": digest}, 3, None)["w"]
    parts = {"sigma": spectrum.sigma, "u": spectrum.u, "v": spectrum.v}
    safetensors.torch.save_file(parts, tmp_path / f"{digest}.safetensors")
    assert torch.equal(cache.get(digest, 3, trailing(10)).u, spectrum.u)
    assert cache.get(digest, 3, leading(10), "leading") is None


def test_a_random_order_is_that_of_the_weight():
    assert random_order(50, "a") == random_order(50, "a") != random_order(50, "b")
    assert random_order(50, "a") != trailing(50) and order_of("random", 50, "a") == random_order(50, "a")
