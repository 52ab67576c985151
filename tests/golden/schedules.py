"""Writes schedules.json: learning rate and momentum per step as PyTorch's schedulers set them.

    pip install torch numpy
    python tests/golden/schedules.py
"""

import json
import pathlib

import torch
from torch.optim import lr_scheduler


def run(make, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    rows = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        rows.append([group["lr"], group["momentum"]])
        optimizer.step()
        scheduler.step()
    return rows


golden = {
    "source": f"torch {torch.__version__} torch.optim.lr_scheduler",
    "step_lr_7_0.3": run(lambda o: lr_scheduler.StepLR(o, step_size=7, gamma=0.3), 30),
    "exponential_lr_0.9": run(lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9), 30),
    "cosine_40_0.001": run(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.001), 41),
    "one_cycle_50": run(lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=50), 50),
}
pathlib.Path(__file__).with_name("schedules.json").write_text(json.dumps(golden))
