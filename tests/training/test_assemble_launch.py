"""How processes are asked for: the shipped configs of `accelerate launch`, and what of accelerate is refused."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import DistributedType
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from fewstep.commands.configs import shipped
from fewstep.errors import UserError
from fewstep.training import assemble
from tests.training.runs import METHODS, config

FOLDER = Path(str(files("fewstep.configs"))) / "accelerate"
EXPECTED = {
    "one_gpu": (DistributedType.NO, 1, 1),
    "eight_gpus_ddp": (DistributedType.MULTI_GPU, 1, 8),
    "eight_gpus_fsdp2": (DistributedType.MULTI_GPU, 1, 8),
    "four_nodes": (DistributedType.MULTI_GPU, 4, 32),
}


def test_every_launch_config_is_expected():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(EXPECTED)
    assert not any(name.startswith("accelerate/") for name in shipped()), "they are no runs"


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_launch_configs(name):
    read = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(read, ClusterConfig)
    assert (DistributedType(read.distributed_type), read.num_machines, read.num_processes) == EXPECTED[name]
    assert read.mixed_precision == "no", "train.precision decides"
    assert not read.use_cpu


@pytest.mark.parametrize("name", EXPECTED)
def test_the_line_in_each_launch_config_is_a_command(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    comment = " ".join(line.lstrip("# ").rstrip("\\") for line in text.splitlines() if line.startswith("#"))
    words = comment[comment.index("accelerate launch") :].split()
    words = [{"N": "3", "FIRST": "10.0.0.1"}.get(word, word) for word in words[: words.index("CONFIG") + 2]][2:]
    parsed = launch_command_parser().parse_args([word for word in words if word != "Precision"])
    assert parsed.config_file == f"configs/accelerate/{name}.yaml"
    assert parsed.module
    assert (parsed.training_script, *parsed.training_script_args[:2]) == ("fewstep", "train", "CONFIG")
    assert ("train.shard=full" in parsed.training_script_args) == (name in {"eight_gpus_fsdp2", "four_nodes"})


def test_an_accelerate_of_one_model_is_refused(monkeypatch):
    made = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(assemble, "Accelerator", lambda **_: made)
    with pytest.raises(UserError, match=r"distributed_type FSDP given; give MULTI_GPU, and train.shard=full"):
        assemble.make_accelerator(config(METHODS["pretrain"]))
