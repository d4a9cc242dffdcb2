"""Whether the engine's KV groups are the ones that were planned.

An engine puts entries that it takes for equal into one group, with one block table and one
manager. Were two policies merged, one of them would silently not hold: blocks that are still read
would be freed, or nothing at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvcache.retention import RetentionPolicy

_WAY_OUT = (
    "the engine groups KV entries in another way than this release expects: install the version "
    "of vLLM that its requirements name, or choose a method that keeps everything"
)


def check_groups(
    planned: Mapping[str, RetentionPolicy | None],
    groups: Sequence[Mapping[str, RetentionPolicy | None]],
) -> None:
    """Compares the engine's groups with the plan.

    Args:
        planned: the policy of each entry that has a KV cache of its own, by name; None where
            it is none of ours.
        groups: per KV group, the policy that holds for each entry in it, by name. Entries that
            nobody planned may join a group of their policy.

    Raises:
        ValueError: an entry is in no group or in several, or under another policy than planned,
            or a group has several policies.
    """
    places: dict[str, list[int]] = {name: [] for name in planned}
    for index, group in enumerate(groups):
        first: str | None = None
        for name, policy in group.items():
            first = name if first is None else first
            if policy != group[first]:
                raise ValueError(
                    f"KV group {index} has entry {first}, which keeps {_text(group[first])}, and "
                    f"entry {name}, which keeps {_text(policy)}; {_WAY_OUT}"
                )
            if name in planned:
                places[name].append(index)
                _require_policy(name, index, planned[name], policy)
    for name, found in places.items():
        if len(found) != 1:
            where = f"in the KV groups {found}" if found else "in no KV group"
            raise ValueError(
                f"entry {name} (keeps {_text(planned[name])}) is {where}, and must be in one; "
                f"{_WAY_OUT}"
            )


def _require_policy(
    name: str, index: int, planned: RetentionPolicy | None, policy: RetentionPolicy | None
) -> None:
    if policy != planned:
        raise ValueError(
            f"entry {name} was to keep {_text(planned)}, and is in KV group {index}, which keeps "
            f"{_text(policy)}; {_WAY_OUT}"
        )


def _text(policy: RetentionPolicy | None) -> str:
    return "what vLLM decides" if policy is None else policy.identity
