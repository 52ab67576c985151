"""Regenerates pytorch_sgd.json: runs torch.optim.SGD over the inputs that the file holds.

    pip install torch
    python tests/golden/pytorch_sgd.py

Reads each case's config, learning rates, frozen steps, start and gradients, and writes back what this
version of PyTorch makes of them in single and in double precision.
"""

import json
import pathlib

import torch

PATH = pathlib.Path(__file__).with_name("pytorch_sgd.json")


def run(case, dtype):
    theta = torch.nn.Parameter(torch.tensor(case["theta0"], dtype=torch.float32).to(dtype))
    optimizer = torch.optim.SGD([theta], lr=case["lr"][0], foreach=False, **case["config"])
    thetas, buffers = [], []
    for step, (lr, grad) in enumerate(zip(case["lr"], case["grads"], strict=True)):
        optimizer.param_groups[0]["lr"] = lr
        frozen = step in case["frozen_steps"]
        theta.grad = None if frozen else torch.tensor(grad, dtype=torch.float32).to(dtype)
        optimizer.step()
        thetas.append(theta.detach().tolist())
        buffer = optimizer.state[theta].get("momentum_buffer")
        buffers.append(None if buffer is None else buffer.tolist())
    return thetas, buffers


cases = json.loads(PATH.read_text())
for case in cases:
    case["source"] = f"torch {torch.__version__} torch.optim.SGD(foreach=False)"
    case["theta_f32"], case["momentum_buffer_f32"] = run(case, torch.float32)
    case["theta_f64"], case["momentum_buffer_f64"] = run(case, torch.float64)
PATH.write_text(json.dumps(cases))
