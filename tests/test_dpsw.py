"""The promises of dpsw.py, against plain loops over tokens and vocabulary in python floats."""
import ast
import itertools
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import dpsw
from dpsw import dpsw_loss, dpsw_loss_chunked

INF = float("inf")
NAN = float("nan")
STATS = ("divergence", "weight", "w_teacher", "w_student")
WEIGHTINGS = ("dpsw", "teacher", "student", "none")
VIEWS = ("teacher", "sampled")
DIVERGENCES = ("reverse", "forward", "jsd")
NORMS = ("response", "none")


def chunked_loss(student, teacher, *rest, chunk_size=5, **options):
    """The chunked form on logits, behind heads that do nothing."""
    heads = nn.Identity(), nn.Identity()
    return dpsw_loss_chunked(student, teacher, *heads, *rest, chunk_size=chunk_size, **options)


both_forms = pytest.mark.parametrize("loss_of", (dpsw_loss, chunked_loss), ids=("dense", "chunked"))


# ---- the reference: one token at a time, float64, nothing clever ----

def log_softmax(logits, temperature):
    scaled = [x / temperature for x in logits]
    top = max(scaled)
    log_sum = top + math.log(sum(math.exp(x - top) for x in scaled))
    return [x - log_sum for x in scaled]


def kl(logp, logq):
    return sum(math.exp(a) * (a - b) for a, b in zip(logp, logq) if a > -INF)


def kl_and_slope(log_s, log_other):
    """KL(S ‖ other), and what it changes by with each student logit, `other` held still."""
    mean = kl(log_s, log_other)
    slope = [math.exp(s) * (s - o - mean) if s > -INF else 0 for s, o in zip(log_s, log_other)]
    return mean, slope


def diverge(log_s, log_t, divergence, beta):
    """One token's divergence and its gradient, by hand, to the student's logits."""
    if divergence == "reverse":
        return kl_and_slope(log_s, log_t)
    if divergence == "forward":
        return kl(log_t, log_s), [math.exp(s) - math.exp(t) for s, t in zip(log_s, log_t)]
    mixture = [beta * math.exp(t) + (1 - beta) * math.exp(s) for s, t in zip(log_s, log_t)]
    log_m = [math.log(m) for m in mixture]
    mean, slope = kl_and_slope(log_s, log_m)  # what M adds to the slope sums to nothing
    return beta * kl(log_t, log_m) + (1 - beta) * mean, [(1 - beta) * x for x in slope]


def teacher_confidence(log_t, top_k):
    k = min(top_k, len(log_t))
    if k == 1:
        return 1.0
    top = sorted([math.exp(t) for t in log_t], reverse=True)[:k]
    shares = [p / sum(top) for p in top]
    return 1 + sum(p * math.log(p) for p in shares if p > 0) / math.log(k)


def score_token(student, teacher, token, weighting="dpsw", student_view="teacher", top_k=20,
                divergence="reverse", beta=0.5, temperature=1.0):
    log_s = log_softmax(student, temperature)
    log_t = log_softmax(teacher, temperature)
    if student_view == "teacher":
        token = log_t.index(max(log_t))
    w_teacher = teacher_confidence(log_t, top_k)
    w_student = 1 - math.exp(log_s[token])
    product = {"dpsw": w_teacher * w_student, "teacher": w_teacher, "student": w_student, "none": 1}
    value, slope = diverge(log_s, log_t, divergence, beta)
    return {"divergence": value, "weight": product[weighting], "w_teacher": w_teacher,
            "w_student": w_student, "gradient": [x / temperature for x in slope]}


def reference(student, teacher, ids, mask, weight_norm="response", **options):
    """Loss, its gradient with constant weights, {(n, t): scores of a token}; logits (N, T, V)."""
    tokens = {}
    for n, t in mask.nonzero().tolist():
        logits = student[n, t].double().tolist(), teacher[n, t].double().tolist()
        tokens[n, t] = score_token(*logits, ids[n, t].item(), **options)
    loss = 0.0
    gradient = torch.zeros(student.shape)
    for (n, t), token in tokens.items():
        share = token["weight"] / len(tokens)
        if weight_norm == "response":
            total = sum(other["weight"] for (m, _), other in tokens.items() if m == n)
            share = token["weight"] / total / len({m for m, _ in tokens})
        loss += share * token["divergence"]
        gradient[n, t] = share * torch.tensor(token["gradient"])
    return loss, gradient, tokens


