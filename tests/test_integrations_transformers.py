"""attn_implementation="tilemask" against transformers' eager attention: tiny models with random
weights, on whichever of transformers 4.57 and 5 is installed."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

import tilemask
from tilemask import masks
from tilemask.backends import triton
from tilemask.integrations import transformers as integration

ROOT = Path(__file__).resolve().parents[1]
with pytest.MonkeyPatch.context() as patch:
    # transformers looks for a package called kernels, which is not the folder here
    patch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() != ROOT])
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    integration.register()
V5 = integration.version() >= (5, 0)
needs_5 = pytest.mark.skipif(not V5, reason="transformers 4.57 has no attention function here")
pytestmark = pytest.mark.skipif(
    triton.INTERPRETED, reason="whole models take too long in Triton's interpreter"
)

transformers.logging.set_verbosity_error()

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CODER = {  # an encoder and a decoder
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
WITHOUT_GROUPS = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
MODELS = {  # class, config class, config
    "bert": ("BertModel", "BertConfig", WITHOUT_GROUPS),
    "roberta": ("RobertaModel", "RobertaConfig", WITHOUT_GROUPS),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SMALL | {"head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", SMALL | {"sliding_window": 5}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        SMALL | {"sliding_window": 5, "head_dim": 8, "attn_logit_softcapping": 0.5},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        SMALL | {"sliding_window": 4, "head_dim": 8, "layer_types": None},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        SMALL
        | {"sliding_window": 5, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        SMALL
        | {
            "attention_chunk_size": 4,
            "head_dim": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "no_rope_layers": [1, 0],
        },
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", CODER | {"dropout": 0.0}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        CODER
        | {
            "max_source_positions": 20,
            "max_target_positions": 40,
            "num_mel_bins": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dropout": 0.0,
        },
    ),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {k: WITHOUT_GROUPS[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        | {"num_attention_heads": 4, "image_size": 32, "patch_size": 8},
    ),
}
DECODERS = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "llama4")


def model(name: str, implementation: str, **config):
    cls, config_cls, given = MODELS[name]
    config = getattr(transformers, config_cls)(**{**given, **config})
    config._attn_implementation = implementation
    torch.manual_seed(0)
    made = getattr(transformers, cls)(config)
    for parameter in made.parameters():  # far from what initialisation leaves near zero
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


def pair(name: str, **config):
    """The same model with eager attention and with tilemask's."""
    eager, ours = (model(name, which, **config) for which in ("eager", "tilemask"))
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def tokens(batch=2, length=11):
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(kind: str, like):
    keep = torch.ones_like(like)
    if kind == "right":
        keep[0, -4:] = 0
    elif kind == "left":
        keep[0, :4] = 0
    elif kind == "holes":
        keep[0, 2:4] = 0
        keep[1, 7] = 0
    return keep


def inputs(name: str, kind: str):
    """Arguments of the model and which of its output positions count."""
    ids = tokens()
    keep = padding(kind, ids)
    if name == "vit":
        generator = torch.Generator().manual_seed(2)
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}, None
    if name == "whisper":
        features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(2))
        given = {"decoder_input_ids": ids, "decoder_attention_mask": keep}
        return {"input_features": features, **given}, keep.bool()
    given = {"input_ids": ids, "attention_mask": keep}
    if name in ("t5", "bart"):
        return {**given, "decoder_input_ids": tokens(2, 7)}, None
    return given, keep.bool()


@pytest.fixture
def calls(monkeypatch):
    """What arrives at tilemask.attention."""
    seen = []

    def spy(*args, **options):
        seen.append(options | {"q": args[0], "k": args[1]})
        return tilemask.attention(*args, **options)

    monkeypatch.setattr(integration, "attention", spy)
    return seen


def through_tilemask(name: str) -> bool:
    """Whether the model calls the attention function; T5 of 4.57 has an attention of its own, and
    BERT's goes through scaled_dot_product_attention."""
    return V5 or name not in ("t5", "bert", "roberta")


