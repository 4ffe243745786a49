"""The picture of the house, kept true: imports go one way, public names exist, importing touches no GPU."""

import ast
import subprocess
import sys

import masm_ext

#: a file may import only from groups before its own
ORDER = [
    ["contract", "registry", "_version"],
    ["_library", "autocast", "cuda_graphs", "reference", "files", "hashing", "wrappers", "recompute"],
    ["ops", "kernels"],  # ops/dispatch.py imports kernels when they are called
    ["config", "selection", "spectra"],
    ["decomposition"],
    ["nn"],
    ["masks", "losses"],
    ["masking", "optim"],
    ["base_model", "conversion_report", "merge"],
    ["convert"],
    ["adapter"],
    ["info"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def imported_names(path, package):
    """Absolute dotted names that a file imports."""
    parts = package.split(".")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(p for p in (prefix, node.module) if p)
            yield from (f"{base}.{a.name}" for a in node.names)


def test_imports_of_masm_ext_go_one_way(repo):
    checked = 0
    for path in (repo / "masm_ext").rglob("*.py"):
        relative = path.relative_to(repo / "masm_ext")
        own = relative.parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        package = ".".join(["masm_ext", *relative.parts[:-1]])
        for name in imported_names(path, package):
            assert not name.startswith("masm_detect"), f"{relative} imports {name}"
            if name.startswith("masm_ext."):
                other = name.split(".")[1]
                if other == own or other not in LEVEL:
                    continue
                assert LEVEL[other] <= LEVEL[own], f"{relative} imports {name}, which comes later in the order"
                checked += 1
        assert own in LEVEL, f"{relative}: give it a place in ORDER"
    assert checked > 20


def test_public_names():
    wanted = {
        "MASMConfig", "MASMLinear", "convert", "merge", "unmerge", "MaskedAdamW", "LayerMasks", "orthogonality_loss",
        "spectral_consistency_loss", "save_adapter", "load_adapter", "build_info",
    }  # fmt: skip
    assert wanted <= set(masm_ext.__all__)
    for name in masm_ext.__all__:
        assert getattr(masm_ext, name).__doc__, f"{name} has no docstring"


def test_import_is_quiet_and_touches_no_gpu():
    code = "import masm_ext, sys, torch; assert not torch.cuda.is_initialized() and 'masm_detect' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "" and run.stderr == "", run.stderr


def test_one_stem_an_op(repo):
    for stem in ("subspace_linear", "subspace_penalty", "masked_adamw", "update_masks", "fold"):
        for place in (
            f"csrc/{stem}.cpp",
            f"csrc/cpu/{stem}.cpp",
            f"masm_ext/ops/{stem}.py",
            f"masm_ext/reference/{stem}.py",
        ):
            assert (repo / place).is_file(), place