def make_inputs(*shape, V=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    student = (2 * torch.randn(*shape, V, generator=g)).requires_grad_()
    teacher = 2 * torch.randn(*shape, V, generator=g)
    return student, teacher, torch.randint(V, shape, generator=g)


def mask_of(*lengths, T):
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def check(student, teacher, ids=None, mask=None, loss_of=dpsw_loss, **options):
    """Loss, stats and student gradient are the reference's."""
    shape = student.shape[:-1]
    token_shape = -1, shape[-1]
    plain = [x.detach().reshape(*token_shape, x.shape[-1]) for x in (student, teacher)]
    for tensor in (ids, mask):
        plain.append((torch.ones(shape) if tensor is None else tensor).reshape(token_shape))
    want, want_gradient, tokens = reference(*plain, **options)

    loss, stats = loss_of(student, teacher, ids, mask, **options)
    gradient, = torch.autograd.grad(loss, student)
    assert loss.shape == () and loss.item() == pytest.approx(want, rel=2e-4, abs=1e-6)
    torch.testing.assert_close(gradient, want_gradient.view_as(student), rtol=1e-3, atol=2e-6)
    for name in STATS:
        assert stats[name].shape == shape and not stats[name].requires_grad
        rows = stats[name].reshape(token_shape).tolist()
        got = [rows[n][t] for n, t in tokens]
        assert got == pytest.approx([x[name] for x in tokens.values()], rel=2e-4, abs=2e-6), name
    return loss, gradient


# ---- the numbers ----

SHAPES = {(3,): [[1, 0, 1]], (2, 2): [[1, 0], [1, 1]], (2, 2, 1): [[1], [0], [1], [1]]}


@pytest.mark.parametrize("weight_norm", NORMS)
@pytest.mark.parametrize("divergence, beta", [*zip(DIVERGENCES, (0.5, 0.5, 0.5)), ("jsd", 0.2)])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_product_of_options_equals_the_loop(weighting, view, divergence, beta, weight_norm):
    options = dict(weighting=weighting, student_view=view, divergence=divergence, beta=beta)
    options["weight_norm"] = weight_norm
    product = itertools.product(SHAPES, (False, True), (1, 2, 20, 23, 99), (0.6, 1.0))
    for shape, masked, top_k, temperature in product:
        mask = torch.tensor(SHAPES[shape]).view(shape) if masked else None
        inputs = make_inputs(*shape, V=23, seed=top_k)
        check(*inputs, mask, top_k=top_k, temperature=temperature, **options)


@both_forms
def test_by_default_every_response_counts_the_same_and_an_empty_one_not_at_all(loss_of):
    student, teacher, _ = make_inputs(3, 5, V=30)
    mask = mask_of(5, 0, 1, T=5)
    loss, _ = check(student, teacher, None, mask, loss_of)
    alone = [loss_of(student[n], teacher[n], None, mask[n])[0].item() for n in (0, 2)]
    assert loss.item() == pytest.approx(sum(alone) / 2, rel=1e-5)


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


@pytest.mark.parametrize("top_k", (2, 6, 20))
def test_a_uniform_top_k_weighs_nothing_and_a_one_hot_one_weighs_one(top_k):
    student, _, _ = make_inputs(2)
    teacher = torch.zeros(2, 6)
    teacher[1, 3] = 200.0
    _, stats = dpsw_loss(student, teacher, top_k=top_k)
    assert stats["w_teacher"].tolist() == pytest.approx([0, 1], abs=1e-6)


@both_forms
@pytest.mark.parametrize("V", (2, 20, 32, 1000))
@pytest.mark.parametrize("weighting", ("dpsw", "teacher"))
def test_where_the_teacher_knows_nothing_rounding_does_not_become_a_weight(weighting, V, loss_of):
    student = (2 * torch.randn(2, 3, V)).requires_grad_()
    loss, stats = loss_of(student, torch.zeros(2, 3, V), weighting=weighting)
    loss.backward()
    assert loss.item() == 0 and not stats["w_teacher"].any() and not student.grad.any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
@both_forms
def test_the_hosts_default_dtype_changes_nothing(dtype, loss_of):
    student, teacher, _ = make_inputs(2, 4, V=40)
    want, _ = loss_of(student, teacher)
    torch.set_default_dtype(dtype)
    try:
        loss, stats = loss_of(student, teacher)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss == want and stats["weight"].dtype == torch.float32


def test_the_confident_wrong_student_is_corrected_and_under_the_sampled_view_muted():
    student = torch.tensor([[30.0, 0.0]])  # certain of token 0, the teacher of token 1
    for view, want in zip(VIEWS, (1, 0)):
        _, stats = dpsw_loss(student, student.flip(-1), torch.tensor([0]), student_view=view)
        assert stats["weight"].item() == pytest.approx(want, abs=1e-6)


@both_forms
@pytest.mark.parametrize("weight_norm", NORMS)
def test_micro_batches_with_the_steps_count_give_the_gradient_of_the_whole(weight_norm, loss_of):
    student, teacher, ids = make_inputs(4, 5)
    mask = mask_of(5, 1, 3, 0, T=5)
    want, want_gradient = check(student, teacher, ids, mask, weight_norm=weight_norm)
    count = {"response": torch.tensor(3), "none": 9}[weight_norm]
    for size in (1, 2, 4):
        parts = zip(*[x.split(size) for x in (student, teacher, ids, mask)])
        losses = [loss_of(*part, weight_norm=weight_norm, denominator=count)[0] for part in parts]
        gradient, = torch.autograd.grad(sum(losses), student)
        torch.testing.assert_close(sum(losses), want)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-7)


