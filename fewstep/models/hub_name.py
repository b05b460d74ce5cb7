"""Names on the Hugging Face hub, alone or with the commit that is meant: `owner/name`, `owner/name@commit`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A repository on the hub.

    Attributes:
        repository: its name with its owner's.
        revision: a commit, branch or tag; None: the newest there is.
    """

    repository: str
    revision: str | None = None

    @staticmethod
    def of(path: str) -> HubName | None:
        """What `path` names on the hub; None for folders, and for what can be no name there."""
        repository, _, revision = path.partition("@")
        if Path(path).is_dir() or repository.count("/") != 1 or repository.startswith((".", "/")):
            return None
        return HubName(repository, revision or None)

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None
