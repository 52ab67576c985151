"""Writes control_pytorch.json: steps whose gradients torch.amp.GradScaler unscales and torch.nn.utils clips.

    pip install torch numpy
    python tests/golden/control.py

Parameters are double throughout, which GradScaler takes, too; its scale and the scale's inverse are always single. Of each
step there are the gradients as backward would leave them, multiplied by the scale (null where a tensor had none), and what
follows: the norms as clip_grad_norm_ returns them, whether optimizer.step() was called, parameters, state and scale. What
is not finite is a string.
"""

import json
import math
import pathlib

import torch

INF, NAN = math.inf, math.nan
SIZES = {"embed": 17, "layer.weight": 12, "layer.bias": 3, "head": 5}
SGD = ("SGD", {"momentum": 0.9})
ADAMW = ("AdamW", {"weight_decay": 0.02})
LRS = [0.1, 0.1, 0.05, 0.2, 0.02, 0.1, 0.1, 0.0, 0.05, 0.1, 0.3, 0.1]


def plain(values):
    """Values that strict JSON holds."""
    if isinstance(values, float):
        return values if math.isfinite(values) else str(values)
    return [plain(value) for value in values]


def run(
    name,
    rule,
    magnitudes,
    scaler=None,
    grad_scale=None,
    max_norm=None,
    clip_value=None,
    groups=None,
    found=None,
    frozen=None,
    sizes=SIZES,
):
    """One step for each of `magnitudes`, by which its gradients are multiplied.

    `groups` are names of tensors by parameter group, each with what clips it by itself; the default group is all others.
    `found` has what is put into a tensor's gradient by step, `frozen` the tensors without one.
    """
    groups, found, frozen = groups or {}, found or {}, frozen or {}
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    kind, config = rule
    random = lambda size: torch.randn(size, generator=generator, dtype=torch.float32)
    params = {tensor: torch.nn.Parameter(random(size).double()) for tensor, size in sizes.items()}
    start = {tensor: param.tolist() for tensor, param in params.items()}
    of_groups = {tensor for group in groups.values() for tensor in group["tensors"]}
    members = {"default": [tensor for tensor in sizes if tensor not in of_groups]}
    members |= {group: of["tensors"] for group, of in groups.items()}
    optimizer = getattr(torch.optim, kind)(
        [{"params": [params[tensor] for tensor in tensors]} for tensors in members.values()],
        lr=LRS[0],
        foreach=False,
        **config,
    )
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(step))
    grad_scaler = torch.amp.GradScaler("cpu", **scaler) if scaler else None
    if grad_scaler:
        # It makes its scale when it is first asked for it.
        grad_scaler.scale(torch.ones(()))

    # What has a norm of its own, and what has that of all others.
    own = [group for group, of in groups.items() if "max_norm" in of]
    rest = [tensor for group, tensors in members.items() if group not in own for tensor in tensors]
    norms_of = [(rest, max_norm)] + [(members[group], groups[group]["max_norm"]) for group in own]

    steps = []
    for step, (lr, magnitude) in enumerate(zip(LRS, magnitudes)):
        scale = grad_scaler.get_scale() if grad_scaler else (grad_scale or 1.0)
        grads = {}
        for tensor, param in params.items():
            grad = random(sizes[tensor]) * magnitude * scale
            for index, value in found.get(step, {}).get(tensor, {}).items():
                grad[index] = value
            is_frozen = tensor in frozen.get(step, [])
            param.grad = None if is_frozen else grad.double()
            grads[tensor] = None if is_frozen else plain(grad.tolist())
        for group in optimizer.param_groups:
            group["lr"] = lr
        if grad_scaler:
            grad_scaler.unscale_(optimizer)
        elif grad_scale:
            for param in params.values():
                if param.grad is not None:
                    param.grad.mul_(1.0 / grad_scale)
        norms = []
        for tensors, most in norms_of:
            clipped = [params[tensor] for tensor in tensors]
            if most is None:
                norm = torch.nn.utils.get_total_norm([p.grad for p in clipped if p.grad is not None])
            else:
                norm = torch.nn.utils.clip_grad_norm_(clipped, most)
            norms.append(float(norm))
        for group, tensors in members.items():
            most = groups.get(group, {}).get("clip_value", clip_value)
            clipped = [params[tensor] for tensor in tensors if params[tensor].grad is not None]
            # It fails where there are none.
            if most is not None and clipped:
                torch.nn.utils.clip_grad_value_(clipped, most)
        if grad_scaler:
            grad_scaler.step(optimizer)
            grad_scaler.update()
        else:
            optimizer.step()
        state = {tensor: optimizer.state[param] for tensor, param in params.items()}
        after = grad_scaler.state_dict() if grad_scaler else {}
        steps.append(
            {
                "lr": lr,
                "grads": grads,
                "norms": plain(norms),
                "skipped": step not in calls,
                "params": {tensor: plain(param.tolist()) for tensor, param in params.items()},
                "state": {
                    tensor: {slot: plain(value.tolist()) for slot, value in slots.items() if value is not None}
                    for tensor, slots in state.items()
                },
                "scale": after.get("scale", scale),
                "growth_tracker": after.get("_growth_tracker", 0),
            }
        )
    return {
        "name": name,
        "source": f"torch {torch.__version__} torch.optim.{kind}(foreach=False), float64",
        "rule": kind.lower(),
        "config": config,
        "scaler": scaler,
        "grad_scale": grad_scale,
        "max_norm": max_norm,
        "clip_value": clip_value,
        "groups": groups,
        "start": start,
        "steps": steps,
    }


