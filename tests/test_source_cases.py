"""The examples by which attention masks are taught, each written the one-line way of tilemask.

Every tutorial has its own polarity and its own arithmetic; what it computes is written out in plain
torch beside the line that replaces it, and compared in output, weights and, where it trains,
gradients. The examples are functions of one table, so that every backend can run them all.
"""

from __future__ import annotations

import math
import warnings
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

import tilemask
from tilemask import masks
from tilemask import scaled_dot_product_attention as sdpa

SOURCES = {}


def source(function):
    """Put an example into the table. It makes its tensors of the default dtype on the default
    device, and asserts what it has to say."""
    SOURCES[function.__name__] = function
    return function


def run_source(name: str, dtype: str, device: str, backend: str | None) -> None:
    """Run an example by its name. backend: forced; None = the first that can run."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    torch.manual_seed(0)
    try:
        with torch.device(device):
            if backend is None:
                SOURCES[name]()
            else:
                with tilemask.use_backend(backend):
                    SOURCES[name]()
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", SOURCES)
def test_source(name, dtype):
    run_source(name, dtype, "cpu", "reference")


def plain(q, k, v, additive=None):
    """softmax(q k^T / sqrt(d) + additive) v and the weights, as the tutorials write it."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if additive is not None:
        scores = scores + additive
    weights = torch.softmax(scores, -1)
    return weights @ v, weights


def minus_inf(blocked):
    return torch.zeros(blocked.shape).masked_fill(blocked, -torch.inf)


