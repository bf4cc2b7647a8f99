"""The loss of a language model in training, whose logits are left out, against the loss of its logits."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils.operations import convert_to_fp32
from hybrids import make_hybrid
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from mamba2_hf import ops
from mamba2_hf.errors import ArgumentError, ConfigurationError, LogitsError
from mamba2_hf.ops.cross_entropy import op as fused

B, T, VOCAB = 2, 23, 61


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CHUNK_ELEMENTS", {"cpu": 8 * VOCAB})


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels(ids: Tensor) -> Tensor:
    """Some are -100, and the two rows have different numbers of others."""
    labels = ids.clone()
    labels[0, :7] = labels[1, 3:5] = -100
    return labels


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**inputs)
    (out.loss * 0.37).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model: Any, tolerance: float = 1e-5, **inputs: Any) -> None:
    """With and without logits."""
    whole, expected = loss_and_gradients(model, return_logits=True, **inputs)
    out, actual = loss_and_gradients(model, **inputs)
    assert "logits" in whole
    assert "logits" not in out
    torch.testing.assert_close(out.loss, whole.loss, rtol=tolerance, atol=0)
    assert out.loss.dtype == whole.loss.dtype
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert gradient.dtype == expected[name].dtype
        # Beside the relative error, what is left of sums that cancel: the bias of keys has no gradient at all.
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm() + 1e-8, name


INPUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"attention_mask": (torch.arange(T) >= torch.tensor([[4], [0]])).long()},
    "documents": {"seq_idx": torch.arange(T).div(5, rounding_mode="floor").expand(B, T)},
    "items as an int": {"num_items_in_batch": 11},
    "items as a tensor": {"num_items_in_batch": torch.tensor(11)},
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_equals_that_of_logits(
    tied: bool, inputs: str, tiny_model: Callable[..., Any], ids: Tensor, labels: Tensor
) -> None:
    model = tiny_model(tie_word_embeddings=tied).train()
    assert_same_training(model, input_ids=ids, labels=labels, **INPUTS[inputs])


@pytest.mark.parametrize("name", ["parallel", "experts", "rotary"])
def test_of_hybrids(name: str, ids: Tensor, labels: Tensor) -> None:
    """One divides its logits, one has a loss of its experts beside that of the labels."""
    model = make_hybrid(name).train()
    assert_same_training(
        model, input_ids=ids, labels=labels, **({"output_router_logits": True} if name == "experts" else {})
    )


def test_of_a_head_that_is_multiplied(ids: Tensor, labels: Tensor) -> None:
    assert_same_training(make_hybrid("plain", lm_head_multiplier=0.3).train(), input_ids=ids, labels=labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype: torch.dtype, tiny_model: Callable[..., Any], ids: Tensor, labels: Tensor) -> None:
    exact = tiny_model().train()
    half = tiny_model().to(dtype).train()
    exact.load_state_dict(half.state_dict())
    expected, gradients = loss_and_gradients(exact, input_ids=ids, labels=labels)
    for return_logits in (None, True):
        out, found = loss_and_gradients(half, input_ids=ids, labels=labels, return_logits=return_logits)
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=0.01)
        head = "backbone.embeddings.weight"
        assert (found[head].float() - gradients[head]).norm() < 0.02 * gradients[head].norm()


def test_under_autocast(tiny_model: Callable[..., Any], ids: Tensor, labels: Tensor) -> None:
    model = tiny_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_training(model, 0.02, input_ids=ids, labels=labels)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_without_any_label(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    """As in transformers: the mean over nothing is NaN, a sum over nothing zero."""
    model, none = tiny_model().train(), torch.full_like(ids, -100)
    for items in (None, 5):
        found = [
            model(ids, labels=none, num_items_in_batch=items, return_logits=choice).loss for choice in (None, True)
        ]
        torch.testing.assert_close(*found, equal_nan=True)


class TestWhenLogitsAreReturned:
    def test_in_eval_mode_unless_refused(self, tiny_model: Callable[..., Any], ids: Tensor) -> None:
        model = tiny_model()
        with torch.no_grad():
            out, without = model(ids, labels=ids), model(ids, labels=ids, return_logits=False)
        assert out.logits.shape == (B, T, VOCAB)
        assert "logits" not in without
        torch.testing.assert_close(without.loss, out.loss)

    def test_in_training_without_labels_or_on_demand(self, tiny_model: Callable[..., Any], ids: Tensor) -> None:
        model = tiny_model().train()
        assert model(ids).logits.shape == (B, T, VOCAB)
        assert model(ids, labels=ids, return_logits=True).logits.shape == (B, T, VOCAB)
        assert "logits" not in model(ids, labels=ids)
        assert len(model(ids, labels=ids, return_dict=False)) == 1

    def test_a_head_that_does_more_than_its_weight_is_called(self, tiny_model: Callable[..., Any], ids: Tensor) -> None:
        class Louder(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        plain = tiny_model(tie_word_embeddings=False).train()
        expected = plain(ids, labels=ids)
        hooked = tiny_model(tie_word_embeddings=False).train()
        hooked.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
        louder = tiny_model(tie_word_embeddings=False).train()
        louder.lm_head.__class__ = Louder
        biased = tiny_model(tie_word_embeddings=False).train()
        biased.lm_head.bias = nn.Parameter(torch.arange(VOCAB).float())
        for model in (hooked, louder, biased):
            out = model(ids, labels=ids)
            logits = out.logits if model is biased else out.logits / 2
            torch.testing.assert_close(logits - (biased.lm_head.bias if model is biased else 0), plain(ids).logits)
            assert (out.loss - expected.loss).abs() > 0.01
            assert "logits" not in model(ids, labels=ids, return_logits=False)

    @pytest.mark.parametrize("head", ["resized", "replaced"])
    def test_in_training_with_another_head(self, head: str, tiny_model: Callable[..., Any], ids: Tensor) -> None:
        model = tiny_model(tie_word_embeddings=False).train()
        if head == "resized":
            model.resize_token_embeddings(80, mean_resizing=False)
            assert type(model.lm_head) is type(tiny_model().lm_head)
        else:
            model.lm_head = nn.Linear(model.config.hidden_size, VOCAB, bias=False)
        assert_same_training(model, input_ids=ids, labels=ids)

    def test_a_loss_function_of_the_user_gets_them(self, tiny_model: Callable[..., Any], ids: Tensor) -> None:
        model = tiny_model().train()
        model.loss_function = lambda logits, labels, **_: logits.square().mean()
        out = model(ids, labels=ids)
        torch.testing.assert_close(out.loss, out.logits.square().mean())

    def test_reading_what_was_left_out_says_how_to_get_it(self, tiny_model: Callable[..., Any], ids: Tensor) -> None:
        out = tiny_model().train()(ids, labels=ids)
        for read in (lambda: out.logits, lambda: out["logits"]):
            with pytest.raises(LogitsError, match="return_logits=True"):
                read()
        assert not hasattr(out, "logits")
        assert getattr(out, "logits", None) is out.get("logits") is None
        assert repr(out) == f"Mamba2CausalLMOutput(loss={out.loss!r})"

    @pytest.mark.parametrize(
        "rebuild",
        [
            copy.deepcopy,
            lambda out: pickle.loads(pickle.dumps(out)),
            convert_to_fp32,  # accelerate, in mixed precision
            lambda out: type(out)((key, out[key]) for key in out),  # DataParallel
            lambda out: tree_unflatten(*reversed(tree_flatten(out))),  # DDP
            dataclasses.replace,  # FSDP 1
            lambda out: type(out)(
                **{f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
            ),  # DDP, unused ones
        ],
        ids=["copy", "pickle", "accelerate", "DataParallel", "pytree", "replace", "fields"],
    )
    def test_an_output_stays_what_it_is(
        self, rebuild: Callable[[Any], Any], tiny_model: Callable[..., Any], ids: Tensor
    ) -> None:
        model = tiny_model().train()
        with torch.no_grad():
            without, whole = model(ids, labels=ids), model(ids, labels=ids, return_logits=True)
        again = rebuild(without)
        assert type(again) is type(without)
        assert torch.equal(again.loss, without.loss)
        with pytest.raises(LogitsError, match="return_logits=True"):
            _ = again.logits
        again = rebuild(whole)
        assert torch.equal(again.logits, whole.logits)
        assert torch.equal(again["logits"], again.to_tuple()[1])

    def test_what_contradicts_is_refused(self, tiny_model: Callable[..., Any], ids: Tensor) -> None:
        model = tiny_model()
        with pytest.raises(ArgumentError, match="no labels"):
            model(ids, return_logits=False)
        with pytest.raises(ArgumentError, match="logits_to_keep"):
            model(ids, labels=ids, return_logits=False, logits_to_keep=1)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # from torch.func
    def test_forward_mode_goes_through_them(self, tiny_model: Callable[..., Any], ids: Tensor) -> None:
        model = tiny_model().train()
        embeds = model.get_input_embeddings()(ids).detach()
        direction = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(2))

        def of(embeds: Tensor) -> Tensor:
            return model(inputs_embeds=embeds, labels=ids, use_cache=False).loss

        _, slope = torch.func.jvp(of, (embeds,), (direction,))
        embeds.requires_grad_()
        (gradient,) = torch.autograd.grad(of(embeds), embeds)
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-4, atol=1e-6)


class TestMemory:
    def test_nothing_that_is_kept_has_the_size_of_logits(self, tiny_model: Callable[..., Any], ids: Tensor) -> None:
        """A vocabulary larger than all else, so that a tensor of (tokens, vocabulary) would show."""
        vocab = 5000
        model, sizes = tiny_model(vocab_size=vocab).train(), {}
        for choice in (None, True):
            kept: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # noqa: B023
                model(ids, labels=ids, return_logits=choice)
            sizes[choice] = max(kept)
        assert sizes[True] >= B * T * vocab
        assert sizes[None] == vocab * model.config.hidden_size < sizes[True]

    def test_backward_twice_gives_twice_the_gradient(self, tiny_model: Callable[..., Any], ids: Tensor) -> None:
        model = tiny_model().train()
        total = model(ids, labels=ids).loss
        total.backward(retain_graph=True)
        once = model.backbone.embeddings.weight.grad.clone()
        total.backward()
        torch.testing.assert_close(model.backbone.embeddings.weight.grad, 2 * once)

    def test_whole_model_under_a_checkpoint(self, tiny_model: Callable[..., Any], ids: Tensor) -> None:
        model = tiny_model().train()
        _, expected = loss_and_gradients(model, input_ids=ids, labels=ids)
        model.zero_grad()
        total = checkpoint(lambda i: model(i, labels=i, use_cache=False).loss, ids, use_reentrant=False)
        (total * 0.37).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name])


def test_the_function_is_that_of_transformers(ids: Tensor) -> None:
    """The op, shifted and divided, and the loss it stands for."""
    source = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(B, T, 8, generator=source), torch.randn(VOCAB, 8, generator=source)
    expected = ForCausalLMLoss(hidden @ weight.T, ids, VOCAB)
    shifted = F.pad(ids, (0, 1), value=-100)[:, 1:].flatten()
    actual = ops.linear_cross_entropy(hidden.flatten(0, 1), weight, shifted) / (B * (T - 1))
    torch.testing.assert_close(actual, expected)


class TestHeadsThatPredictFurtherTokens:
    COEF = 0.3

    def model(self, count: int = 2, coef: float = COEF, **changes: Any) -> Any:
        heads = {"num_mtp_layers": count, "mtp_layer_blocks": ["attention", "ssd mlp"], "mtp_loss_coef": coef}
        return make_hybrid("plain", **heads, **changes).double().train()

    @pytest.mark.parametrize("return_logits", [None, True])
    def test_the_mean_of_their_losses_is_added(self, return_logits: bool | None, ids: Tensor, labels: Tensor) -> None:
        model = self.model()
        found = model(ids, labels=labels, return_logits=return_logits).loss
        states = model.backbone(ids).last_hidden_state
        total, count = torch.zeros((), dtype=torch.float64), (labels[:, 1:] != -100).sum()
        for depth, head in enumerate(model.mtp, 1):
            states = head(model.backbone.embeddings(ids[:, depth:]), states[:, : T - depth])
            logits = model.lm_head(states[:, :-1])  # none behind the last token
            total += F.cross_entropy(logits.flatten(0, 1), labels[:, depth + 1 :].flatten(), reduction="sum") / count
        expected = model.eval()(ids, labels=labels).loss + self.COEF * total / 2
        torch.testing.assert_close(found, expected)

    def test_documents_and_padding_are_apart(self) -> None:
        """Also documents that are shorter than the heads reach."""
        model = self.model(3)
        lengths, ids = [5, 1, 9, 2, 3], torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
        documents = ids.split(lengths, 1)
        expected = sum(model(each, labels=each, num_items_in_batch=20).loss for each in documents)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        packed = model(ids, position_ids=positions, labels=ids, num_items_in_batch=20).loss
        torch.testing.assert_close(packed, expected)
        for side in ("left", "right"):
            batch = torch.nn.utils.rnn.pad_sequence([each[0] for each in documents], True, padding_side=side)
            inputs = {"attention_mask": (batch != 0).long(), "labels": batch.masked_fill(batch == 0, -100)}
            loss = model(batch, num_items_in_batch=20, **inputs).loss
            torch.testing.assert_close(loss, expected)

    def test_trains_them_if_asked(self, ids: Tensor, tmp_path: Any) -> None:
        for coef in (0.0, self.COEF):
            model = self.model(coef=coef)
            model.save_pretrained(tmp_path)
            for each in (model, type(model).from_pretrained(tmp_path).train()):
                each(ids, labels=ids).loss.backward()
                trained = {name: p.grad is not None for name, p in each.named_parameters()}
                assert {trained[name] for name in trained if name.startswith("mtp.")} == {coef > 0}
                assert all(trained[name] for name in trained if not name.startswith("mtp."))
        asked = type(model).from_pretrained(tmp_path, mtp_loss_coef=0.1)
        assert all(p.requires_grad for p in asked.parameters())

    def test_a_forward_does_not_run_them(self, ids: Tensor) -> None:
        model = self.model(coef=0.0)
        without = make_hybrid("plain").double().train()
        without.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("mtp.")})
        for head in model.mtp:
            head.register_forward_pre_hook(lambda *_: pytest.fail("a head ran"))
        assert torch.equal(model(ids, labels=ids).loss, without(ids, labels=ids).loss)
        assert torch.equal(model.eval()(ids).logits, without.eval()(ids).logits)

    def test_what_they_cannot_do_is_refused(self, ids: Tensor) -> None:
        with pytest.raises(
            ArgumentError, match=r"mtp_loss_coef=0.3: the heads have the usual loss, and logits_to_keep was given"
        ):
            self.model()(ids, labels=ids[:, -2:], logits_to_keep=2)
        with pytest.raises(ConfigurationError, match=r"mtp_loss_coef is 0.3: a weight of at least 0; without heads"):
            make_hybrid("plain", mtp_loss_coef=0.3)
