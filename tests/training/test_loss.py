"""The loss by chunks against torch's own losses of all logits at once: values, gradients, and what is never made."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from masformer.errors import InputError
from masformer.models.head import Head
from masformer.training.loss import chunked_loss

from ..models.helpers import tiny, tokens

BATCH, TOKENS, HIDDEN, VOCABULARY = 2, 11, 5, 37
PREDICTED = 17
BARS = {torch.float64: 1e-12, torch.float32: 1e-6}
SHAPES = {"plain": {}, "cohere": {"scale": 0.3}, "granite": {"divisor": 3.0}, "gemma": {"softcap": 1.5}}


def made(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dtype=torch.float64, seed=0, hidden=HIDDEN, **after):
    """Hidden states and a head of leaves that need gradients."""
    states = made(BATCH, TOKENS, hidden, seed=seed, dtype=dtype).requires_grad_()
    weight = made(VOCABULARY, hidden, seed=seed + 1, dtype=dtype).requires_grad_()
    bias = made(VOCABULARY, seed=seed + 2, dtype=dtype).requires_grad_()
    return states, Head(weight, bias, **after)


def labels():
    """Two packed documents in the first row, padding in the second; the label of a first token is ignored."""
    ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(9))
    ids[:, 0] = ids[0, 4] = -100
    ids[1, 9:] = -100
    return ids


def plain_loss(hidden, labels, head, total, teacher=None, weight=0.0):
    """loss, nats, kl of all logits at once."""
    wanted = labels[:, 1:].flatten()
    logits = head(hidden[:, :-1]).flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nats, kl = F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum"), torch.zeros(())
    if teacher is not None:
        theirs = teacher[0](teacher[1][:, :-1]).flatten(0, 1)[wanted != -100].detach().to(logits.dtype)
        kl = F.kl_div(logits[wanted != -100].log_softmax(-1), theirs.softmax(-1), reduction="sum")
    return ((1 - weight) * nats + weight * kl) / total, nats, kl


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, (hidden, head.weight, head.bias))


def close(got, expected, bar):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=bar, rtol=bar, check_dtype=False)


@pytest.mark.parametrize("chunk", [1, 7, PREDICTED, None])
@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("after", SHAPES)
def test_value_and_gradients_are_those_of_the_plain_loss(after, dtype, chunk):
    hidden, head = inputs(dtype, **SHAPES[after])
    got = chunked_loss(hidden, labels(), head, total=20, chunk=chunk)
    loss, nats, _ = plain_loss(hidden, labels(), head, 20)
    close((got.loss, got.nats), (loss, nats), BARS[dtype])
    close(gradients(3 * got.loss, hidden, head), gradients(3 * loss, hidden, head), BARS[dtype])
    assert got.tokens == PREDICTED
    assert got.kl == 0
    assert got.loss.dtype == got.nats.dtype == got.kl.dtype == dtype
    assert not got.nats.requires_grad


@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", BARS)
def test_a_teacher_adds_its_divergence(dtype, weight, chunk):
    hidden, head = inputs(dtype, softcap=2.0)
    states, teacher = inputs(dtype, seed=5, hidden=7, scale=0.5)
    got = chunked_loss(
        hidden, labels(), head, total=torch.tensor(20.0), teacher=(teacher, states), weight=weight, chunk=chunk
    )
    expected = plain_loss(hidden, labels(), head, 20, (teacher, states), weight)
    close(got[:3], expected, BARS[dtype])
    close(gradients(got.loss, hidden, head), gradients(expected[0], hidden, head), BARS[dtype])
    got = chunked_loss(hidden, labels(), head, total=20, teacher=(teacher, states), weight=weight, chunk=chunk)
    got.loss.backward()
    assert states.grad is None
    assert teacher.weight.grad is None


def test_a_teacher_that_is_the_student_diverges_by_nothing():
    hidden, head = inputs()
    got = chunked_loss(hidden, labels(), head, total=20, teacher=(head, hidden), weight=1.0)
    assert abs(float(got.kl)) < 1e-12
    close(gradients(got.loss, hidden, head), [torch.zeros_like(x) for x in (hidden, head.weight, head.bias)], 1e-12)


def test_micro_batches_weigh_by_their_tokens():
    hidden, head = inputs()
    joint = chunked_loss(hidden, labels(), head, total=PREDICTED)
    parts = [chunked_loss(hidden[i : i + 1], labels()[i : i + 1], head, total=PREDICTED) for i in range(BATCH)]
    assert parts[0].tokens != parts[1].tokens
    close([sum(part.loss for part in parts)], [joint.loss], 1e-12)
    expected = gradients(joint.loss, hidden, head)
    for part in parts:
        part.loss.backward()  # accumulates
    close((hidden.grad, head.weight.grad, head.bias.grad), expected, 1e-12)


def test_positions_without_a_label_get_no_gradient_and_need_no_number():
    hidden, head = inputs()
    ignored = F.pad(labels(), (0, 1), value=-100)[:, 1:] == -100
    broken = hidden.detach().masked_fill(ignored[..., None], torch.nan).requires_grad_()
    got, expected = (chunked_loss(x, labels(), head, total=20).loss for x in (broken, hidden))
    assert torch.equal(got, expected)
    grad = gradients(got, broken, head)[0]
    assert torch.equal(grad == 0, ignored[..., None].expand_as(grad))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "head", "all"])
def test_what_needs_no_gradient_gets_none(frozen):
    hidden, head = inputs()
    leaves = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    expected = dict(zip(leaves, gradients(plain_loss(hidden, labels(), head, 20)[0], hidden, head), strict=True))
    names = {"head": ["weight", "bias"], "all": list(leaves)}.get(frozen, [frozen])
    for name in names:
        leaves[name].requires_grad_(False)
    loss = chunked_loss(hidden, labels(), head, total=20, chunk=4).loss
    assert loss.requires_grad == (frozen != "all")
    if frozen != "all":
        loss.backward()
    for name, leaf in leaves.items():
        if name in names:
            assert leaf.grad is None
        else:
            close([leaf.grad], [expected[name]], 1e-12)


def test_a_head_without_a_bias():
    hidden, head = inputs()
    head = Head(head.weight)
    got = torch.autograd.grad(chunked_loss(hidden, labels(), head, total=20, chunk=4).loss, (hidden, head.weight))
    expected = torch.autograd.grad(plain_loss(hidden, labels(), head, 20)[0], (hidden, head.weight))
    close(got, expected, 1e-12)


def test_no_predicted_tokens_give_a_zero_that_goes_backward():
    hidden, head = inputs()
    got = chunked_loss(hidden, torch.full((BATCH, TOKENS), -100), head, total=20, teacher=(head, hidden), weight=0.5)
    assert (float(got.loss.detach()), float(got.nats), float(got.kl), got.tokens) == (0, 0, 0, 0)
    got.loss.backward()
    assert not any(bool(leaf.grad.any()) for leaf in (hidden, head.weight, head.bias))


class Made(TorchDispatchMode):
    """Notes every operation and the elements of the largest tensor that any of them returned."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("default", [False, True])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(default, monkeypatch):
    size = 8  # more than the hidden size, so that the gradient of the weight is smaller than a chunk's logits
    monkeypatch.setattr("masformer.training.loss.CHUNK_BYTES", 4 * VOCABULARY * size + 3)
    chunk = None if default else size
    hidden, head = inputs(softcap=2.0)
    with Made() as seen:
        chunked_loss(hidden, labels(), head, total=20, teacher=(head, hidden), weight=0.5, chunk=chunk).loss.backward()
    assert seen.largest == size * VOCABULARY
    with Made() as seen:
        plain_loss(hidden, labels(), head, 20)[0].backward()
    assert seen.largest == BATCH * (TOKENS - 1) * VOCABULARY


