"""python -m tilemask demo: two sentences through tilemask and through plain PyTorch, compared.

Encoder attention with padding, decoder attention (causal and padding), both sentences packed into
one row, and one training step. Every result is compared with F.scaled_dot_product_attention in
float32, whose dense mask is built here without tilemask; nothing is timed before it was compared.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilemask
from tilemask import masks

SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "a mask says which words a query may see and a kernel pays only for those",
)
PAD = 0
WIDTH, HEADS = 64, 4  # of the toy model: 4 heads of 16
LENGTH, HEAD_WIDTH = 1024, 64  # of the realistic size
TILE = (128, 64)  # of its pictures
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # above rounding, far below a wrong mask
GRADIENT_BOUND = 1e-4  # on the largest difference over the largest element, float32
INDENT = " " * 5


# -- words to tensors -----------------------------------------------------------------------------


def split_words(sentence: str) -> list[str]:
    """Lower-case words; a punctuation mark is a word of its own."""
    return re.findall(r"\w+|[^\w\s]", sentence.lower())


def tokenise(sentences) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Padded tokens [B, L], their lengths [B], and the vocabulary; id 0 is padding."""
    vocabulary = {"<pad>": PAD}
    ids = [[vocabulary.setdefault(w, len(vocabulary)) for w in split_words(s)] for s in sentences]
    tokens = nn.utils.rnn.pad_sequence(
        [torch.tensor(sentence) for sentence in ids], batch_first=True, padding_value=PAD
    )
    return tokens, torch.tensor([len(sentence) for sentence in ids]), vocabulary


class Model(nn.Module):
    """One layer: tokens [B, L] -> q, k, v -> attention -> scores over the vocabulary."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, vocabulary)

    def heads(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each [B, HEADS, L, WIDTH // HEADS]."""
        qkv = self.qkv(self.embed(tokens))
        return qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, tokens: Tensor, attend) -> Tensor:
        return self.out(attend(*self.heads(tokens)).transpose(1, 2).flatten(2))


# -- what is shown and compared -------------------------------------------------------------------


