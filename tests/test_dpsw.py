"""Promises of dpsw.py, checked against plain loops over python floats (see `reference`)."""
import ast
import itertools
import math
import weakref
from pathlib import Path

import pytest
import torch

import dpsw
from dpsw import dpsw_loss, dpsw_loss_chunked

INF, NAN = float("inf"), float("nan")
STATS = ("divergence", "weight", "w_teacher", "w_student")
WEIGHTINGS, VIEWS = ("dpsw", "teacher", "student", "none"), ("teacher", "sampled")
DIVERGENCES = ("reverse", "forward", "jsd")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are tiny here: a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- the reference: one token at a time, float64, nothing clever ----

def softmax(logits, tau=1.0):
    top = max(logits)
    exps = [math.exp((x - top) / tau) for x in logits]
    return [e / sum(exps) for e in exps]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def token_divergence(p_s, p_t, divergence, beta):
    if divergence == "reverse":
        return kl(p_s, p_t)
    if divergence == "forward":
        return kl(p_t, p_s)
    m = [beta * t + (1 - beta) * s for s, t in zip(p_s, p_t)]
    return beta * kl(p_t, m) + (1 - beta) * kl(p_s, m)


def teacher_confidence(p_t, top_k):
    k = min(top_k, len(p_t))
    if k == 1:
        return 1.0
    top = sorted(p_t, reverse=True)[:k]
    entropy = -sum(p / sum(top) * math.log(p / sum(top)) for p in top if p > 0)
    return 1 - entropy / math.log(k)


def reference(student, teacher, ids=None, mask=None, *, weighting="dpsw", student_view="teacher", top_k=20,
              divergence="reverse", beta=0.5, temperature=1.0, weight_norm="none", denominator=None, weights=None):
    """Lists of logit rows -> (loss, one dict a token, None where masked). `weights`: constants to use instead."""
    rows, total, count, weight_sum = [], 0.0, 0, 0.0
    for i, (s, t) in enumerate(zip(student, teacher)):
        if mask is not None and not mask[i]:
            rows.append(None)
            continue
        p_s, p_t = softmax(s, temperature), softmax(t, temperature)
        token = ids[i] if student_view == "sampled" else max(range(len(t)), key=lambda v: t[v])
        w_t, w_s = teacher_confidence(p_t, top_k), 1 - p_s[token]
        w = {"dpsw": w_t * w_s, "teacher": w_t, "student": w_s, "none": 1.0}[weighting]
        w = w if weights is None else weights[i]
        d = token_divergence(p_s, p_t, divergence, beta)
        rows.append({"divergence": d, "weight": w, "w_teacher": w_t, "w_student": w_s})
        total, count, weight_sum = total + w * d, count + 1, weight_sum + w
    n = denominator or (weight_sum if weight_norm == "mean" else count)
    return total / n, rows


def reference_grad(student, teacher, ids=None, mask=None, **kw):
    """Central differences on the reference, the weights (and the sum of them) held constant."""
    rows = reference(student, teacher, ids, mask, **kw)[1]
    kw, eps = {**kw, "weights": [row and row["weight"] for row in rows]}, 1e-5
    grad = [[0.0] * len(row) for row in student]
    for i, v in itertools.product(range(len(student)), range(len(student[0]))):
        here = student[i][v]
        for sign in (1, -1):
            student[i][v] = here + sign * eps
            grad[i][v] += sign * reference(student, teacher, ids, mask, **kw)[0] / (2 * eps)
        student[i][v] = here
    return grad


def inputs(*shape, V=6, seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(*shape, V, generator=g)).requires_grad_()
    teacher = scale * torch.randn(*shape, V, generator=g)
    return student, teacher, torch.randint(V, shape, generator=g)


def check(student, teacher, ids=None, mask=None, **kw):
    """Loss, stats and student gradient of dpsw_loss against the reference."""
    flat = [None if x is None else x.detach().double().reshape(-1, x.shape[-1]).tolist() for x in (student, teacher)]
    flat += [None if x is None else x.reshape(-1).tolist() for x in (ids, mask)]
    want, rows = reference(*flat, **kw)
    loss, stats = dpsw_loss(student, teacher, ids, mask, **kw)
    assert loss.shape == () and loss.item() == pytest.approx(want, rel=1e-4, abs=1e-6)
    for name in STATS:
        assert stats[name].shape == student.shape[:-1]
        for got, row in zip(stats[name].reshape(-1).tolist(), rows):
            if row is not None and (name in ("divergence", "weight") or kw.get("weighting", "dpsw") == "dpsw"):
                assert got == pytest.approx(row[name], rel=1e-4, abs=1e-5), name
    grad, = torch.autograd.grad(loss, student)
    torch.testing.assert_close(grad.reshape(-1, grad.shape[-1]).double(),
                               torch.tensor(reference_grad(*flat, **kw), dtype=torch.double), rtol=1e-3, atol=1e-5)
    return loss, stats, grad


# ---- the numbers ----

@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_option_equals_the_plain_loop_in_loss_stats_and_gradient(weighting, view, divergence):
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    kw = dict(weighting=weighting, student_view=view, divergence=divergence)
    check(*inputs(2, 3), mask, top_k=3, **kw)
    check(*inputs(5, seed=1), weight_norm="mean", beta=0.3, temperature=0.7, **kw)


