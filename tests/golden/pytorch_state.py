"""Writes pytorch_state.safetensors, a state that torch.optim.SGD itself remembers, and pytorch_state.json, the
parameters at that point and what PyTorch makes of the next steps.

    pip install torch numpy safetensors
    python tests/golden/pytorch_state.py

Three parameters; the last one has no gradient until the state is saved, so it has no momentum buffer in it.
"""

import json
import pathlib

import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
CONFIG = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}
SHAPES = {"weight": (3, 4), "bias": (5,), "late": (2, 2)}

torch.manual_seed(3)
params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
optimizer = torch.optim.SGD(params.values(), foreach=False, **CONFIG)


def step(frozen=()):
    grads = {}
    for name, param in params.items():
        param.grad = None if name in frozen else torch.randn(param.shape)
        grads[name] = None if param.grad is None else param.grad.flatten().tolist()
    optimizer.step()
    return grads


def values():
    return {name: param.detach().flatten().tolist() for name, param in params.items()}


for _ in range(3):
    step(frozen=["late"])

state = optimizer.state_dict()["state"]
buffers = {
    f"state.{index}.momentum_buffer": entry["momentum_buffer"].contiguous()
    for index, entry in state.items()
    if entry.get("momentum_buffer") is not None
}
save_file(buffers, HERE / "pytorch_state.safetensors")

golden = {
    "source": f"torch {torch.__version__} torch.optim.SGD(foreach=False)",
    "config": CONFIG,
    "names": list(params),
    "start": values(),
    "steps": [],
}
for _ in range(4):
    grads = step()
    golden["steps"].append({"grads": grads, "params": values()})
(HERE / "pytorch_state.json").write_text(json.dumps(golden))
