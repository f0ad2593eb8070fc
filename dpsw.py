"""DPSW, the dual-perspective safety-weighted divergence of MSD (arXiv 2605.02971).

    L   = 1/B · Σ_y 1/L_y · Σ_t w̃_t · KL_t          the mean over responses y of L_y tokens
    KL_t = Σ_v p_S(v) · (log p_S(v) − log p_T(v))    KL(student ‖ teacher), over the vocabulary
    w̃_t  = L_y · w_t / Σ_j w_j                       normalised within the response
    w_t  = w_t^T · w_t^S                             teacher's confidence × student's risk
    w_t^T = 1 − H_K / log K                          H_K: entropy of the teacher's top K
    w_t^S = 1 − p_S(y*_t)                            y*_t: the teacher's most likely token

S is the student (it sees the query in the target language), T the teacher (the same model, which
sees its English, too). So every response counts the same, and within it the tokens where the
teacher is sure and the student would go wrong weigh most. The formulas are those of public
summaries of the paper. Ours: the weights are constants to autograd (else the loss would fall by
raising p_S alone), the top K is renormalised, K is at most V, and K = 1 gives w^T = 1. The gradient
reaches the student only. Needs torch, and nothing else.
"""
import math

import torch

CHOICES = {  # what some options may be: their names here and on msd.py's command line
    "weighting": ["dpsw", "teacher", "student", "none"],
    "student_view": ["teacher", "sampled"],
    "divergence": ["reverse", "forward", "jsd"],
    "weight_norm": ["response", "none"],
}


def dpsw_loss(student_logits, teacher_logits, response_ids=None, mask=None, *,
              weighting="dpsw", student_view="teacher", top_k=20, divergence="reverse", beta=0.5,
              temperature=1.0, weight_norm="response", denominator=None):
    """The mean over responses of their safety-weighted divergence from the teacher.

    student_logits, teacher_logits: (..., T, V), any float dtype, computed in float32. The last two
        dimensions are a response's tokens and the vocabulary, those before them are responses.
        The logits at t predict response_ids[t].
    response_ids, mask: (..., T). The mask is true on response tokens, the stop token among them;
        padding may hold NaN.
    weighting: "dpsw" w^T · w^S | "teacher" w^T | "student" w^S | "none" 1
    student_view: w^S is 1 − p_S of the "teacher"'s most likely token | of the "sampled" one
    top_k: K of the teacher's entropy
    divergence: "reverse" KL(student ‖ teacher) | "forward" KL(teacher ‖ student) | "jsd"
        β·KL(teacher ‖ M) + (1−β)·KL(student ‖ M) with M = β·teacher + (1−β)·student
    temperature: divides both logits before everything else, weights included; no τ² factor
    weight_norm: "response" as above | "none": Σ w·D over the number of tokens
    denominator: the responses (of "none": tokens) to divide by. Default: those of this mask. Under
        micro-batches or several processes: those of the whole step.

    Returns (loss, stats): a float32 scalar in nats, whose gradient reaches student_logits only, and
    detached float32 tensors of the mask's shape, 0 where masked: divergence D_t, weight w_t (before
    it is normalised), w_teacher, w_student. A response without a token does not count; nothing
    unmasked, or weights that are all zero, give loss 0. Raises ValueError for an unknown option and
    for shapes that do not agree.
    """
    options = dict(weighting=weighting, student_view=student_view, top_k=top_k,
                   divergence=divergence, beta=beta, temperature=temperature,
                   weight_norm=weight_norm, denominator=denominator)
    ids, mask = check_inputs(student_logits, teacher_logits, response_ids, mask, **options)
    student_logp = log_probs(student_logits[mask], temperature)  # (n, V)
    teacher_logp = log_probs(teacher_logits.detach()[mask], temperature)
    loss, stats = sum_responses(student_logp, teacher_logp, ids[mask], mask, options)
    return loss / find_denominator(mask, options), stats


