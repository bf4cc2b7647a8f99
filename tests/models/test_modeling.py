"""The models' outputs: stock's numbers, what every output means, and every way to call them."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import minimal_mamba2
import pytest
import torch
import torch.nn.functional as F
from hybrids import make_hybrid
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import Mamba2ForCausalLM as StockForCausalLM
from transformers import Mamba2Model as StockModel
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as StockConfig
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from mamba2_hf import Mamba2Cache, Mamba2ForCausalLM, Mamba2ForSequenceClassification, Mamba2Model
from mamba2_hf.errors import ArgumentError
from mamba2_hf.models import modeling_mamba2

Make = Callable[..., Any]
SAME = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Mamba2ForCausalLM:
    return tiny_model()


@pytest.fixture(params=[Mamba2ForCausalLM, Mamba2ForSequenceClassification, None], ids=["pure", "classifier", "hybrid"])
def any_model(request: pytest.FixtureRequest, tiny_model: Make) -> Any:
    return make_hybrid() if request.param is None else tiny_model(request.param)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 61, (3, 14), generator=torch.Generator().manual_seed(1))


MASK = torch.tensor([[0] * 5 + [1] * 9, [1] * 14, [1] * 4 + [0] * 3 + [1] * 5 + [0] * 2])


def stock_of(model: Mamba2ForCausalLM) -> StockForCausalLM:
    if model.config.n_groups > 1 and "group_size" not in inspect.signature(MambaRMSNormGated).parameters:
        pytest.skip("this transformers still norms all groups as one")
    stock = StockForCausalLM(StockConfig(**model.config.to_dict())).eval()
    stock.load_state_dict(model.state_dict())
    return stock


class TestAgainstStock:
    @pytest.mark.parametrize("tokens", [1, 2, 3, 64, 300])
    def test_logits_of_any_length(self, model: Any, tokens: int) -> None:
        ids = torch.randint(3, 61, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, stock_of(model)(ids).logits, **CLOSE)

    @pytest.mark.parametrize(
        "changes",
        [
            {"n_groups": 1, "use_bias": False},
            {"n_groups": 8, "head_dim": 16, "num_heads": 8, "expand": 4, "use_conv_bias": False},
            {"time_step_limit": (0.02, 0.08), "conv_kernel": 2, "hidden_act": "swish", "residual_in_fp32": False},
            {"chunk_size": 5, "num_hidden_layers": 3, "layer_norm_epsilon": 1e-3, "state_size": 24},
        ],
    )
    def test_every_option(self, tiny_model: Make, ids: Tensor, changes: dict[str, Any]) -> None:
        model = tiny_model(**changes)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, stock_of(model)(ids).logits, **CLOSE)

    def test_loss_and_gradients(self, tiny_model: Make, ids: Tensor) -> None:
        model = tiny_model()
        stock = stock_of(model)
        labels = ids.masked_fill(torch.arange(14) < 4, -100)
        ours, theirs = model(ids, labels=labels), stock(ids, labels=labels)
        torch.testing.assert_close(ours.loss, theirs.loss, **CLOSE)
        ours.loss.backward()
        theirs.loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, stock.get_parameter(name).grad, rtol=1e-4, atol=1e-6, msg=name)
        items = torch.tensor(100)
        torch.testing.assert_close(
            model(ids, labels=labels, num_items_in_batch=items).loss,
            stock(ids, labels=labels, num_items_in_batch=items).loss,
            **CLOSE,
        )

    def test_names_and_shapes_of_all_weights(self, model: Any) -> None:
        ours = {name: tensor.shape for name, tensor in model.state_dict().items()}
        assert ours == {name: tensor.shape for name, tensor in stock_of(model).state_dict().items()}

    def test_every_argument_of_stock_is_known(self) -> None:
        for ours, stock in ((Mamba2ForCausalLM, StockForCausalLM), (Mamba2Model, StockModel)):
            wanted = inspect.signature(stock.forward).parameters.keys() - {"kwargs"}
            assert wanted <= inspect.signature(ours.forward).parameters.keys()


@pytest.mark.parametrize("changes", [{}, {"n_groups": 1}, {"n_groups": 8, "conv_kernel": 3}, {"use_bias": False}])
class TestAgainstOnePage:
    """The whole model of ``examples/minimal_mamba2.py``, in fp64."""

    def both(self, tiny_model: Make, tmp_path: Path, changes: dict[str, Any]) -> tuple[Any, minimal_mamba2.Mamba2LM]:
        model = tiny_model(**changes).double()
        model.save_pretrained(tmp_path)
        page = minimal_mamba2.Mamba2LM(minimal_mamba2.Config.read(tmp_path)).double()
        page.load_state_dict(model.state_dict())
        return model, page

    @pytest.mark.parametrize("tokens", [1, 2, 65, 129])
    def test_loss_and_gradients(self, tiny_model: Make, tmp_path: Path, changes: dict[str, Any], tokens: int) -> None:
        model, page = self.both(tiny_model, tmp_path, changes)
        ids = torch.randint(3, 61, (2, tokens + 1), generator=torch.Generator().manual_seed(tokens))
        losses = []
        for logits in (model(ids[:, :-1]).logits, page(ids[:, :-1])[0]):
            losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=0, atol=1e-10)
        for name, parameter in page.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-7, atol=1e-10, msg=name)

    @torch.no_grad()
    def test_a_prompt_and_then_steps(self, tiny_model: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
        model, page = self.both(tiny_model, tmp_path, changes)
        ids = torch.randint(3, 61, (2, 75), generator=torch.Generator().manual_seed(0))
        cache, states = None, None
        for part in ids.split([67, *[1] * 8], 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            expected, states = page(part, states)
            torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-10)


class TestHiddenStates:
    def test_are_the_embeddings_then_every_layer_then_the_norm(self, model: Any, ids: Tensor) -> None:
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
            base = model.backbone(ids)
            assert len(out.hidden_states) == 3
            assert {tuple(hidden.shape) for hidden in out.hidden_states} == {(3, 14, 32)}
            torch.testing.assert_close(out.hidden_states[0], model.get_input_embeddings()(ids), **SAME)
            torch.testing.assert_close(out.hidden_states[-1], base.last_hidden_state, **SAME)
            first = model.backbone.layers[0](out.hidden_states[0])
            torch.testing.assert_close(out.hidden_states[1], first, **SAME)
            torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits, **SAME)

    def test_the_residual_stream_is_fp32_where_the_config_says_so(self, tiny_model: Make, ids: Tensor) -> None:
        for in_fp32, dtype in ((True, torch.float32), (False, torch.bfloat16)):
            model = tiny_model(residual_in_fp32=in_fp32).bfloat16()
            with torch.no_grad():
                out = model(ids, output_hidden_states=True)
            assert out.hidden_states[1].dtype == dtype
            assert out.hidden_states[-1].dtype == torch.bfloat16
            assert out.logits.dtype == torch.float32

    def test_the_config_may_ask_for_them(self, tiny_model: Make, ids: Tensor) -> None:
        model = tiny_model(output_hidden_states=True, output_attentions=True)
        with torch.no_grad():
            out = model(ids)
            assert len(out.hidden_states) == 3
            assert len(out.attentions) == 2
            assert model(ids, output_hidden_states=False).hidden_states is None
            assert model(ids, output_attentions=False).attentions is None


class TestAttentions:
    """``output_attentions``: per layer (B, H, T, T), the matrix that the scan multiplies x with."""

    def mixed(self, model: Any, ids: Tensor, **arguments: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per layer: the attention matrix, the mixer's input and its output, all in the batch's own positions."""
        seen: list[tuple[Tensor, Tensor]] = []
        hooks = [
            layer.mixer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output[0])))
            for layer in model.backbone.layers
        ]
        with torch.no_grad():
            attentions = model(ids, output_attentions=True, **arguments).attentions
        for hook in hooks:
            hook.remove()
        return [(matrix, *both) for matrix, both in zip(attentions, seen, strict=True)]

    @pytest.mark.parametrize("changes", [{}, {"n_groups": 1}, {"time_step_limit": (0.02, 0.08)}])
    def test_times_x_and_the_skip_is_the_scan(self, tiny_model: Make, ids: Tensor, changes: dict[str, Any]) -> None:
        model = tiny_model(**changes).double()
        for layer, (matrix, hidden, output) in zip(model.backbone.layers, self.mixed(model, ids), strict=True):
            assert matrix.shape == (3, 8, 14, 14)
            mixer = layer.mixer
            z, xbc, _ = mixer.in_proj(hidden).split([64, mixer.conv_size, 8], -1)
            x = F.silu(mixer.conv1d(xbc.mT)[..., :14]).mT[..., :64].unflatten(-1, (8, 8))  # (B, T, H, P)
            y = torch.einsum("bhij,bjhp->bihp", matrix, x) + mixer.D[:, None] * x
            torch.testing.assert_close(mixer.out_proj(mixer.norm(y.flatten(2), z)), output, rtol=0, atol=1e-10)

    def test_no_row_sees_the_future_another_document_or_padding(self, model: Any, ids: Tensor) -> None:
        seq_idx = torch.tensor([[0] * 7 + [1] * 7, [0] * 2 + [1] * 12, [0] * 9 + [1] * 5])
        with torch.no_grad():
            attentions = model(ids, attention_mask=MASK, seq_idx=seq_idx, output_attentions=True).attentions
        allowed = torch.ones(14, 14).tril().bool() & (seq_idx[:, :, None] == seq_idx[:, None, :])
        allowed = allowed & (MASK[:, :, None] * MASK[:, None, :]).bool()
        for matrix in attentions:
            assert not matrix.masked_fill(allowed[:, None], 0).any()
            assert matrix.masked_select(allowed[:, None]).ne(0).all()

    def test_padding_leaves_no_trace(self, model: Any, ids: Tensor) -> None:
        with torch.no_grad():
            padded = model(ids, attention_mask=MASK, output_attentions=True).attentions
            for row, keep in enumerate(MASK.bool()):
                alone = model(ids[row, keep][None], output_attentions=True).attentions
                for matrix, expected in zip(padded, alone, strict=True):
                    torch.testing.assert_close(matrix[row][:, keep][:, :, keep], expected[0], **CLOSE)

    def test_packed_documents_stand_on_the_diagonal(self, model: Any, ids: Tensor) -> None:
        bounds = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
        with torch.no_grad():
            matrix = model(ids[:1], cu_seq_lens_q=bounds, output_attentions=True).attentions[0]
            for start, stop in pairwise(bounds.tolist()):
                alone = model(ids[:1, start:stop], output_attentions=True).attentions[0]
                torch.testing.assert_close(matrix[..., start:stop, start:stop], alone, **CLOSE)
        assert not matrix[..., 5:, :5].any()

    def test_asking_changes_nothing_else(self, model: Any, ids: Tensor) -> None:
        with torch.no_grad():
            expected = model(ids, attention_mask=MASK).logits
            torch.testing.assert_close(model(ids, attention_mask=MASK, output_attentions=True).logits, expected, **SAME)

    def test_are_refused_above_the_limit(self, model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ArgumentError, match=r"1 x 20000 tokens takes 23.8 GiB.*ATTENTION_BYTES_LIMIT"):
            model(torch.zeros(1, 20000, dtype=torch.long), output_attentions=True)
        needed = 4 * 2 * 3 * 8 * 14 * 14
        with torch.no_grad():
            monkeypatch.setattr(modeling_mamba2, "ATTENTION_BYTES_LIMIT", needed)
            attentions = model(ids, output_attentions=True).attentions
            assert sum(matrix.nbytes for matrix in attentions) == needed
            monkeypatch.setattr(modeling_mamba2, "ATTENTION_BYTES_LIMIT", needed - 1)
            with pytest.raises(ArgumentError, match="GiB"):
                model(ids, output_attentions=True)

    def test_a_filled_cache_is_refused(self, model: Any, ids: Tensor) -> None:
        with torch.no_grad():
            cache = model(ids).past_key_values
        with pytest.raises(ArgumentError, match="cache of 14 tokens"):
            model(ids, past_key_values=cache, output_attentions=True)


