"""Uploads to the Hugging Face Hub, through `huggingface_hub`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .configuration import HubError


def push_folder(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload detector",
) -> Any:
    """Upload the files of a folder to a model repository, which is created if needed.

    Args:
        folder: a local folder.
        repo_id: "owner/name" on the hub.
        private: of a new repository; None: the default of its owner.
        token: of the hub; None: the stored one.
        revision: branch; None: main.
        create_pr: open a pull request instead of a commit on the branch.
        commit_message: first line of the commit.

    Returns:
        `huggingface_hub.CommitInfo`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=name,
        folder_path=str(folder),
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )


def push_export(folder: Path | str, repo_id: str, **options: Any) -> Any:
    """Upload an export of `masm export` as it is: weights, preprocessing, model card and certificate.

    Args:
        folder: the folder that `masm export` wrote.
        repo_id: "owner/name" on the hub.
        **options: as of `push_folder`.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        HubError: the folder is no export.
    """
    folder = Path(folder)
    missing = [name for name in ("certificate.json", "README.md") if not (folder / name).is_file()]
    if missing:
        raise HubError(f"{folder} has no {' and no '.join(missing)}: give a folder that `masm export` wrote")
    return push_folder(folder, repo_id, **options)
