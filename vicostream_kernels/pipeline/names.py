"""A video's name as people, logs and reports may see it: without the password in its URL."""

from __future__ import annotations

import re

#: The word for standard input in place of a video.
STDIN = "-"
# What FFmpeg takes for user and password; and, where somebody forgot to escape a slash in the
# password, what FFmpeg would take for a host with a port that is no number.
_SECRETS = re.compile(r"(?<=://)(?:[^/?#]*@|[^/?#\s:@\[]+:(?!\d*(?:[/?#\s]|$))\S*@)")


def shown_name(video: str) -> str:
    """``video`` as it is shown."""
    return "standard input" if video == STDIN else without_secrets(video)


def without_secrets(text: str) -> str:
    """``text`` with user and password of the URLs in it replaced by ``***``."""
    return _SECRETS.sub("***@", text)
