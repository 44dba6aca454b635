"""Model files from the Hugging Face hub, for `Llama.from_pretrained`."""

from __future__ import annotations

import fnmatch
import importlib
import os
from collections.abc import Sequence
from typing import Any

from crumplezone.errors import InputError


def download(repo_id: str, patterns: Sequence[str], **options: Any) -> str:
    """Download one file for each pattern; returns the path of the first.

    Args:
        repo_id: The repository.
        patterns: File names or glob patterns, each of which fits one file.
        options: Of ``huggingface_hub.hf_hub_download``.

    Raises:
        ImportError: huggingface_hub is not installed.
        InputError: A pattern fits no file, or several.
    """
    try:
        hub: Any = importlib.import_module("huggingface_hub")
        checks: Any = importlib.import_module("huggingface_hub.utils")
    except ImportError:
        raise ImportError(
            "from_pretrained needs the huggingface-hub package: `pip install huggingface-hub`"
        ) from None
    checks.validate_repo_id(repo_id)
    found = hub.HfFileSystem().ls(repo_id, recursive=True)
    names = [os.path.relpath(each["name"] if isinstance(each, dict) else each, repo_id) for each in found]
    paths: list[str] = []
    for pattern in patterns:
        fitting = [name for name in names if fnmatch.fnmatch(name, pattern)]
        if len(fitting) != 1:
            raise InputError(
                "filename", pattern, f"must fit one file of {repo_id}, and fits {fitting or names}"
            )
        # The folder is part of the name: the place of the file follows from it, with local_dir too.
        folder, name = os.path.split(fitting[0])
        path = hub.hf_hub_download(repo_id=repo_id, filename=name, subfolder=folder or None, **options)
        paths.append(str(path))
    return paths[0]