def check_inputs(student, teacher, response_ids, mask, *, top_k, beta, temperature, denominator,
                 **names):
    """(ids, mask), both (..., T); the mask is bool, all true where there is none. Raises
    ValueError. names: the options of CHOICES; a new one that is not of these is listed before."""
    for name, value in names.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r} is none of {', '.join(CHOICES[name])}")
    if not (temperature > 0 and top_k >= 1):
        raise ValueError("temperature > 0 and top_k ≥ 1 are needed")
    if names["divergence"] == "jsd" and not 0 < beta < 1:
        raise ValueError("jsd needs 0 < beta < 1: it is 0 at both ends; take forward or reverse")
    if names["student_view"] == "sampled" and response_ids is None:
        raise ValueError("student_view='sampled' needs response_ids")

    shape = student.shape[:-1]
    if not shape:
        raise ValueError("a dimension of tokens is needed: (..., T, V)")
    if mask is None:
        mask = torch.ones(shape, device=student.device)
    if response_ids is None:
        response_ids = mask  # any numbers: they are not read
    for name, x in (("teacher", teacher[..., 0]), ("mask", mask), ("response_ids", response_ids)):
        if x.shape != shape:
            raise ValueError(
                f"{name}: tokens {tuple(x.shape)}, where the student's are {tuple(shape)}")
    return response_ids, mask.bool()


def find_denominator(mask, options):
    """What the sum is divided by: the option, else the mask's responses (or tokens); never 0."""
    if options["denominator"] is not None:
        return options["denominator"] or 1
    counted = mask.any(-1) if options["weight_norm"] == "response" else mask
    return counted.sum().clamp(min=1)


def log_probs(logits, temperature):
    """(n, V) -> (n, V) float32, in nats. The clamp makes 0 · log 0 a 0."""
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    return logits.log_softmax(-1).clamp(min=-3e38)


def kl(p_logp, q_logp):
    """KL(p ‖ q) of log-probabilities (n, V) -> (n,), in nats."""
    return (p_logp.exp() * (p_logp - q_logp)).sum(-1)


def diverge(student_logp, teacher_logp, options):
    """D_t of log-probabilities (n, V) -> (n,), in nats."""
    if options["divergence"] == "reverse":  # mode-seeking, the paper's
        return kl(student_logp, teacher_logp)
    if options["divergence"] == "forward":  # mass-covering
        return kl(teacher_logp, student_logp)
    if options["divergence"] != "jsd":
        raise NotImplementedError(f"{options['divergence']} is in CHOICES, and not here")
    beta = options["beta"]
    mix_logp = torch.logaddexp(teacher_logp + math.log(beta), student_logp + math.log1p(-beta))
    return beta * kl(teacher_logp, mix_logp) + (1 - beta) * kl(student_logp, mix_logp)


@torch.no_grad()
def weigh(student_logp, teacher_logp, response_ids, options):
    """w, w^T and w^S of log-probabilities (n, V), by name, each (n,). Constants to autograd."""
    K = min(options["top_k"], teacher_logp.shape[-1])
    top_logp, top_ids = teacher_logp.topk(K, dim=-1)  # (n, K)
    top_logp = top_logp.log_softmax(-1)  # renormalised
    entropy = -(top_logp.exp() * top_logp).sum(-1)  # H_K, nats
    w_teacher = 1 - entropy / math.log(max(K, 2))  # of K = 1 the entropy is 0
    w_teacher = w_teacher.where(w_teacher > 1e-6, 0.0)  # rounding, which w̃ would blow up

    token = top_ids[:, 0] if options["student_view"] == "teacher" else response_ids.long()  # (n,)
    w_student = 1 - student_logp.gather(-1, token[:, None])[:, 0].exp()

    weights = {
        "dpsw": w_teacher * w_student,
        "teacher": w_teacher,
        "student": w_student,
        "none": torch.ones_like(w_teacher),
    }
    return {"weight": weights[options["weighting"]], "w_teacher": w_teacher, "w_student": w_student}


