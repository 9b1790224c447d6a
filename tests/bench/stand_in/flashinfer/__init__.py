"""What the benchmark calls of FlashInfer, in plain torch, with the signatures of release 0.7.4.

Strict where the package hands raw pointers to kernels: a wrong dtype, length or order of arguments
raises here. ``log`` has the name of every call.
"""

from __future__ import annotations

import torch

log: list[str] = []


def _int32(**tensors):
    for name, x in tensors.items():
        assert x.dtype == torch.int32 and x.dim() == 1 and x.is_contiguous(), (name, x)


class _Wrapper:
    def _made(self, float_workspace_buffer, kv_layout, use_cuda_graph):
        buffer = float_workspace_buffer
        assert buffer.dtype == torch.uint8 and buffer.numel() >= 128 << 20 and not buffer[:99].any()
        assert kv_layout == "NHD" and not use_cuda_graph
        self.planned = False

    def _plan(self, starts, pages, last, heads, page_size, dtypes):
        log.append("plan")
        _int32(starts=starts, pages=pages, last=last)
        assert len(starts) == len(last) + 1 and starts[0] == 0 and starts[-1] == len(pages)
        assert all(0 < x <= page_size for x in last.tolist()) and (pages >= 0).all()
        assert all(x in (torch.float16, torch.bfloat16) for x in dtypes)
        self.starts, self.pages, self.last = starts.tolist(), pages.long(), last.tolist()
        self.heads, self.page_size, self.dtypes, self.planned = heads, page_size, dtypes, True

    def _run(self, q, paged_kv_cache, out, rows, causal):
        log.append("run")
        assert self.planned and (q.dtype, paged_kv_cache[0].dtype) == self.dtypes
        k_pages, v_pages = paged_kv_cache
        shape = (q.shape[1], k_pages.shape[2], q.shape[2])
        assert shape == self.heads and k_pages.shape[1] == self.page_size and len(q) == rows[-1]
        assert k_pages.shape == v_pages.shape and out.shape == q.shape and out.dtype == q.dtype
        for s, last in enumerate(self.last):
            pages = self.pages[self.starts[s] : self.starts[s + 1]]
            length = (len(pages) - 1) * self.page_size + last
            k, v = (x[pages].flatten(0, 1)[:length].float() for x in (k_pages, v_pages))
            group = shape[0] // shape[1]
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            mine = q[rows[s] : rows[s + 1]].float()
            scores = torch.einsum("qhd,khd->hqk", mine, k) * shape[2] ** -0.5
            if causal:
                seen = torch.arange(length) <= torch.arange(length)[length - len(mine) :, None]
                scores = scores.masked_fill(~seen, -torch.inf)
            out[rows[s] : rows[s + 1]] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False,
        paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None, backend="auto", jit_args=None, jit_kwargs=None,
    ):  # fmt: skip
        self._made(float_workspace_buffer, kv_layout, use_cuda_graph)

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
        pos_encoding_mode="NONE", window_left=-1, window_right=0, logits_soft_cap=None,
        q_data_type="float16", kv_data_type=None, o_data_type=None, data_type=None, sm_scale=None,
        rope_scale=None, rope_theta=None, non_blocking=True, block_tables=None, seq_lens=None,
        fixed_split_size=None, disable_split_kv=False, q_len_per_req=1, is_causal=None,
        use_token_head_sf=False,
    ):  # fmt: skip
        heads = (num_qo_heads, num_kv_heads, head_dim)
        self._plan(indptr, indices, last_page_len, heads, page_size, (q_data_type, kv_data_type))

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None,
        lse=None, return_lse=False, enable_pdl=None, window_left=None, sinks=None,
        q_len_per_req=None, skip_softmax_threshold_scale_factor=None, kv_cache_sf=None,
    ):  # fmt: skip
        rows = list(range(len(self.last) + 1))
        return self._run(q, paged_kv_cache, out, rows, causal=False)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None,
        custom_mask_buf=None, mask_indptr_buf=None, backend="auto", jit_args=None, jit_kwargs=None,
        variant_owns_mask=False, max_total_num_rows=None,
    ):  # fmt: skip
        assert backend in ("auto", "fa2", "fa3")
        self._made(float_workspace_buffer, kv_layout, use_cuda_graph)

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, head_dim_vo=None, custom_mask=None,
        packed_custom_mask=None, causal=False, pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
        o_data_type=None, non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None,
        token_pos_in_items_len=0, max_item_len_ptr=None, seq_lens=None, seq_lens_q=None,
        block_tables=None, max_token_per_sequence=None, max_sequence_kv=None,
        fixed_split_size=None, disable_split_kv=False, uniform_q_len=None, use_token_head_sf=False,
    ):  # fmt: skip
        _int32(qo_indptr=qo_indptr)
        assert len(qo_indptr) == len(paged_kv_indptr)
        heads = (num_qo_heads, num_kv_heads, head_dim_qk)
        dtypes = (q_data_type, kv_data_type)
        table = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._plan(*table, heads, page_size, dtypes)
        self.rows, self.causal = qo_indptr.tolist(), causal

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None,
        lse=None, return_lse=False, lse_base="log2", lse_layout="NH", enable_pdl=None,
        window_left=None, sinks=None, kv_cache_sf=None, skip_softmax_threshold_scale_factor=None,
        use_fp16_softmax=None, uses_spcompress=None,
    ):  # fmt: skip
        return self._run(q, paged_kv_cache, out, self.rows, self.causal)