@dataclass
class Problem:
    """Inputs, and one mask said in both ways."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: masks.Mask
    dense: Tensor  # bool, for plain PyTorch

    def ours(self, q, k, v) -> Tensor:
        return tilemask.attention(q, k, v, mask=self.mask)

    def plain(self, q, k, v) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.dense)


class Report:
    """Prints, and counts the comparisons and those that failed."""

    def __init__(self, device: torch.device, small: bool):
        self.device = device
        self.small = small
        self.checks = self.failures = 0

    def check(self, difference: float, bound: float) -> str:
        good = difference <= bound  # a NaN is not
        self.checks += 1
        self.failures += not good
        return "ok" if good else "FAILED"

    def head(self, number: int, title: str, said: str, problem: Problem):
        """Title, mask, and the backend with the reasons of the others."""
        explanation = tilemask.explain(problem.q, problem.k, problem.v, mask=problem.mask)
        say(f"\n{number}/4  {title}")
        say(f"{INDENT}mask     {said}")
        say(f"{INDENT}lowered  to {explanation.mask}")
        say(f"{INDENT}backend  {explanation.backend}")
        for name, reason in explanation.reasons.items():
            say(f"{INDENT}         not {name}: {reason}")

    def table(self, *problems: Problem):
        """A line for every problem and dtype: compared first, then timed."""
        head = f"{'size':<7}{'q':<18}{'dtype':<10}{'difference':>10}{'bound':>9}"
        say(f"\n{INDENT}{head}{'':8}{'tilemask':>11}{'PyTorch':>11}")
        for problem in problems[:1] if self.small else problems:
            for dtype in dtypes(self.device):
                self.row(problem, dtype)

    @torch.no_grad()
    def row(self, problem: Problem, dtype: torch.dtype):
        q, k, v = (t.to(dtype) for t in (problem.q, problem.k, problem.v))
        expected = problem.plain(q.float(), k.float(), v.float())
        difference, bound = largest(problem.ours(q, k, v), expected), BOUNDS[dtype]
        verdict = self.check(difference, bound)
        kind = str(dtype).removeprefix("torch.")
        line = f"{problem.name:<7}{list(q.shape)!s:<18}{kind:<10}{difference:>10.1e}{bound:>9.0e}"
        runs = 3 if self.device.type == "cpu" and problem.name != "toy" else 10
        times = [
            median_ms(lambda attend=attend: attend(q, k, v), self.device, runs)
            for attend in (problem.ours, problem.plain)
        ]
        say(f"{INDENT}{line}  {verdict:<6}" + "".join(f"{t:>8.2f} ms" for t in times))


def say(text: str = ""):
    print(text, flush=True)


def dtypes(device: torch.device) -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]


def largest(found: Tensor, expected: Tensor) -> float:
    """The largest difference of any element."""
    return (found.float() - expected.float()).abs().max().item()


def median_ms(run, device: torch.device, runs: int) -> float:
    """Median time of a call in milliseconds, after one that is not counted."""
    spent = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(1e3 * (time.perf_counter() - start))
    return statistics.median(spent[1:])


def pictures(*panels: tuple[str, str]) -> str:
    """Titled pictures side by side, from Mask.picture()."""
    columns = []
    for title, text in panels:
        *tiles, counts = text.splitlines()
        kind, _, share = counts.partition(": ")
        columns.append([title, kind, *tiles, share.rpartition("; ")[2]])
    height = max(map(len, columns))
    widths = [max(map(len, column)) + 4 for column in columns]
    padded = [column[:-1] + [""] * (height - len(column)) + column[-1:] for column in columns]
    lines = ["".join(cell.ljust(w) for cell, w in zip(row, widths)) for row in zip(*padded)]
    return "\n".join((INDENT + line).rstrip() for line in lines)


def toy_tile(length: int) -> tuple[int, int]:
    """A tile size that draws ``length`` words in about ten characters."""
    size = -(-length // 10)
    return size, size


def realistic(batch: int, device: torch.device) -> list[Tensor]:
    """Random q, k and v of the realistic size."""
    heads = 16 if device.type == "cuda" else 2
    shape = (batch, heads, LENGTH, HEAD_WIDTH)
    return [torch.randn(shape).to(device) for _ in range(3)]


# -- the four parts -------------------------------------------------------------------------------


def keys_below(lengths: Tensor, length: int) -> Tensor:
    """Bool [B, 1, 1, length], True for the real keys: a padding mask in plain PyTorch."""
    return (torch.arange(length, device=lengths.device) < lengths[:, None])[:, None, None, :]


def triangle(length: int, device) -> Tensor:
    """Bool [length, length], True on and below the diagonal: a causal mask in plain PyTorch."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def padded_batch(report: Report, number: int, title: str, causal: bool, qkv, lengths: Tensor):
    """Encoder (padding) or decoder (causal and padding) attention over the padded batch."""

    def problem(name, qkv, lengths):
        length = qkv[0].shape[2]
        mask, dense = masks.padding(lengths), keys_below(lengths, length)
        if causal:
            mask, dense = mask & masks.causal(), dense & triangle(length, lengths.device)
        return Problem(name, *qkv, mask, dense)

    long = torch.tensor([700, LENGTH], device=report.device)
    toy = problem("toy", qkv, lengths)
    real = problem(str(LENGTH), realistic(2, report.device), long)
    said = f"masks.padding({lengths.tolist()})" + (" & masks.causal()" if causal else "")
    report.head(number, title, said, toy)
    length = toy.q.shape[2]
    tile = toy_tile(length)
    shown = [
        (f"sentence {b}", toy.mask.picture(length, length, B=2, tile=tile, batch=b)) for b in (0, 1)
    ]
    large = real.mask.picture(LENGTH, LENGTH, B=2, tile=TILE)
    say(f"\n{pictures(*shown, (f'length 700 of {LENGTH}', large))}")
    report.table(toy, real)


def packed_row(report: Report, qkv, lengths: Tensor):
    """Both sentences one after another in one row, without padding."""

    def problem(name, qkv, lengths):
        ends = F.pad(lengths.cumsum(0), (1, 0))  # cu_seqlens: 0, end of the first, ...
        ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths.cpu()).to(lengths.device)
        dense = (ids[:, None] == ids) & triangle(len(ids), ids.device)
        return Problem(name, *qkv, masks.varlen(ends, within=masks.causal()), dense)

    real_rows = keys_below(lengths, qkv[0].shape[2])[:, 0, 0]  # [B, L]
    packed = [t.transpose(1, 2)[real_rows].transpose(0, 1)[None] for t in qkv]  # [1, H, total, D]
    toy = problem("toy", packed, lengths)
    long = torch.tensor([300, 124, 500, 100], device=report.device)
    real = problem(str(LENGTH), realistic(1, report.device), long)
    said = f"masks.varlen({F.pad(lengths.cumsum(0), (1, 0)).tolist()}, within=masks.causal())"
    report.head(3, "packed: both sentences in one row, no padding, causal inside each", said, toy)
    total = toy.q.shape[2]
    small = toy.mask.picture(total, total, tile=toy_tile(total))
    large = real.mask.picture(LENGTH, LENGTH, tile=TILE)
    say(f"\n{pictures(('both sentences', small), (f'four documents, {LENGTH}', large))}")
    report.table(toy, real)
    decoder = masks.padding(lengths) & masks.causal()
    with torch.no_grad():
        alone = tilemask.attention(*qkv, mask=decoder).transpose(1, 2)[real_rows].transpose(0, 1)
        difference = largest(toy.ours(*packed)[0], alone)
    verdict = report.check(difference, BOUNDS[torch.float32])
    say(f"{INDENT}against the same words in the padded batch of 2/4: {difference:.1e}  {verdict}")