def check_outputs_and_gradients(eager, ours, given, keep, tolerance=2e-5):
    """Every output, with the rows in keep, and the gradient of every parameter."""
    found = []
    for which in (eager, ours):
        out = which(**given).to_tuple()
        out = [t for t in out if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if keep is not None:
            out = [t[keep] if t.shape[:2] == keep.shape else t for t in out]
        generator = torch.Generator().manual_seed(3)
        which.zero_grad()
        sum(
            (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in out
        ).backward()
        found.append((out, {n: p.grad for n, p in which.named_parameters()}))
    (expected, gradients), (out, own) = found
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    for name, gradient in gradients.items():
        if gradient is not None:
            bound = tolerance * max(1.0, gradient.abs().max().item())
            assert (own[name] - gradient).abs().max() <= bound, name


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name, kind, calls):
    if name == "vit" and kind != "none":
        pytest.skip("images are not padded")
    eager, ours = pair(name)
    given, keep = inputs(name, kind)
    if kind == "none":
        given.pop("attention_mask", None)
    check_outputs_and_gradients(eager, ours, given, keep)
    assert bool(calls) == through_tilemask(name)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bart", "vit"])
def test_float64(name):
    eager, ours = (m.double() for m in pair(name))
    given, keep = inputs(name, "right")
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    # eager attention takes its softmax in float32
    tolerance = 1e-11 if name == "bart" else 1e-6
    check_outputs_and_gradients(eager, ours, given, keep, tolerance)


@needs_5
def test_position_bias_has_its_gradient(calls):
    eager, ours = pair("t5")
    given, _ = inputs("t5", "right")
    for which in (eager, ours):
        which(**given).logits.square().sum().backward()
    assert all(call["bias"] is not None for call in calls)
    tables = [n for n, _ in ours.named_parameters() if "relative_attention_bias" in n]
    assert len(tables) == 2
    for name in tables:
        expected = eager.get_parameter(name).grad
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(
            ours.get_parameter(name).grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max()
        )


# -- what arrives: compact masks, options of the models -------------------------------------------


def sizes(mask):
    return [t.numel() for t in mask.tensors()] if mask is not None else []


@pytest.mark.parametrize("kind", ["none", "left", "holes"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "llama4"])
def test_masks_of_decoders_are_compact(name, kind, calls):
    ids = tokens(2, 32)
    ours = model(name, "tilemask")
    ours(ids, attention_mask=padding(kind, ids))
    assert len(calls) == 2
    for call in calls:
        assert call["bias"] is None
        assert call["k"].shape[1] == 2  # key heads are not repeated
        assert max(sizes(call["mask"]), default=0) <= ids.numel()
        assert call["mask"].bits(2, 4, 32, 32, ids.device) is None


@needs_5
@pytest.mark.parametrize("name", ["bert", "bart", "t5"])
def test_masks_of_encoders_are_compact(name, calls):
    ids = tokens(2, 32)
    ours = model(name, "tilemask")
    given = {} if name == "bert" else {"decoder_input_ids": ids}
    ours(input_ids=ids, attention_mask=padding("holes", ids), **given)
    ours(input_ids=ids, **given)
    assert calls
    for call in calls:
        mask = call["mask"] or masks.Mask()
        assert max(sizes(mask), default=0) <= ids.numel()
        assert mask.bits(2, 4, 32, 32, ids.device) is None


def test_no_square_tensor_is_made_for_a_mask():
    """AttentionMask owns nothing; the dense one is made only for who asks."""
    ids = tokens(2, 4096)
    made = []
    ours = model("llama", "tilemask", num_hidden_layers=1)
    attn = ours.model.layers[0].self_attn
    attn.register_forward_pre_hook(
        lambda m, a, k: made.append(k["attention_mask"]), with_kwargs=True
    )
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(integration, "attention", lambda q, k, v, **_: q)
        patch.setattr(integration.AttentionMask, "dense", None)
        ours.model(ids, attention_mask=padding("left", ids))
    assert isinstance(made[0], integration.AttentionMask)
    assert made[0].shape == (2, 1, 4096, 4096)
    assert max(sizes(made[0].mask)) == ids.numel()


def test_options_of_the_models_arrive(calls):
    ids = tokens()
    model("gemma2", "tilemask", query_pre_attn_scalar=16)(ids)
    assert [call["softcap"] for call in calls] == [0.5, 0.5]
    assert [call["scale"] for call in calls] == [0.25, 0.25]
    calls.clear()
    ours = model("gpt_oss", "tilemask")
    ours(ids)
    for call, layer in zip(calls, ours.model.layers, strict=True):
        assert call["sinks"] is layer.self_attn.sinks


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_dropout_in_training_only(name, calls):
    ours = model(name, "tilemask", attention_dropout=0.25)
    given, _ = inputs(name, "none")
    ours(**given)
    assert {call["dropout_p"] for call in calls} == {0.0}
    calls.clear()
    first, second = (ours.train()(**given).logits for _ in range(2))
    assert {call["dropout_p"] for call in calls} == {0.25}
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    first = ours(**given).logits
    torch.manual_seed(5)
    assert torch.equal(first, ours(**given).logits)


@pytest.mark.parametrize("name", ["llama", "bart", "gpt_oss", pytest.param("bert", marks=needs_5)])
def test_output_attentions(name):
    eager, ours = pair(name)
    given, _ = inputs(name, "right")
    expected, out = (m(**given, output_attentions=True) for m in (eager, ours))
    fields = [f for f in expected if "attentions" in f and expected[f]]
    assert fields
    for field in fields:
        torch.testing.assert_close(out[field], expected[field], rtol=1e-5, atol=1e-6)


def test_output_attentions_are_the_ones_that_were_used():
    """With dropout too."""
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, 2, 8, 8, generator=generator) for _ in range(3))
    module = torch.nn.Module().train()
    out, weights = integration.attend(
        module, q, k, v, None, dropout=0.5, is_causal=False, output_attentions=True
    )
    assert (weights == 0).any()
    torch.testing.assert_close((weights @ v).transpose(1, 2), out)


