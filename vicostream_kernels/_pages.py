"""Who owns which page: the host-side allocator under the cache, and the cache's named errors."""

from __future__ import annotations

from collections.abc import Sequence


class OutOfPages(RuntimeError):
    """The pool cannot serve a request; the message says what holds it and what would help."""


class CacheClosed(RuntimeError):
    """The cache or the stream was closed before this call."""


class ForeignStream(ValueError):
    """A block was handed to a stream (or cache) that does not own it."""


class DoubleFree(RuntimeError):
    """Pages, or a block, were given back twice."""


class StaleBlock(ValueError):
    """A block was used after it was freed, evicted or rolled back."""


class PagePool:
    """Page ids 0..total-1, each free or with exactly one owner. Pure host work, O(pages moved).

    Free ids are a stack: the pages given back last go out first (they are the warm ones), and a
    run of ids comes back in the order in which it went out.
    """

    def __init__(self, total: int) -> None:
        self._owner: list[object | None] = [None] * total
        self._free = list(range(total - 1, -1, -1))
        self.peak = 0

    @property
    def total(self) -> int:
        return len(self._owner)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._owner) - len(self._free)

    def owner(self, page: int) -> object | None:
        """What :meth:`take` was told, or None for a free page."""
        return self._owner[page]

    def of(self, owner: object) -> list[int]:
        """The pages of an owner; looks at all."""
        return [page for page, held_by in self.owners() if held_by is owner]

    def owners(self) -> list[tuple[int, object]]:
        """Each page that is not free, and its owner."""
        return [(page, owner) for page, owner in enumerate(self._owner) if owner is not None]

    def take(self, n: int, owner: object) -> list[int]:
        """Hands out ``n`` pages; raises OutOfPages (and takes none) when fewer are free."""
        if n > len(self._free):
            raise OutOfPages(f"{n} pages asked, {self.free} of {self.total} are free")
        if n == 0:
            return []
        pages = self._free[-n:][::-1]
        del self._free[-n:]
        for page in pages:
            self._owner[page] = owner
        self.peak = max(self.peak, self.used)
        return pages

    def give(self, pages: Sequence[int], owner: object) -> None:
        """Takes pages back. DoubleFree (a free page, or one named twice) and ForeignStream
        (another owner's page) are raised before any page has moved."""
        if len(set(pages)) != len(pages):
            raise DoubleFree(f"a page is named twice in {list(pages)}")
        for page in pages:
            held_by = self._owner[page]
            if held_by is None:
                raise DoubleFree(f"page {page} is free already")
            if held_by is not owner:
                raise ForeignStream(f"page {page} belongs to {held_by!r}, not to {owner!r}")
        for page in pages:
            self._owner[page] = None
        self._free.extend(reversed(pages))

    def extend(self, n: int) -> None:
        """Adds ``n`` free pages behind the present ones, which go out last."""
        total = self.total
        self._owner.extend([None] * n)
        self._free[:0] = range(total + n - 1, total - 1, -1)


def check_int(what: str, name: str, value: object, low: int, high: int | None = None) -> int:
    """Raises TypeError unless ``value`` is an int (bool is not), ValueError outside the range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what}: {name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        allowed = f">= {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{what}: {name}={value} must be {allowed}")
    return value