class TestArguments:
    def test_embeddings_in_place_of_ids(self, model: Any, ids: Tensor) -> None:
        embeds = model.get_input_embeddings()(ids)
        for arguments in ({}, {"attention_mask": MASK}, {"labels": ids}):
            expected = model(ids, **arguments)
            out = model(inputs_embeds=embeds, **arguments)
            torch.testing.assert_close(out.logits, expected.logits, **SAME)

    @pytest.mark.parametrize("cls", [Mamba2Model, Mamba2ForCausalLM, Mamba2ForSequenceClassification])
    def test_one_of_both_and_a_batch(self, tiny_model: Make, ids: Tensor, cls: type[Any]) -> None:
        model = tiny_model(cls)
        embeds = model.get_input_embeddings()(ids)
        for arguments in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
            with pytest.raises(ArgumentError, match="either input_ids or inputs_embeds"):
                model(**arguments)
        with pytest.raises(ArgumentError, match=r"input_ids has shape \(14,\), expected \(B, T\)"):
            model(ids[0])
        with pytest.raises(ArgumentError, match=r"inputs_embeds has shape \(14, 32\), expected \(B, T, d\)"):
            model(inputs_embeds=embeds[0])
        with pytest.raises(ArgumentError, match="at least 1"):
            model(ids[:, :0])

    @pytest.mark.parametrize("cls", [Mamba2Model, Mamba2ForCausalLM, Mamba2ForSequenceClassification])
    def test_unknown_arguments_are_refused(self, tiny_model: Make, ids: Tensor, cls: type[Any]) -> None:
        """With labels too: a misspelt mask must not vanish into the loss."""
        model = tiny_model(cls)
        with pytest.raises(TypeError, match="atention_mask"):
            model(ids, atention_mask=MASK)
        if cls is Mamba2ForCausalLM:
            with pytest.raises(TypeError, match="atention_mask"):
                model(ids, labels=ids, atention_mask=MASK)
            with pytest.raises(TypeError, match="shift_labels"):  # what trainers pass with shards of a sequence
                model(ids, labels=ids, shift_labels=ids)

    def test_what_code_for_any_model_passes_changes_nothing(self, any_model: Any, ids: Tensor) -> None:
        """As in transformers' own models, in which it vanishes."""
        generic = {
            **{"cache_position": torch.arange(14), "num_logits_to_keep": 1, "head_mask": None, "is_causal": True},
            **{"num_items_in_batch": torch.tensor(3), "special_tokens_mask": ids, "output_router_logits": False},
        }
        backbone = any_model.backbone
        with torch.no_grad():
            for part in (any_model, backbone):
                torch.testing.assert_close(part(ids, **generic)[0], part(ids)[0], **SAME)
            torch.testing.assert_close(backbone(ids, logits_to_keep=1)[0], backbone(ids)[0], **SAME)

    def test_what_would_be_missing_from_the_result_is_refused(self, any_model: Any, ids: Tensor) -> None:
        with pytest.raises(ArgumentError, match="is_causal=False"):
            any_model(ids, is_causal=False)
        with pytest.raises(ArgumentError, match="head_mask"):
            any_model(ids, head_mask=torch.ones(2, 6))

    def test_a_misspelt_argument_is_named_with_the_right_one(self, any_model: Any, ids: Tensor) -> None:
        for part in (any_model, any_model.backbone):
            with pytest.raises(TypeError, match="'past_key_value': did you mean 'past_key_values'"):
                part(ids, past_key_value=None)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64, torch.uint8])
    def test_ids_of_another_dtype_are_refused(self, any_model: Any, ids: Tensor, dtype: torch.dtype) -> None:
        model, wrong = any_model, ids.to(dtype)
        ran: list[int] = []
        model.get_input_embeddings().register_forward_pre_hook(lambda *_: ran.append(1))
        for call in (model, model.backbone, *([model.read] if model.can_generate() else [])):
            with pytest.raises(ArgumentError, match=rf"input_ids has dtype {dtype}.*input_ids.long\(\)"):
                call(wrong)
        assert not ran
        torch.testing.assert_close(model(ids.int()).logits, model(ids).logits, **SAME)

    def test_embeddings_that_are_ids_are_refused(self, any_model: Any, ids: Tensor) -> None:
        with pytest.raises(ArgumentError, match=r"inputs_embeds has dtype torch\.int64.*input_ids"):
            any_model(inputs_embeds=ids[..., None].expand(-1, -1, 32))

    def test_ids_that_have_no_embedding_are_named(self, any_model: Any, ids: Tensor) -> None:
        for wrong in (ids + 61 - ids.min(), ids - 62):
            with pytest.raises(ArgumentError, match=rf"from {wrong.min()} to {wrong.max()}, and vocab_size=61.*resize"):
                any_model(wrong)

    @pytest.mark.parametrize("training", [False, True])
    def test_labels_that_are_no_token_ids_are_refused(self, tiny_model: Make, ids: Tensor, training: bool) -> None:
        model = tiny_model().train(training)
        for wrong in (ids.float(), ids > 5):
            with pytest.raises(ArgumentError, match=r"labels has dtype .*labels.long\(\)"):
                model(ids, labels=wrong)
        with pytest.raises(ArgumentError, match=r"labels has shape \(3, 13\), expected \(B, T\) = \(3, 14\)"):
            model(ids, labels=ids[:, 1:])
        torch.testing.assert_close(model(ids, labels=ids.int()).loss, model(ids, labels=ids).loss, **SAME)

    @pytest.mark.parametrize("cls", [Mamba2Model, Mamba2ForCausalLM, Mamba2ForSequenceClassification])
    def test_token_types_of_a_tokenizer_are_accepted(self, tiny_model: Make, ids: Tensor, cls: type[Any]) -> None:
        model = tiny_model(cls)
        with torch.no_grad():
            expected = model(ids)[0]
            torch.testing.assert_close(model(ids, token_type_ids=torch.zeros_like(ids))[0], expected, **SAME)
            if cls is Mamba2ForCausalLM:
                torch.testing.assert_close(
                    model.generate(ids, token_type_ids=torch.zeros_like(ids), max_new_tokens=3),
                    model.generate(ids, max_new_tokens=3),
                )

    def test_which_logits_to_keep(self, model: Any, ids: Tensor) -> None:
        with torch.no_grad():
            full = model(ids).logits
            assert full.shape == (3, 14, 61)
            torch.testing.assert_close(model(ids, logits_to_keep=0).logits, full, **SAME)
            torch.testing.assert_close(model(ids, logits_to_keep=1).logits, full[:, -1:], **CLOSE)
            torch.testing.assert_close(model(ids, logits_to_keep=5).logits, full[:, -5:], **CLOSE)
            torch.testing.assert_close(model(ids, logits_to_keep=99).logits, full, **CLOSE)
            places = torch.tensor([0, 3, 13])
            torch.testing.assert_close(model(ids, logits_to_keep=places).logits, full[:, places], **CLOSE)

    def test_tuples(self, tiny_model: Make, ids: Tensor) -> None:
        model = tiny_model()
        with torch.no_grad():
            expected = model(ids, labels=ids)
            loss, logits, cache = model(ids, labels=ids, return_dict=False)
            torch.testing.assert_close((loss, logits), (expected.loss, expected.logits), **SAME)
            assert isinstance(cache, Mamba2Cache)
            logits, hidden_states, attentions = model(
                *(ids, MASK),
                use_cache=False,
                output_hidden_states=True,
                output_attentions=True,
                return_dict=False,
            )
            assert (len(hidden_states), len(attentions)) == (3, 2)
            assert [type(part) for part in model.backbone(ids, return_dict=False)] == [Tensor, Mamba2Cache]
            model.config.return_dict = False
            assert isinstance(model(ids), tuple)

    def test_labels_are_not_written_to(self, model: Any, ids: Tensor) -> None:
        labels = ids.clone()
        model(ids, attention_mask=MASK, labels=labels)
        assert torch.equal(labels, ids)

    def test_labels_next_to_padding_are_ignored(self, model: Any, ids: Tensor) -> None:
        """What a collator that forgot -100 leaves at padding, before it and after it."""
        expected = model(ids, attention_mask=MASK, labels=ids).loss
        counts = F.pad(MASK[:, 1:] * MASK[:, :-1], (1, 0)).bool()  # tokens with a token before them
        for filler in (-100, 5):
            out = model(ids, attention_mask=MASK, labels=ids.where(counts, filler))
            torch.testing.assert_close(out.loss, expected, **SAME)
        losses = F.cross_entropy(model(ids, attention_mask=MASK).logits[:, :-1].mT, ids[:, 1:], reduction="none")
        torch.testing.assert_close(expected, losses[counts[:, 1:]].mean(), **CLOSE)

    def test_labels_at_document_starts_are_ignored(self, model: Any, ids: Tensor) -> None:
        seq_idx = (torch.arange(14) // 4).expand(3, -1)
        expected = model(ids, seq_idx=seq_idx, labels=ids).loss
        out = model(ids, seq_idx=seq_idx, labels=ids.masked_fill(torch.arange(14) % 4 == 0, -100))
        torch.testing.assert_close(out.loss, expected, **SAME)


class TestEmbeddings:
    @pytest.mark.parametrize("tied", [True, False])
    def test_resize(self, tiny_model: Make, ids: Tensor, tied: bool) -> None:
        model = tiny_model(tie_word_embeddings=tied)
        with torch.no_grad():
            expected = model(ids).logits
            model.resize_token_embeddings(70)
            assert model.config.vocab_size == 70
            logits = model(ids).logits
            assert logits.shape == (3, 14, 70)
            torch.testing.assert_close(logits[..., :61], expected, **CLOSE)
            assert model(ids + 9, labels=ids + 9).loss.isfinite()
            model.resize_token_embeddings(61)
            torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied

    def test_are_found_and_replaced(self, tiny_model: Make, ids: Tensor) -> None:
        for cls in (Mamba2Model, Mamba2ForCausalLM, Mamba2ForSequenceClassification):
            model = tiny_model(cls)
            model.set_input_embeddings(torch.nn.Embedding(100, 32))
            assert model.get_input_embeddings().num_embeddings == 100
            assert model(ids + 30)[0].isfinite().all()
        causal = tiny_model()
        assert causal.get_output_embeddings() is causal.lm_head


class TestTraining:
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, tiny_model: Make, ids: Tensor, reentrant: bool) -> None:
        model = tiny_model().train()
        model(ids, attention_mask=MASK, labels=ids).loss.backward()
        expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": reentrant})
        model(ids, attention_mask=MASK, labels=ids, output_hidden_states=True, output_attentions=True).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], **CLOSE, msg=name)

    def test_every_parameter_learns(self, tiny_model: Make, ids: Tensor) -> None:
        model = tiny_model().train()
        model(ids, labels=ids).loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, tiny_model: Make, ids: Tensor, dtype: torch.dtype) -> None:
        model = tiny_model().train()
        expected = model(ids, labels=ids).loss
        with torch.autocast("cpu", dtype):
            loss = model(ids, attention_mask=MASK, labels=ids).loss
            plain = model(ids, labels=ids).loss
        torch.testing.assert_close(plain, expected, rtol=0.02, atol=0)
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}

    def test_half_precision_trains(self, tiny_model: Make, ids: Tensor) -> None:
        model = tiny_model().bfloat16().train()
        model(ids, attention_mask=MASK, labels=ids).loss.backward()
        mixer = model.backbone.layers[0].mixer
        assert {mixer.A_log.grad.dtype, mixer.D.grad.dtype, mixer.dt_bias.grad.dtype} == {torch.float32}
        assert mixer.in_proj.weight.grad.dtype == torch.bfloat16
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_learns_a_sequence_by_heart(self, tiny_config: Make) -> None:
        torch.manual_seed(0)
        model = Mamba2ForCausalLM(tiny_config()).train()
        ids = torch.randint(3, 61, (2, 24))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.05 < math.log(61)


