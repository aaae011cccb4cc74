"""What a conversion read, ignored and missed, in words."""

import dataclasses
from typing import Any

from jaxstyle.errors import one_line


@dataclasses.dataclass
class Report:
    """One line of text an entry.

    Attributes:
      kind: what the file was recognised as.
      licence: which terms bind the weights.
      source: name and sha256 of the file.
      read: networks and arrays that were taken.
      ignored: what was not, and why.
      missing: what the file lacks and what that prevents.
      notes: anything else a user should know.
      more: further metadata of the network folder.
      training: arrays to go on training from, see `convert.training`.
    """

    kind: str = ""
    licence: str = ""
    source: dict[str, str] = dataclasses.field(default_factory=dict)
    read: list[str] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report as lines to print."""
        lines = [f"{self.source.get('file', 'file')}: {self.kind}"]
        parts = {"read": self.read, "ignored": self.ignored, "missing": self.missing}
        for name, entries in (parts | {"note": self.notes}).items():
            # Keys come from the file: no line breaks, no control characters.
            lines += [f"  {name:8} {one_line(entry)}" for entry in entries]
        return [*lines, f"  {'licence':8} {self.licence}"]

    def metadata(self) -> dict:
        """What is kept in the network folder's config."""
        return self.more | {
            "source": {**self.source, "kind": self.kind, "licence": self.licence},
            "conversion": {"missing": self.missing, "notes": self.notes},
        }