def scaled(init_scale, growth_factor, growth_interval):
    return {
        "init_scale": init_scale,
        "growth_factor": growth_factor,
        "backoff_factor": 0.5,
        "growth_interval": growth_interval,
    }


# The first step of all is skipped, two in a row, and one just before the scale would grow.
INFINITIES = {
    0: {"head": {4: INF}},
    3: {"embed": {0: -INF, 16: NAN}},
    4: {"layer.bias": {1: NAN}},
    6: {"layer.weight": {5: INF, 6: INF}},
}
EVEN = [1.0] * 12
# Norms on both sides of 1, none of them next to it, and gradients of zero.
UNEVEN = [0.01, 3.0, 0.0, 1.0, 0.05, 40.0, 0.0, 0.1, 2.0, 0.02]
FROZEN = {0: ["embed"], 1: ["embed"], 4: ["head", "layer.bias"], 5: ["layer.weight"], 8: ["embed", "head"]}
OWN = {
    "biases": {"tensors": ["layer.bias"], "max_norm": 0.25},
    "heads": {"tensors": ["head"], "max_norm": 2.0, "clip_value": 0.75},
    "embeddings": {"tensors": ["embed"], "clip_value": 0.125},
}

cases = [
    run("scaler_sgd", SGD, EVEN, scaled(65536.0, 2.0, 2), found=INFINITIES),
    run("scaler_adamw", ADAMW, EVEN, scaled(1024.0, 2.0, 3), found=INFINITIES),
    run("scaler_of_no_power_of_two_sgd", SGD, EVEN, scaled(24.0, 1.5, 2), found=INFINITIES),
    run("scaler_of_no_power_of_two_adamw", ADAMW, EVEN, scaled(1000.0, 1.5, 3), found=INFINITIES),
    run("clip_norm_sgd", SGD, UNEVEN, max_norm=1.0),
    run("clip_norm_of_any_magnitude", SGD, [1e25, 1e-25, 1.0, 1e-6, 1e32, 1e-38, 1e12, 1e-12], max_norm=0.7),
    run("clip_value_adamw", ADAMW, UNEVEN, clip_value=0.375, sizes={"wide": 40, "narrow": 4}),
    run("unscaled_and_clipped_adamw", ADAMW, UNEVEN, scaled(4096.0, 2.0, 2), max_norm=1.0, found=INFINITIES),
    run("unscaled_by_hand", SGD, UNEVEN, grad_scale=128.0, max_norm=2.5, clip_value=0.5, frozen=FROZEN),
    run(
        "scaled_frozen_and_clipped_sgd",
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        UNEVEN,
        scaled(256.0, 1.5, 2),
        max_norm=0.5,
        found=INFINITIES,
        frozen=FROZEN,
    ),
    run("groups_sgd", SGD, UNEVEN, max_norm=1.0, groups=OWN, frozen=FROZEN),
    run("groups_scaled_adamw", ADAMW, UNEVEN, scaled(512.0, 2.0, 3), groups=OWN, found=INFINITIES, frozen=FROZEN),
    # Without a scaler nothing is skipped: an infinite norm leaves zeros and NaN, one that is NaN nothing else.
    run("infinity_applied", SGD, EVEN[:8], max_norm=1.0, found={6: {"head": {2: INF}}, 7: {"head": {0: NAN}}}),
    run("infinity_cut_off", SGD, EVEN[:8], clip_value=0.5, found={5: {"head": {2: -INF}}, 7: {"embed": {0: NAN}}}),
]
pathlib.Path(__file__).with_name("control_pytorch.json").write_text(json.dumps(cases, allow_nan=False))
