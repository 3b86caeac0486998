"""What the driver records with a domain, as an element of its metadata: whose it is and how its last run went. Pure.

The element is all that is needed to find and describe an instance after the agent's restart.
"""

from datetime import datetime
from xml.etree import ElementTree

import msgspec

__all__ = ["METADATA_KEY", "METADATA_URI", "Record", "RunEnd"]

METADATA_URI = "urn:hypervisor:instance:1"
METADATA_KEY = "hypervisor"
_TAG = f"{{{METADATA_URI}}}instance"
ElementTree.register_namespace(METADATA_KEY, METADATA_URI)


class RunEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended."""

    exit_code: int | None
    """0: the guest switched itself off; 137: it was ended by force; None: it failed."""
    finished_at: datetime
    reason: str
    """EXITED, KILLED, SUSPENDED, GUEST_PANIC, VMM_DIED or RESTORED."""
    requested: bool
    """Whether the driver was asked for it."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The metadata of a domain, as values."""

    instance_id: str
    generation: int
    epoch: int
    name: str
    project: str
    home: str = ""
    """The driver's data directory: whose the domain is where several agents use one libvirt."""
    files: tuple[str, ...] = ()
    """Names of the files of the node's cache that it uses."""
    image: str = ""
    """Identity of the image its disk is based on; empty: none."""
    has_disk: bool = False
    uefi: bool = False
    accelerator: str = ""
    """``kvm``, ``qemu`` (its own emulation) or ``test``."""
    accelerator_reason: str = ""
    started_at: datetime | None = None
    stop_asked: bool = False
    """Whether this run was told to end: recorded before it is, so that whoever sees the end knows it was asked for."""
    end: RunEnd | None = None

    def element(self) -> ElementTree.Element:
        """The element to store."""
        element = ElementTree.Element(_TAG)
        for name, value in self._attributes().items():
            element.set(name, value)
        return element

    def to_xml(self) -> str:
        """The element as libvirt takes it by itself: it gives the name space a prefix of its own."""
        plain = ElementTree.Element("instance")
        for name, value in self._attributes().items():
            plain.set(name, value)
        return ElementTree.tostring(plain, encoding="unicode")

    def _attributes(self) -> dict[str, str]:
        attributes = {
            "id": self.instance_id,
            "generation": str(self.generation),
            "epoch": str(self.epoch),
            "name": self.name,
            "project": self.project,
            "home": self.home,
            "files": " ".join(self.files),
            "image": self.image,
            "disk": _word(self.has_disk),
            "uefi": _word(self.uefi),
            "accelerator": self.accelerator,
            "accelerator-reason": self.accelerator_reason,
        }
        if self.started_at is not None:
            attributes["started-at"] = self.started_at.isoformat()
        if self.stop_asked:
            attributes["stop-asked"] = "yes"
        if self.end is not None:
            attributes["finished-at"] = self.end.finished_at.isoformat()
            attributes["exit-code"] = "" if self.end.exit_code is None else str(self.end.exit_code)
            attributes["end-reason"] = self.end.reason
            attributes["end-requested"] = _word(self.end.requested)
        return attributes

    @classmethod
    def from_xml(cls, text: str) -> "Record":
        """The record in what libvirt gives back. Raises ValueError for one that somebody has damaged."""
        try:
            element = ElementTree.fromstring(text)
        except ElementTree.ParseError as exc:
            raise ValueError(f"the metadata is no XML: {exc}") from exc
        values = element.attrib
        try:
            end = None
            if "finished-at" in values:
                code = values["exit-code"]
                end = RunEnd(
                    exit_code=int(code) if code else None,
                    finished_at=datetime.fromisoformat(values["finished-at"]),
                    reason=values["end-reason"],
                    requested=values["end-requested"] == "yes",
                )
            started = values.get("started-at")
            return cls(
                instance_id=values["id"],
                generation=int(values["generation"]),
                epoch=int(values["epoch"]),
                name=values["name"],
                project=values["project"],
                home=values["home"],
                files=tuple(values["files"].split()),
                image=values["image"],
                has_disk=values["disk"] == "yes",
                uefi=values["uefi"] == "yes",
                accelerator=values["accelerator"],
                accelerator_reason=values["accelerator-reason"],
                started_at=None if started is None else datetime.fromisoformat(started),
                stop_asked=values.get("stop-asked") == "yes",
                end=end,
            )
        except KeyError as exc:
            raise ValueError(f"attribute {exc.args[0]} is missing") from exc


def _word(value: bool) -> str:
    return "yes" if value else "no"