def close(got, expected):
    """Equal up to rounding, measured by the largest element; plain torch rounds too, at every
    step."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    rounding = {torch.bfloat16: 2**-6, torch.float32: 1e-5, torch.float64: 1e-12}[got.dtype]
    allowed = rounding * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=allowed)


def check(q, k, v, expected, mask=None, bias=None):
    """Output and weights of q, k, v [B, H, L, D] are those ``expected``; weights sum to 1."""
    truth, weights = expected
    close(tilemask.attention(q, k, v, mask=mask, bias=bias), truth)
    got = tilemask.attention_weights(q, k, mask=mask, bias=bias)
    close(got, weights)
    assert ((weights > 0) | (got == 0)).all()  # what is masked has no weight at all
    close(got.sum(-1), torch.ones(got.shape[:-1]))


# -- keep masks over positions: True = look here --------------------------------------------------


@source
def keep_all_positions():
    keep = torch.ones(1, 10, dtype=torch.bool)
    q, k, v = torch.randn(3, 1, 2, 10, 8)
    check(q, k, v, plain(q, k, v), masks.padding(keep=keep))


@source
def keep_two_positions():
    """Positions 2 and 6 of a sentence of ten."""
    keep = torch.zeros(1, 10, dtype=torch.bool)
    keep[0, [2, 6]] = True
    q, k, v = torch.randn(3, 1, 2, 10, 8)
    check(q, k, v, plain(q, k, v, minus_inf(~keep)[:, None, None]), masks.padding(keep=keep))
    weights = tilemask.attention_weights(q, k, mask=masks.padding(keep=keep))
    assert (weights[..., ~keep[0]] == 0).all() and (weights[..., keep[0]] > 0).all()


@source
def keep_positions_of_a_batch():
    """Another choice of positions for each of four sentences."""
    keep = torch.tensor([[(i * b + b) % 3 != 1 for i in range(10)] for b in range(4)])
    q, k, v = torch.randn(3, 4, 2, 10, 8)
    expected = plain(q, k, v, minus_inf(~keep)[:, None, None])
    check(q, k, v, expected, masks.padding(keep=keep))
    close(sdpa(q, k, v, attn_mask=keep[:, None, None]), expected[0])


# -- padding mask, look-ahead mask, sequence mask -------------------------------------------------

TOKENS = [[7, 6, 0, 0], [1, 2, 3, 0]]


@source
def padding_mask_where_true_is_padded():
    """(seq == pad)[:, None, None], True = padded: invert it, or give the tokens."""
    seq = torch.tensor(TOKENS)
    padded = (seq == 0)[:, None, None, :]
    q, k, v = torch.randn(3, 2, 2, 4, 8)
    expected = plain(q, k, v, minus_inf(padded))
    check(q, k, v, expected, masks.padding_from_tokens(seq, pad_id=0))
    check(q, k, v, expected, masks.dense(~padded))
    close(sdpa(q, k, v, attn_mask=~padded), expected[0])


@source
def look_ahead_mask_where_one_is_blocked():
    """triu(ones, 1), float, 1 = blocked: causal()."""
    blocked = torch.triu(torch.ones(4, 4), diagonal=1)
    q, k, v = torch.randn(3, 2, 2, 4, 8)
    expected = plain(q, k, v, minus_inf(blocked == 1))
    check(q, k, v, expected, masks.causal())
    check(q, k, v, expected, masks.dense(blocked == 0))
    check(q, k, v, expected, bias=blocked * -1e9)  # every row sees itself: the rest is 0
    close(sdpa(q, k, v, attn_mask=blocked == 0), expected[0])


@source
def sequence_mask_of_a_batch_with_padding():
    """Look-ahead, made for a [B, L] tensor, and padding together."""
    seq = torch.tensor(TOKENS)
    blocked = torch.triu(torch.ones(*seq.shape, 4), diagonal=1)[:, None] == 1
    padded = (seq == 0)[:, None, None, :]
    q, k, v = torch.randn(3, 2, 2, 4, 8)
    expected = plain(q, k, v, minus_inf(blocked | padded))
    check(q, k, v, expected, masks.causal() & masks.padding_from_tokens(seq, pad_id=0))
    check(q, k, v, expected, masks.dense(~blocked) & masks.dense(~padded))


def minus_1e9(width):
    """mask * -1e9 on [2, 4, width] without heads: output and weights. A row that is blocked
    everywhere attends as if nothing were blocked, evenly in float32: no row dies of a finite
    number."""
    q, k, v = torch.randn(3, 2, 4, width)
    blocked = torch.triu(torch.ones(4, 4), diagonal=1).repeat(2, 1, 1)
    blocked[1, 2] = 1  # a row without a key
    truth, weights = plain(q, k, v, blocked * -1e9)
    out = sdpa(q, k, v, attn_mask=blocked * -1e9)
    got = tilemask.attention_weights(q[:, None], k[:, None], bias=(blocked * -1e9)[:, None])[:, 0]

    close(out, truth)
    close(got, weights)
    close(out[0, 0], v[0, 0])
    close(got.sum(-1), torch.ones(2, 4))
    if q.dtype == torch.float32:
        close(got[1, 2], torch.full((4,), 0.25))
        close(out[1, 2], v[1].mean(0))


@source
def look_ahead_times_minus_1e9():
    minus_1e9(64)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_minus_1e9_on_512_columns(dtype, monkeypatch):
    """The width of the tutorial: wider than kernels take, so whatever can run it does."""
    monkeypatch.setitem(SOURCES, "512", lambda: minus_1e9(512))
    run_source("512", dtype, "cpu", None)


@source
def padding_times_minus_1e9():
    """[B, 1, 1, L], True = padded, times -1e9: a sentence of padding alone attends evenly, where a
    mask gives it nothing to see and the output 0."""
    seq = torch.tensor([*TOKENS, [0, 0, 0, 0]])
    padded = (seq == 0)[:, None, None, :]
    q, k, v = torch.randn(3, 3, 2, 4, 8)
    additive = padded.to(q.dtype) * -1e9
    truth, weights = plain(q, k, v, additive)
    close(sdpa(q, k, v, attn_mask=additive), truth)
    close(tilemask.attention_weights(q, k, bias=additive), weights)
    if q.dtype == torch.float32:
        close(weights[2], torch.full((2, 4, 4), 0.25))

    out = sdpa(q, k, v, attn_mask=~padded)
    close(out[:2], truth[:2])
    assert (out[2] == 0).all()


# -- two-dimensional masks for BERT ---------------------------------------------------------------

PAD = 0
IDS = [[101, 2023, 2003, 102], [101, 2023, 102, PAD]]


@source
def bert_padding():
    """attention_mask [B, L], 1 = valid, of any type: padding(keep=mask.bool())."""
    q, k, v = torch.randn(3, 2, 12, 4, 64)
    valid = torch.tensor(IDS) != PAD
    extended = (1.0 - valid[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    truth, weights = plain(q, k, v, extended)
    for dtype in (torch.bool, torch.int64, torch.float32):
        attention_mask = valid.to(dtype)
        out = tilemask.attention(q, k, v, mask=masks.padding(keep=attention_mask.bool()))
        close(out, truth)
    close(sdpa(q, k, v, attn_mask=extended), truth)
    check(q[:, :2], k[:, :2], v[:, :2], (truth[:, :2], weights[:, :2]), masks.padding(keep=valid))


SENTENCES = [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]


@source
def bert_two_sentences_in_a_row():
    """[B, L, L] of permitted pairs, block-diagonal: documents(ids) says it in [B, L]."""
    sentence = torch.tensor(SENTENCES)
    permitted = sentence[:, :, None] == sentence[:, None, :]
    q, k, v = torch.randn(3, 2, 2, 6, 8)
    expected = plain(q, k, v, minus_inf(~permitted)[:, None])
    check(q, k, v, expected, masks.documents(sentence, contiguous=True))
    check(q, k, v, expected, masks.documents(sentence))
    check(q, k, v, expected, masks.dense(permitted[:, None]))
    close(sdpa(q, k, v, attn_mask=permitted[:, None]), expected[0])


@source
def bert_two_sentences_with_padding():
    """The same where the second row ends in padding; its own rows of padding see its sentence."""
    sentence = torch.tensor(SENTENCES)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    permitted = (sentence[:, :, None] == sentence[:, None, :]) & valid[:, None, :]
    q, k, v = torch.randn(3, 2, 2, 6, 8)
    expected = plain(q, k, v, minus_inf(~permitted)[:, None])
    padding = masks.padding(keep=valid)
    check(q, k, v, expected, masks.documents(sentence, contiguous=True) & padding)
    check(q, k, v, expected, masks.documents(sentence) & padding)
    check(q, k, v, expected, masks.dense(permitted[:, None]))
    check(q, k, v, expected, bias=minus_inf(~permitted)[:, None])


@source
def other_masks_for_other_layers():
    """Layers of one model, each with a mask of its own over the same padding, and the gradient
    through all of them."""
    valid = torch.tensor(IDS) != PAD
    sentence = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    permitted = (sentence[:, :, None] == sentence[:, None, :])[:, None]
    padding = masks.padding(keep=valid)
    per_layer = [
        padding,
        padding & masks.causal(),
        padding & masks.window(1, 1),
        padding & masks.documents(sentence, contiguous=True),
        padding & masks.dense(permitted),
    ]
    i, j = torch.arange(4)[:, None], torch.arange(4)
    seen = [(i >= 0) & (j >= 0), j <= i, (i - j).abs() <= 1, permitted, permitted]

    first = torch.randn(2, 2, 4, 8).requires_grad_()
    x = truth = first
    for mask, allowed in zip(per_layer, seen, strict=True):
        x = F.layer_norm(x + tilemask.attention(x, x, x, mask=mask), (8,))
        blocked = ~(allowed & valid[:, None, None, :])
        truth = F.layer_norm(truth + plain(truth, truth, truth, minus_inf(blocked))[0], (8,))
    close(x, truth)
    upstream = torch.randn(2, 2, 4, 8)
    (got,), (right,) = (torch.autograd.grad(out, first, upstream) for out in (x, truth))
    close(got, right)


# -- self-attention that returns its weights ------------------------------------------------------


def self_attention(q, k, v):
    """Output and weights of matrices, with a batch or without, against the formula."""
    truth, weights = plain(q, k, v)
    close(sdpa(q, k, v), truth)
    q, k, v, truth, weights = (
        t.reshape(-1, 1, *t.shape[-2:]) for t in (q, k, v, truth, weights)
    )  # one head
    check(q, k, v, (truth, weights))


@source
def self_attention_of_one_row():
    x, v = torch.tensor([[1.0, 0, 1]]), torch.tensor([[0.0, 1, 0]])
    self_attention(x, x, v)
    assert sdpa(x, x, v).tolist() == [[0, 1, 0]]


@source
def self_attention_of_three_rows():
    x = torch.tensor([[[1.0, 0, 1, 0], [0, 2, 0, 2], [1, 1, 1, 1]]])
    v = torch.tensor([[[0.0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1]]])
    self_attention(x, x, v)
    self_attention(x[0], x[0], v[0])


@source
def self_attention_of_random_numbers():
    q, k, v = torch.randn(3, 2, 3, 4)
    self_attention(q, k, v)


# -- the Transformer for translation --------------------------------------------------------------

S, T, B, H, WIDTH, END, PADDING = 27, 24, 2, 8, 512, 3, 1
COLUMN = [2, 20, 26, 16, 1170, 809, 18, 58, 85, 337, 1340, 6, 3, 1, 1, 1]


def sentences(length):
    """Token ids [length, B]: sentences of several lengths that end with END, then PADDING."""
    tokens = torch.randint(4, 2000, (length, B))
    for column, end in enumerate(torch.randint(5, length, (B,)).tolist()):
        tokens[end, column], tokens[end + 1 :, column] = END, PADDING
    tokens[-1, 0] = END
    return tokens


def create_mask(src, tgt):
    """The tutorial's: src [S, B] and tgt [T, B]; True = padded, -inf = blocked."""
    src_mask = torch.zeros(len(src), len(src), dtype=torch.bool)
    tgt_mask = torch.nn.Transformer.generate_square_subsequent_mask(
        len(tgt), src.device, torch.get_default_dtype()
    )
    return src_mask, tgt_mask, (src == PADDING).T, (tgt == PADDING).T


