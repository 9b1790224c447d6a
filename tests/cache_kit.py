"""What the cache's tests share."""

from __future__ import annotations

from vicostream_kernels.cache import Block, CacheStream, PagedKVCache


def make_cache(**options) -> PagedKVCache:
    """A tiny cache; options override."""
    sizes = {"layers": 1, "pages": 16, "page_size": 4, "kv_heads": 1, "head_dim": 8}
    return PagedKVCache(**{**sizes, **options})


def add(stream: CacheStream, count: int, *, bucket: int | None = None, **options) -> Block:
    """Reserves, plans and commits a block of ``count`` body tokens."""
    bucket = count if bucket is None else bucket
    block = stream.reserve(bucket, **options)
    stream.plan(block, count, bucket + sum(block.markers))
    stream.commit(block, count)
    return block


def fills(cache: PagedKVCache, block: Block) -> list[int]:
    """page_fill of the block's pages, in order."""
    return cache.page_fill[block.pages].tolist()
