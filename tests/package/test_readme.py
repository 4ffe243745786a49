"""What the README tells people to type works."""

import re
import shlex

import pytest
import torch


def test_the_ten_lines_run(repo, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs the extra masm_ext[detect]")
    [code] = re.findall(r"```python\n(.*?)```", (repo / "README.md").read_text(), flags=re.S)
    config = transformers.Dinov2Config(hidden_size=384, num_hidden_layers=1, num_attention_heads=6, image_size=28)
    monkeypatch.setattr(
        transformers.Dinov2Model, "from_pretrained", classmethod(lambda cls, name: transformers.Dinov2Model(config))
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    batches = [(torch.randn(3, 3, 28, 28), torch.tensor([0.0, 1.0, 1.0])) for _ in range(2)]
    scope = {"batches": batches}
    exec(code, scope)
    assert scope["loss"].isfinite() and (tmp_path / "my-adapter" / "adapter.json").is_file()
    assert len(scope["masks"].layer_names) == 3


def test_files_the_readme_names_exist(repo):
    text = (repo / "README.md").read_text()
    for path in re.findall(r"`((?:csrc|masm_ext|python|benchmarks|docs)/[\w/.-]*)`", text):
        assert (repo / path).exists(), path
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", prose):
        assert (repo / target).exists(), target


def test_masm_commands_parse(repo, tmp_path):
    cli = pytest.importorskip("masm_detect.cli", reason="needs the extra masm_ext[detect]")
    text = (repo / "README.md").read_text()
    [config] = re.findall(r"```yaml\n(.*?)```", text, flags=re.S)
    (tmp_path / "run.yaml").write_text(config)
    commands = re.findall(r"^masm (\w.*?)(?:\s+#.*)?$", text, flags=re.M)
    assert {c.split()[0] for c in commands} == {"prepare", "train", "eval"}
    for command in commands:
        parser, _ = cli._parser()
        values = parser.parse_args(shlex.split(command.replace("run.yaml", str(tmp_path / "run.yaml"))))
        parser.instantiate(values)


def test_make_targets_exist(repo):
    makefile = (repo / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (repo / "README.md").read_text(), flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