def training_step(report: Report, model: Model, tokens: Tensor):
    """Next-word prediction: gradients against plain PyTorch, and one step of the optimizer."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    lengths = (inputs != PAD).sum(1)
    dense = keys_below(lengths, inputs.shape[1]) & triangle(inputs.shape[1], tokens.device)
    mask = masks.padding(lengths) & masks.causal()
    with torch.no_grad():
        toy = Problem("toy", *model.heads(inputs), mask, dense)
    said = f"masks.padding({lengths.tolist()}) & masks.causal()"
    report.head(
        4, "training: predict the next word, compare the gradient of every weight", said, toy
    )
    names, weights = zip(*model.named_parameters())

    def loss_and_gradients(attend):
        scores = model(inputs, attend)
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=PAD)
        return loss, torch.autograd.grad(loss, weights)

    before, found = loss_and_gradients(toy.ours)
    _, expected = loss_and_gradients(toy.plain)
    title = "largest difference / largest gradient"
    say(f"\n{INDENT}{'weight':<15}{'shape':<15}{title}{'bound':>9}")
    for name, weight, ours, plain in zip(names, weights, found, expected):
        difference = largest(ours, plain) / plain.abs().max().item()
        verdict = report.check(difference, GRADIENT_BOUND)
        line = f"{name:<15}{list(weight.shape)!s:<15}{difference:>{len(title)}.1e}"
        say(f"{INDENT}{line}{GRADIENT_BOUND:>9.0e}  {verdict}")
    times = [
        median_ms(lambda run=run: loss_and_gradients(run), report.device, 20)
        for run in (toy.ours, toy.plain)
    ]
    say(
        f"{INDENT}loss and gradients: {times[0]:.2f} ms, with PyTorch's attention {times[1]:.2f} ms"
    )

    optimizer = torch.optim.Adam(weights, lr=1e-2)
    for weight, gradient in zip(weights, found):
        weight.grad = gradient
    optimizer.step()
    after, _ = loss_and_gradients(toy.ours)
    verdict = report.check(after.item() - before.item(), 0.0)
    say(f"{INDENT}one step of Adam: loss {before.item():.4f} -> {after.item():.4f}  {verdict}")


def introduce(device: torch.device, backend: str, sentences, tokens: Tensor):
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, float32 and bfloat16"
    else:
        where = f"CPU, float32, {backend} implementation"
    say(f"tilemask {tilemask.__version__}, torch {torch.__version__}, {where}")
    if device.type != "cuda":
        say("No GPU here: these times compare one CPU code with another and measure no kernel.")
    for number, (sentence, row) in enumerate(zip(sentences, tokens.tolist())):
        say(f"\n{INDENT}sentence {number}  {sentence}")
        say(f"{INDENT}tokens      {' '.join(map(str, row))}")


def main(sentences=None) -> int:
    """Run the demo; 0 if every comparison holds."""
    sentences = SENTENCES if sentences is None else sentences
    short = [s for s in sentences if len(split_words(s)) < 2]
    if short:
        print(f"demo: a sentence needs two words or more, got {short[0]!r}", file=sys.stderr)
        return 2
    began = time.perf_counter()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tokens, lengths, vocabulary = tokenise(sentences)
    model = Model(len(vocabulary)).to(device)
    tokens, lengths = tokens.to(device), lengths.to(device)
    with torch.no_grad():
        qkv = model.heads(tokens)
    try:
        backend = tilemask.explain(*qkv).backend
    except (RuntimeError, ValueError) as error:  # a backend is forced that cannot run
        print(f"demo: {error}", file=sys.stderr)
        return 2
    introduce(device, backend, sentences, tokens)

    # in Triton's interpreter the realistic size would take minutes
    report = Report(device, small=device.type == "cpu" and backend != "reference")
    encoder = "encoder: every word sees the real words of its sentence"
    padded_batch(report, 1, encoder, False, qkv, lengths)
    decoder = "decoder: every word sees the real words before it, and itself"
    padded_batch(report, 2, decoder, True, qkv, lengths)
    packed_row(report, qkv, lengths)
    training_step(report, model, tokens)

    spent = f"{time.perf_counter() - began:.1f} s"
    if report.failures:
        say(f"\n{report.failures} of {report.checks} comparisons FAILED ({spent})")
        return 1
    say(f"\nall {report.checks} comparisons with plain PyTorch hold ({spent})")
    return 0
