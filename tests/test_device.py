"""What can be seen of a GPU without one: a device of paper. Its tensors hold ordinary ones, and
compute by them; one of another device among them is the error that it would be on a GPU, and what
is transferred from it is counted."""
import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import msd
from conftest import build_any
from sample import sample

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames things
PAPER = "lazy"  # a device type that PyTorch knows and builds nothing for
INDEXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}  # by what may lie elsewhere


class Paper(torch.Tensor):
    transfers = 0

    @staticmethod
    def __new__(cls, inner):
        paper = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype,
            device=PAPER)
        paper.inner = inner
        return paper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def tolist(self):
        Paper.transfers += 1
        return self.inner.tolist()


class Printer(TorchDispatchMode):
    """Within, paper can be made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def unwrap(x):
    return x.inner if isinstance(x, Paper) else x


def compute(func, args, kwargs):
    name = func.name().split(".")[0]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    is_paper = [isinstance(x, Paper) for x in tensors]
    into_paper = any(is_paper)
    if kwargs.get("device"):
        into_paper = torch.device(kwargs["device"]).type == PAPER
        kwargs = {**kwargs, "device": "cpu"}
    elif any(is_paper) and name not in ("aten::copy_", *INDEXED):
        assert all(paper or not x.dim() for paper, x in zip(is_paper, tensors)), f"mixed: {func}"
    Paper.transfers += name == "aten::_local_scalar_dense" and any(is_paper)

    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    written = {id(unwrap(x)): x for x in tensors}  # in place: what was given is given back

    def wrap(x):
        if not isinstance(x, torch.Tensor) or not into_paper:
            return x
        return written.get(id(x)) if id(x) in written else Paper(x)
    return tree_map(wrap, out)


@pytest.fixture
def printer(monkeypatch):
    """A GPU of paper, as a context."""
    class Generator(torch.Generator):
        def __new__(cls, device):
            return super().__new__(cls, "cpu")

    adamw = torch.optim.AdamW
    save = torch.save
    save_model = msd.save_model
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, PAPER, torch.cpu, raising=False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kw: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **kw: adamw(*args, **kw))
    monkeypatch.setattr(torch, "save", lambda x, path: save(tree_map(unwrap, x), path))
    monkeypatch.setattr(msd, "save_model",
                        lambda args, student, rest: save_model(args, student.to("cpu"), rest))
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device) as a copy that is seen
    torch.__future__.set_swap_module_params_on_conversion(True)  # what is tied stays so
    yield Printer()
    torch.__future__.set_swap_module_params_on_conversion(False)
    torch._C._set_only_lift_cpu_tensors(False)


def test_paper_tells_devices_apart(printer):
    with printer:
        paper = torch.arange(3, device=PAPER)
        assert (paper + 1)[[0, 2]].tolist() == [1, 3]
        with pytest.raises(AssertionError, match="mixed"):
            paper + torch.arange(3)


@pytest.mark.parametrize("options", [
    {"temperature": 0}, {"top_k": 5, "top_p": 0.9, "vocab_size": 90}], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma3Text wide", "LoRA"])
def test_of_a_token_the_ids_alone_are_transferred(printer, name, options):
    model = build_any(name)
    prompts = [[5, 6, 7], [8], [*range(9, 20)]]
    options = {**options, "max_new_tokens": 12, "stop_ids": []}
    want = sample(model, prompts, generator=torch.Generator("cpu").manual_seed(0), **options)
    with printer:
        model = model.to(PAPER)
        sample(model, prompts, **options)  # what is tried once a model
        Paper.transfers = 0
        rows = sample(model, prompts, generator=torch.Generator(PAPER).manual_seed(0), **options)
    assert rows == want and Paper.transfers == 12


@pytest.mark.parametrize("flags", [
    "", "--lora-rank 4 --dtype bfloat16 --policy off",
    "--teacher ema --dtype bfloat16 --cot-tokens 3 --divergence jsd --student-view sampled "
    "--weight-norm none"])
def test_a_run_keeps_to_its_device_and_ends_as_on_a_cpu(printer, folder, tmp_path, flags):
    rows = [f"{label},How {n}?,Piye {n}?" for label in ("harmful", "benign") for n in range(9)]
    (tmp_path / "q.csv").write_text("\n".join(["label,en,jv", *rows]))
    common = (f"--lang jv --model {folder} --data {tmp_path}/q.csv --batch-size 4 --preflight 1 "
              "--micro-batch-size 2 --max-new-tokens 4 --eval-max-new-tokens 2 --save-every 1 "
              f"--temperature 0 --holdout 0.5 {flags}")

    def run(device, *argv):
        out = str(tmp_path / device)
        msd.main(msd.build_parser().parse_args([
            *common.split(), "--device", device, "--out", out, *argv]))
        return torch.load(f"{out}/checkpoint.pt", weights_only=True)["weights"]

    want = run("cpu", "--steps", "2")
    with printer:
        run(PAPER, "--steps", "1")
        got = run(PAPER, "--steps", "2", "--resume")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=0)
