"""One attention layer of an engine of your own: pages, a window, and a question that looks back.

python examples/own_engine.py

Chunks of a stream are appended to a `PagedKVCache`, each under a window of recent chunks, and the
mean of their keys is kept on the way. A question then reads the chunks whose keys it is closest to,
moved together so that they stand without gaps right before it. Keys and queries are random here: a
model's projections take their place.
"""

from __future__ import annotations

import argparse

import torch

import vicostream_kernels as vk

HEADS, KV_HEADS, HEAD_DIM, PAGE = 8, 2, 64, 16
WINDOW = 256


def rows_of(tokens: int, random: torch.Generator) -> tuple[torch.Tensor, ...]:
    """q, k and v of ``tokens`` new tokens, as a layer's projections give them."""
    return tuple(
        torch.randn(tokens, heads, HEAD_DIM, generator=random)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def moved_together(
    table: torch.Tensor, page_fill: torch.Tensor, first_id: torch.Tensor, end: int
) -> torch.Tensor:
    """``page_shift`` [S, L, 3] that has the pages of ``table`` [S, L] stand without gaps up to the
    id ``end``. first_id: [P], the id of the first token of each page, its tokens' being successive.
    """
    page = table.clamp_min(0).long()
    fill = torch.where(table >= 0, page_fill[page], 0)
    wanted = end - fill.sum(-1, keepdim=True) + fill.cumsum(-1) - fill
    shift = torch.where(table >= 0, wanted - first_id[page], 0)
    return shift.int().unsqueeze(-1).expand(-1, -1, 3).contiguous()


def recent(tokens: vk.cache.CacheStream) -> list[vk.cache.Block]:
    """The newest chunks, as many as a window reaches into from the first token of the next."""
    wanted, missing = [], WINDOW - 1
    for block in reversed(tokens.chunks):
        if missing <= 0:
            break
        wanted.append(block)
        missing -= block.tokens
    return wanted[::-1]


def stream(chunks: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The answer rows of a question [n, H, d], and the numbers of the chunks that it read."""
    random = torch.Generator().manual_seed(seed)
    inv_freq = 1e4 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cache = vk.PagedKVCache(
        layers=1, pages=64, page_size=PAGE, kv_heads=KV_HEADS, head_dim=HEAD_DIM, grow=True
    )
    with cache, cache.open() as tokens:
        keys = tokens.keep_keys(kind="mean", unit="chunk", source="raw")
        first_id = torch.zeros(0, dtype=torch.int64)
        at = 0  # position id of the next token

        for _ in range(chunks):
            n = int(torch.randint(20, 60, (), generator=random))
            block = tokens.reserve(n)  # pages, on the host
            slots = tokens.plan(block, n, rows=n)  # and a slot for each token
            q, key, value = rows_of(n, random)
            ids = torch.arange(at, at + n, dtype=torch.int32).expand(3, n)
            rotated = vk.rope_append(
                q, key, value, ids, inv_freq, None, cache.k_pages[0], cache.v_pages[0], slots,
                summary=keys.of_layer(0), block_of_page=keys.block_of_page,
            )  # fmt: skip
            vk.sink_window_attention(
                rotated, cache.k_pages[0], cache.v_pages[0],
                tokens.page_table([*recent(tokens), block]),
                torch.tensor([0, n], dtype=torch.int32),
                page_fill=cache.page_fill, window=WINDOW,
            )  # fmt: skip
            missing = cache.total_pages - len(first_id)
            first_id = torch.cat((first_id, first_id.new_zeros(missing)))
            first_id[block.pages] = at + PAGE * torch.arange(len(block.pages))
            tokens.commit(block, n)
            at += n

        # The question's own tokens come last; here as many as fit one page, in a block of its own.
        n = PAGE
        asked = tokens.reserve(n, kind="text")
        slots = tokens.plan(asked, n, rows=n)
        q, key, value = rows_of(n, random)
        ids = torch.arange(at, at + n, dtype=torch.int32).expand(3, n)
        rotated = vk.rope_append(
            q, key, value, ids, inv_freq, None, cache.k_pages[0], cache.v_pages[0], slots
        )
        first_id[asked.pages] = at

        of_row = keys.rows(list(tokens.chunks))  # the chunk of each row
        table, chosen = vk.topk_pages(
            q.mean(0, keepdim=True), keys.summaries(len(of_row))[0], keys.table(len(of_row)),
            recent_pages=tokens.page_table([asked]), k=k,
        )  # fmt: skip
        answer = vk.sink_window_attention(
            rotated, cache.k_pages[0], cache.v_pages[0], table,
            torch.tensor([0, n], dtype=torch.int32), page_fill=cache.page_fill,
            page_shift=moved_together(table, cache.page_fill, first_id, at + n),
            inv_freq=inv_freq,
        )  # fmt: skip
        tokens.rollback(asked)  # a question is not part of the stream
    return answer, chosen.block_index[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--k", type=int, default=6, help="chunks that the question reads")
    options = parser.parse_args()
    answer, chosen = stream(options.chunks, options.k)
    print(f"read chunks {chosen.tolist()} of {options.chunks}; answer {list(answer.shape)}")


if __name__ == "__main__":
    main()
