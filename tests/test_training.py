"""The Transformer for translation trains with tilemask to the losses of stock modules.

The task: the source, reversed; sentences of several lengths, end token and padding as in the
tutorial. Everything but attention's implementation is the same, dropout is 0 or, with dropout, only
that it learns is checked: the random numbers are not torch's.
"""

import contextlib
import math
import sys
import warnings

import pytest
import torch

from tilemask.integrations.torch import patch
from tilemask.nn import replace_attention

PAD, START, END, FIRST = 1, 2, 3, 4
VOCABULARY, LONGEST, BATCH, STEPS = 14, 6, 48, 60
WIDTH, HEADS = 32, 4


def batches(count):
    """(src [S, B], tgt [T, B]): START, tokens, END, PAD ...; tgt's tokens in reverse."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        src = torch.full((LONGEST + 2, BATCH), PAD)
        tgt = src.clone()
        lengths = torch.randint(2, LONGEST + 1, (BATCH,), generator=generator)
        for column, length in enumerate(lengths.tolist()):
            words = torch.randint(FIRST, VOCABULARY, (length,), generator=generator)
            for tokens, said in ((src, words), (tgt, words.flip(0))):
                tokens[0, column], tokens[length + 1, column] = START, END
                tokens[1 : length + 1, column] = said
        yield src, tgt


def create_mask(src, tgt):
    """The tutorial's: True = padded, -inf = blocked."""
    src_mask = torch.zeros(len(src), len(src), dtype=torch.bool)
    tgt_mask = torch.nn.Transformer.generate_square_subsequent_mask(
        len(tgt), src.device, torch.get_default_dtype()
    )
    return src_mask, tgt_mask, (src == PAD).T, (tgt == PAD).T


class Translator(torch.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nested tensors would need batches first
            self.transformer = torch.nn.Transformer(WIDTH, HEADS, 2, 2, 2 * WIDTH, dropout)
        self.embeddings = torch.nn.ModuleList(
            torch.nn.Embedding(VOCABULARY, WIDTH) for _ in range(2)
        )
        self.generator = torch.nn.Linear(WIDTH, VOCABULARY)
        place = torch.arange(LONGEST + 2)[:, None]
        angle = place * torch.exp(-torch.arange(0, WIDTH, 2) * math.log(10000) / WIDTH)
        self.register_buffer("places", torch.cat([angle.sin(), angle.cos()], -1)[:, None])

    def forward(
        self, src, tgt, src_mask, tgt_mask, src_padding_mask, tgt_padding_mask, memory_padding_mask
    ):
        x, y = (
            embed(tokens) * math.sqrt(WIDTH) + self.places[: len(tokens)]
            for embed, tokens in zip(self.embeddings, (src, tgt), strict=True)
        )
        out = self.transformer(
            x, y, src_mask, tgt_mask, None, src_padding_mask, tgt_padding_mask, memory_padding_mask
        )
        return self.generator(out)


def make(dropout=0.0):
    torch.manual_seed(1)
    model = Translator(dropout).train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.xavier_uniform_(parameter)
    return model


def train(model, steps):
    """The loss of every step, on shifted targets."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98), eps=1e-9)
    losses = []
    for src, tgt in batches(steps):
        shifted = tgt[:-1]
        src_mask, tgt_mask, src_padding_mask, tgt_padding_mask = create_mask(src, shifted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # masks of two types, as in the tutorial
            logits = model(
                src, shifted, src_mask, tgt_mask, src_padding_mask, tgt_padding_mask,
                src_padding_mask,
            )  # fmt: skip
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tgt[1:].flatten(), ignore_index=PAD
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@contextlib.contextmanager
def counted():
    """A list that gets every call of tilemask's attention()."""
    module, seen = sys.modules["tilemask.attention"], []
    attend = module.attend
    module.attend = lambda call, name: (seen.append(call), attend(call, name))[1]
    try:
        yield seen
    finally:
        module.attend = attend


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("in_float64")
def test_same_losses():
    """Step by step, to the last digits but a few; and the model learns."""
    with counted() as seen:
        stock = train(make(), STEPS)
        assert not seen
        replaced = make()
        with replace_attention(replaced):
            replaced = train(replaced, STEPS)
        assert len(seen) == 6 * STEPS
        causal = [call for call in seen if call.mask.bounds[3] == 1]  # j < i + 1
        assert len(causal) == 2 * STEPS
        assert all(call.bias is None for call in seen)
        assert all(call.mask.key_bits is not None for call in seen)
        seen.clear()
        with patch():
            patched = train(make(), STEPS)
        assert len(seen) == 6 * STEPS
    torch.testing.assert_close(replaced, stock, rtol=1e-6, atol=0)
    torch.testing.assert_close(patched, stock, rtol=1e-6, atol=0)
    assert stock[0] > 2.5 and max(stock[-5:]) < 0.6 * stock[0]


def test_same_losses_in_single_precision():
    """Rounding errors grow with the steps, so fewer of them."""
    stock = train(make(), 20)
    model = make()
    with replace_attention(model):
        replaced = train(model, 20)
    torch.testing.assert_close(replaced, stock, rtol=1e-3, atol=0)


def test_learns_with_dropout():
    model = make(dropout=0.1)
    with replace_attention(model):
        losses = train(model, STEPS)
    assert max(losses[-5:]) < 0.7 * losses[0]