def test_defaults_are_dpsw_teacher_view_top_20_reverse_kl_at_temperature_1():
    student, teacher, ids = inputs(4, V=30)
    loss, stats = dpsw_loss(student, teacher)
    explicit, _ = dpsw_loss(student, teacher, ids, torch.ones(4), weighting="dpsw", student_view="teacher", top_k=20,
                            divergence="reverse", beta=0.5, temperature=1.0, weight_norm="none", denominator=None)
    assert loss.item() == explicit.item()
    check(student, teacher)


# student (1/2, 1/2), teacher (1/4, 3/4), in nats
#   reverse  KL(S||T) = 1/2 ln 2 + 1/2 ln 2/3              = 0.346574 - 0.202733 = 0.143841
#   forward  KL(T||S) = 1/4 ln 1/2 + 3/4 ln 3/2            = 0.304099 - 0.173287 = 0.130812
#   jsd 0.5  M = (3/8, 5/8): 1/2 [1/4 ln 2/3 + 3/4 ln 6/5] + 1/2 [1/2 ln 4/3 + 1/2 ln 4/5]
#                                                          = (0.035375 + 0.032269) / 2 = 0.033822
#   jsd 0.25 M = 1/4 T + 3/4 S = (7/16, 9/16): 1/4 [1/4 ln 4/7 + 3/4 ln 4/3] + 3/4 [1/2 ln 8/7 + 1/2 ln 8/9]
#                                                          = 0.25 * 0.075858 + 0.75 * 0.007874 = 0.024870
#   jsd 0.75 M = 3/4 T + 1/4 S = (5/16, 11/16): 3/4 [1/4 ln 4/5 + 3/4 ln 12/11] + 1/4 [1/2 ln 8/5 + 1/2 ln 8/11]
#                                                          = 0.75 * 0.009473 + 0.25 * 0.075775 = 0.026048
@pytest.mark.parametrize("divergence, beta, want", [
    ("reverse", 0.5, 0.143841), ("forward", 0.5, 0.130812),
    ("jsd", 0.5, 0.033822), ("jsd", 0.25, 0.024870), ("jsd", 0.75, 0.026048)])
def test_divergences_have_their_hand_computed_direction(divergence, beta, want):
    student = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    teacher = torch.tensor([[0.25, 0.75]]).log()
    kw = dict(weighting="none", divergence=divergence, beta=beta)
    loss, _ = dpsw_loss(student, teacher, **kw)
    assert loss.item() == pytest.approx(want, abs=2e-6)
    assert dpsw_loss(student + 7, teacher - 3, **kw)[0].item() == pytest.approx(want, abs=2e-6)  # softmaxes, not logits


# d KL(S||T) / d z_v = p_S(v) (log p_S(v)/p_T(v) - KL): 1/2 (0.693147 - 0.143841) = +0.274653, and its negative
# d KL(T||S) / d z_v = p_S(v) - p_T(v)                                            = +0.25, -0.25
@pytest.mark.parametrize("divergence, want", [("reverse", 0.274653), ("forward", 0.25)])
def test_gradient_has_its_hand_computed_sign_and_size(divergence, want):
    student = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    dpsw_loss(student, torch.tensor([[0.25, 0.75]]).log(), weighting="none", divergence=divergence)[0].backward()
    assert student.grad.tolist()[0] == pytest.approx([want, -want], abs=1e-5)


@pytest.mark.parametrize("beta", (0.1, 0.5, 0.9))
def test_jsd_swaps_sides_when_beta_turns_round_and_stays_bounded(beta):
    student, teacher, _ = inputs(5, scale=20.0)

    def jsd(a, b, beta):
        return dpsw_loss(a, b, weighting="none", divergence="jsd", beta=beta)[0].item()
    assert jsd(student, teacher, beta) == pytest.approx(jsd(teacher, student, 1 - beta), rel=1e-4)
    if beta != 0.5:
        assert abs(jsd(student, teacher, beta) - jsd(teacher, student, beta)) > 1e-3
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)  # the entropy of a (beta, 1 - beta) coin
    assert 0 < jsd(student, teacher, beta) <= bound + 1e-5
    check(student, teacher, divergence="jsd", beta=beta)


@pytest.mark.parametrize("beta", (0.0, 1.0))
def test_jsd_at_the_ends_of_beta_is_zero_by_its_formula_and_finite(beta):
    student, teacher, _ = inputs(4)
    loss, _ = dpsw_loss(student, teacher, weighting="none", divergence="jsd", beta=beta)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_logits_diverge_by_exactly_nothing(divergence):
    student, _, _ = inputs(4, V=50)
    loss, stats = dpsw_loss(student, student.detach().clone(), weighting="none", divergence=divergence)
    assert loss.item() == pytest.approx(0, abs=1e-7 if divergence == "jsd" else 0)
    assert (stats["weight"] == 1).all()


