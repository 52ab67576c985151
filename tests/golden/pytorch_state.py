"""Writes NAME.safetensors, a state that an optimizer of torch.optim itself remembers, and NAME.json, the parameters at
that point and what PyTorch makes of the next steps; for pytorch_state (SGD) and pytorch_state_adamw (AdamW, AMSGrad).

    pip install torch numpy safetensors
    python tests/golden/pytorch_state.py

Three parameters; the last one has no gradient until the state is saved, so nothing of it is in it.
"""

import json
import pathlib

import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
SHAPES = {"weight": (3, 4), "bias": (5,), "late": (2, 2)}


def write(name, kind, config):
    torch.manual_seed(3)
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    optimizer = kind(params.values(), foreach=False, **config)

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
    tensors = {
        f"state.{index}.{key}": value.contiguous()
        for index, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }
    save_file(tensors, HERE / f"{name}.safetensors")

    golden = {
        "source": f"torch {torch.__version__} torch.optim.{kind.__name__}(foreach=False)",
        "config": config,
        "names": list(params),
        "start": values(),
        "steps": [],
    }
    for _ in range(4):
        grads = step()
        golden["steps"].append({"grads": grads, "params": values()})
    (HERE / f"{name}.json").write_text(json.dumps(golden))


write(
    "pytorch_state",
    torch.optim.SGD,
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01},
)
write(
    "pytorch_state_adamw",
    torch.optim.AdamW,
    {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.02, "amsgrad": True},
)