class TestSequenceClassification:
    @pytest.fixture
    def classifier(self, tiny_model: Make) -> Mamba2ForSequenceClassification:
        return tiny_model(Mamba2ForSequenceClassification, num_labels=3)

    def alone(self, classifier: Any, ids: Tensor, mask: Tensor) -> Tensor:
        rows = [classifier(ids[row, keep][None]).logits for row, keep in enumerate(mask.bool())]
        return torch.cat(rows)

    @pytest.mark.parametrize("side", ["left", "right", "both"])
    def test_reads_the_last_token_that_counts(self, classifier: Any, ids: Tensor, side: str) -> None:
        mask = {
            "left": torch.tensor([[0] * 5 + [1] * 9, [1] * 14, [0] * 13 + [1]]),
            "right": torch.tensor([[1] * 9 + [0] * 5, [1] * 14, [1] + [0] * 13]),
            "both": MASK,
        }[side]
        with torch.no_grad():
            out = classifier(ids, attention_mask=mask)
            assert out.logits.shape == (3, 3)
            torch.testing.assert_close(out.logits, self.alone(classifier, ids, mask), **CLOSE)
            embeds = classifier.get_input_embeddings()(ids)
            again = classifier(inputs_embeds=embeds, attention_mask=mask)
            torch.testing.assert_close(again.logits, out.logits, **SAME)

    def test_without_a_mask_the_last_token_is_the_last_that_is_no_padding(self, classifier: Any, ids: Tensor) -> None:
        padded = ids.clone()
        padded[0, 9:] = classifier.config.pad_token_id
        padded[1, 3] = classifier.config.pad_token_id  # inside a sequence it is a token like any other
        with torch.no_grad():
            logits = classifier(padded).logits
            torch.testing.assert_close(logits[:1], classifier(ids[:1, :9]).logits, **CLOSE)
            torch.testing.assert_close(logits[1:], classifier(padded[1:]).logits, **CLOSE)
            embeds = classifier.get_input_embeddings()(padded[1:2])
            torch.testing.assert_close(classifier(inputs_embeds=embeds).logits, logits[1:2], **CLOSE)

    def test_no_pad_token(self, tiny_model: Make, ids: Tensor) -> None:
        classifier = tiny_model(Mamba2ForSequenceClassification, pad_token_id=None)
        with torch.no_grad():
            torch.testing.assert_close(classifier(ids).logits, self.alone(classifier, ids, torch.ones(3, 14)), **CLOSE)
            logits = classifier(ids, attention_mask=MASK).logits
            torch.testing.assert_close(logits, self.alone(classifier, ids, MASK), **CLOSE)

    def test_continues_a_cache(self, classifier: Any, ids: Tensor) -> None:
        with torch.no_grad():
            cache = classifier(ids[:, :6]).past_key_values
            torch.testing.assert_close(
                classifier(ids[:, 6:], past_key_values=cache).logits, classifier(ids).logits, **CLOSE
            )

    @pytest.mark.parametrize(
        ("labels", "changes", "loss", "problem_type"),
        [
            (torch.tensor([0, 2, 1]), {"num_labels": 3}, F.cross_entropy, "single_label_classification"),
            (
                torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]]),
                {"num_labels": 3},
                F.binary_cross_entropy_with_logits,
                "multi_label_classification",
            ),
            (torch.tensor([0.5, -1.0, 2.0]), {"num_labels": 1}, F.mse_loss, "regression"),
            (torch.randn(3, 2), {"num_labels": 2, "problem_type": "regression"}, F.mse_loss, "regression"),
        ],
        ids=["classes", "multi_label", "regression", "regression_of_two"],
    )
    def test_losses(
        self,
        *,
        tiny_model: Make,
        ids: Tensor,
        labels: Tensor,
        changes: dict[str, Any],
        loss: Callable[..., Tensor],
        problem_type: str,
    ) -> None:
        classifier = tiny_model(Mamba2ForSequenceClassification, **changes)
        out = classifier(ids, attention_mask=MASK, labels=labels)
        torch.testing.assert_close(out.loss, loss(out.logits.squeeze(-1), labels), **CLOSE)
        assert classifier.config.problem_type == problem_type
        out.loss.backward()
        assert classifier.score.weight.grad.any()

    def test_outputs(self, classifier: Any, ids: Tensor) -> None:
        with torch.no_grad():
            out = classifier(ids, output_hidden_states=True, output_attentions=True)
            assert (len(out.hidden_states), len(out.attentions)) == (3, 2)
            loss, logits = classifier(ids, labels=torch.tensor([0, 1, 2]), use_cache=False, return_dict=False)
        assert loss.shape == ()
        assert logits.shape == (3, 3)


