"""DPSW, the dual-perspective safety-weighted divergence of MSD (arXiv 2605.02971). Needs torch and nothing else.

    L = 1/N · Σ_t w_t · D_t        D_t = Σ_v p_S(v) (log p_S(v) − log p_T(v))        reverse KL, KL(student ‖ teacher)
    w_t = w_t^T · w_t^S            w_t^T = 1 − H_K / log K            w_t^S = 1 − p_S(a token)

S is the student (query in the target language), T the teacher (the same query in English). H_K is the entropy, in nats,
of the teacher's K largest probabilities, renormalised: weights are large where the teacher is sure and the student
would go wrong. They are constants to autograd, else the loss would fall by raising p_S alone. The reverse KL and w =
teacher confidence × student risk are from a survey that summarises the paper; the form of w^T, and whose token p_S is
of, are ours. `dpsw_loss_chunked` is `dpsw_loss` from hidden states, in memory that does not grow with N · V.
"""
import torch


def _per_token(student_logits, teacher_logits, response_ids, weighting="dpsw", student_view="teacher", top_k=20,
               divergence="reverse", beta=0.5, temperature=1.0):
    """(N, V), (N, V), (N,) -> D, w, w^T, w^S, each (N,) float32. Only D carries a gradient, to the student."""
    logp = lambda x: (x.float() if temperature == 1 else x.float() / temperature).log_softmax(-1).clamp(min=-3e38)
    student_logp, teacher_logp = logp(student_logits), logp(teacher_logits.detach())  # the clamp makes 0 · log 0 a 0
    kl = lambda p_logp, q_logp: (p_logp.exp() * (p_logp - q_logp)).sum(-1)  # KL(p ‖ q), nats
    if divergence == "reverse":  # KL(student ‖ teacher): mode-seeking, the paper's
        d = kl(student_logp, teacher_logp)
    elif divergence == "forward":  # KL(teacher ‖ student): mass-covering
        d = kl(teacher_logp, student_logp)
    else:
        log_beta, log_rest = torch.tensor([beta, 1 - beta]).log().tolist()
        mix_logp = torch.logaddexp(teacher_logp + log_beta, student_logp + log_rest)  # log M
        d = beta * kl(teacher_logp, mix_logp) + (1 - beta) * kl(student_logp, mix_logp)
    with torch.no_grad():  # the weights are constants
        top_logp, top_ids = teacher_logp.topk(min(top_k, teacher_logp.shape[-1]), dim=-1)  # (N, K)
        K, top_logp = top_logp.shape[-1], top_logp.log_softmax(-1)
        entropy = -(top_logp.exp() * top_logp).sum(-1)  # nats
        w_teacher = (1 - entropy / torch.tensor(float(K)).log()).clamp(0, 1) if K > 1 else torch.ones_like(entropy)
        token = top_ids[:, 0] if student_view == "teacher" else response_ids
        w_student = 1 - student_logp.gather(-1, token.long().unsqueeze(-1)).squeeze(-1).exp()
        w = {"dpsw": w_teacher * w_student, "teacher": w_teacher, "student": w_student}.get(
            weighting, torch.ones_like(w_teacher))
    return d, w, w_teacher, w_student


def _prepare(student, teacher, response_ids, mask, weight_norm, weighting="dpsw", student_view="teacher", top_k=20,
             divergence="reverse", beta=0.5, temperature=1.0):
    """Check the options; pick the unmasked rows, (N, ·), (N, ·), (N,) or None, and the mask. Padding is never read."""
    for value, allowed in ((weighting, ("dpsw", "teacher", "student", "none")), (student_view, ("teacher", "sampled")),
                           (divergence, ("reverse", "forward", "jsd")), (weight_norm, ("none", "mean"))):
        if value not in allowed:
            raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    if not (temperature > 0 and 0 <= beta <= 1 and top_k >= 1):
        raise ValueError("temperature > 0, 0 ≤ beta ≤ 1 and top_k ≥ 1 are needed")
    if student_view == "sampled" and response_ids is None:
        raise ValueError("student_view='sampled' needs response_ids")
    shape = student.shape[:-1]
    for name, x in (("teacher", teacher[..., 0]), ("response_ids", response_ids), ("mask", mask)):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, the student's tokens have {tuple(shape)}")
    mask = torch.ones(shape, dtype=torch.bool, device=student.device) if mask is None else mask.bool()
    return student[mask], teacher[mask], None if response_ids is None else response_ids[mask], mask


def _finish(loss_sum, per_token, mask, weight_norm, denominator):
    """Divide Σ w·D by `denominator`, the sum of the weights, or N; put the statistics back into the mask's shape."""
    if denominator is None:
        denominator = per_token[1].sum().clamp(min=1e-30) if weight_norm == "mean" else max(len(per_token[0]), 1)
    stats = [torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, x.detach()) for x in per_token]
    return loss_sum / denominator, dict(zip(("divergence", "weight", "w_teacher", "w_student"), stats))


