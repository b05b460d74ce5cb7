"""An export on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from fewstep.errors import RunError, UserError


def check_name(name: str) -> None:
    """Refuse what can be no repository, before anything long starts.

    Raises:
        UserError: it is not `owner/name`, or not in the hub's letters.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub: {name!r} is no name of a repository; write owner/name") from error
    if name.count("/") != 1:
        raise UserError(f"--push-to-hub: {name!r} given; write owner/name")


def push(out: Path, name: str) -> str:
    """Upload the folder, into a new repository where there is none; its address.

    Raises:
        RunError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(name, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=out, commit_message="Export by fewstep")
    except Exception as error:  # the client lets errors of its HTTP library through, and has changed that library
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"--push-to-hub: {name} was not uploaded, {out} is whole: {told}") from error
    return address