# teacher (1/2, 1/4, 1/4), student (0.2, 0.7, 0.1), sampled token 1
#   K = 3: H = 1/2 ln 2 + 1/2 ln 4 = 1.039721, / ln 3 = 1.098612 -> w_T = 0.053605
#   K = 2: renormalised (2/3, 1/3): H = 0.636514, / ln 2 -> w_T = 1 - 0.918296 = 0.081704
#   w_S = 1 - 0.2 of the teacher's top token, 1 - 0.7 of the sampled one
@pytest.mark.parametrize("top_k, view, w_teacher, w_student", [
    (2, "teacher", 0.081704, 0.8), (2, "sampled", 0.081704, 0.3), (3, "teacher", 0.053605, 0.8),
    (20, "teacher", 0.053605, 0.8), (1, "sampled", 1.0, 0.3)])
def test_weights_equal_hand_computed_ones(top_k, view, w_teacher, w_student):
    student, teacher = torch.tensor([[0.2, 0.7, 0.1]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log()
    _, stats = dpsw_loss(student, teacher, torch.tensor([1]), top_k=top_k, student_view=view)
    assert stats["w_teacher"].item() == pytest.approx(w_teacher, abs=2e-6)
    assert stats["w_student"].item() == pytest.approx(w_student, abs=2e-6)
    assert stats["weight"].item() == pytest.approx(w_teacher * w_student, abs=2e-6)


@pytest.mark.parametrize("V, top_k", [(6, 2), (6, 6), (6, 20), (50, 20)])
def test_a_uniform_top_k_weighs_nothing_and_a_one_hot_one_weighs_one(V, top_k):
    uniform, one_hot = torch.zeros(1, V), torch.zeros(1, V)
    one_hot[0, V // 2] = 200.0
    student, _, _ = inputs(1, V=V)
    assert dpsw_loss(student, uniform, top_k=top_k)[1]["w_teacher"].item() == pytest.approx(0, abs=1e-6)
    assert dpsw_loss(student, one_hot, top_k=top_k)[1]["w_teacher"].item() == pytest.approx(1, abs=1e-6)


def test_only_the_top_k_of_the_teacher_count_towards_its_confidence():
    teacher = torch.tensor([[3.0, 3.0, 0.0, 0.0, 0.0, 0.0]])  # its top 2 are uniform, the rest are not
    weight = {k: dpsw_loss(torch.zeros(1, 6), teacher, top_k=k)[1]["w_teacher"].item() for k in (1, 2, 6, 7, 1000)}
    assert weight[1] == 1 and weight[2] == pytest.approx(0, abs=1e-6) and weight[6] > 0.1
    assert weight[6] == weight[7] == weight[1000]


@pytest.mark.parametrize("top_k", (1, 2, 6, 7, 1000))
def test_any_top_k_is_finite_and_equals_the_loop(top_k):
    check(*inputs(3), top_k=top_k)


def test_a_vocabulary_of_one_token_is_finite():
    student = torch.tensor([[3.0], [1.0]], requires_grad=True)
    loss, _ = dpsw_loss(student, torch.tensor([[1.0], [2.0]]))
    loss.backward()
    assert loss.item() == 0 and (student.grad == 0).all()


def test_the_confident_wrong_student_is_corrected_under_the_teacher_view_and_muted_under_the_sampled_one():
    # student: "Sure" (token 0) for certain; teacher: refuses (token 1) for certain. D = 30, w_T = 1, and
    # w_S = 1 - p_S(1) = 1 or 1 - p_S(0) = 0
    student, teacher = torch.tensor([[30.0, 0.0]]), torch.tensor([[0.0, 30.0]])
    sure = torch.tensor([0])
    assert dpsw_loss(student, teacher, sure)[0].item() == pytest.approx(30, rel=1e-4)
    assert dpsw_loss(student, teacher, sure, student_view="sampled")[0].item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("temperature", (0.5, 2.0))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_divides_both_logits_weights_included_and_is_not_squared_back(temperature, divergence):
    student, teacher, ids = inputs(4)
    for view in VIEWS:
        kw = dict(divergence=divergence, student_view=view, top_k=3)
        loss, stats, _ = check(student, teacher, ids, temperature=temperature, **kw)
        by_hand, divided = dpsw_loss(student / temperature, teacher / temperature, ids, **kw)
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
        for name in STATS:
            torch.testing.assert_close(stats[name], divided[name])


# ---- what the loss is divided by ----

def test_the_default_divides_by_the_masks_count_and_mean_by_the_sum_of_the_weights():
    student, teacher, _ = inputs(2, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    loss, stats = dpsw_loss(student, teacher, None, mask)
    total = (stats["weight"] * stats["divergence"])[mask.bool()].sum().item()
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)
    mean, _ = dpsw_loss(student, teacher, None, mask, weight_norm="mean")
    assert mean.item() == pytest.approx(total / stats["weight"][mask.bool()].sum().item(), rel=1e-5)


@pytest.mark.parametrize("denominator", (10, 2.5, torch.tensor(10), torch.tensor(2.5)))
@pytest.mark.parametrize("weight_norm", ("none", "mean"))
def test_denominator_overrides_the_count_and_the_sum_of_weights(weight_norm, denominator):
    student, teacher, _ = inputs(4)
    loss, stats = dpsw_loss(student, teacher, weight_norm=weight_norm, denominator=denominator)
    want = (stats["weight"] * stats["divergence"]).sum().item() / float(denominator)
    assert loss.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("weight_norm", ("none", "mean"))
def test_micro_batches_of_unequal_length_give_the_gradient_of_the_whole(weight_norm):
    student, teacher, ids = inputs(4, 5)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [0]])  # the last row is empty
    loss, stats = dpsw_loss(student, teacher, ids, mask, weight_norm=weight_norm)
    whole, = torch.autograd.grad(loss, student)
    n = mask.sum() if weight_norm == "none" else stats["weight"][mask].sum()
    parts = [dpsw_loss(student[i:i + 1], teacher[i:i + 1], ids[i:i + 1], mask[i:i + 1],
                       weight_norm=weight_norm, denominator=n)[0] for i in range(4)]
    assert sum(parts).item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), student)[0], whole, rtol=1e-5, atol=1e-7)


