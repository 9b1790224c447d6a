"""A video's name as people, logs and reports may see it: without the secrets in its URL."""

from __future__ import annotations

import re

#: The word for standard input in place of a video.
STDIN = "-"
# A user with a password, up to the last @: somebody may have forgotten to escape one, or a slash,
# which FFmpeg takes for a host with a port that is no number. Then a user alone.
_SECRETS = re.compile(r"(?<=://)(?:(?!\[)[^/?#\s:@]*:(?!\d*(?:[/?#\s]|$))[^?\s]*@|[^/?#\s]*@)")
# Parameters whose names say so (?token=, &api_key=, ...), rather one too many.
_PARAMETERS = re.compile(
    r"([?&;][^=&;#\s]*(?:user|login|pass|pwd|token|secret|sig|auth|key|credential|session)"
    r"[^=&;#\s]*=)[^&;#\s]+",
    re.IGNORECASE,
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")


def shown_name(video: str) -> str:
    """``video`` as it is shown."""
    return "standard input" if video == STDIN else without_secrets(video)


def without_secrets(text: str) -> str:
    """``text`` with what its URLs should keep to themselves replaced by ``***``: user and password,
    and parameters named like a secret."""
    return _URL.sub(lambda url: _PARAMETERS.sub(r"\1***", url[0]), _SECRETS.sub("***@", text))
