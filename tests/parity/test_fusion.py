"""Our eyes and those of published models, same weights: IDEFICS, Llama 3.2 Vision, Janus, all of DeepSeek-VL."""

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    IdeficsConfig,
    JanusVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MllamaTextConfig,
    SiglipVisionConfig,
    SwinConfig,
    SwinModel,
)
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.janus.modeling_janus import JanusVisionAlignerMLP
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    _prepare_cross_attention_mask,
)

from dslib.architecture.fusion import FusionConfig, VisionLanguageDecoder
from dslib.architecture.generation import generate
from dslib.architecture.vision.cross_attention import GatedCrossAttention
from dslib.architecture.vision.swin import TINY_SWIN, SwinStream
from dslib.architecture.weights.checkpoint import decoder_from_hf

HIDDEN, INNER, HEADS, C, N = 32, 48, 4, 24, 6


def noisy(module, std=0.3):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and len(parameter) > 1), std=std)
    return module.eval()


def block_like(theirs, kv_heads, k_proj, v_proj, attention, gates, eps):
    config = FusionConfig(
        40, HIDDEN, INNER, 1, HEADS, kv_heads, rms_norm_eps=eps, image_hidden_size=k_proj.in_features,
        cross_intermediate_size=INNER,
    )  # fmt: skip
    ours = GatedCrossAttention(config).eval()
    with torch.no_grad():
        ours.q_proj.weight.copy_(attention.q_proj.weight)
        ours.kv_proj.weight.copy_(torch.cat((k_proj.weight, v_proj.weight)))
        ours.o_proj.weight.copy_(attention.o_proj.weight)
        ours.mlp.gate_up_proj.weight.copy_(torch.cat((theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight)))
        ours.mlp.down_proj.weight.copy_(theirs.mlp.down_proj.weight)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            getattr(ours, norm).weight.copy_(getattr(theirs, norm).weight)
        for gate, value in zip((ours.gate, ours.mlp_gate), gates, strict=True):
            gate.bias.copy_(value.squeeze())
    return ours


def inputs():
    generator = torch.Generator().manual_seed(1)
    x, features = (torch.randn(*shape, generator=generator) for shape in ((2, 5, HIDDEN), (2, N, C)))
    return x, features, torch.tensor([[True] * N, [True, False, True, True, False, False]])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("alphas", [(0.0, 0.0), (0.7, -0.4)])
