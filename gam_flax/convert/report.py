"""What a conversion did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from gam_flax.convert.errors import shorten


@dataclass
class ConversionReport:
    """What went where.

    source: the file; "" for what came from memory.
    mapped: torch key, canonical → Flax path.
    missing: Flax leaves that the source has nothing for, by their torch keys.
    unexpected: keys of the source that the model has no place for.
    mismatched: torch key → the shape found and the shape expected, both in torch's layout.
    kept: layers that keep their initialisation, as `keep` asked.
    left: keys of the source that belong to such layers and were not taken.
    cast: torch key → the dtype found and the dtype of the model.
    not_finite: keys whose tensors hold NaN or infinity.
    settings: norm layer → (setting, the model's value, the source's value, now the model's).
    variants: block → the variant as which it was read.
    notes: what else a reader should know.
    """

    source: str = ""
    mapped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    cast: dict[str, tuple[str, str]] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    settings: dict[str, list[tuple[str, float | None, float | None]]] = field(default_factory=dict)
    variants: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every leaf was filled and every tensor found its place, but for `kept`."""
        return not (self.missing or self.unexpected or self.mismatched)

    def problems(self) -> list[str]:
        """One line for each leaf that strict loading will not accept."""
        return [
            *(f"missing {shorten(key)}" for key in self.missing),
            *(f"unexpected {shorten(key)}" for key in self.unexpected),
            *(
                f"{shorten(key)} is {found}, expected {expected}"
                for key, (found, expected) in self.mismatched.items()
            ),
        ]

    def to_json(self) -> str:
        """The fields as one JSON object."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        lines = [f"{len(self.mapped)} tensors converted"]
        if self.kept:
            lines.append(f"{_some(self.kept)}: keep their initialisation")
        if self.left:
            lines.append(f"{_some(self.left)}: left in the source")
        if self.cast:
            pairs = sorted(set(self.cast.values()))
            kinds = ", ".join(f"{found} to {expected}" for found, expected in pairs)
            lines.append(f"{len(self.cast)} cast: {kinds}")
        if self.not_finite:
            lines.append(f"NaN or infinity in {_some(self.not_finite)}")
        for path, changes in self.settings.items():
            lines += [f"{path}: {name} {old} → {new}" for name, old, new in changes]
        return "\n".join([*lines, *self.problems(), *self.notes])


def _some(names: list[str]) -> str:
    """How many, and the first of them."""
    more = ", …" if len(names) > 4 else ""
    return f"{len(names)} ({', '.join(map(shorten, names[:4]))}{more})"
