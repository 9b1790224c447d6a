"""A video's name as people, logs and reports may see it: without the password in its URL."""

from __future__ import annotations

import re

#: The word for standard input in place of a video.
STDIN = "-"
# A user with a password, up to the last @: somebody may have forgotten to escape one, or a slash,
# which FFmpeg takes for a host with a port that is no number. Then a user alone.
_SECRETS = re.compile(r"(?<=://)(?:(?!\[)[^/?#\s:@]*:(?!\d*(?:[/?#\s]|$))[^?\s]*@|[^/?#\s]*@)")


def shown_name(video: str) -> str:
    """``video`` as it is shown."""
    return "standard input" if video == STDIN else without_secrets(video)


def without_secrets(text: str) -> str:
    """``text`` with user and password of the URLs in it replaced by ``***``."""
    return _SECRETS.sub("***@", text)