# -- masks that callers pass ----------------------------------------------------------------------


def blocks(like):
    """Two sentences in one row that do not see each other, [B, L, L]."""
    half = torch.arange(like.shape[1]) < like.shape[1] // 2
    return (half[:, None] == half).expand(like.shape[0], -1, -1)


@pytest.mark.parametrize("name", ["llama", pytest.param("bert", marks=needs_5)])
@pytest.mark.parametrize("form", ["3d bool", "3d int", "4d bool", "4d float"])
def test_masks_of_callers(name, form):
    eager, ours = pair(name)
    ids = tokens()
    allowed = blocks(ids)
    causal = torch.ones(11, 11, dtype=torch.bool).tril() if name == "llama" else True
    seen = (allowed & causal)[:, None]
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = eager(ids, attention_mask=added)[0]
    given = {"3d bool": allowed, "3d int": allowed.long(), "4d bool": seen, "4d float": added}
    out = ours(ids, attention_mask=given[form])[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_masks_of_callers_for_bert_with_padding():
    eager, ours = pair("bert")
    ids = tokens()
    keep = padding("right", ids)
    allowed = blocks(ids).long() * keep[:, None]
    if V5:  # its eager attention takes no 3-D mask
        added = torch.zeros(2, 1, 11, 11).masked_fill(allowed[:, None] == 0, -1e30)
        expected = eager(ids, attention_mask=added)[0]
    else:
        expected = eager(ids, attention_mask=allowed)[0]
    out = ours(ids, attention_mask=allowed)[0]
    torch.testing.assert_close(out[keep > 0], expected[keep > 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 11, 11), torch.ones(2, 1, 11, 11, dtype=torch.int64), torch.ones(11).long()],
    ids=["3d float", "4d int", "1d"],
)
def test_masks_that_could_mean_two_things_are_refused(mask):
    with pytest.raises(TypeError, match=r"attention_mask must be"):
        model("llama", "tilemask")(tokens(), attention_mask=mask)
    with pytest.raises(ValueError, match=r"has shape \(2, 10, 11\), expected \(2, 11, 11\)"):
        model("llama", "tilemask")(tokens(), attention_mask=torch.ones(2, 10, 11).bool())


# -- packed sequences -----------------------------------------------------------------------------