def test_mean_over_weights_that_are_all_zero_is_zero_not_nan():
    student = torch.tensor([[200.0, 0.0]], requires_grad=True)  # p_S of the teacher's top token is exactly 1
    loss, stats = dpsw_loss(student, torch.tensor([[2.0, 0.0]]), weight_norm="mean")
    loss.backward()
    assert stats["weight"].item() == 0 and loss.item() == 0 and (student.grad == 0).all()


# ---- gradients ----

@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_constants_to_autograd(weighting, view):
    student, teacher, ids = inputs(6)
    loss, stats = dpsw_loss(student, teacher, ids, weighting=weighting, student_view=view)
    grad, = torch.autograd.grad(loss, student)
    plain, = torch.autograd.grad(dpsw_loss(student, teacher, weighting="none")[0], student)
    torch.testing.assert_close(grad, stats["weight"][:, None] * plain)
    assert weighting == "none" or (stats["weight"] < 0.9).any()  # or the line above shows nothing


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_gradient_reaches_the_teacher(divergence):
    student, teacher, _ = inputs(4)
    teacher.requires_grad_()
    dpsw_loss(student, teacher, divergence=divergence)[0].backward()
    assert teacher.grad is None and student.grad.abs().max() > 1e-4


def test_one_tensor_on_both_sides_is_taught_only_as_the_student():
    hidden = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    other = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    grad, = torch.autograd.grad(dpsw_loss(hidden + other, 2 * hidden)[0], hidden)
    want, = torch.autograd.grad(dpsw_loss(hidden + other, 2 * hidden.detach())[0], hidden)
    torch.testing.assert_close(grad, want)


def test_inputs_are_left_untouched():
    student, teacher, ids = inputs(2, 3)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    with torch.no_grad():
        before = [x.clone() for x in (student, teacher, ids, mask)]
        dpsw_loss(student, teacher, ids, mask, student_view="sampled", temperature=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, (student, teacher, ids, mask)))


# ---- masks, padding, shapes, dtypes ----

@pytest.mark.parametrize("shape", ((6,), (2, 3), (1, 2, 3)))
def test_leading_shapes_do_not_matter(shape):
    student, teacher, ids = inputs(6)
    mask = torch.tensor([1, 1, 0, 1, 0, 1])
    want, flat = dpsw_loss(student, teacher, ids, mask, student_view="sampled")
    loss, stats = dpsw_loss(student.view(*shape, -1), teacher.view(*shape, -1), ids.view(shape), mask.view(shape),
                            student_view="sampled")
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    for name in STATS:
        assert stats[name].shape == shape
        torch.testing.assert_close(stats[name].flatten()[mask.bool()], flat[name][mask.bool()])


@pytest.mark.parametrize("dtype", (torch.bool, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8))
def test_masks_of_any_dtype_select_the_same_tokens(dtype):
    student, teacher, _ = inputs(6)
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    loss, stats = dpsw_loss(student, teacher, None, mask.to(dtype))
    kept, _ = dpsw_loss(student[mask.bool()], teacher[mask.bool()])
    assert loss.item() == pytest.approx(kept.item(), rel=1e-6)
    grad, = torch.autograd.grad(loss, student)
    assert (grad[mask == 0] == 0).all() and (grad[mask == 1].abs().sum(-1) > 0).all()


def test_no_mask_means_every_token():
    student, teacher, _ = inputs(2, 3)
    none, stats = dpsw_loss(student, teacher)
    assert none.item() == dpsw_loss(student, teacher, None, torch.ones(2, 3))[0].item()
    assert all(stats[name].shape == (2, 3) for name in STATS)


def test_a_large_low_precision_mask_is_counted_exactly():
    student, teacher, _ = inputs(1)
    n = 3001  # not a bfloat16 number
    loss, _ = dpsw_loss(student.expand(n, -1), teacher.expand(n, -1), None, torch.ones(n, dtype=torch.bfloat16))
    assert loss.item() == pytest.approx(dpsw_loss(student, teacher)[0].item(), rel=1e-5)