def _unsorted_top_k(scores, k):
    """The package gives them in no order: here the smallest first."""
    assert scores.dim() == 2 and scores.is_contiguous()
    return scores.topk(k).indices.flip(-1)


def top_k(input, k, sorted=False, deterministic=False, tie_break=0, dsa_graph_safe=False):
    log.append("top_k")
    index = _unsorted_top_k(input, k)
    return input.gather(-1, index), index


def top_k_page_table_transform(
    input, src_page_table, lengths, k, row_to_batch=None, deterministic=False, tie_break=0,
    dsa_graph_safe=False, row_starts=None, page_table_row_starts=None, *, page_size=1, out=None,
    out_raw_indices=None,
):  # fmt: skip
    log.append("top_k_page_table_transform")
    _int32(lengths=lengths)
    assert src_page_table.shape == input.shape and lengths.tolist() == [input.shape[1]]
    assert src_page_table.dtype == out_raw_indices.dtype == torch.int32
    out_raw_indices.copy_(_unsorted_top_k(input, k))
    return src_page_table.gather(-1, out_raw_indices.long())


def apply_rope_with_cos_sin_cache(
    positions, query, key, head_size, cos_sin_cache, is_neox=True
):  # fmt: skip
    log.append("apply_rope_with_cos_sin_cache")
    _int32(positions=positions)
    assert cos_sin_cache.dtype == torch.float32 and cos_sin_cache.shape[1] == head_size
    cos, sin = cos_sin_cache[positions.long(), None].chunk(2, dim=-1)

    def turned(x):
        one, other = x.view(len(x), -1, head_size).float().chunk(2, dim=-1)
        both = torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)
        return both.to(x.dtype).view(x.shape)

    assert is_neox and query.dtype == key.dtype and query.dtype in (torch.float16, torch.bfloat16)
    return turned(query), turned(key)


def append_paged_kv_cache(
    append_key, append_value, batch_indices, positions, paged_kv_cache, kv_indices, kv_indptr,
    kv_last_page_len, kv_layout="NHD",
):  # fmt: skip
    log.append("append_paged_kv_cache")
    _int32(streams=batch_indices, positions=positions, pages=kv_indices, starts=kv_indptr)
    _int32(last=kv_last_page_len)
    page_size = paged_kv_cache[0].shape[1]
    length = (kv_indptr.diff() - 1) * page_size + kv_last_page_len
    assert kv_layout == "NHD" and (positions < length[batch_indices]).all()
    place = kv_indptr[batch_indices] + positions // page_size
    for pages, rows in zip(paged_kv_cache, (append_key, append_value)):
        pages[kv_indices[place].long(), positions.long() % page_size] = rows