STARTS = torch.tensor([0, 4, 11], dtype=torch.int32)
RESTARTING = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "llama4"])
def test_packed_sequences(name, calls):
    """As the sequences one by one."""
    ours = model(name, "tilemask")
    ids = tokens(1)
    out = ours(ids, position_ids=RESTARTING, use_cache=False).logits
    for first, last in itertools.pairwise(STARTS):
        alone = ours(ids[:, first:last], use_cache=False).logits
        if name == "gpt_oss" or (name == "llama4" and not V5):
            continue  # the first does not cut them at all; 4.57 counts chunks along the row
        torch.testing.assert_close(out[:, first:last], alone, rtol=1e-5, atol=1e-5)
    for call in calls:
        assert call["mask"].bits(1, 4, call["q"].shape[2], 11, ids.device) is None
    expected = model(name, "eager")(ids, position_ids=RESTARTING, use_cache=False).logits
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_cu_seq_lens(name, use_cache):
    """Sequences are cut by cu_seq_lens where transformers does not look at position_ids."""
    eager, ours = pair(name)
    ids = tokens(1)
    expected = eager(ids, position_ids=RESTARTING, use_cache=False).logits
    out = ours(
        ids,
        position_ids=RESTARTING,
        use_cache=use_cache,
        cu_seq_lens_q=STARTS,
        cu_seq_lens_k=STARTS,
        max_length_q=7,
        max_length_k=7,
    ).logits
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_cu_seq_lens_that_cannot_be_honoured():
    packed = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS}
    with pytest.raises(ValueError, match="cu_seq_lens_q is for one batch"):
        model("llama", "tilemask")(tokens(), **packed)
    with pytest.raises(ValueError, match="chunked attention"):
        model("llama4", "tilemask")(tokens(1), position_ids=RESTARTING, use_cache=True, **packed)


# -- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static", "none", "chunked prefill", "beams"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_with_left_padding(name, cache):
    how = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "none": {"use_cache": False},
        "chunked prefill": {"prefill_chunk_size": 3},
        "beams": {"num_beams": 3},
    }[cache]
    eager, ours = pair(name)
    ids = tokens()
    keep = padding("left", ids)
    how |= {"attention_mask": keep, "max_new_tokens": 12, "do_sample": False}
    expected, out = (m.generate(ids.clone(), **how) for m in (eager, ours))
    assert torch.equal(out, expected)
    assert out.shape[1] > 11


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_of_encoder_decoders(name, cache):
    eager, ours = pair(name)
    given, _ = inputs(name, "right")
    given = {k: v for k, v in given.items() if not k.startswith("decoder_")}
    how = {"cache_implementation": "static"} if cache == "static" else {}
    how |= {"max_new_tokens": 10, "do_sample": False}
    expected, out = (m.generate(**given, **how) for m in (eager, ours))
    assert torch.equal(out, expected)


def test_static_cache_slots_that_are_not_written_are_masked():
    """They may hold anything."""
    ours = model("llama", "tilemask")
    ids = tokens()
    keep = padding("left", ids)
    expected = ours(ids, attention_mask=keep, use_cache=False).logits
    cache = transformers.StaticCache(config=ours.config, max_cache_len=32)
    ours(ids[:, :1], attention_mask=keep[:, :1], past_key_values=cache)
    for layer in cache.layers:
        layer.keys[:, :, 1:] = 50.0
        layer.values[:, :, 1:] = 50.0
    parts = []
    for part in (slice(1, 6), slice(6, 10), slice(10, 11)):
        where = {} if V5 else {"cache_position": torch.arange(11)[part]}
        parts.append(
            ours(
                ids[:, part],
                attention_mask=keep[:, : part.stop],
                past_key_values=cache,
                position_ids=torch.arange(11)[None, part].expand(2, -1),
                **where,
            ).logits
        )
    out = torch.cat(parts, 1)
    real = keep[:, 1:].bool()
    torch.testing.assert_close(out[real], expected[:, 1:][real], rtol=1e-5, atol=1e-5)


# -- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", pytest.param("bert", marks=needs_5)])
def test_compile(name):
    torch._dynamo.reset()
    eager, ours = pair(name)
    given, keep = inputs(name, "left" if name == "mistral" else "right")
    given |= {"use_cache": False} if name == "mistral" else {}
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    out, expected = compiled(**given)[0], eager(**given)[0]
    torch.testing.assert_close(out[keep], expected[keep], rtol=1e-5, atol=1e-5)
    out[keep].sum().backward()
    torch._dynamo.reset()


# -- what cannot be done is said ------------------------------------------------------------------


