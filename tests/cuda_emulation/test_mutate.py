"""The tests of the emulation notice mistakes: each mutation of a CUDA kernel makes the tests of that kernel fail."""

import mutate
import pytest
from emulated import COMPILER, FLAGS

MUTATIONS = [mutation for file in mutate.kernels() for mutation in mutate.mutations(file)]
compiled = pytest.mark.skipif(COMPILER is None or bool(FLAGS), reason="needs a C++ compiler, and no sanitizers")


@compiled
@pytest.mark.kernels
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_is_caught(mutation):
    assert mutate.is_caught(mutation, mutation.file), "no test fails with this change of the kernel"


@compiled
@pytest.mark.kernels
@pytest.mark.parametrize("file", sorted({mutation.file for mutation in MUTATIONS}))
def test_the_kernels_themselves_pass(file):
    """Else every mutation of them would count as caught."""
    assert not mutate.is_caught(None, file)


@compiled
def test_a_mutation_is_caught_and_the_kernel_itself_passes():
    mutation = next(m for m in MUTATIONS if m.file == "update_masks.h")
    assert mutate.is_caught(mutation, mutation.file)
    assert not mutate.is_caught(None, mutation.file)


def test_every_listed_change_applies_once():
    for file in mutate.kernels():
        text = file.read_text()
        assert all(text.count(old) == 1 for old, _ in mutate.CHANGES.get(file.name, ())), file.name
    assert set(mutate.CHANGES) <= {file.name for file in mutate.kernels()}
    assert len(MUTATIONS) > 15


def test_mutations_are_found(tmp_path):
    file = tmp_path / "kernel.cuh"
    file.write_text(
        "__syncthreads();  // grid_barrier();\nif (mask == 0) continue;\n"
        "if (taken && a.mask[b] != 0) bad = __syncthreads_or(bad);\nlive[r] = live[0] ? 1 : 2;\n"
    )
    assert [mutation.mutated.strip() for mutation in mutate.mutations(file)] == [
        "",
        "if (false) continue;",
        "if (taken && true) bad = __syncthreads_or(bad);",
        "if (taken && a.mask[b] != 0) bad = (bad);",
        "live[r] = true ? 1 : 2;",
    ]
