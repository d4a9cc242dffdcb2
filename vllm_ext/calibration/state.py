"""What a calibration has found out so far, on disk beside the profile to be: where an interrupted
one goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_backends.config import read_text
from vllm_ext.errors import UserError

MAX_STATE_BYTES = 64 << 20


class SavedState:
    """Results by name.

    Args:
        path: of the file, which need not exist.
        key: everything that the results depend on; a file with another key is not used.

    Raises:
        UserError: the file is of something else.
    """

    def __init__(self, path: Path, key: Mapping[str, str]) -> None:
        self.path = path
        self._key = dict(key)
        self._found: dict[str, Any] = {}
        if path.is_file():
            saved = _read(path)
            if saved["key"] == self._key:
                self._found = saved["found"]

    def __len__(self) -> int:
        return len(self._found)

    def recall(self, name: str) -> Any:
        """What an earlier run with the same key kept under a name, or None."""
        return self._found.get(name)

    def keep(self, name: str, value: Any) -> None:
        """Writes a value of JSON's down at once."""
        self._found[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"key": self._key, "found": self._found}))
        os.replace(partial, self.path)

    def forget(self) -> None:
        """The profile is written: nothing to go on from."""
        self.path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(read_text(path, MAX_STATE_BYTES, named=str(path)))
        return {"key": dict(saved["key"]), "found": dict(saved["found"])}
    except (ValueError, TypeError, KeyError, RecursionError):  # ConfigError is a ValueError
        raise UserError(f"{path} is not of an interrupted calibration; remove it") from None
