"""Options for publishing a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from flextok_pl.interop.hub import HubId

REVISION = r"[\w.-][\w./-]*"


@dataclass(frozen=True)
class Publication:
    """How to publish a model on the Hugging Face Hub, and facts for its card.

    Args:
        repository: `OWNER/NAME`; created if it does not exist.
        license: licence of the weights: an identifier of the Hub, such as `apache-2.0`, `mit`, `cc-by-sa-4.0` or
            `other`; must be given.
        license_link: address of the text of a licence that is `other`.
        data_license: licence of the training data, in any words, such as `CC BY-SA 4.0`; must be given.
        data: name of the training data, or the Hub id of its data set, which the Hub then links; default the name of
            the folder that the run has read.
        private: show it only to the owner, or to the members of that organisation.
        gated: make others ask for access: `auto` gives it at once, `manual` when the owner agrees.
        revision: branch to write to, created if it does not exist; default `main`.
        message: commit message; default `Add NAME`.
    """

    repository: str
    license: str | None = None
    license_link: str | None = None
    data_license: str | None = None
    data: str | None = None
    private: bool = False
    gated: Literal["auto", "manual"] | None = None
    revision: str | None = None
    message: str | None = None

    def __post_init__(self) -> None:
        found = HubId.parse(self.repository)
        if found is None or found.revision is not None:
            raise ValueError(f"repository={self.repository!r} must be OWNER/NAME; a branch goes into revision")
        if not self.license:
            raise ValueError(
                "license is missing: give the licence for use of the weights, as the Hub names it, such as "
                "license=apache-2.0, cc-by-sa-4.0, or other with license_link"
            )
        if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", self.license):
            raise ValueError(
                f"license={self.license!r} is not an identifier (small letters, digits, dots and hyphens) of "
                "https://huggingface.co/docs/hub/repositories-licenses; for any other use `other` with license_link"
            )
        if (self.license == "other") != bool(self.license_link):
            raise ValueError(
                f"license={self.license!r} and license_link={self.license_link!r}: `other` needs a link, and no other "
                "licence takes one"
            )
        if not (self.data_license or "").strip():
            raise ValueError(
                "data_license is missing: give the licence of the training data, such as "
                "data_license='CC BY-SA 4.0' or 'ImageNet terms of access', or 'unknown'"
            )
        if self.gated not in (None, "auto", "manual"):
            raise ValueError(f"gated={self.gated!r} must be auto or manual, or left out")
        if self.revision is not None and not re.fullmatch(REVISION, self.revision):
            raise ValueError(f"revision={self.revision!r} is not the name of a branch")
        if self.message is not None and not self.message.strip():
            raise ValueError("message='' is empty: leave it out, or describe the commit")

    @property
    def address(self) -> str:
        """The address from which `from_pretrained` loads it."""
        return str(HubId(self.repository, self.revision))

    @property
    def title(self) -> str:
        """The name without its owner."""
        return self.repository.partition("/")[2]
