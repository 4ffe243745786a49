"""The Makefile names files that exist, and leaves none of the GPU tests out unnoticed."""

import re

#: Run whole models: minutes of work for compute-sanitizer, with kernels that the other files run too.
NOT_SANITIZED = {"test_models_on_gpu.py", "test_training_on_gpu.py"}


def test_every_gpu_test_runs_under_the_sanitizer_or_is_listed_here(repo):
    [line] = re.findall(r"^SANITIZED := (.*)$", (repo / "Makefile").read_text(), re.MULTILINE)
    listed = set(re.findall(r"tests/gpu/(\w+\.py)", line))
    found = {path.name for path in (repo / "tests/gpu").glob("test_*.py")}
    assert listed | NOT_SANITIZED == found and not listed & NOT_SANITIZED


def test_every_target_is_phony_or_a_file(repo):
    text = (repo / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", text, re.MULTILINE))
    assert targets == phony