# ---- padding, edges, dtypes ----

@both_forms
@pytest.mark.parametrize("fill", (NAN, INF, -INF))
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_may_hold_anything(divergence, view, fill, loss_of):
    student, teacher, ids = make_inputs(3, 4)
    mask = mask_of(2, 0, 4, T=4)
    dirty = [x.detach().masked_fill(~mask[..., None], fill) for x in (student, teacher)]
    dirty[0].requires_grad_()
    dirty.append(ids.masked_fill(~mask, -100))
    for weight_norm in NORMS:
        options = dict(divergence=divergence, student_view=view, weight_norm=weight_norm)
        want = check(student, teacher, ids, mask, **options)
        loss, _ = loss_of(*dirty, mask, **options)
        gradient, = torch.autograd.grad(loss, dirty[0])
        torch.testing.assert_close((loss, gradient), want)


@both_forms
@pytest.mark.parametrize("side", (0, 1))
def test_nan_on_a_response_token_is_never_hidden(side, loss_of):
    logits = [x.detach() for x in make_inputs(3)[:2]]
    logits[side][1, 2] = NAN
    assert loss_of(*logits)[0].isnan()


@both_forms
@pytest.mark.parametrize("shape, fill", [((2, 3), 0.0), ((2, 3), NAN), ((0,), 0.0), ((2, 0), 0.0)])
@pytest.mark.parametrize("denominator", (None, 7, 0))
def test_a_fully_masked_input_gives_zero_loss_and_gradient(denominator, shape, fill, loss_of):
    student = torch.full((*shape, 5), fill, requires_grad=True)
    for weight_norm in NORMS:
        options = dict(weight_norm=weight_norm, denominator=denominator)
        loss, stats = loss_of(student, student.detach(), None, torch.zeros(shape), **options)
        loss.backward()
        assert loss.item() == 0 and (student.grad == 0).all()
        assert all(stats[name].shape == shape for name in STATS)


@both_forms
@pytest.mark.parametrize("weight_norm", NORMS)
def test_weights_that_are_all_zero_give_zero_loss_and_gradient(weight_norm, loss_of):
    student = torch.tensor([[[200.0, 0.0]]], requires_grad=True)  # p_S(y*) is 1 to the last digit
    loss, stats = loss_of(student, torch.tensor([[[2.0, 0.0]]]), weight_norm=weight_norm)
    loss.backward()
    assert stats["weight"].item() == 0 and loss.item() == 0 and (student.grad == 0).all()


