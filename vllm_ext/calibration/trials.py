"""Verdicts on disk, beside the profile to be: an interrupted calibration goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attn_backends.config import read_text
from vllm_ext.calibration.search import Verdict
from vllm_ext.errors import UserError

MAX_STATE_BYTES = 64 << 20


class Trials:
    """The verdicts that are known.

    Args:
        path: of the file, which need not exist.
        key: everything that the verdicts depend on; a file with another key is not used.

    Raises:
        UserError: the file is of something else.
    """

    def __init__(self, path: Path, key: Mapping[str, str]) -> None:
        self.path = path
        self._key = dict(key)
        self._verdicts: dict[str, dict[str, Any]] = {}
        if path.is_file():
            found = _read(path)
            if found["key"] == self._key:
                self._verdicts = found["verdicts"]

    def __len__(self) -> int:
        return len(self._verdicts)

    def recall(self, anchors: tuple[int, ...]) -> Verdict | None:
        """The verdict of an earlier run with the same key."""
        found = self._verdicts.get(str(anchors))
        return None if found is None else Verdict(**(found | {"anchors": anchors}))

    def keep(self, verdict: Verdict) -> None:
        """Writes it down at once."""
        self._verdicts[str(verdict.anchors)] = asdict(verdict)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"key": self._key, "verdicts": self._verdicts}))
        os.replace(partial, self.path)

    def forget(self) -> None:
        """The profile is written: nothing to go on from."""
        self.path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path, MAX_STATE_BYTES, named=str(path)))
        return {"key": dict(found["key"]), "verdicts": dict(found["verdicts"])}
    except (ValueError, TypeError, KeyError, RecursionError):  # ConfigError is a ValueError
        raise UserError(f"{path} is not of an interrupted calibration; remove it") from None
