"""The examples by which attention masks are taught, each written the one-line way of tilemask.

Every tutorial has its own polarity and its own arithmetic; what it computes is written out in plain
torch beside the line that replaces it.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import tilemask
from tilemask import masks
from tilemask import scaled_dot_product_attention as sdpa


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def plain(q, k, v, additive=None):
    """softmax(q k^T / sqrt(d) + additive) v and the weights, as the tutorials write it."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if additive is not None:
        scores = scores + additive
    weights = torch.softmax(scores, -1)
    return weights @ v, weights


def minus_inf(blocked):
    return torch.zeros(blocked.shape, dtype=torch.float64).masked_fill(blocked, -torch.inf)


def weights_of(mask, q, k, **options):
    """The weights of an attention, shown by the identity as values."""
    identity = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return tilemask.attention(q, k, identity, mask=mask, **options)


# -- keep masks over positions: True = look here --------------------------------------------------

ONLY_2_AND_6 = torch.tensor([[i in (2, 6) for i in range(10)]])
ALL = torch.ones(1, 10, dtype=torch.bool)


@pytest.mark.parametrize("keep", [ALL, ONLY_2_AND_6], ids=["all", "2 and 6"])
def test_keep_mask_over_positions(keep):
    q, k, v = normal(1, 2, 10, 8), normal(1, 2, 10, 8), normal(1, 2, 10, 8)
    out = tilemask.attention(q, k, v, mask=masks.padding(keep=keep))

    truth, weights = plain(q, k, v, minus_inf(~keep)[:, None, None])
    torch.testing.assert_close(out, truth)
    got = weights_of(masks.padding(keep=keep), q, k)
    torch.testing.assert_close(got, weights)
    assert (got[..., ~keep[0]] == 0).all()
    torch.testing.assert_close(got.sum(-1), torch.ones(1, 2, 10, dtype=torch.float64))


# -- padding mask, look-ahead mask, sequence mask -------------------------------------------------

TOKENS = torch.tensor([[7, 6, 0, 0], [1, 2, 3, 0]])


def test_padding_mask_where_true_is_padded():
    """(seq == pad)[:, None, None], True = padded: invert it, or give the tokens."""
    padded = (TOKENS == 0)[:, None, None, :]
    q, k, v = normal(2, 2, 4, 8), normal(2, 2, 4, 8), normal(2, 2, 4, 8)
    truth, _ = plain(q, k, v, minus_inf(padded))

    by_tokens = tilemask.attention(q, k, v, mask=masks.padding_from_tokens(TOKENS, pad_id=0))
    inverted = sdpa(q, k, v, attn_mask=~padded)
    torch.testing.assert_close(by_tokens, truth)
    torch.testing.assert_close(inverted, truth)
    assert masks.padding_from_tokens(TOKENS, 0).to_dense(2, 1, 1, 4)[:, 0, 0].tolist() == [
        [True, True, False, False],
        [True, True, True, False],
    ]


def test_look_ahead_mask_where_one_is_blocked():
    """triu(ones, 1), 1 = blocked: causal()."""
    blocked = torch.triu(torch.ones(4, 4), diagonal=1)
    q, k, v = normal(2, 2, 4, 8), normal(2, 2, 4, 8), normal(2, 2, 4, 8)
    out = tilemask.attention(q, k, v, mask=masks.causal())

    torch.testing.assert_close(out, plain(q, k, v, minus_inf(blocked == 1))[0])
    torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=blocked == 0))
    assert torch.equal(masks.causal().to_dense(1, 1, 4, 4)[0, 0], blocked == 0)


