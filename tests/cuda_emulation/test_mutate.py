"""The committed table of mutations belongs to the kernels as they are, and holds none that no test noticed."""

import json

import mutate


def test_the_table_is_that_of_these_kernels():
    names = [mutation.name for file in mutate.kernels() for mutation in mutate.mutations(file)]
    table = json.loads(mutate.TABLE.read_text())
    assert sorted(name.rstrip("'") for name in table) == sorted(names), "python tests/cuda_emulation/mutate.py"
    assert len(names) > 15 and "NOT CAUGHT" not in table.values()


def test_every_listed_change_applies_once():
    for file in mutate.kernels():
        text = file.read_text()
        assert all(text.count(old) == 1 for old, _ in mutate.CHANGES.get(file.name, ())), file.name
    assert set(mutate.CHANGES) <= {file.name for file in mutate.kernels()}


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