def in_heads(x):
    """[L, B, width] -> [B, H, L, width / H]"""
    return x.unflatten(-1, (H, -1)).permute(1, 2, 0, 3)


def stock(query, memory, attn_mask, key_padding_mask):
    """F.multi_head_attention_forward with identities for projections: [L, B, width] -> output and
    weights by heads, [B, H, L, width / H] and [B, H, L, Lk].
    """
    eye = torch.eye(WIDTH)
    out, weights = F.multi_head_attention_forward(
        query, memory, memory, WIDTH, H, torch.cat([eye] * 3), None, None, None, False, 0.0,
        eye, None, training=False, key_padding_mask=key_padding_mask, attn_mask=attn_mask,
        average_attn_weights=False,
    )  # fmt: skip
    return in_heads(out), weights


@source
def encoder_self_attention():
    """src_mask all False (nothing blocked) and src_padding_mask, True = padded."""
    src = sentences(S)
    src_mask, _, src_padding_mask, _ = create_mask(src, src)
    x = torch.randn(S, B, WIDTH)
    q = in_heads(x)
    expected = stock(x, x, minus_inf(src_mask), minus_inf(src_padding_mask))
    check(q, q, q, expected, masks.padding_from_tokens(src.T, PADDING))
    check(q, q, q, expected, masks.dense(~src_mask) & masks.padding(keep=~src_padding_mask))