def test_arguments_that_cannot_be_honoured_raise():
    q = torch.randn(1, 2, 4, 8)
    module = torch.nn.Module()
    for name in ("indices", "block_indices", "cache", "alibi", "attn_bias", "logit_sinks"):
        with pytest.raises(TypeError, match=f"cannot honour the attention argument {name}="):
            integration.attend(module, q, q, q, None, **{name: torch.ones(1)})
    integration.attend(module, q, q, q, None, position_ids=q, use_cache=True, past_key_values=1)
    with pytest.raises(ValueError, match="was given no mask for 4 queries and 6 keys"):
        k = torch.randn(1, 2, 6, 8)
        integration.attend(module, q, k, k, None)
    with pytest.raises(ValueError, match="sliding_window=2 and was given no mask"):
        integration.attend(module, q, q, q, None, is_causal=False, sliding_window=2)
    with pytest.raises(ValueError, match="one number per head"):
        integration.attend(module, q, q, q, None, head_mask=torch.ones(1, 2, 4, 4))


def test_window_of_a_causal_layer_without_a_mask(calls):
    q = torch.randn(1, 2, 4, 8)
    integration.attend(torch.nn.Module(), q, q, q, None, sliding_window=2)
    integration.attend(torch.nn.Module(), q[:, :, -1:], q, q, None, sliding_window=2)
    full, step = (c["mask"].to_dense(1, 1, c["q"].shape[2], 4)[0, 0] for c in calls)
    assert torch.equal(full, torch.ones(4, 4).tril().triu(-1).bool())
    assert torch.equal(step, full[-1:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    eager, ours = pair("mistral")
    given, keep = inputs("mistral", "left")
    for which in (eager, ours):
        which.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        which.enable_input_require_grads()
    check_outputs_and_gradients(eager, ours, given | {"use_cache": False}, keep)


def test_head_mask():
    q = torch.randn(1, 2, 4, 8)
    plain, _ = integration.attend(torch.nn.Module(), q, q, q, None)
    out, weights = integration.attend(
        torch.nn.Module(), q, q, q, None, head_mask=torch.tensor([0.0, 2.0]), output_attentions=True
    )
    torch.testing.assert_close(out, plain * torch.tensor([0.0, 2.0])[:, None])
    torch.testing.assert_close(weights.sum(-1), torch.tensor([0.0, 2.0])[:, None].expand(1, 2, 4))


def test_mask_as_a_tensor():
    """What model code may do with a mask gives what it would with a dense one."""
    causal = masks.causal() & masks.padding([3, 5])
    mask = integration.AttentionMask(causal, (2, 1, 5, 5), torch.device("cpu"))
    dense = causal.to_dense(2, 1, 5, 5)
    for same in (mask.contiguous(), mask.to(torch.bool), mask.clone(), mask.to("cpu")):
        assert isinstance(same, integration.AttentionMask) and same.mask is causal
    part = mask[:, :, 2:, :4]
    assert isinstance(part, integration.AttentionMask)
    assert torch.equal(part.dense(), dense[:, :, 2:, :4])
    assert torch.equal(~mask, ~dense)
    assert torch.equal(mask & dense.flip(3), dense & dense.flip(3))
    assert torch.equal(mask.float(), dense.float())
    assert torch.equal(mask.expand(-1, 3, -1, -1).dense(), dense.expand(-1, 3, -1, -1))
    scores = torch.randn(2, 1, 5, 5)
    probabilities = (scores + mask).softmax(-1)
    assert torch.equal(probabilities > 0, dense)
    assert torch.equal(scores.masked_fill(~mask, 0), scores.masked_fill(~dense, 0))
    with pytest.raises(TypeError, match="computes with its masks"):
        torch.mul(mask, 2.0)
    for wrong in (lambda: 1.0 - mask, lambda: mask * -1e9):
        with pytest.raises(TypeError):
            wrong()
    assert "AttentionMask" in repr(mask)


def test_mask_functions_that_are_not_known_become_dense():
    """A function of a caller's; with padding, and where the queries start later."""
    from transformers import masking_utils

    def odd(batch, head, row, column):
        return (row + column) % 2 == 0

    function = masking_utils.and_masks(masking_utils.causal_mask_function, odd)
    keep = torch.tensor([[1, 1, 1, 0, 1, 1], [1] * 6]).bool()
    place = {"q_length": 4, "q_offset": 2, "device": torch.device("cpu")}
    place = place if V5 else {"cache_position": torch.arange(2, 6)}
    given = {"batch_size": 2, "kv_length": 6, "mask_function": function, "attention_mask": keep}
    mask = integration.make_mask(**given, **place)
    row, column = torch.arange(2, 6)[:, None], torch.arange(6)
    expected = (column <= row) & ((row + column) % 2 == 0) & keep[:, None, None, :]
    assert torch.equal(mask.dense(), expected)
