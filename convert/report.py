"""What a conversion read, ignored and missed, in words."""

import dataclasses

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
    """

    kind: str = ""
    licence: str = ""
    source: dict[str, str] = dataclasses.field(default_factory=dict)
    read: list[str] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as lines to print."""
        lines = [f"{self.source.get('file', 'file')}: {self.kind}"]
        for name in ("read", "ignored", "missing", "notes"):
            label = {"notes": "note"}.get(name, name)
            lines += [f"  {label:8} {entry}" for entry in getattr(self, name)]
        lines.append(f"  {'licence':8} {self.licence}")
        # Keys come from the file: no line breaks, no control characters.
        return [
            line[: len(line) - len(line.lstrip())] + one_line(line) for line in lines
        ]

    def metadata(self) -> dict:
        """What is kept in the network folder's config."""
        return {
            "source": {**self.source, "kind": self.kind, "licence": self.licence},
            "conversion": {"missing": self.missing, "notes": self.notes},
        }