@source
def masked_decoder_self_attention():
    """tgt_mask and tgt_padding_mask, as masks, as they are, and merged by -inf before the softmax;
    the upstream gradient reaches q, k and v as in torch."""
    tgt = sentences(T)
    _, tgt_mask, _, tgt_padding_mask = create_mask(tgt, tgt)
    x = torch.randn(T, B, WIDTH)
    q = in_heads(x)
    mask = masks.causal() & masks.padding_from_tokens(tgt.T, PADDING)
    padding = minus_inf(tgt_padding_mask)
    expected = stock(x, x, tgt_mask, padding)
    check(q, q, q, expected, mask)
    check(q, q, q, expected, masks.padding(keep=~tgt_padding_mask), bias=tgt_mask)
    check(q, q, q, expected, bias=tgt_mask + padding[:, None, None, :])

    x.requires_grad_()
    q, truth = in_heads(x), stock(x, x, tgt_mask, padding)[0]
    upstream = torch.randn_like(truth)
    out = tilemask.attention(q, q, q, mask=mask)
    (got,), (right,) = (torch.autograd.grad(o, x, upstream) for o in (out, truth))
    close(got, right)


@source
def square_subsequent_mask():
    """float, 0 where visible and -inf above the diagonal: added as it is, or causal()."""
    additive = torch.nn.Transformer.generate_square_subsequent_mask(
        T, torch.get_default_device(), torch.get_default_dtype()
    )
    q, k, v = torch.randn(3, B, H, T, 64)
    expected = plain(q, k, v, additive)
    check(q, k, v, expected, masks.causal())
    check(q, k, v, expected, bias=additive)
    close(sdpa(q, k, v, attn_mask=additive), expected[0])
    close(sdpa(q, k, v, is_causal=True), expected[0])