def test_nothing_is_learned_where_gradients_are_off():
    hidden, head = inputs()
    expected = chunked_loss(hidden, labels(), head, total=20)
    for off in (torch.no_grad, torch.inference_mode):
        with off(), Made() as seen:
            got = chunked_loss(hidden, labels(), head, total=20)
        assert not got.loss.requires_grad
        close(got[:3], [x.detach() for x in expected[:3]], 0)
        assert not [name for name in seen.names if "backward" in name]


def test_the_backward_pass_computes_nothing_again():
    hidden, head = inputs()
    loss = chunked_loss(hidden, labels(), head, total=20).loss
    with Made() as seen:
        loss.backward()
    assert not seen.names & {"mm", "addmm", "_log_softmax", "_log_softmax_backward_data"}


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_gives_what_the_plain_loss_gives_under_it(frozen):
    hidden, head = inputs(torch.float32, scale=0.5)
    states, teacher = inputs(torch.float32, seed=5, softcap=2.0)
    head.weight.requires_grad_(not frozen)
    leaves = [leaf for leaf in (hidden, head.weight, head.bias) if leaf.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_loss(hidden, labels(), head, 20, (teacher, states), 0.5)
        got = chunked_loss(hidden, labels(), head, total=20, teacher=(teacher, states), weight=0.5, chunk=4)
    close(got[:3], expected, 1e-5)
    exact = plain_loss(hidden, labels(), head, 20, (teacher, states), 0.5)
    assert abs(float((got.loss - exact[0]).detach())) > 1e-4  # autocast was on
    for one, other in zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(expected[0], leaves), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-2)