class TestModules:
    def test_auto_classes_build_ours(self, tiny_config: Make) -> None:
        config = tiny_config()
        assert type(AutoModel.from_config(config)) is Mamba2Model
        assert type(AutoModelForCausalLM.from_config(config)) is Mamba2ForCausalLM
        assert type(AutoModelForSequenceClassification.from_config(config)) is Mamba2ForSequenceClassification

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, model: Any, ids: Tensor, duplicate: Callable[[Any], Any]) -> None:
        with torch.no_grad():
            torch.testing.assert_close(duplicate(model)(ids).logits, model(ids).logits, **SAME)

    def test_batches_are_independent(self, model: Any, ids: Tensor) -> None:
        with torch.no_grad():
            alone = torch.cat([model(row[None]).logits for row in ids])
            torch.testing.assert_close(model(ids).logits, alone, **CLOSE)

    def test_the_future_is_not_read(self, model: Any, ids: Tensor) -> None:
        other = ids.clone()
        other[:, 8:] = 60 - other[:, 8:]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits[:, :8], model(other).logits[:, :8], **SAME)

    def test_chunk_size_never_changes_a_result(self, tiny_model: Make, ids: Tensor) -> None:
        with torch.no_grad():
            torch.testing.assert_close(
                tiny_model(chunk_size=3)(ids).logits, tiny_model(chunk_size=256)(ids).logits, **SAME
            )
