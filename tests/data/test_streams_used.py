"""Streams made into caches and trained on, to the end and through faults."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fewstep.commands import cache as command
from fewstep.data.cached import CachedLatents
from fewstep.errors import UserError
from fewstep.training.opening import open_sources
from tests.cli.lab import call
from tests.data.cache_lab import files_of
from tests.data.stream_lab import (
    CACHE,
    CAPTIONS,
    FILES,
    in_parquet,
    table,
)
from tests.data.test_cache import Rank
from tests.data.test_data_faults import fault_at, goes_on_as_if_nothing_had_been, pretraining
from tests.tiny_pipelines import SIDE
from tests.tiny_pipelines import saved as saved_pipeline
from tests.training.runs import begin, go

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(multiprocess|dill|datasets).*")


def test_a_cache_of_a_stream_has_the_bytes_of_one_of_the_whole_set(tmp_path, monkeypatch, request_, encoder):
    path = in_parquet(tmp_path / "streamed", [*CAPTIONS[:5], None, *CAPTIONS[:17]])
    monkeypatch.setattr(CACHE, tmp_path / "copies")
    whole = replace(request_, data="huggingface", path=path, out=tmp_path / "whole")
    streamed = replace(whole, out=tmp_path / "cached", options=("streaming=true", "buffer=5"))
    for one in (whole, streamed):
        command.run(one)
    ours, its = files_of(streamed.out), files_of(whole.out)
    shards = [name for name in its if name.endswith(".safetensors")]
    assert len(shards) == 9
    assert [name for name in shards if ours[name] != its[name]] == []
    assert CachedLatents(streamed.out).length == 22
    (streamed.out / "index.json").unlink()
    (streamed.out / shards[1]).unlink()
    encoder.seen.clear()
    command.run(streamed)
    assert files_of(streamed.out) == ours
    shared = replace(streamed, out=tmp_path / "shared")
    command.files.write_plan(shared.out, command._plan(shared, Path(shared.teacher), command._dataset(shared)))
    for rank in (2, 1, 0):
        monkeypatch.setattr(command, "Accelerator", lambda rank=rank: Rank(rank, 3))
        command.run(shared)
    assert files_of(shared.out) == ours
    pq.write_table(table(range(5), ["other"] * 5), path / "data" / FILES[0])
    with pytest.raises(UserError, match=r"was begun otherwise \(contents was '"):
        command.run(streamed)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("through", ["cache", "run"])
def test_a_teacher_of_prompts_learns_from_a_stream_and_goes_on(tmp_path, through):
    """By the commands: through a cache of the stream, and with what the run itself encodes."""
    pipeline, path = saved_pipeline("sd15", tmp_path), in_parquet(tmp_path / "set", side=SIDE)
    options = {"streaming": True, "buffer": 4}
    data = {"name": "huggingface", "path": str(path), "size": SIDE, "batch_size": 2, "options": options}
    if through == "cache":
        words = ["--data", "huggingface", "--path", str(path), "--size", str(SIDE), "--option", "streaming=true"]
        assert call("cache", str(pipeline), str(tmp_path / "cache"), *words, "--batch", "8").code == 0
        data = {"name": "cache", "path": str(tmp_path / "cache"), "batch_size": 2}
    run = {
        "run": {"dir": str(tmp_path / "run")},
        "teacher": {"path": str(pipeline)},
        "method": {"name": "dmd2", "critic_updates": 2},
        "data": data,
        "train": {"steps": 4, "threads": 1, "sample_every": 0, "checkpoint_every": 1, "keep_last": 4},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    outcome = call("train", str(tmp_path / "run.yaml"))
    assert outcome.code == 0, outcome.err
    last = tmp_path / "run" / "checkpoints" / "step-00000004" / "player-student.safetensors"
    straight = last.read_bytes()
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    outcome = call("train", str(tmp_path / "run.yaml"), "data.workers=2")
    assert outcome.code == 0, outcome.err
    assert last.read_bytes() == straight


@pytest.mark.skipif(sys.platform != "linux", reason="as the other tests of faults")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_a_stream_survives_a_shard_that_goes(tmp_path, workers):
    path = in_parquet(tmp_path / "set")
    options = {"streaming": True, "buffer": 4}
    run = pretraining(tmp_path, {"name": "huggingface", "path": str(path), "workers": workers, "options": options})
    straight = begin(run, open_sources(run))
    go(straight)
    told = fault_at(begin(run, open_sources(run)), 2, lambda: (path / "data").rename(tmp_path / "away") and None)
    assert "cannot be read any more (No such file or directory); put it back; the same command goes on" in told
    (tmp_path / "away").rename(path / "data")
    goes_on_as_if_nothing_had_been(run, lambda: open_sources(run), straight)
