"""tests/gpu.py tries itself on a CPU: every section runs, what needs CUDA is told as skipped."""
import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_gpu_script_runs_on_a_cpu_and_calls_nothing_passed_that_needs_cuda(tmp_path):
    script = Path(__file__).parent / "gpu.py"
    done = subprocess.run(
        [sys.executable, script, "--device", "cpu", "--shapes", "tiny", "--minutes", "2"],
        capture_output=True, text=True, env={**os.environ, "OUT": str(tmp_path)}, timeout=180)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert done.returncode == 0, lines
    checks = {line["check"]: line for line in lines}
    assert checks["summary"]["judged"] == checks["summary"]["passed"] == 7
    for rank in (0, 8):
        graph = checks[f"graph: skipped without CUDA, LoRA {rank}"]
        assert graph["ok"] is None
        assert graph["same"] is True
        assert graph["lengths"][2] < graph["lengths"][3] == 6  # half of the rows left
        assert checks[f"resume, LoRA {rank}"]["bit_for_bit"] is True
    assert checks["sdpa: cuDNN skipped without CUDA"]["ok"] is None