@both_forms
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_any_float_dtype_is_computed_in_float32(dtype, loss_of):
    student, teacher, _ = make_inputs(2, 4, V=40)
    student = student.detach().to(dtype).requires_grad_()
    wide = student.detach().float().requires_grad_()
    want, want_gradient = check(wide, teacher.to(dtype).float())
    loss, _ = loss_of(student, teacher.to(dtype))
    gradient, = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, want)  # of one dtype: float32
    torch.testing.assert_close(gradient, want_gradient.to(dtype), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_that_one_side_or_both_rule_out_stay_finite(divergence):
    student, teacher, _ = make_inputs(2, 3)
    loss, gradient = check(student, teacher, divergence=divergence, top_k=3)
    wide = [nn.functional.pad(x.detach(), (0, 2), value=-INF) for x in (student, teacher)]
    got, _ = dpsw_loss(wide[0].requires_grad_(), wide[1], divergence=divergence, top_k=3)
    torch.testing.assert_close(got, loss)
    want = nn.functional.pad(gradient, (0, 2))
    torch.testing.assert_close(torch.autograd.grad(got, wide[0])[0], want)

    some = [torch.tensor([[1.0, 0.5, 0.2]]), torch.tensor([[0.3, 0.9, -INF]])]
    if divergence == "reverse":  # where only the teacher rules a token out, it is infinite
        some.reverse()
    check(some[0].requires_grad_(), some[1], divergence=divergence)


@pytest.mark.parametrize("divergence", ("reverse", "forward"))
def test_extreme_logits_neither_overflow_nor_lose_the_gradient(divergence):
    student = torch.tensor([[1e4, 0.0, -1e4], [0.1, 0.2, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 1.0]])
    _, gradient = check(student, teacher, divergence=divergence)
    assert gradient[1].abs().max() > 0.1


# ---- errors, and the file itself ----

@both_forms
@pytest.mark.parametrize("options, told", [
    (dict(weighting="dspw"), "dspw"), (dict(student_view="student"), "student"),
    (dict(divergence="kl"), "kl"), (dict(weight_norm="sum"), "sum"),
    (dict(student_view="sampled"), "response_ids"),
    (dict(divergence="jsd", beta=0), "(?s)(?=.*forward).*reverse"),
    (dict(divergence="jsd", beta=1.0), "(?s)(?=.*forward).*reverse")])
def test_what_cannot_be_meant_is_a_value_error(options, told, loss_of):
    with pytest.raises(ValueError, match=told):
        loss_of(*make_inputs(2, 3)[:2], **options)


@both_forms
@pytest.mark.parametrize("shapes", [
    ((2, 3, 30), (2, 3, 31), (2, 3), (2, 3)), ((2, 3, 30), (2, 3, 1), (2, 3), (2, 3)),
    ((2, 3, 9), (2, 4, 9), (2, 3), (2, 3)), ((2, 3, 9), (1, 3, 9), (2, 3), (2, 3)),
    ((2, 3, 9), (2, 3, 9), (2, 1), (2, 3)), ((2, 3, 9), (2, 3, 9), (2, 3), (3,))])
def test_vocabularies_or_shapes_that_disagree_are_a_value_error(shapes, loss_of):
    student, teacher, ids, mask = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError):
        loss_of(student, teacher, ids.long(), mask + 1, student_view="sampled")


def test_a_chunk_of_no_tokens_is_a_value_error():
    with pytest.raises(ValueError, match="chunk_size"):
        chunked_loss(*make_inputs(2, 3), chunk_size=0)


def test_the_file_alone_in_an_empty_folder_runs(tmp_path):
    shutil.copy(dpsw.__file__, tmp_path)
    program = ("import torch, dpsw; x = torch.zeros(2, 3, 5, requires_grad=True);"
               "dpsw.dpsw_loss(x, torch.eye(5)[:3].expand(2, 3, 5))[0].backward();"
               "print(dpsw.__file__, x.grad.abs().sum().item() > 0)")
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout.split() == [str(tmp_path / "dpsw.py"), "True"], ran.stderr


def test_the_file_imports_torch_and_math_only():
    tree = ast.walk(ast.parse(Path(dpsw.__file__).read_text()))
    imports = [ast.unparse(x) for x in tree if isinstance(x, (ast.Import, ast.ImportFrom))]
    assert {line.split()[1].split(".")[0] for line in imports} <= {"torch", "math"}


# ---- the chunked form and its heads ----

H = 8
TEACHER_H = 5
HEADS = ("plain", "bias", "capped", "scaled")


class Head(nn.Module):
    """A linear layer, its logits scaled or soft-capped as some models do; remembers its calls."""

    def __init__(self, kind, width):
        super().__init__()
        self.linear = nn.Linear(width, 13, bias=kind != "plain")
        self.kind = kind
        self.calls = []  # the rows of each
        self.graphs = []  # a mark that dies with the graph of each call's logits
        self.most_alive = 0

    def forward(self, hidden):
        self.calls.append([tuple(row) for row in hidden.flatten(0, -2).tolist()])
        alive = [graph for graph in self.graphs if graph() is not None]
        self.most_alive = max(self.most_alive, len(alive))
        logits = self.linear(hidden)
        if logits.requires_grad:
            def mark(gradient):
                return None
            logits.register_hook(mark)
            self.graphs.append(weakref.ref(mark))
        if self.kind == "capped":
            return 0.5 * torch.tanh(logits / 0.5)
        return 0.25 * logits if self.kind == "scaled" else logits


def make_setting(*shape, head="bias", mask=None):
    """Hidden states that are NaN at padding, heads, ids, and a mask with holes if none is given."""
    torch.manual_seed(0)
    if mask is None:
        mask = torch.rand(shape) < 0.7
        mask[-1] = False  # of several responses, an empty one
    hidden = [3 * torch.randn(*shape, width) for width in (H, TEACHER_H)]
    hidden = [x.masked_fill(~mask[..., None], NAN).requires_grad_() for x in hidden]
    return [*hidden, Head(head, H), Head(head, TEACHER_H), torch.randint(13, shape), mask]