def test_gradients_of_bfloat16_weights_keep_their_digits_over_chunks():
    hidden, head = inputs(torch.bfloat16)
    doubles = [leaf.detach().double().requires_grad_() for leaf in (hidden, head.weight, head.bias)]
    expected = torch.autograd.grad(plain_loss(doubles[0], labels(), Head(*doubles[1:]), 20)[0], doubles)
    errors = {}
    for chunk in (1, None):
        got = gradients(chunked_loss(hidden, labels(), head, total=20, chunk=chunk).loss, hidden, head)
        assert all(grad.dtype == torch.bfloat16 for grad in got)
        errors[chunk] = float((got[1] - expected[1]).norm() / expected[1].norm())
    assert max(errors.values()) < 1e-2


def test_sums_of_many_tokens_overflow_no_half_precision():
    hidden = torch.full((1, 3001, 1), 30.0, dtype=torch.float16).requires_grad_()
    weight = torch.tensor([[0.0], [0.0]], dtype=torch.float16).requires_grad_()
    wanted = torch.zeros(1, 3001, dtype=torch.long)
    chunked_loss(hidden, wanted, Head(weight), total=3000, chunk=1000).loss.backward()
    close([weight.grad], [torch.tensor([[-15.0], [15.0]])], 1e-3)


def test_a_model_with_tied_embeddings_gets_the_gradients_of_its_own_loss():
    model, ids = tiny("gemma2", tie_word_embeddings=True), tokens(20, batch=2)
    wanted = ids.clone()
    wanted[0, :7] = -100
    loss = plain_loss(model.base_model(input_ids=ids).last_hidden_state, wanted, Head.of(model), 32)[0]
    loss.backward()
    expected = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(loss.float(), model(input_ids=ids, labels=wanted).loss, check_dtype=False)
    model.zero_grad()
    hidden = model.base_model(input_ids=ids).last_hidden_state
    chunked_loss(hidden, wanted, Head.of(model), total=32, chunk=5).loss.backward()
    close([parameter.grad for parameter in model.parameters()], expected, 1e-10)


def test_the_backward_pass_runs_once():
    hidden, head = inputs()
    loss = chunked_loss(hidden, labels(), head, total=20).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(InputError, match="no second derivative"):
        torch.autograd.grad(chunked_loss(hidden, labels(), head, total=20).loss, hidden, create_graph=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": labels()[:, 1:]}, r"hidden states \[2, 11, 5\] and labels \[2, 10\] do not fit"),
        ({"total": 0}, "total is 0.0 tokens"),
        ({"total": torch.tensor(0)}, "total is 0.0 tokens"),
        ({"chunk": 0}, "chunk of 0 tokens"),
        ({"weight": 1.5}, r"weight is 1.5: give a part of the loss"),
        ({"weight": 0.5}, "there is no teacher"),
        ({"teacher": (Head(torch.zeros(36, 3)), torch.zeros(2, 11, 3))}, "has 36 tokens in its vocabulary .* 37"),
        ({"teacher": (Head(torch.zeros(37, 3)), torch.zeros(2, 10, 3))}, r"teacher \[2, 10, 3\] do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    hidden, head = inputs()
    with pytest.raises(InputError, match=words):
        chunked_loss(**{"hidden": hidden, "labels": labels(), "head": head, "total": 20} | changes)
