"""Nothing that ships runs code out of a file, unpacks an archive, starts a shell, or asks a network by itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.packaging.source import ROOT, Source, python_files, sources

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("shutil.unpack_archive", "torch.hub.load", "torch.package.PackageImporter", "ssl._create_unverified_context"),
    *("runpy.run_path", "runpy.run_module"),
}
"""Calls by their full name."""

LAST = {"extractall", "urlopen", "urlretrieve", "snapshot_download", "hf_hub_download", "upload_folder",
        "load_state_dict_from_url", "load_dataset", "load_dataset_builder", "import_module"}  # fmt: skip
"""Calls by the last part of their name: of archives, networks, and modules by name."""

ONLY = {"trust_remote_code": "False", "weights_only": "True", "use_safetensors": "True", "allow_pickle": "False",
        "shell": "False", "verify_ssl": "True"}  # fmt: skip
"""Arguments that may have one value."""

NEEDED = {"torch.load": "weights_only", "torch.jit.load": "nothing makes it safe",
          "from_pretrained": "use_safetensors"}  # fmt: skip
"""Calls that must say so."""

ALLOWED = {
    # names that the user gave
    ("fewstep/models/load.py", "snapshot_download"): "a hub name was given",
    ("fewstep/data/table.py", "load_dataset"): "a hub name was given, or a folder",
    ("fewstep/data/shard_list.py", "load_dataset_builder"): "a hub name was given, or a folder",
    ("pipelines/hub.py", "upload_folder"): "asked for with --push-to-hub",
    ("evaluation/user_module.py", "import_module"): "--features module:PACKAGE.ATTR",
    # names that fewstep gives
    ("fewstep/training/tracking.py", "import_module"): "wandb or trackio",
    ("fewstep/models/encoder.py", "import_module"): "below fewstep.pipelines alone",
    ("pipelines/reload.py", "import_module"): "what the export just wrote, in the fresh process that checks it",
    # what holds no weights, or runs no Python
    ("pipelines/reload.py", "from_pretrained"): "a scheduler's JSON",
    ("evaluation/dinov2.py", "from_pretrained"): "a config's JSON",
    ("evaluation/inception.py", "torch.jit.load"): "TorchScript, the form that clean-fid's weights come in: no pickle "
    "of Python's, and its code can call tensors' operations alone",
}
"""Place and call, and why."""


def all_sources() -> Iterator[Source]:
    """What ships, and what a developer runs."""
    yield from sources()
    for folder in ("benchmarks", "scripts", "examples", "docs"):
        yield from python_files(folder, ROOT / folder)


def risks(tree: ast.AST) -> list[str]:
    """The calls of a file that could run others' code, or reach out."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.rpartition(".")[2]
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            plain = last == "import_module" and isinstance(node.args[0], ast.Constant)
            if name in FORBIDDEN or (last in LAST and not plain) or name.endswith(".extract"):
                found.append(name if name in FORBIDDEN else last)
            found += [f"{key}={words[key]}" for key, value in ONLY.items() if words.get(key, value) != value]
            found += [key for key, word in NEEDED.items() if key in (name, last) and word not in words]
    return found


def test_no_file_runs_what_it_reads():
    found = {(one.place, risk) for one in all_sources() for risk in risks(one.tree)}
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set(), "an exception that nothing needs any more"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("eval(text)", ["eval"]),
        ("model.eval()", []),
        ("re.compile(text)", []),
        ("subprocess.run(words, shell=True)", ["shell=True"]),
        ("subprocess.run(words)", []),
        ("os.system(words)", ["os.system"]),
        ("yaml.load(text)", ["yaml.load"]),
        ("yaml.safe_load(text)", []),
        ("tarfile.open(path).extractall(place)", ["extractall"]),
        ("archive.extract(member)", ["extract"]),
        ("extract(images)", []),
        ("importlib.import_module(name)", ["import_module"]),
        ("importlib.import_module('torch')", []),
        ("np.load(path, allow_pickle=True)", ["allow_pickle=True"]),
        ("load(name, trust_remote_code=flag)", ["trust_remote_code=flag"]),
        ("torch.load(path, weights_only=False)", ["weights_only=False"]),
        ("torch.load(path)", ["torch.load"]),
        ("torch.jit.load(path)", ["torch.jit.load"]),
        ("Network.from_pretrained(path)", ["from_pretrained"]),
        ("Network.from_pretrained(path, use_safetensors=None)", ["use_safetensors=None"]),
        ("Network.from_pretrained(path, use_safetensors=True)", []),
        ("urllib.request.urlopen(address)", ["urlopen"]),
    ],
)
def test_the_search_for_risks_sees_them(text, found):
    assert risks(ast.parse(text)) == found
