"""What a profile says to a method, by the method's ``profile`` setting."""

from __future__ import annotations

from pathlib import Path

from attn_backends.method import Geometry
from attn_backends.profile import Profile, Section, load_profile, require_fit, shipped_profile

AUTO = "auto"


def chosen_section(
    choice: str, geometry: Geometry, method: str, section_cls: type[Section]
) -> Section | None:
    """The method's section of the chosen profile.

    Args:
        choice: path of a profile, or ``auto`` for the one shipped for the checkpoint.
        geometry: of the model.
        method: its name.
        section_cls: its kind of section.

    Returns:
        None under ``auto`` where nothing is shipped that says something to the method.

    Raises:
        ConfigError: the profile is not valid, says nothing to the method, or is of another shape.
    """
    profile = chosen_profile(choice, geometry, method)
    return None if profile is None else profile.section(method, section_cls)


def chosen_profile(choice: str, geometry: Geometry, method: str) -> Profile | None:
    """The profile that has the section; arguments, result and errors as of ``chosen_section``."""
    if choice != AUTO:
        profile = load_profile(Path(choice))
    else:
        shipped = shipped_profile(Path(geometry.model_path))
        if shipped is None or method not in shipped.methods:
            return None
        profile = shipped
    require_fit(profile, geometry.num_layers, geometry.num_kv_heads)
    return profile