@pytest.mark.parametrize("bad", (NAN, INF, -INF))
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_may_hold_anything(divergence, view, bad):
    student, teacher, ids = inputs(2, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    kw = dict(divergence=divergence, student_view=view)
    want, clean = dpsw_loss(student, teacher, ids, mask, **kw)
    want_grad, = torch.autograd.grad(want, student)
    poison = mask[..., None] == 0
    dirty = student.detach().masked_fill(poison, bad).requires_grad_()
    for weight_norm in ("none", "mean"):
        loss, stats = dpsw_loss(dirty, teacher.masked_fill(poison, bad), ids, mask, weight_norm=weight_norm, **kw)
        grad, = torch.autograd.grad(loss, dirty)
        assert loss.isfinite() and grad.isfinite().all() and (grad[mask == 0] == 0).all()
        for name in STATS:
            torch.testing.assert_close(stats[name][mask == 1], clean[name][mask == 1])
            assert stats[name].isfinite().all()  # a caller may multiply by the mask
        if weight_norm == "none":
            torch.testing.assert_close(loss, want)
            torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("side", (0, 1))
def test_nan_on_a_response_token_is_never_hidden(side):
    logits = [x.detach() for x in inputs(3)[:2]]
    logits[side][1, 2] = NAN
    assert dpsw_loss(*logits)[0].isnan()
    assert dpsw_loss(*logits, None, torch.tensor([1, 0, 1]))[0].isfinite()


@pytest.mark.parametrize("fill", (0.0, NAN))
@pytest.mark.parametrize("denominator", (None, 7))
@pytest.mark.parametrize("weight_norm", ("none", "mean"))
def test_a_fully_masked_input_gives_zero_loss_and_exactly_zero_gradients(weight_norm, denominator, fill):
    student = torch.full((2, 3, 5), fill, requires_grad=True)
    loss, stats = dpsw_loss(student, torch.full((2, 3, 5), fill), torch.zeros(2, 3, dtype=torch.long),
                            torch.zeros(2, 3), weight_norm=weight_norm, denominator=denominator)
    loss.backward()
    assert loss.item() == 0 and (student.grad == 0).all()
    assert all(stats[name].shape == (2, 3) for name in STATS)


def test_no_tokens_at_all_give_zero_loss():
    student = torch.zeros(0, 5, requires_grad=True)
    loss, stats = dpsw_loss(student, torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), torch.zeros(0),
                            student_view="sampled")
    loss.backward()
    assert loss.item() == 0 and student.grad.shape == (0, 5)
    assert all(stats[name].shape == (0,) for name in STATS)
    assert dpsw_loss(torch.zeros(2, 0, 5), torch.zeros(2, 0, 5))[0].item() == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("view", VIEWS)
def test_tokens_masked_out_of_both_vocabularies_contribute_nothing(view, divergence):
    student, teacher, ids = inputs(4, V=6)
    kw = dict(divergence=divergence, student_view=view, top_k=3)
    want, clean = dpsw_loss(student, teacher, ids, **kw)
    want_grad, = torch.autograd.grad(want, student)
    wide = torch.cat([student.detach(), torch.full((4, 2), -INF)], -1).requires_grad_()
    loss, stats = dpsw_loss(wide, torch.cat([teacher, torch.full((4, 2), -INF)], -1), ids, **kw)
    grad, = torch.autograd.grad(loss, wide)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad[:, :6], want_grad)
    assert (grad[:, 6:] == 0).all()
    for name in STATS:
        torch.testing.assert_close(stats[name], clean[name])


def test_masked_tokens_inside_the_top_k_keep_the_entropy_finite():
    student, teacher = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, -INF, -INF]])
    student[:, 2:] = -INF
    _, stats = dpsw_loss(student, teacher)
    assert stats["w_teacher"].item() == pytest.approx(0.5, abs=1e-6)  # 1 - ln 2 / ln 4


@pytest.mark.parametrize("divergence", ("reverse", "jsd"))
def test_a_token_only_the_student_rules_out_is_finite(divergence):
    student = torch.tensor([[1.0, 0.5, -INF]], requires_grad=True)
    teacher = torch.tensor([[0.3, 1.0, 0.0]])
    loss, _ = dpsw_loss(student, teacher, divergence=divergence)
    loss.backward()
    want, _ = reference(student.tolist(), teacher.tolist(), divergence=divergence)
    assert loss.item() == pytest.approx(want, rel=1e-4)
    assert student.grad.isfinite().all() and student.grad[0, 2] == 0