def test_a_block_is_idefics_gated_cross_attention(alphas, masked):
    """IDEFICS is the open Flamingo: 9B and 80B parameters with this block before every fourth layer."""
    vision = {"embed_dim": C}
    theirs = noisy(
        IdeficsGatedCrossAttentionLayer(
            IdeficsConfig(
                hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=HEADS, vision_config=vision,
                rms_norm_eps=1e-5, alpha_type="float", attn_implementation="eager",
            ),
            layer_idx=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        theirs.alpha_cross_attn.fill_(alphas[0])
        theirs.alpha_dense.fill_(alphas[1])
    attention = theirs.cross_attn
    gates = (theirs.alpha_cross_attn, theirs.alpha_dense)
    ours = block_like(theirs, HEADS, attention.k_proj, attention.v_proj, attention, gates, 1e-5)
    x, features, mask = inputs()
    far = torch.zeros(2, 1, 5, N).masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        wanted = theirs(x, None, features, far if masked else None, cross_attention_gate=torch.ones(2, 5))
        got = ours(x, ours.keys_values(features), mask if masked else None)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    assert (wanted - x).abs().max() == 0 if alphas == (0, 0) else (wanted - x).abs().max() > 0.1


@pytest.mark.parametrize("by_token", [False, True])
def test_a_block_is_llama_vision_without_its_query_and_key_norms(by_token):
    """Llama 3.2 Vision norms queries and keys besides; without those norms, and with grouped heads, it is our block.

    Also with its mask, by which a token sees the tiles of some pictures only. Of a token that sees none, transformers'
    class drops the feed-forward network alone (Meta's own code drops both branches, as ours does), so each sees some.
    """
    config = MllamaTextConfig(
        vocab_size=40, hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=HEADS, num_key_value_heads=2,
        rms_norm_eps=1e-5, attn_implementation="sdpa", num_hidden_layers=1, cross_attention_layers=[0], pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    theirs = noisy(MllamaCrossAttentionDecoderLayer(config, 0))
    attention = theirs.cross_attn
    attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()
    gates = (theirs.cross_attn_attn_gate, theirs.cross_attn_mlp_gate)
    with torch.no_grad():
        gates[0].fill_(0.6)
        gates[1].fill_(-0.3)
    ours = block_like(theirs, 2, attention.k_proj, attention.v_proj, attention, gates, 1e-5)
    x, _, _ = inputs()
    features = torch.randn(2, N, HIDDEN, generator=torch.Generator().manual_seed(3))  # projected before, there
    seen = torch.rand(2, 5, 3, 1, generator=torch.Generator().manual_seed(4)) < 0.5  # (B, T, pictures, tiles)
    seen[..., 0, 0] |= ~seen.any(2).any(2)
    seen = seen if by_token else torch.ones_like(seen)
    bias, rows = _prepare_cross_attention_mask(seen.float(), N // 3, torch.float32)
    with torch.no_grad():
        wanted = theirs(x, features, bias, None, rows)
        mask = seen[..., 0].repeat_interleave(N // 3, dim=2) if by_token else None  # (B, T, N)
        torch.testing.assert_close(ours(x, ours.keys_values(features), mask), wanted, atol=1e-5, rtol=1e-4)
        unmasked = theirs(x, features, torch.zeros_like(bias), None, None)
    assert (wanted - x).abs().max() > 0.1 and (bool((wanted - unmasked).abs().max() > 0.1) is by_token)


@pytest.mark.parametrize("name", ["LLaVA", "Janus"])
def test_the_projector_is_theirs(name):
    if name == "LLaVA":
        config = LlavaConfig(
            vision_config=SiglipVisionConfig(hidden_size=C), text_config=LlamaConfig(hidden_size=HIDDEN)
        )
        theirs = noisy(LlavaMultiModalProjector(config))
        first, second = theirs.linear_1, theirs.linear_2
    else:
        theirs = noisy(JanusVisionAlignerMLP(JanusVisionConfig(hidden_size=C, projection_dim=HIDDEN, depth=2)))
        first, second = theirs.fc1, theirs.hidden_layers[0]
    config = FusionConfig(40, HIDDEN, INNER, 1, HEADS, 2, fusion="projector", image_hidden_size=C)
    vision = nn.Identity()
    vision.hidden_size = C
    ours = VisionLanguageDecoder(config, vision)
    ours.projector[0].load_state_dict(first.state_dict())
    ours.projector[2].load_state_dict(second.state_dict())
    _, features, _ = inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours.image_context(features).tokens, theirs(features), atol=1e-6, rtol=1e-5)


class Siglip(nn.Module):
    """transformers' SigLIP as an image stream: what a model of DeepSeek-VL's hands to its projector."""

    def __init__(self, model):
        super().__init__()
        self.model, self.hidden_size = model, model.config.hidden_size

    def forward(self, pixels):
        return self.model(pixels).last_hidden_state


def deepseek_vl():
    """A tiny DeepSeek-VL of transformers', and our decoder with its weights behind the same SigLIP."""
    text = LlamaConfig(
        vocab_size=40, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, pad_token_id=None, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=C, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
        vision_use_head=False,
    )  # fmt: skip
    config = DeepseekVLConfig(text_config=text, vision_config=vision, image_token_id=39, tie_word_embeddings=False)
    theirs = noisy(DeepseekVLForConditionalGeneration(config), 0.2)
    prefix = "model.language_model."
    state = {
        "model." + name.removeprefix(prefix) if name.startswith(prefix) else name: tensor
        for name, tensor in theirs.state_dict().items()
        if name.startswith((prefix, "lm_head"))
    }
    stream = Siglip(theirs.model.vision_model)
    ours = VisionLanguageDecoder.from_text(decoder_from_hf(text, state), stream, fusion="projector").eval()
    ours.projector[0].load_state_dict(theirs.model.aligner.linear1.state_dict())
    ours.projector[2].load_state_dict(theirs.model.aligner.linear2.state_dict())
    return ours, theirs


def test_the_projector_variant_is_deepseek_vl():
    """Same logits from pixels to words, and the same greedy continuation."""
    ours, theirs = deepseek_vl()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    ids = torch.randint(39, (2, 7), generator=torch.Generator().manual_seed(5))
    behind = torch.cat((torch.full((2, 4), 39), ids), dim=1)  # 4 places for the picture's 4 patches
    with torch.no_grad():
        wanted = theirs(input_ids=behind, pixel_values=pixels).logits[:, 4:]
        torch.testing.assert_close(ours(ids, image=ours.encode_image(pixels)), wanted, atol=2e-5, rtol=1e-4)
        other = theirs(input_ids=behind, pixel_values=pixels.flip(0)).logits[:, 4:]
        assert (other - wanted).abs().max() > 1e-2
        text = theirs.generate(
            input_ids=behind, pixel_values=pixels, attention_mask=torch.ones_like(behind), max_new_tokens=8,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    assert [r.tokens for r in generate(ours, ids, 8, image=ours.encode_image(pixels))] == text[:, 11:].tolist()


def test_the_swin_stream_is_transformers_swin():
    """Ours only wraps it: the features of the last stage, before pooling; a model handed over stays the one it was."""
    torch.manual_seed(0)
    theirs = SwinModel(SwinConfig(**TINY_SWIN)).eval()
    ours, wrapped = SwinStream(), SwinStream(model=theirs)
    ours.swin.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("pooler")})
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = theirs(pixels).last_hidden_state
        torch.testing.assert_close(ours.eval()(pixels), wanted)
        assert torch.equal(wrapped(pixels), wanted)
    assert wanted.shape == (2, 64, 64) and wrapped.swin is theirs


def test_swin_tells_places_apart_only_with_absolute_positions():
    """Why TINY_SWIN has them: shifted windows know relative places, so one patch looks alike wherever its window is."""
    torch.manual_seed(0)
    patch = torch.randn(3, 16, 16)
    for absolute in (True, False):
        stream = SwinStream({**TINY_SWIN, "use_absolute_embeddings": absolute, "depths": [1, 1]}).eval()
        if absolute:
            nn.init.normal_(stream.swin.embeddings.position_embeddings, std=0.5)
        pixels = torch.zeros(2, 3, 64, 64)
        pixels[0, :, :16, :16], pixels[1, :, 32:48, 32:48] = patch, patch
        with torch.no_grad():
            first, second = stream(pixels).unflatten(1, (8, 8))
        same = torch.allclose(first[:2, :2], second[4:6, 4:6], atol=1e-5)
        assert same is not absolute


def test_efficientnet_is_an_image_stream():
    encoders = pytest.importorskip("dslib.data.encoders")
    try:
        stream = encoders.load_efficientnet()
    except encoders.WeightsNotFound as error:
        pytest.skip(str(error))
    config = FusionConfig(40, HIDDEN, INNER, 2, HEADS, 2, image_hidden_size=stream.hidden_size)
    model = VisionLanguageDecoder(config, stream).train()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert "vision" not in trained and all(p.requires_grad for block in model.seeing() for p in block.parameters())
    image = model.encode_image(torch.randn(1, 3, 224, 224))
    assert image.keys_values[0][0].shape == (1, 2, 49, 8)
    assert not model.vision.training