@source
def cross_attention():
    """Lq != Lk, and the padding is the source's (memory_key_padding_mask)."""
    src = sentences(S)
    x, memory = torch.randn(T, B, WIDTH), torch.randn(S, B, WIDTH)
    q, k = in_heads(x), in_heads(memory)
    expected = stock(x, memory, None, minus_inf((src == PADDING).T))
    check(q, k, k, expected, masks.padding_from_tokens(src.T, PADDING))


@source
def a_target_column():
    """13 tokens and 3 of padding: row i sees the first i + 1 of the 13."""
    column = torch.tensor([COLUMN])
    mask = masks.causal() & masks.padding_from_tokens(column, PADDING)
    counts = mask.to_dense(1, 1, 16, 16, column.device)[0, 0].sum(-1).tolist()
    assert counts == [*range(1, 14), 13, 13, 13]
    q, k, v = torch.randn(3, 1, H, 16, 64)
    blocked = torch.triu(torch.ones(16, 16), 1).bool() | (column == PADDING)
    expected = plain(q, k, v, minus_inf(blocked))
    check(q, k, v, expected, mask)
    check(q, k, v, expected, masks.causal() & masks.padding([COLUMN.index(END) + 1]))


@source
def nn_transformer():
    """nn.Transformer on shifted targets with its attention replaced by tilemask's: the same output
    and the same gradient of every parameter."""
    src, tgt = sentences(S), sentences(T)[:-1]
    src_mask, tgt_mask, src_padding_mask, tgt_padding_mask = create_mask(src, tgt)
    # floats throughout: torch deprecates pairs of masks of two types
    padding, tgt_padding = minus_inf(src_padding_mask), minus_inf(tgt_padding_mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors would need batches first
        model = torch.nn.Transformer(64, H, 1, 1, 96, dropout=0.0)
    x, y = torch.randn(S, B, 64), torch.randn(T - 1, B, 64)
    upstream = torch.randn(T - 1, B, 64).masked_fill((tgt == PADDING)[..., None], 0)

    def train():
        out = model(x, y, minus_inf(src_mask), tgt_mask, None, padding, tgt_padding, padding)
        out.backward(upstream)
        gradients = [p.grad for p in model.parameters()]
        model.zero_grad()
        return out.detach(), gradients

    truth, right = train()
    with patch.object(F, "scaled_dot_product_attention", side_effect=sdpa) as attend:
        out, got = train()
    assert attend.call_count == 3  # the encoder's, the decoder's, and between them
    close(out, truth)
    for gradient, other in zip(got, right, strict=True):
        close(gradient, other)
