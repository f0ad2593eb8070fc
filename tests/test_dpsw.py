"""The promises of dpsw.py, against a plain loop over responses and tokens in float64."""
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import dpsw
from dpsw import dpsw_loss, dpsw_loss_chunked

INF = math.inf
NAN = math.nan
STATS = ("divergence", "weight", "w_teacher", "w_student")
VIEWS = ("teacher", "sampled")
DIVERGENCES = ("reverse", "forward", "jsd")
NORMS = ("response", "none")


def chunked_loss(student, teacher, *rest, chunk_size=5, **options):
    """The chunked form on logits, behind heads that do nothing."""
    heads = nn.Identity(), nn.Identity()
    return dpsw_loss_chunked(student, teacher, *heads, *rest, chunk_size=chunk_size, **options)


both_forms = pytest.mark.parametrize("loss_of", (dpsw_loss, chunked_loss), ids=("dense", "chunked"))


# ---- the reference: one token at a time, float64, nothing clever ----

def kl(logp, logq):
    kept = logp > -INF
    return (logp[kept].exp() * (logp[kept] - logq[kept])).sum()


def diverge(log_s, log_t, divergence, beta):
    if divergence == "reverse":
        return kl(log_s, log_t)
    if divergence == "forward":
        return kl(log_t, log_s)
    log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def teacher_confidence(log_t, top_k):
    k = min(top_k, len(log_t))
    if k == 1:
        return torch.tensor(1.0)
    top = log_t.exp().sort(descending=True).values[:k]
    shares = top / top.sum()
    return 1 + torch.xlogy(shares, shares).sum() / math.log(k)


def score_token(student, teacher, token, weighting="dpsw", student_view="teacher", top_k=20,
                divergence="reverse", beta=0.5, temperature=1.0):
    """Logits (V,) -> the stats of a token; its divergence alone has a gradient."""
    log_s = (student / temperature).log_softmax(-1)
    log_t = (teacher / temperature).log_softmax(-1)
    if student_view == "teacher":
        token = log_t.argmax()
    w_t = teacher_confidence(log_t, top_k)
    w_s = 1 - log_s[token].detach().exp()
    weight = {"dpsw": w_t * w_s, "teacher": w_t, "student": w_s, "none": torch.tensor(1.0)}
    return {"divergence": diverge(log_s, log_t, divergence, beta), "weight": weight[weighting],
            "w_teacher": w_t, "w_student": w_s}


def reference(student, teacher, ids, mask, weight_norm="response", **options):
    """Loss and the stats of each token; logits (..., T, V)."""
    responses = {}
    tokens = []
    for at in map(tuple, mask.nonzero().tolist()):
        tokens.append(score_token(student[at], teacher[at], ids[at], **options))
        responses.setdefault(at[:-1], []).append(tokens[-1])
    loss = 0.0
    for response in responses.values():
        total = sum(token["weight"] * token["divergence"] for token in response)
        if weight_norm == "response":
            loss += total / sum(token["weight"] for token in response) / len(responses)
        else:
            loss += total / len(tokens)
    return loss, tokens


