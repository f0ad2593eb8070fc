"""Promises of the README's blocks under 'Paste the loss': they run as they stand, and what they
train with is the loss of msd.py. The block for TRL takes TRL 1.16 and is skipped without it."""
import copy
import re
from pathlib import Path

import pytest
import torch
from conftest import build_model

import msd
from data.queries import load_queries
from sample import load_model, pad_right

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
ROOT = Path(__file__).parents[1]


def read_block(word):
    """The README's python block under 'Paste the loss' in which a word occurs."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.split(r"^#+ Paste the loss$", page, flags=re.M)[-1]
    for block in re.findall(r"^```python\n(.*?)^```", section, re.S | re.M):
        if word in block:
            return block
    pytest.fail(f"the README has no python block with {word} under a heading 'Paste the loss'")


def take(ids, mask):
    """The rows of padded ids as lists."""
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the trainer of the README's block after two steps, its first batch as rows and tensors)."""
    pytest.importorskip("trl", "1.16", reason="TRL is not installed: pip install 'trl==1.16.*'")
    block = read_block("SDFTTrainer")
    from trl.experimental import sdft

    make_config = sdft.SDFTConfig
    prepare = sdft.SDFTTrainer._prepare_training_batch
    out = tmp_path_factory.mktemp("trl")
    batches = []

    def shorten(**flags):
        return make_config(**{**flags, "output_dir": str(out), "max_steps": 2, "logging_steps": 1,
                              "use_cpu": True})

    def record(trainer, rows):
        batch = prepare(trainer, rows)
        batches.append((rows, batch))
        return batch

    names = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sdft, "SDFTConfig", shorten)
        patch.setattr(sdft.SDFTTrainer, "_prepare_training_batch", record)
        exec(compile(block, "README.md", "exec"), names)
    return names["trainer"], *batches[0]


@pytest.fixture(scope="module")
def ours():
    """(args, student, teacher, tokenizer) of msd.py under its defaults."""
    model = str(ROOT / "data" / "tiny")
    args = msd.build_parser().parse_args(["--lang", "jv", "--model", model])
    return args, *msd.load_models(args, torch.device("cpu"), torch.float32)


def test_the_trl_block_has_the_prompts_the_loss_and_the_gradient_of_msd(trained, ours):
    trainer, rows, batch = trained
    args, student, teacher, tokenizer = ours
    queries = {}
    for query in load_queries(ROOT / "data" / "queries.csv", ["en", "jv"]):
        queries[query.text["jv"], query.text["en"]] = query
    pairs = [(queries[row["prompt"][0]["content"], row["privileged_context"]], "jv")
             for row in rows]
    args.template = msd.read_template(args.teacher_prompt)
    student_prompts = msd.write_prompts(args, tokenizer, pairs)
    teacher_prompts = msd.write_teacher_prompts(args, teacher, tokenizer, pairs)
    responses = take(batch["completion_ids"], batch["completion_mask"])
    seen = take(batch["teacher_input_ids"], batch["teacher_attention_mask"])
    assert take(batch["prompt_ids"], batch["prompt_mask"]) == student_prompts
    assert seen == [prompt + response for prompt, response in zip(teacher_prompts, responses)]

    loss, _ = msd.learn(args, student, teacher, student_prompts, teacher_prompts, responses)
    norm = torch.nn.utils.get_total_norm(p.grad for p in msd.list_masters(student)).item()
    first = trainer.state.log_history[0]
    assert loss > 0.1 and first["loss"] == pytest.approx(loss, abs=1e-4)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-3)
    # the embedded model's template has no such switch: that it is set must be looked up
    assert trainer.chat_template_kwargs == {"enable_thinking": False}


def test_the_trl_block_leaves_a_trained_model_that_loads(trained, ours):
    args, _, teacher, _ = ours
    model, tokenizer = load_model(trained[0].args.output_dir, torch.device("cpu"), torch.float32)
    pairs = zip(model.parameters(), teacher.parameters(), strict=True)
    assert not all(torch.equal(p, q) for p, q in pairs)
    assert tokenizer.chat_template


def test_the_block_of_a_plain_loop_takes_a_step_on_the_loss_of_msd(ours):
    args = ours[0]
    student_prompts = [[5, 6, 7], [8, 9, 10]]
    teacher_prompts = [[5, 6, 7, 11, 12], [8, 9, 10, 13, 14]]
    responses = [[15, 16, 17, 18], [19, 20]]
    student = build_model("Llama")
    teacher = copy.deepcopy(student)
    msd.add_masters(student)
    want, _ = msd.learn(args, student, teacher, student_prompts, teacher_prompts, responses)
    stepped = [p.detach() - p.master.grad for p in student.parameters()]
    student.zero_grad()

    response_ids, mask = pad_right(responses, "cpu")
    names = {
        "student": student, "teacher": teacher, "response_ids": response_ids, "mask": mask,
        "student_ids": torch.cat([torch.tensor(student_prompts), response_ids], 1),
        "teacher_ids": torch.cat([torch.tensor(teacher_prompts), response_ids], 1),
        "T": response_ids.shape[1],
        "optimizer": torch.optim.SGD(student.parameters(), lr=1)}
    exec(read_block("optimizer.step()"), names)
    assert names["loss"].item() == pytest.approx(want, abs=1e-5) and want > 0.01
    for p, q in zip(student.parameters(), stepped):
        torch.testing.assert_close(p.detach(), q)
    assert all(p.grad is None for p in teacher.parameters())