def dpsw_loss(student_logits, teacher_logits, response_ids=None, mask=None, *, weighting="dpsw", student_view="teacher",
              top_k=20, divergence="reverse", beta=0.5, temperature=1.0, weight_norm="none", denominator=None):
    """The safety-weighted divergence of every response token, averaged.

    student_logits, teacher_logits: (..., V), any float dtype, computed in float32; logits at t predict response_ids[t].
    response_ids, mask: (...), the mask true on response tokens, the stop token among them; padding may hold NaN.
    weighting "dpsw" | "teacher" | "student" | "none"; student_view: p_S of the "teacher"'s top token or the "sampled";
    top_k: K of H_K; divergence "reverse" KL(student ‖ teacher) | "forward" KL(teacher ‖ student) | "jsd" β·KL(teacher ‖
    M) + (1−β)·KL(student ‖ M), M = β·teacher + (1−β)·student; temperature divides both logits first, weights included
    (no τ² factor); weight_norm "mean" divides by the sum of the weights, not N; denominator overrides both.
    Returns (loss, stats): a float32 scalar in nats whose gradient reaches student_logits only, and detached float32
    tensors of the mask's shape, 0 where masked: divergence D_t, weight w_t, w_teacher, w_student. Nothing unmasked:
    loss 0, zero gradients. Raises ValueError for an unknown option or shapes that do not agree.
    """
    options = (weighting, student_view, top_k, divergence, beta, temperature)
    student, teacher, ids, mask = _prepare(student_logits, teacher_logits, response_ids, mask, weight_norm, *options)
    d, w, *views = _per_token(student, teacher, ids, *options)
    return _finish((w * d).sum(), (d, w, *views), mask, weight_norm, denominator)


def _graph(tensor):
    """The nodes of the autograd graph behind `tensor`; those with a `variable` are its leaves, a head's weights."""
    stack, nodes = [tensor.grad_fn], set()
    while stack:
        if (node := stack.pop()) is not None and node not in nodes:
            nodes.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return nodes


class _ChunkedSum(torch.autograd.Function):
    """Σ w·D over chunks of rows. A chunk's gradient is taken in the *forward* pass, while its logits are there: nothing
    is kept but the gradients themselves, and no logits are computed twice."""

    @staticmethod
    def forward(ctx, chunk_sum, rows, with_grad, keep, hidden, *weights):
        total = hidden.new_zeros((), dtype=torch.float32)
        totals = [torch.zeros_like(x) for x in (hidden, *weights) if with_grad]
        for at in rows:
            with torch.set_grad_enabled(with_grad):
                h = hidden[at].detach().requires_grad_(with_grad)
                part = chunk_sum(h, at)
            if with_grad:
                grads = torch.autograd.grad(part, (h, *weights), retain_graph=keep, materialize_grads=True)
                for into, grad in zip((totals[0][at], *totals[1:]), grads):
                    into += grad
            total += part.detach()
        ctx.save_for_backward(*totals)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        return None, None, None, None, *(g.mul_(grad_output) for g in ctx.saved_tensors)  # in place: no copy


def dpsw_loss_chunked(student_hidden, teacher_hidden, student_head, teacher_head, response_ids=None, mask=None, *,
                      chunk_size=128, weight_norm="none", denominator=None, **options):
    """dpsw_loss(student_head(student_hidden), teacher_head(teacher_hidden), …), `chunk_size` rows of logits at a time.

    student_hidden, teacher_hidden: (..., H) (the two H may differ); heads: any callable (n, H) -> (n, V), soft-capping
    and the like included. The rest, and what is returned, as for dpsw_loss. Gradient reaches student_hidden and every
    leaf that student_head computes with (its weights), never the teacher. It is backpropagated once.
    """
    student, teacher, ids, mask = _prepare(student_hidden, teacher_hidden, response_ids, mask, weight_norm, **options)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    per_token = torch.zeros(4, len(student), device=student.device)  # D, w, w^T, w^S; lists would fragment a heap

    def chunk_sum(h, at):
        with torch.no_grad():
            teacher_logits = teacher_head(teacher[at])
        values = _per_token(student_head(h), teacher_logits, ids if ids is None else ids[at], **options)
        per_token[:, at] = torch.stack(values).detach()
        return (values[0] * values[1]).sum()

    rows = [slice(i, i + chunk_size) for i in range(0, max(len(student), 1), chunk_size)]  # one even if N = 0
    nodes, again = (_graph(student_head(student[:1].detach())) if torch.is_grad_enabled() else set() for _ in range(2))
    weights = [node.variable for node in nodes if hasattr(node, "variable")]
    captured = any(not hasattr(node, "variable") for node in nodes & again)  # a weight computed outside of the head
    with_grad = torch.is_grad_enabled() and (student.requires_grad or bool(weights))
    loss_sum = _ChunkedSum.apply(chunk_sum, rows, with_grad, captured, student, *weights)
    return _finish(loss_sum, per_token, mask, weight_norm, denominator)