def make_inputs(*shape, V=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    student = (2 * torch.randn(*shape, V, generator=g)).requires_grad_()
    teacher = 2 * torch.randn(*shape, V, generator=g)
    return student, teacher, torch.randint(V, shape, generator=g)


def mask_of(*lengths, T):
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def check(student, teacher, ids, mask, **options):
    """Loss, stats and student gradient are the reference's -> loss, gradient."""
    wide = student.detach().double().requires_grad_()
    want, tokens = reference(wide, teacher.double(), ids, mask, **options)
    want_gradient, = torch.autograd.grad(want, wide)

    loss, stats = dpsw_loss(student, teacher, ids, mask, **options)
    gradient, = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, want.float(), rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(gradient, want_gradient.float(), rtol=1e-3, atol=2e-6)
    for name in STATS:
        assert stats[name].shape == mask.shape and not stats[name].requires_grad
        want = [token[name].item() for token in tokens]
        assert stats[name][mask].tolist() == pytest.approx(want, rel=2e-4, abs=2e-6), name
    return loss, gradient


# ---- the numbers ----

MASKS = [1, 0, 1], [[1, 0], [1, 1]], [[[1], [0]], [[1], [1]]]


@pytest.mark.parametrize("weight_norm", NORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("weighting", ("dpsw", "teacher", "student", "none"))
def test_every_product_of_options_equals_the_loop(weighting, view, divergence, weight_norm):
    for mask, top_k, temperature in itertools.product(MASKS, (1, 2, 20, 99), (0.6, 1.0)):
        mask = torch.tensor(mask).bool()
        inputs = make_inputs(*mask.shape, V=23, seed=top_k)
        check(*inputs, mask, weighting=weighting, student_view=view, divergence=divergence,
              beta=0.2, weight_norm=weight_norm, top_k=top_k, temperature=temperature)


# student (1/2, 1/2), teacher (1/4, 3/4), in nats; of a single token Σ w D / Σ w is D
#   reverse   KL(S||T) = 1/2 ln 2 + 1/2 ln 2/3    gradient p_S (ln p_S/p_T − KL) = ±0.274653
#   forward   KL(T||S) = 1/4 ln 1/2 + 3/4 ln 3/2  gradient p_S − p_T             = ±0.25
#   jsd 1/4   M = (7/16, 9/16): 1/4 KL(T||M) + 3/4 KL(S||M)
@pytest.mark.parametrize("divergence, want, slope", [
    ("reverse", 0.143841, 0.274653), ("forward", 0.130812, 0.25), ("jsd", 0.024870, 0.047121)])
def test_divergences_have_their_hand_computed_direction(divergence, want, slope):
    student = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    teacher = torch.tensor([[0.25, 0.75]]).log().requires_grad_()
    loss, _ = dpsw_loss(student + 7, teacher - 3, divergence=divergence, beta=0.25)
    loss.backward()
    assert loss.item() == pytest.approx(want, abs=2e-6)
    assert student.grad.tolist()[0] == pytest.approx([slope, -slope], abs=2e-6)
    assert teacher.grad is None


@both_forms
@pytest.mark.parametrize("weight_norm", NORMS)
@pytest.mark.parametrize("V", (2, 20, 32, 1000))
def test_where_the_teacher_knows_nothing_weights_loss_and_gradient_are_zero(
        V, weight_norm, loss_of):
    student, _, _ = make_inputs(2, 3, V=V)
    loss, stats = loss_of(student, torch.zeros(2, 3, V), weight_norm=weight_norm)
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()
    assert not stats["w_teacher"].any() and not stats["weight"].any()


def test_a_certain_teacher_corrects_the_confident_wrong_student_not_under_the_sampled_view():
    student = torch.tensor([[30.0, 0.0]])  # certain of token 0, the teacher of token 1
    for view, want in zip(VIEWS, (1, 0)):
        _, stats = dpsw_loss(student, student.flip(-1), torch.tensor([0]), student_view=view)
        assert stats["w_teacher"].item() == pytest.approx(1)
        assert stats["weight"].item() == pytest.approx(want, abs=1e-6)


@both_forms
@pytest.mark.parametrize("weight_norm", NORMS)
def test_micro_batches_with_the_steps_count_give_the_gradient_of_the_whole(weight_norm, loss_of):
    student, teacher, ids = make_inputs(4, 5)
    mask = mask_of(5, 1, 3, 0, T=5)
    want, want_gradient = check(student, teacher, ids, mask, weight_norm=weight_norm)
    count = {"response": torch.tensor(3), "none": 9}[weight_norm]
    parts = zip(*[x.split(1) for x in (student, teacher, ids, mask)])
    losses = [loss_of(*part, weight_norm=weight_norm, denominator=count)[0] for part in parts]
    gradient, = torch.autograd.grad(sum(losses), student)
    torch.testing.assert_close(sum(losses), want)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-7)


# ---- padding, edges, dtypes ----

@both_forms
@pytest.mark.parametrize("fill", (NAN, -INF))
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("weight_norm", NORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_may_hold_anything(divergence, weight_norm, view, fill, loss_of):
    options = dict(divergence=divergence, student_view=view, weight_norm=weight_norm)
    student, teacher, ids = make_inputs(3, 4)
    mask = mask_of(2, 0, 4, T=4)
    want = check(student, teacher, ids, mask, **options)
    padding = ~mask[..., None]
    dirty = student.detach().masked_fill(padding, fill).requires_grad_()
    loss, _ = loss_of(dirty, teacher.masked_fill(padding, fill), ids.masked_fill(~mask, -100),
                      mask, **options)
    gradient, = torch.autograd.grad(loss, dirty)
    torch.testing.assert_close((loss, gradient), want)


@both_forms
@pytest.mark.parametrize("side", (0, 1))
def test_nan_on_a_response_token_is_never_hidden(side, loss_of):
    logits = [x.detach() for x in make_inputs(3)[:2]]
    logits[side][1, 2] = NAN
    assert loss_of(*logits)[0].isnan()


@both_forms
@pytest.mark.parametrize("shape", [(2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("denominator", (None, 0))
@pytest.mark.parametrize("weight_norm", NORMS)
def test_a_fully_masked_input_gives_zero_loss_and_gradient(
        weight_norm, denominator, shape, loss_of):
    student = torch.full((*shape, 5), NAN, requires_grad=True)
    loss, stats = loss_of(student, student.detach(), None, torch.zeros(shape),
                          weight_norm=weight_norm, denominator=denominator)
    loss.backward()
    assert loss.item() == 0 and (student.grad == 0).all()
    assert all(stats[name].shape == shape for name in STATS)


@both_forms
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_any_float_dtype_is_computed_in_float32(dtype, loss_of):
    student, teacher, _ = [x.detach().to(dtype) for x in make_inputs(2, 4, V=40)]
    wide = student.float().requires_grad_()
    want, _ = loss_of(wide, teacher.float())
    loss, _ = loss_of(student.requires_grad_(), teacher)
    assert loss == want and loss.dtype == torch.float32
    want.backward()
    loss.backward()
    torch.testing.assert_close(student.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_that_one_side_or_both_rule_out_stay_finite(divergence):
    options = dict(divergence=divergence, top_k=3)
    student, teacher, ids = make_inputs(2, 3)
    loss, gradient = check(student, teacher, ids, ids > -1, **options)
    wide = [nn.functional.pad(x.detach(), (0, 2), value=-INF) for x in (student, teacher)]
    got, _ = dpsw_loss(wide[0].requires_grad_(), wide[1], **options)
    got_gradient, = torch.autograd.grad(got, wide[0])
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(got_gradient, nn.functional.pad(gradient, (0, 2)))

    ruled_out = student if divergence == "reverse" else teacher  # else it is infinite
    ruled_out.data[..., 0] = -INF
    check(student, teacher, ids, ids > -1, **options)


@pytest.mark.parametrize("divergence", ("reverse", "forward"))
def test_extreme_logits_neither_overflow_nor_lose_the_gradient(divergence):
    student = torch.tensor([[1e4, 0.0, -1e4], [0.1, 0.2, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 1.0]])
    ids = torch.zeros(2).long()
    check(student, teacher, ids, ids > -1, divergence=divergence)


# ---- errors, and the file itself ----

@both_forms
@pytest.mark.parametrize("options, told", [
    (dict(weighting="dspw"), "dspw"), (dict(student_view="student"), "student"),
    (dict(divergence="kl"), "kl"), (dict(weight_norm="sum"), "sum"),
    (dict(temperature=0), "temperature"), (dict(top_k=0), "top_k"),
    (dict(student_view="sampled"), "response_ids"),
    (dict(divergence="jsd", beta=0), "forward or reverse"),
    (dict(divergence="jsd", beta=1.0), "forward or reverse")])
def test_what_cannot_be_meant_is_a_value_error(options, told, loss_of):
    with pytest.raises(ValueError, match=told):
        loss_of(*make_inputs(2, 3)[:2], **options)


@both_forms
@pytest.mark.parametrize("wrong, shape", [
    ("teacher", (2, 3, 31)), ("teacher", (2, 3, 1)), ("teacher", (2, 4, 30)), ("ids", (2, 1)),
    ("mask", (3,))])
def test_vocabularies_or_shapes_that_disagree_are_a_value_error(wrong, shape, loss_of):
    shapes = {"student": (2, 3, 30), "teacher": (2, 3, 30), "ids": (2, 3), "mask": (2, 3)}
    shapes[wrong] = shape
    inputs = [torch.ones(shape).long() for shape in shapes.values()]
    with pytest.raises(ValueError):
        loss_of(*inputs, student_view="sampled")


def test_a_chunk_of_no_tokens_is_a_value_error():
    with pytest.raises(ValueError, match="chunk_size"):
        chunked_loss(*make_inputs(2, 3), chunk_size=0)


def test_the_file_runs_alone_beside_torch_and_math():
    source = Path(dpsw.__file__).read_text(encoding="utf-8")
    imports = re.findall("^ *(?:import|from) .*", source, re.M)
    assert imports == ["import math", "import torch"]


# ---- the chunked form and its heads ----

H = 8
TEACHER_H = 5
V = 13


class Head(nn.Module):
    """A linear layer whose logits are capped, as some models do it; remembers its calls."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, V)
        self.calls = []  # the rows of each, and "back" when its gradient is taken

    def forward(self, hidden):
        self.calls.append(len(hidden))
        logits = self.linear(hidden)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self.calls.append("back"))
        return torch.tanh(logits)


def make_setting(*shape, mask=None):
    """Hidden states that are NaN at padding, heads, ids, and a mask with holes if none is given."""
    torch.manual_seed(0)
    if mask is None:
        mask = torch.rand(shape) < 0.7
        mask[-1] = False  # of several responses, an empty one
    hidden = [3 * torch.randn(*shape, width) for width in (H, TEACHER_H)]
    hidden = [x.masked_fill(~mask[..., None], NAN).requires_grad_() for x in hidden]
    return [*hidden, Head(H), Head(TEACHER_H), torch.randint(V, shape), mask]


def dense(hidden, teacher_hidden, student_head, teacher_head, ids, mask, **options):
    """The same by dpsw_loss; its padding is emptied, since 0 · NaN would reach the heads."""
    hidden, teacher_hidden = [x.masked_fill(~mask[..., None], 0) for x in (hidden, teacher_hidden)]
    return dpsw_loss(student_head(hidden), teacher_head(teacher_hidden), ids, mask, **options)


def assert_same_gradients(got, want):
    torch.testing.assert_close(list(got), list(want), rtol=1e-4, atol=1e-6)
    assert all(x.any() for x in want)  # or the comparison shows nothing


@pytest.mark.parametrize("chunk_size", (1, 3, 10**6))
@pytest.mark.parametrize("shape", ((7,), (5, 3), (2, 3, 2)))
@pytest.mark.parametrize("options", [
    dict(), dict(student_view="sampled", weight_norm="none"),
    dict(divergence="forward", temperature=0.6, weighting="student", denominator=4)])
def test_chunked_equals_dense_in_loss_stats_and_gradients(options, shape, chunk_size):
    args = make_setting(*shape)
    mask = args[-1]
    trained = [args[0], *args[2].parameters()]
    want, want_stats = dense(*args, **options)
    loss, stats = dpsw_loss_chunked(*args, chunk_size=chunk_size, **options)
    torch.testing.assert_close(loss, want)
    for name in STATS:
        assert stats[name].shape == shape and not stats[name].requires_grad
        torch.testing.assert_close(stats[name][mask], want_stats[name][mask])
    got = torch.autograd.grad(loss, trained)
    assert_same_gradients(got, torch.autograd.grad(want, trained))

    with torch.no_grad():
        loss, _ = dpsw_loss_chunked(*args, chunk_size=chunk_size, **options)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want.detach())


@pytest.mark.parametrize("wanted", ("hidden", "linear.weight", "hidden linear.weight linear.bias"))
def test_chunked_backward_scales_adds_up_and_reaches_the_student_alone(wanted):
    hidden, _, head, _, ids, mask = make_setting(4, 3)
    teacher_hidden = (2 * hidden.detach()).requires_grad_()
    args = hidden, teacher_hidden, head, head, ids, mask  # one head on both sides
    named = {"hidden": hidden, **dict(head.named_parameters())}
    for name, tensor in named.items():
        tensor.requires_grad_(name in wanted)
    trained = [tensor for tensor in named.values() if tensor.requires_grad]
    want = torch.autograd.grad(3 * dense(*args)[0], trained)
    for times in (1, 2):
        (3 * dpsw_loss_chunked(*args, chunk_size=3)[0]).backward()
        assert_same_gradients([x.grad for x in trained], [times * x for x in want])
    assert teacher_hidden.grad is None


@pytest.mark.parametrize("chunk_size, rows", [
    (1, [2, 3, 1]), (4, [2, 4]), (5, [5, 1]), (99, [6])])
def test_a_chunk_holds_whole_responses_and_no_row_is_computed_twice(chunk_size, rows):
    args = make_setting(4, 3, mask=mask_of(2, 3, 0, 1, T=3))
    dpsw_loss_chunked(*args, chunk_size=chunk_size)[0].backward()
    student_head, teacher_head = args[2:4]
    assert student_head.calls[::2] == teacher_head.calls == rows
    assert student_head.calls[1::2] == ["back"] * len(rows)  # of two chunks no logits are held