def sum_responses(student_logp, teacher_logp, response_ids, mask, options):
    """Log-probabilities (n, V) and ids (n,) of the mask's tokens -> (the sum over its responses,
    stats)."""
    if student_logp.shape != teacher_logp.shape:
        raise ValueError(f"vocabularies differ: the student's logits end in "
                         f"{student_logp.shape[-1]}, the teacher's in {teacher_logp.shape[-1]}")
    divergence = diverge(student_logp, teacher_logp, options)  # (n,)
    scores = {"divergence": divergence.detach(),
              **weigh(student_logp, teacher_logp, response_ids, options)}

    stats = {name: x.new_zeros(mask.shape).masked_scatter(mask, x)  # (..., T)
             for name, x in scores.items()}
    share = stats["weight"]
    if options["weight_norm"] == "response":  # 1/L_y · w̃_t
        share = share / share.sum(-1, keepdim=True).clamp(min=1e-30)
    return (share[mask] * divergence).sum(), stats


def dpsw_loss_chunked(student_hidden, teacher_hidden, student_head, teacher_head,
                      response_ids=None, mask=None, *, chunk_size=128, **options):
    """dpsw_loss(student_head(student_hidden), teacher_head(teacher_hidden), …) in less memory.

    student_hidden, teacher_hidden: (..., T, H), the two H may differ; heads: nn.Module, (n, H) ->
    (n, V). Works through whole responses, as many at a time as chunk_size tokens hold and at least
    one: it never holds more logits than theirs, and computes none twice. The rest, and what is
    returned, as for dpsw_loss. The gradient reaches student_hidden and student_head.parameters(),
    never the teacher; it is backpropagated once.
    """
    if unknown := options.keys() - dpsw_loss.__kwdefaults__.keys():
        raise TypeError(f"unknown keywords: {', '.join(unknown)}")
    options = {**dpsw_loss.__kwdefaults__, **options}
    ids, mask = check_inputs(student_hidden, teacher_hidden, response_ids, mask, **options)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")

    rows = mask[None].flatten(0, -2)  # (R, T): the responses
    student = student_hidden[mask]  # (N, H), the tokens of all
    teacher = teacher_hidden[mask]
    ids = ids[mask]
    weights = [p for p in student_head.parameters() if p.requires_grad]
    total = student.new_zeros((), dtype=torch.float32)
    hidden_grads = []
    weight_grads = []
    stats = {}
    for chunk, at in cut_chunks(rows.sum(-1).tolist(), chunk_size):
        hidden = student[at].detach().requires_grad_(student.requires_grad or bool(weights))
        with torch.no_grad():
            teacher_logp = log_probs(teacher_head(teacher[at]), options["temperature"])
        student_logp = log_probs(student_head(hidden), options["temperature"])
        loss, chunk_stats = sum_responses(student_logp, teacher_logp, ids[at], rows[chunk], options)
        del student_logp, teacher_logp  # the backward pass needs neither
        total += loss.detach()
        for name, x in chunk_stats.items():
            stats.setdefault(name, x.new_zeros(mask.shape)).view(rows.shape)[chunk] = x
        if loss.requires_grad:
            hidden_grad, *new_grads = torch.autograd.grad(
                loss, (hidden, *weights), materialize_grads=True)
            hidden_grads.append(hidden_grad)
            for into, grad in zip(weight_grads, new_grads):
                into += grad
            # .data is no view: into it the gradient of a tied embedding is summed in place
            weight_grads = weight_grads or [grad.data for grad in new_grads]

    if hidden_grads:
        grads = torch.cat(hidden_grads), *weight_grads
        total = KnownGradient.apply(total, grads, student, *weights)
    return total / find_denominator(mask, options), stats


def cut_chunks(lengths, chunk_size):
    """Lengths of responses in tokens -> [(slice of responses, slice of their tokens)]."""
    chunks = []
    first = start = end = 0
    for i, length in enumerate(lengths):
        if i > first and end + length - start > chunk_size:
            chunks.append((slice(first, i), slice(start, end)))
            first, start = i, end
        end += length
    chunks.append((slice(first, len(lengths)), slice(start, end)))
    return chunks


class KnownGradient(torch.autograd.Function):
    """A value whose gradients with respect to the inputs are there already. So a chunk's are taken
    while its logits are there: nothing else is kept, and no logits are computed twice."""

    @staticmethod
    def forward(ctx, value, grads, *inputs):
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grads = [grad.mul_(grad_output) for grad in ctx.saved_tensors]  # in place: no copy
        return None, None, *grads
