"""What servers wrote down of requests (trirank_backend.request_log), read again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trirank_backend.sealed_files import lines_of

from trirank_build.errors import BadData

NEEDED = ("request_id", "moment", "user_id", "query", "scenario", "item_ids", "retrieval_scores")
"""Of every line."""


def logged_requests(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of all files of a folder, file by file. A last line that is not whole, as a killed server leaves
    it, is left out.

    Raises:
        BadData: there is no file, or a line in the middle of one is none.
    """
    files = sorted(folder.glob("requests-*.jsonl"))
    if not files:
        raise BadData(f"{folder} holds no requests-*.jsonl; serve with --log-requests {folder}")
    for file in files:
        for number, text, whole in lines_of(file):
            if text is None and whole:
                raise BadData(f"{file}, line {number} was changed, or is of another file; leave the file out")
            try:
                found = json.loads(text or b"")
            except ValueError as error:
                if not whole:
                    break
                raise BadData(f"{file}, line {number} is no JSON ({error}); leave the file out") from error
            if not isinstance(found, dict) or (lacking := [name for name in NEEDED if name not in found]):
                what = f"has no {lacking[0]}" if isinstance(found, dict) else "is no object"
                raise BadData(f"{file}, line {number} {what}, so no server wrote it down; leave the file out")
            yield found