def test_sequence_mask_of_a_batch_with_padding():
    """Look-ahead and padding together."""
    blocked = torch.triu(torch.ones(2, 4, 4), diagonal=1)[:, None].bool()
    padded = (TOKENS == 0)[:, None, None, :]
    q, k, v = normal(2, 2, 4, 8), normal(2, 2, 4, 8), normal(2, 2, 4, 8)
    mask = masks.causal() & masks.padding_from_tokens(TOKENS, pad_id=0)
    out = tilemask.attention(q, k, v, mask=mask)
    torch.testing.assert_close(out, plain(q, k, v, minus_inf(blocked | padded))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minus_1e9_is_a_number(dtype):
    """mask * -1e9 on [2, 4, 512] without heads. A row that is blocked everywhere attends as if
    nothing were blocked, evenly in float32: no row dies of a finite number."""
    q, k, v = (normal(2, 4, 512).to(dtype) for _ in range(3))
    blocked = torch.triu(torch.ones(4, 4, dtype=dtype), diagonal=1).repeat(2, 1, 1)
    blocked[1, 2] = 1  # a row without a key
    out = sdpa(q, k, v, attn_mask=blocked * -1e9)

    truth, weights = plain(q, k, v, blocked * -1e9)
    torch.testing.assert_close(out, truth)
    if dtype == torch.float32:
        torch.testing.assert_close(weights[1, 2], torch.full((4,), 0.25))
    torch.testing.assert_close(out[0, 0], v[0, 0])


# -- two-dimensional masks for BERT ---------------------------------------------------------------

PAD = 0
IDS = torch.tensor([[101, 2023, 2003, 102], [101, 2023, 102, PAD]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_bert_padding(dtype):
    """attention_mask [B, L], 1 = valid, of any type: padding(keep=mask.bool())."""
    attention_mask = (IDS != PAD).to(dtype)
    q, k, v = normal(2, 12, 4, 64), normal(2, 12, 4, 64), normal(2, 12, 4, 64)
    out = tilemask.attention(q, k, v, mask=masks.padding(keep=attention_mask.bool()))

    extended = (1.0 - attention_mask[:, None, None, :].double()) * torch.finfo(torch.float64).min
    torch.testing.assert_close(out, plain(q, k, v, extended)[0])


def test_bert_two_sentences_in_a_row():
    """[B, L, L] of permitted pairs, block-diagonal: documents(ids) says it in [B, L]."""
    sentence = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    permitted = sentence[:, :, None] == sentence[:, None, :]
    q, k, v = normal(2, 2, 6, 8), normal(2, 2, 6, 8), normal(2, 2, 6, 8)
    truth, _ = plain(q, k, v, minus_inf(~permitted)[:, None])
    torch.testing.assert_close(sdpa(q, k, v, attn_mask=permitted[:, None]), truth)
    mask = masks.documents(sentence, contiguous=True)
    torch.testing.assert_close(tilemask.attention(q, k, v, mask=mask), truth)

    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    truth, _ = plain(q, k, v, minus_inf(~(permitted & valid[:, None, :]))[:, None])
    both = mask & masks.padding(keep=valid)
    torch.testing.assert_close(tilemask.attention(q, k, v, mask=both), truth)
    both = masks.dense(permitted[:, None]) & masks.padding(keep=valid)
    torch.testing.assert_close(tilemask.attention(q, k, v, mask=both), truth)


def test_other_masks_for_other_layers():
    """Layers of one model, each with a mask of its own over the same padding."""
    valid = IDS != PAD
    padding = masks.padding(keep=valid)
    per_layer = [padding, padding & masks.causal(), padding & masks.window(1, 1)]
    i, j = torch.arange(4)[:, None], torch.arange(4)
    seen = [torch.ones(4, 4, dtype=torch.bool), j <= i, (i - j).abs() <= 1]

    x = truth = normal(2, 2, 4, 8)
    for mask, allowed in zip(per_layer, seen, strict=True):
        x = x + tilemask.attention(x, x, x, mask=mask)
        blocked = ~(allowed & valid[:, None, None, :])
        truth = truth + plain(truth, truth, truth, minus_inf(blocked))[0]
    torch.testing.assert_close(x, truth)


# -- self-attention on small examples -------------------------------------------------------------

SMALL = {
    "one row": ([[1, 0, 1]], [[0, 1, 0]]),
    "three rows": (
        [[1, 0, 1, 0], [0, 2, 0, 2], [1, 1, 1, 1]], [[0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1]]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_self_attention(name):
    """q = k, without heads or batch: two dimensions are enough."""
    x, v = (torch.tensor(rows, dtype=torch.float64) for rows in SMALL[name])
    out = sdpa(x, x, v)

    truth, weights = plain(x, x, v)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(sdpa(x[None], x[None], v[None]), truth[None])
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(x), dtype=torch.float64))
    if name == "one row":
        assert out.tolist() == [[0, 1, 0]]


def test_self_attention_of_random_numbers():
    q, k, v = normal(2, 3, 4), normal(2, 3, 4), normal(2, 3, 4)
    torch.testing.assert_close(sdpa(q, k, v), plain(q, k, v)[0])


# -- the Transformer for translation --------------------------------------------------------------

S, T, B, H, WIDTH, END, PADDING = 27, 24, 16, 8, 512, 3, 1
COLUMN = [2, 20, 26, 16, 1170, 809, 18, 58, 85, 337, 1340, 6, 3, 1, 1, 1]


def sentences(length):
    """Token ids [length, B]: sentences of several lengths that end with END, then PADDING."""
    tokens = torch.randint(4, 2000, (length, B))
    for column, end in enumerate(torch.randint(5, length, (B,)).tolist()):
        tokens[end, column], tokens[end + 1 :, column] = END, PADDING
    tokens[-1, 0] = END
    return tokens


def square_subsequent_mask(size):
    """float, 0 where visible and -inf above the diagonal, as nn.Transformer makes it."""
    return torch.nn.Transformer.generate_square_subsequent_mask(size, dtype=torch.float64)


def in_heads(x):
    """[L, B, width] -> [B, H, L, width / H]"""
    return x.unflatten(-1, (H, -1)).permute(1, 2, 0, 3)


def stock(query, memory, attn_mask, key_padding_mask):
    """F.multi_head_attention_forward with identities for projections: [L, B, width] -> the same,
    and the weights of each head.
    """
    eye = torch.eye(WIDTH, dtype=torch.float64)
    return F.multi_head_attention_forward(
        query, memory, memory, WIDTH, H, torch.cat([eye] * 3), None, None, None, False, 0.0,
        eye, None, training=False, key_padding_mask=key_padding_mask, attn_mask=attn_mask,
        average_attn_weights=False,
    )  # fmt: skip


def in_rows(out):
    """[B, H, L, width / H] -> [L, B, width]"""
    return out.permute(2, 0, 1, 3).flatten(2)


def test_encoder_self_attention():
    """src_mask all False (nothing blocked) and src_padding_mask, True = padded."""
    src = sentences(S)
    src_mask, src_padding_mask = torch.zeros(S, S, dtype=torch.bool), (src == PADDING).T
    x = normal(S, B, WIDTH)
    q = in_heads(x)
    out = tilemask.attention(q, q, q, mask=masks.padding_from_tokens(src.T, PADDING))

    truth, weights = stock(x, x, minus_inf(src_mask), minus_inf(src_padding_mask))
    torch.testing.assert_close(in_rows(out), truth)
    got = weights_of(masks.padding_from_tokens(src.T, PADDING), q, q)
    torch.testing.assert_close(got, weights)
    assert (got.transpose(1, 3)[src_padding_mask] == 0).all()
    torch.testing.assert_close(got.sum(-1), torch.ones(B, H, S, dtype=torch.float64))


def test_masked_decoder_self_attention():
    """tgt_mask and tgt_padding_mask; the upstream gradient reaches q, k and v as in torch."""
    tgt = sentences(T)
    x = normal(T, B, WIDTH).requires_grad_()
    q = in_heads(x)
    mask = masks.causal() & masks.padding_from_tokens(tgt.T, PADDING)
    out = in_rows(tilemask.attention(q, q, q, mask=mask))

    truth, _ = stock(x, x, square_subsequent_mask(T), minus_inf((tgt == PADDING).T))
    torch.testing.assert_close(out, truth)
    upstream = torch.randn_like(truth)
    (got,), (right,) = (torch.autograd.grad(o, x, upstream) for o in (out, truth))
    torch.testing.assert_close(got, right)
    as_float = sdpa(q, q, q, attn_mask=square_subsequent_mask(T))
    torch.testing.assert_close(as_float, tilemask.attention(q, q, q, mask=masks.causal()))


def test_cross_attention():
    """Lq != Lk, and the padding is the source's (memory_key_padding_mask)."""
    src = sentences(S)
    x, memory = normal(T, B, WIDTH), normal(S, B, WIDTH)
    q, k = in_heads(x), in_heads(memory)
    out = tilemask.attention(q, k, k, mask=masks.padding_from_tokens(src.T, PADDING))

    truth, weights = stock(x, memory, None, minus_inf((src == PADDING).T))
    torch.testing.assert_close(in_rows(out), truth)
    got = weights_of(masks.padding_from_tokens(src.T, PADDING), q, k)
    torch.testing.assert_close(got, weights)


def test_a_target_column():
    """13 tokens and 3 of padding: row i sees the first i + 1 of the 13."""
    column = torch.tensor([COLUMN])
    mask = masks.causal() & masks.padding_from_tokens(column, PADDING)
    counts = mask.to_dense(1, 1, 16, 16)[0, 0].sum(-1).tolist()
    assert counts == [*range(1, 14), 13, 13, 13]
    q, k, v = normal(1, H, 16, 64), normal(1, H, 16, 64), normal(1, H, 16, 64)
    blocked = torch.triu(torch.ones(16, 16), 1).bool() | (column == PADDING)
    out = tilemask.attention(q, k, v, mask=mask)
    torch.testing.assert_close(out, plain(q, k, v, minus_inf(blocked))[0])
    by_length = masks.causal() & masks.padding([COLUMN.index(END) + 1])
    torch.testing.assert_close(tilemask.attention(q, k, v, mask=by_length), out)
