"""A run goes on with the commits of hub repositories that it began with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.config import RunConfig
from fewstep.models.hub_name import HubName, commit_of
from fewstep.models.load import resolve

PLACES = (("teacher", "path"), ("teacher", "weak"), ("student", "path"))
"""Where a config names pipelines."""


def pinned(config: RunConfig, recorded: Path) -> RunConfig:
    """The config, each hub name in it at one commit: that of `recorded`, if it names the same, else the newest.

    A name that is told with a commit stays as it is, and so does one that the run began with before it had one.

    Args:
        config: of the run.
        recorded: the config that the run wrote down when it began, if there is one.

    Raises:
        UserError: the hub does not give a repository.
    """
    before = _read(recorded)
    for section, key in PLACES:
        values = getattr(config, section)
        hub = HubName.of(getattr(values, key) or "")
        if hub is None or hub.revision is not None:
            continue
        known = HubName.of(before.get(section, {}).get(key) or "")
        if known is None or known.repository != hub.repository:
            known = HubName(hub.repository, commit_of(resolve(str(hub), f"{section}.{key}")))
        config = config.model_copy(update={section: values.model_copy(update={key: str(known)})})
    return config


def _read(recorded: Path) -> Mapping[str, Any]:
    """Its text; nothing where it is missing or damaged: a checkpoint tells its own config, and refuses another's."""
    try:
        found = json.loads(recorded.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