def dense(hidden, teacher_hidden, student_head, teacher_head, ids, mask, **options):
    """The same by dpsw_loss; its padding is emptied, since 0 · NaN would reach the heads."""
    hidden, teacher_hidden = [x.masked_fill(~mask[..., None], 0) for x in (hidden, teacher_hidden)]
    return dpsw_loss(student_head(hidden), teacher_head(teacher_hidden), ids, mask, **options)


def assert_same_gradients(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert b.abs().max() > 1e-4  # or the comparison shows nothing


@pytest.mark.parametrize("chunk_size", (1, 3, 10**6))
@pytest.mark.parametrize("shape", ((7,), (5, 3), (2, 3, 2)))
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("options", [
    dict(), dict(student_view="sampled", weight_norm="none"), dict(divergence="jsd", beta=0.2),
    dict(divergence="forward", temperature=0.6, weighting="student", denominator=4)])
def test_chunked_equals_dense_in_loss_stats_and_gradients(options, head, shape, chunk_size):
    *args, mask = make_setting(*shape, head=head)
    trained = [args[0], *args[2].parameters()]
    want, want_stats = dense(*args, mask, **options)
    loss, stats = dpsw_loss_chunked(*args, mask, chunk_size=chunk_size, **options)
    torch.testing.assert_close(loss, want)
    for name in STATS:
        assert stats[name].shape == shape and not stats[name].requires_grad
        torch.testing.assert_close(stats[name][mask], want_stats[name][mask])
    got = torch.autograd.grad(loss, trained)
    assert all(x.grad is None for x in trained)
    assert_same_gradients(got, torch.autograd.grad(want, trained))

    with torch.no_grad():
        loss, _ = dpsw_loss_chunked(*args, mask, chunk_size=chunk_size, **options)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want.detach())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("wanted", ("hidden", "linear.weight", "hidden linear.weight linear.bias"))
def test_chunked_backward_scales_adds_up_and_reaches_what_is_trained_alone(wanted, head):
    args = make_setting(4, 3, head=head)
    named = {"hidden": args[0], **dict(args[2].named_parameters())}
    for name, tensor in named.items():
        tensor.requires_grad_(name in wanted)
    trained = [tensor for tensor in named.values() if tensor.requires_grad]
    want = torch.autograd.grad(3 * dense(*args)[0], trained)
    for times in (1, 2):
        (3 * dpsw_loss_chunked(*args, chunk_size=3)[0]).backward()
        assert_same_gradients([x.grad for x in trained], [times * x for x in want])
    others = [args[1], *args[2].parameters(), *args[3].parameters()]
    assert all(x.grad is None for x in others if not any(x is y for y in trained))


@pytest.mark.parametrize("frozen", (False, True))
def test_chunked_with_one_head_on_both_sides_tied_to_the_embedding(frozen):
    _, _, head, _, ids, mask = make_setting(4, 3, head="plain")
    body = nn.Linear(H, H)
    head.requires_grad_(not frozen)
    trained = [x for x in (*body.parameters(), head.linear.weight) if x.requires_grad]

    def gradients(loss_of, **options):
        embedded = head.linear.weight[ids]
        teacher_hidden = embedded.detach().flip(0)
        loss, _ = loss_of(body(embedded), teacher_hidden, head, head, ids, mask, **options)
        return torch.autograd.grad(loss, trained)

    assert_same_gradients(gradients(dpsw_loss_chunked, chunk_size=3), gradients(dense))


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("chunk_size, held", [(1, 1), (3, 1), (5, 1), (6, 2), (11, 3), (99, 7)])
def test_a_chunk_holds_whole_responses_and_no_row_is_computed_twice(chunk_size, held, masked):
    args = make_setting(7, 3, mask=None if masked else torch.ones(7, 3).bool())
    dpsw_loss_chunked(*args, chunk_size=chunk_size)[0].backward()
    for side in (0, 1):
        calls = args[2 + side].calls
        assert max(len(call) for call in calls) <= max(chunk_size, 3)
        assert masked or len(calls) == math.ceil(7 / held)
        computed = sum(calls, [])
        for hidden, mask in zip(args[side], args[5]):
            rows = {tuple(row) for row in hidden[mask].tolist()}
            assert all(computed.count(row) == 1 for row in rows)
            assert sum(not rows.isdisjoint(call) for call in calls) <= 1
    assert args[2].most_alive <= 1  # the last chunk's graph, none of the chunks before it