def test_a_token_only_the_teacher_rules_out_costs_without_bound_under_reverse_kl():
    teacher = torch.tensor([[1.0, 0.5, -INF]])
    assert dpsw_loss(torch.tensor([[0.3, 1.0, 0.0]]), teacher, weighting="none")[0].item() > 1e30  # inf by the formula
    assert dpsw_loss(torch.tensor([[0.3, 1.0, 0.0]]), teacher, weighting="none", divergence="jsd")[0].item() < 0.7


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_huge_logits_neither_overflow_nor_lose_the_gradient(divergence):
    student = torch.tensor([[3e4, 0.0, -3e4], [1.0, 2.0, 3e4]], requires_grad=True)
    loss, stats = dpsw_loss(student, torch.tensor([[0.0, 3e4, -3e4], [3e4, 2.0, 1.0]]), divergence=divergence)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    if divergence == "reverse":
        assert stats["divergence"].tolist() == pytest.approx([3e4, 3e4 - 1], rel=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_other_float_types_are_computed_in_float32(divergence, dtype):
    student, teacher, ids = inputs(3, 4, V=200)
    student, teacher = student.detach().to(dtype).requires_grad_(), teacher.to(dtype)
    loss, stats = dpsw_loss(student, teacher, ids, divergence=divergence, student_view="sampled", temperature=0.7)
    wide = student.detach().float().requires_grad_()
    want, clean = dpsw_loss(wide, teacher.float(), ids, divergence=divergence, student_view="sampled", temperature=0.7)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item(), rel=1e-6)
    for name in STATS:
        assert stats[name].dtype == torch.float32
        torch.testing.assert_close(stats[name], clean[name])
    loss.backward(), want.backward()
    assert student.grad.dtype == dtype
    rtol = 1e-4 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(student.grad, wide.grad.to(dtype), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("view", VIEWS)
def test_stats_are_detached_and_say_what_the_loss_was_made_of(view):
    student, teacher, ids = inputs(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    loss, stats = dpsw_loss(student, teacher, ids, mask, student_view=view)
    assert set(STATS) <= set(stats)
    for name in STATS:
        assert not stats[name].requires_grad and stats[name].shape == mask.shape
    m = mask.bool()
    torch.testing.assert_close(stats["weight"][m], (stats["w_teacher"] * stats["w_student"])[m])
    torch.testing.assert_close((stats["weight"] * stats["divergence"])[m].sum() / 5, loss.detach())


# ---- options ----

@pytest.mark.parametrize("chunked", (False, True))
@pytest.mark.parametrize("bad", [dict(weighting="dspw"), dict(student_view="student"), dict(divergence="kl"),
                                 dict(weight_norm="sum"), dict(student_view="sampled")])
def test_mistyped_options_and_a_missing_response_raise_value_error(bad, chunked):
    student, teacher, _ = inputs(3)
    heads = (torch.nn.Identity(), torch.nn.Identity()) if chunked else ()
    with pytest.raises(ValueError):
        (dpsw_loss_chunked if chunked else dpsw_loss)(student, teacher, *heads, **bad)


def test_unknown_keywords_fail_in_both_forms():
    student, teacher, _ = inputs(3)
    with pytest.raises(TypeError):
        dpsw_loss(student, teacher, tau=2.0)
    with pytest.raises(TypeError):
        dpsw_loss_chunked(student, teacher, torch.nn.Identity(), torch.nn.Identity(), tau=2.0)


def test_response_ids_do_not_matter_under_the_teacher_view_and_do_under_the_sampled_one():
    student, teacher, ids = inputs(5)
    assert dpsw_loss(student, teacher, ids)[0].item() == dpsw_loss(student, teacher)[0].item()
    sampled = [dpsw_loss(student, teacher, i, student_view="sampled")[0].item() for i in (ids, (ids + 1) % 6)]
    assert abs(sampled[0] - sampled[1]) > 1e-4


def test_the_file_imports_only_torch():
    tree = ast.parse(Path(dpsw.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} == {"torch"}


# ---- the chunked form ----

H, V = 8, 13


def setting(*shape, head="linear", seed=0):
    """hidden states, heads and their weights for both sides; the mask has holes."""
    g = torch.Generator().manual_seed(seed)

    def make_head():
        if head == "linear":
            module = torch.nn.Linear(H, V)
            with torch.no_grad():
                for p in module.parameters():
                    p.copy_(torch.randn(p.shape, generator=g))
            return module, list(module.parameters())
        weight = torch.randn(V, H, generator=g).requires_grad_()
        return (lambda h: 5 * torch.tanh(h @ weight.T / 5)), [weight]  # a soft-cap, as in Gemma-2
    student_head, student_weights = make_head()
    teacher_head, teacher_weights = make_head()
    hidden = torch.randn(*shape, H, generator=g).requires_grad_()
    teacher_hidden = torch.randn(*shape, H, generator=g).requires_grad_()
    ids, mask = torch.randint(V, shape, generator=g), torch.rand(shape, generator=g) < 0.7
    return hidden, teacher_hidden, student_head, teacher_head, ids, mask, student_weights, teacher_weights


def dense(hidden, teacher_hidden, student_head, teacher_head, ids=None, mask=None, **kw):
    return dpsw_loss(student_head(hidden), teacher_head(teacher_hidden), ids, mask, **kw)


def assert_same(got, want, mask=None):
    (loss, stats), (want_loss, want_stats) = got, want
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-6)
    for name in STATS:
        assert stats[name].shape == want_stats[name].shape and not stats[name].requires_grad
        keep = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(stats[name][keep], want_stats[name][keep], rtol=1e-4, atol=1e-5)


def assert_grads(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert b.abs().max() > 1e-3  # or the comparison shows nothing


@pytest.mark.parametrize("chunk_size", (1, 3, 10, 64))
@pytest.mark.parametrize("head", ("linear", "softcap"))
def test_chunked_equals_dense_in_loss_stats_and_gradient(head, chunk_size):
    *args, ws, wt = setting(10, head=head)
    for kw in (dict(), dict(student_view="sampled", weight_norm="mean"), dict(divergence="jsd", beta=0.2, top_k=3),
               dict(divergence="forward", temperature=0.6, weighting="student", denominator=4)):
        want, got = dense(*args, **kw), dpsw_loss_chunked(*args, chunk_size=chunk_size, **kw)
        assert_same(got, want, args[5])
        wrt = [args[0], *ws]
        assert_grads(torch.autograd.grad(got[0], wrt), torch.autograd.grad(want[0], wrt))


@pytest.mark.parametrize("chunk_size", (3, 64))
@pytest.mark.parametrize("head", ("linear", "softcap"))
def test_chunked_works_under_backward_scaled_and_accumulating(head, chunk_size):
    *args, ws, wt = setting(2, 5, head=head)
    wrt = [args[0], *ws]
    want = torch.autograd.grad(3 * dense(*args)[0], wrt)
    loss, _ = dpsw_loss_chunked(*args, chunk_size=chunk_size)
    assert all(p.grad is None for p in wrt)  # nothing is written before backward
    (3 * loss).backward()
    assert_grads([p.grad for p in wrt], want)
    (3 * dpsw_loss_chunked(*args, chunk_size=chunk_size)[0]).backward()
    assert_grads([p.grad for p in wrt], [2 * g for g in want])
    assert args[1].grad is None and all(p.grad is None for p in wt)


def test_chunked_under_autograd_grad_leaves_no_grad_behind_and_none_reaches_the_teacher():
    *args, ws, wt = setting(7)
    loss, _ = dpsw_loss_chunked(*args, chunk_size=2)
    grads = torch.autograd.grad(loss, [args[0], *ws, args[1], *wt], allow_unused=True)
    assert all(g is not None for g in grads[:3]) and all(g is None for g in grads[3:])
    assert all(p.grad is None for p in [args[0], args[1], *ws, *wt])


@pytest.mark.parametrize("shape", ((7,), (2, 5), (2, 2, 3)))
def test_chunked_takes_any_leading_shape(shape):
    *args, ws, _ = setting(*shape)
    want, got = dense(*args), dpsw_loss_chunked(*args, chunk_size=4)
    assert got[1]["weight"].shape == shape
    assert_same(got, want, args[5])
    assert_grads(torch.autograd.grad(got[0], [args[0], *ws]), torch.autograd.grad(want[0], [args[0], *ws]))


def test_chunked_has_a_default_chunk_and_needs_neither_ids_nor_mask():
    hidden, teacher_hidden, student_head, teacher_head, *_ = setting(9)
    args = (hidden, teacher_hidden, student_head, teacher_head)
    assert_same(dpsw_loss_chunked(*args), dense(*args))
    assert_same(dpsw_loss_chunked(*args, chunk_size=2), dense(*args))


@pytest.mark.parametrize("tied", ("embedding", "penalty"))
def test_chunked_adds_to_the_other_uses_of_a_tied_head(tied):
    *args, _, _ = setting(10, head="softcap")
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(5)).requires_grad_()

    def total(loss_fn, **kw):
        hidden = torch.tanh(weight[args[4]]) if tied == "embedding" else args[0]
        loss, _ = loss_fn(hidden, args[1], lambda h: h @ weight.T, args[3], *args[4:6], **kw)
        return loss + (0.1 * weight ** 2).sum() * (tied == "penalty")
    want = torch.autograd.grad(total(dense), weight)
    assert_grads(torch.autograd.grad(total(dpsw_loss_chunked, chunk_size=3), weight), want)
    total(dpsw_loss_chunked, chunk_size=3).backward()
    assert_grads([weight.grad], want)


def test_chunked_with_one_head_for_both_sides_teaches_it_only_as_the_student():
    hidden, teacher_hidden, head, _, ids, mask, ws, _ = setting(10)
    args = (hidden, teacher_hidden, head, head, ids, mask)
    want = torch.autograd.grad(dense(*args)[0], [hidden, *ws])
    assert_grads(torch.autograd.grad(dpsw_loss_chunked(*args, chunk_size=3)[0], [hidden, *ws]), want)


def test_chunked_with_a_frozen_head_still_reaches_the_hidden_states():
    *args, ws, _ = setting(10)
    want = torch.autograd.grad(dense(*args)[0], args[0])
    for p in ws:
        p.requires_grad_(False)
    dpsw_loss_chunked(*args, chunk_size=3)[0].backward()
    assert_grads([args[0].grad], want)
    assert all(p.grad is None for p in ws)


def test_chunked_with_constant_hidden_states_still_reaches_the_head():
    *args, ws, _ = setting(10)
    want = torch.autograd.grad(dense(*args)[0], ws)
    args[0] = args[0].detach()
    dpsw_loss_chunked(*args, chunk_size=3)[0].backward()
    assert_grads([p.grad for p in ws], want)


def test_chunked_under_no_grad_gives_the_same_numbers_and_no_graph():
    *args, _, _ = setting(10)
    want = dense(*args)
    with torch.no_grad():
        got = dpsw_loss_chunked(*args, chunk_size=3)
    assert not got[0].requires_grad
    assert_same(got, (want[0].detach(), want[1]), args[5])


@pytest.mark.parametrize("merged", ("inside", "outside"))
def test_chunked_reaches_the_weights_that_a_heads_weight_is_computed_from(merged):
    *args, _, _ = setting(10)
    g = torch.Generator().manual_seed(7)
    a, b = torch.randn(V, 2, generator=g).requires_grad_(), torch.randn(2, H, generator=g).requires_grad_()
    base = torch.randn(V, H, generator=g)

    def total(loss_fn, **kw):  # a LoRA head, its weight merged at every call or once
        weight = base + a @ b
        head = (lambda h: h @ weight.T) if merged == "outside" else (lambda h: h @ (base + a @ b).T)
        return loss_fn(*args[:2], head, *args[3:], **kw)[0] + 0.1 * (weight ** 2).sum()
    want = torch.autograd.grad(total(dense), [args[0], a, b])
    for chunk_size in (3, 64):
        assert_grads(torch.autograd.grad(total(dpsw_loss_chunked, chunk_size=chunk_size), [args[0], a, b]), want)
    total(dpsw_loss_chunked, chunk_size=3).backward()
    assert_grads([args[0].grad, a.grad, b.grad], want)


def test_chunked_gradient_flows_on_into_what_made_the_hidden_states():
    *args, _, _ = setting(10)
    body = torch.nn.Linear(H, H)
    want = torch.autograd.grad(dense(body(args[0]), *args[1:])[0], body.weight)
    dpsw_loss_chunked(body(args[0]), *args[1:], chunk_size=3)[0].backward()
    assert_grads([body.weight.grad], want)


def peak_logits(n, chunk_size):
    """Most logit-sized numbers the graph kept at any head call or at the end, and the rows of each head call."""
    hidden, teacher_hidden, student_head, teacher_head, *_ = setting(n)
    rows, peaks, live = [], [], weakref.WeakSet()

    def pack(tensor):
        tensor = tensor.detach()  # an output packed with its graph would keep itself alive
        saved = lambda: tensor  # what the graph holds: dies with it
        if tensor.dim() and tensor.shape[-1] == V and tensor.shape != (H, V):  # (H, V) is the head's own weight
            live.add(saved)
        return saved

    def count():
        peaks.append(sum(saved().numel() for saved in live))

    def spied(head):
        return lambda h: (rows.append(h.numel() // H), count(), head(h))[-1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved()):
        loss, _ = dpsw_loss_chunked(hidden, teacher_hidden, spied(student_head), spied(teacher_head),
                                    chunk_size=chunk_size)
        count()
        loss.backward()
    return max(peaks), rows


@pytest.mark.parametrize("chunk_size", (1, 4))
def test_chunked_never_holds_more_than_a_chunk_of_logits(chunk_size):
    peak, rows = peak_logits(60, chunk_size)
    assert max(rows) <= chunk_size and sum(rows) >= 2 * 60
    assert peak <= peak_logits(3 * chunk_size, chunk_size)[0]  # does not grow with the number of tokens
    assert peak < 60 * V


@pytest.mark.parametrize("fill", (0.0, NAN))
@pytest.mark.parametrize("weight_norm", ("none", "mean"))
def test_chunked_fully_masked_gives_zero_loss_and_exactly_zero_gradients(weight_norm, fill):
    *args, ws, _ = setting(10)
    args[0] = torch.full((10, H), fill, requires_grad=True)
    args[5] = torch.zeros(10)
    loss, stats = dpsw_loss_chunked(*args, chunk_size=3, weight_norm=weight_norm)
    grads = torch.autograd.grad(loss, [args[0], *ws])
    assert loss.item() == 0 and all((g == 0).all() for g in grads)
    assert all(stats[name].shape == (10,) for name in STATS)


def test_chunked_without_any_token_gives_zero_loss():
    *args, ws, _ = setting(0)
    loss, stats = dpsw_loss_chunked(*args, chunk_size=3)
    loss.backward()
    assert loss.item() == 0 and args[0].grad.shape == (0, H) and stats["weight"].shape == (0,)
    assert all(p.grad is None or (p.grad == 0).all() for p in ws)


@pytest.mark.parametrize("chunk_size", (1, 3, 64))
def test_chunked_padding_may_hold_nan(chunk_size):
    *args, ws, _ = setting(2, 5)
    want, clean = dense(*args)
    want_grads = torch.autograd.grad(want, [args[0], *ws])
    poison = ~args[5][..., None]
    dirty = args[0].detach().masked_fill(poison, NAN).requires_grad_()
    loss, stats = dpsw_loss_chunked(dirty, args[1].detach().masked_fill(poison, NAN), *args[2:], chunk_size=chunk_size)
    assert_same((loss, stats), (want, clean), args[5])
    assert_grads(torch.autograd.grad(loss, [dirty, *ws]), want_grads)


def test_chunked_takes_bfloat16_hidden_states_and_computes_in_float32():
    *args, _, _ = setting(10)
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(3)).bfloat16().requires_grad_()
    args[0] = args[0].detach().bfloat16().requires_grad_()
    args[2] = lambda h: h @ weight.T
    want, got = dense(*args), dpsw_loss_chunked(*args, chunk_size=3)
    assert got[0].dtype == torch.float32
    assert_same(got, want, args[5])
    for a, b in zip(torch.autograd.grad(got[0], [args[0], weight]), torch.autograd.grad(want[0], [args[0], weight])):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.01 * b.abs().max().item())


def test_chunked_is_the_same_under_micro_batches_with_the_steps_denominator():
    *args, ws, _ = setting(4, 5)
    wrt = [args[0], *ws]
    want = torch.autograd.grad(dense(*args)[0], wrt)
    for i in range(4):
        part = [x[i:i + 1] if torch.is_tensor(x) else x for x in args]
        dpsw_loss_chunked(*part, chunk_size=3, denominator=args[5].sum())[0].backward()
    assert_grads([p.grad for p in wrt], want)
