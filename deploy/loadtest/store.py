"""The run's JSON file: finished cells are kept, so that a run can be continued."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.loadtest.grid import Cell
from vllm_ext.errors import UserError


class Store:
    """Results of one run, on disk after every cell.

    Args:
        path: the JSON file; it need not exist.
        settings: whatever the figures depend on beside arm and cell.
        machine: where the load comes from.
        is_fresh: throw away what the file holds.

    Raises:
        UserError: the file is of another kind or another run; the message names the setting.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], machine: dict[str, str], is_fresh: bool = False
    ) -> None:
        self._path = path
        self.result: dict[str, Any] = {
            "settings": settings,
            "machine": machine,
            "notes": [],
            "arms": {},
            "cells": [],
            "not_run": [],
        }
        if path.exists() and not is_fresh:
            self._continue_from(json.loads(path.read_text()))

    def _continue_from(self, old: dict[str, Any]) -> None:
        hint = f"choose another --output, or --fresh to throw away what {self._path} holds"
        if not {"settings", "arms", "cells"} <= set(old):
            raise UserError(f"--output: {self._path} is not a load test; choose another")
        self._require_same("settings", old["settings"], self.result["settings"], hint)
        self._require_same("machine", old["machine"], self.result["machine"], hint)
        self.result |= {"arms": old["arms"], "cells": old["cells"], "notes": old["notes"]}

    def _require_same(self, what: str, old: dict[str, Any], new: dict[str, Any], hint: str) -> None:
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise UserError(
                    f"{self._path} was made with {what} {key} {old.get(key)!r}, now it is "
                    f"{new.get(key)!r}; {hint}"
                )

    def add_note(self, text: str) -> None:
        """Keeps what the reader must know beside the figures, once."""
        if text not in self.result["notes"]:
            self.result["notes"].append(text)

    def add_arm(self, name: str, definition: dict[str, Any]) -> None:
        """Notes what an arm is.

        Raises:
            UserError: the file knows another arm of that name.
        """
        hint = f"give the arm another name, or --fresh to throw away what {self._path} holds"
        known = self.result["arms"].setdefault(name, definition)
        self._require_same(f"arm {name}'s", known, definition, hint)

    def has(self, arm: str, cell: Cell) -> bool:
        """Whether the cell is finished; one whose client failed is not."""
        return any(
            record["arm"] == arm and record["cell"] == asdict(cell) and not record["failure"]
            for record in self.result["cells"]
        )

    def add(self, record: dict[str, Any]) -> None:
        """Keeps a cell's record, in place of an earlier failed one, and writes the file."""
        self.result["cells"] = [
            known
            for known in self.result["cells"]
            if (known["arm"], known["cell"]) != (record["arm"], record["cell"])
        ] + [record]
        self.save()

    def add_not_run(self, arm: str, cell: Cell, reason: str) -> None:
        """Notes a cell that this run did not get to."""
        entry = {"arm": arm, "cell": asdict(cell), "reason": reason}
        self.result["not_run"].append(entry)
        self.save()

    def save(self) -> None:
        """Writes the file whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".json.part")
        draft.write_text(json.dumps(self.result, indent=1, allow_nan=False) + "\n")
        os.replace(draft, self._path)
