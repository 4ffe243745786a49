"""The protocols of the package, and those of a user: every file is complete, unknown keys are refused."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml
from masm_detect.commands.main import build_parser, completed, main
from masm_detect.data.deepfakebench import label_of
from masm_detect.evaluation.protocols import (
    ProtocolError,
    known_data_sets,
    load_protocol,
    protocol_names,
    training_command,
)

OWN = {
    "title": "mine",
    "source": [{"title": "a paper", "link": "https://example.org"}],
    "train": {"data": ["FaceForensics++"]},
    "test": [{"data": "Celeb-DF-v2", "split": "test"}],
}


def own(tmp_path, **changes) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(OWN | changes))
    return str(path)


def test_data_sets_are_described_and_their_files_are_unique():
    known = known_data_sets()
    names = [data.file for data in known.values()]
    assert len(set(names)) == len(names) and all(name.endswith(".json") for name in names)
    assert len({data.short for data in known.values()}) == len(known)
    for data in known.values():
        assert data.page.startswith("https://") and data.terms and data.json and data.title
        # the labels are those that the reader knows anyway
        assert set(data.labels.values()) == {0, 1}
        assert all(label_of(name) == label for name, label in data.labels.items())


@pytest.mark.parametrize("name", protocol_names())
def test_every_protocol_is_complete(name):
    protocol = load_protocol(name)
    assert protocol.name == name and protocol.source and all(s.title and s.link for s in protocol.source)
    assert protocol.test and protocol.train.data
    for data in {*protocol.train.data, *(test.data for test in protocol.test)}:
        assert protocol.data_sets[data].page and protocol.data_sets[data].terms
    # no protocol tests on the split that is trained on, nor on a forgery that it calls unseen
    for test in protocol.test:
        assert test.split == "test"
        if "leave-out" in name:
            assert not set(test.methods) & set(protocol.train.methods)
    parser, commands = build_parser()
    words = shlex.split(training_command(protocol).removeprefix("masm "))
    assert parser.parse_args(completed(words, commands)).train.data.paths  # the command is one


def test_the_cross_dataset_table_and_its_parts():
    cross = load_protocol("ffpp-cross-dataset")
    alone = [load_protocol(name) for name in protocol_names() if name.startswith("ffpp-to-")]
    assert sorted(test.data for one in alone for test in one.test) == sorted(test.data for test in cross.test)
    assert all(one.train == cross.train for one in alone)
    assert {test for one in alone for test in map(repr, one.test)} == set(map(repr, cross.test))
    methods = set(cross.train.methods)
    left_out = {}
    for name in protocol_names():
        if "leave-out" in name:
            one = load_protocol(name)
            left_out[name] = methods - set(one.train.methods)
            assert left_out[name] == set(one.test[0].methods)
    assert set.union(*left_out.values()) == methods and len(left_out) == 4


def test_a_protocol_of_ones_own(tmp_path):
    protocol = load_protocol(own(tmp_path))
    assert protocol.name == "mine" and protocol.names() == ["CDFv2"]
    described = {"faces": {"title": "Faces", "short": "F", "file": "f.json", "page": "p", "terms": "t", "json": "j"}}
    protocol = load_protocol(own(tmp_path, data_sets=described, test=[{"data": "faces"}]))
    assert protocol.places("faces") == ["f.json", "f/f.json", "f/"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tests": []}, "tests"),
        ({"train": {"data": ["FaceForensics++"], "method": ["FF-DF"]}}, "method"),
        ({"test": [{"data": "Celeb-DF-v2", "frames": 3}]}, "frames"),
        ({"test": [{"data": "Celeb-DF-v2", "frames_per_video": "many"}]}, "many"),
        ({"metric": "accuracy"}, "accuracy"),
        ({"source": "a paper"}, "a paper"),
        ({"name": "x"}, "has the key name"),
        ({"test": [{"data": "Celeb-DF-v9"}]}, "names the data sets Celeb-DF-v9, which are not known"),
        ({"test": [{"data": "UADFV"}, {"data": "UADFV", "split": "test"}]}, "two test sets called UADFV"),
    ],
)
def test_what_is_no_protocol_is_refused(tmp_path, changes, message):
    with pytest.raises(ProtocolError, match=message):
        load_protocol(own(tmp_path, **changes))


def test_other_files_are_refused(tmp_path):
    for text, message in (("[1", "is not valid YAML"), ("3", "holds no protocol")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ProtocolError, match=message):
            load_protocol(str(tmp_path / "x.yaml"))
    with pytest.raises(ProtocolError, match="does not exist"):
        load_protocol(str(tmp_path / "y.yaml"))


def test_parameters():
    protocol = load_protocol("unseen-generator", {"data": "faces", "unseen": "gan, diffusion"})
    assert protocol.names() == ["gan", "diffusion"] and protocol.train.without == ["gan", "diffusion"]
    assert protocol.data_sets[protocol.test[0].data].file == "faces"
    with pytest.raises(ProtocolError, match=r"needs data \(.*--parameters.unseen=VALUE"):
        load_protocol("unseen-generator", {})
    with pytest.raises(ProtocolError, match="needs no parameters, and got data: leave them out"):
        load_protocol("demo", {"data": "x"})
    with pytest.raises(ProtocolError, match=r"parameter unseen .* is empty"):
        load_protocol("unseen-generator", {"data": "faces", "unseen": " , "})


def test_the_list_and_the_page_of_the_documentation(capsys, repo):
    assert main(["eval", "--list_protocols"]) == 0
    printed = capsys.readouterr().out
    page = (repo / "docs" / "protocols.md").read_text()
    rows = {cells[0]: cells for line in page.splitlines() if (cells := _cells(line))}
    for name in protocol_names():
        protocol = load_protocol(name)
        for source in protocol.source:
            assert source.link in printed and source.link.removeprefix("docs/") in page
        assert f"{name}: {protocol.title}" in printed and training_command(protocol) in printed
        row = rows[f"`{name}`"]
        tests = ", ".join("the unseen generators" if "{" in test else test for test in protocol.names())
        assert row[2] == tests, name
        if name.startswith("ffpp"):
            assert row[1] == f"FF++ ({protocol.train.compression}): {', '.join(protocol.train.methods)}"
    for data in known_data_sets().values():
        row = rows[data.short]
        assert row[1:] == [f"`{data.file}`", f"[{data.title}]({data.page})", data.terms], data.short
        assert data.page in printed


def test_the_example_of_the_documentation(tmp_path, repo):
    text = (repo / "docs" / "protocols.md").read_text()
    for command in re.findall(r"^masm (\w.*)$", text, flags=re.M):
        parser, modules = build_parser()
        parser.instantiate(parser.parse_args(completed(shlex.split(command), modules)))
    [example] = re.findall(r"```yaml\n(.*?)```", text, flags=re.S)
    (tmp_path / "example.yaml").write_text(example)
    protocol = load_protocol(str(tmp_path / "example.yaml"))
    assert protocol.names() == ["mine"] and protocol.train.compression == "c40"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
