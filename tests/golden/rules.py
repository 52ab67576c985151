"""Regenerates rules_pytorch.json, rules_schedulefree.json, rules_optax.json and rules_keras.json: runs the libraries over
the inputs that the files hold.

    pip install torch schedulefree jax optax keras
    KERAS_BACKEND=jax JAX_ENABLE_X64=1 python tests/golden/rules.py pytorch schedulefree optax keras

Reads each case's source, config, learning rates, frozen steps, start and gradients, and writes back what these
versions make of them: PyTorch and schedulefree in both precisions, optax and Keras in double. Of schedule-free rules it
writes what they evaluate with, too.
"""

import json
import os
import pathlib
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_ENABLE_X64", "1")


def run_pytorch(case):
    import torch

    def run(dtype):
        theta = torch.nn.Parameter(torch.tensor(case["theta0"], dtype=dtype))
        rule = getattr(torch.optim, case["source"].split("torch.optim.")[1].split("(")[0])
        optimizer = rule([theta], lr=case["lr"][0], foreach=False, **case["config"])
        thetas, states = [], []
        for step, (lr, grad) in enumerate(zip(case["lr"], case["grads"])):
            optimizer.param_groups[0]["lr"] = lr
            frozen = step in case["frozen_steps"]
            theta.grad = None if frozen else torch.tensor(grad, dtype=dtype)
            optimizer.step()
            thetas.append(theta.detach().tolist())
            states.append({name: value.tolist() for name, value in optimizer.state[theta].items()})
        return thetas, states

    case["theta_f32"], case["state_f32"] = run(torch.float32)
    case["theta_f64"], case["state_f64"] = run(torch.float64)


def run_schedulefree(case):
    import schedulefree
    import torch

    def run(dtype):
        theta = torch.nn.Parameter(torch.tensor(case["theta0"], dtype=dtype))
        rule = getattr(schedulefree, case["source"].split(" ")[-1], None)
        rule = rule or schedulefree.adamw_schedulefree_paper.AdamWScheduleFreePaper
        optimizer = rule([theta], lr=case["lr"][0], foreach=False, **case["config"])
        optimizer.train()
        thetas, states, evals = [], [], []
        for grad in case["grads"]:
            theta.grad = torch.tensor(grad, dtype=dtype)
            optimizer.step()
            thetas.append(theta.detach().tolist())
            states.append({name: value.tolist() for name, value in optimizer.state[theta].items()})
            # There and back is not exact.
            trained = theta.detach().clone()
            optimizer.eval()
            evals.append(theta.detach().tolist())
            optimizer.train()
            theta.data.copy_(trained)
        return thetas, states, evals

    case["theta_f32"], case["state_f32"], _ = run(torch.float32)
    case["theta_f64"], _, case["eval_f64"] = run(torch.float64)


def run_optax(case):
    import jax.numpy as jnp
    import optax

    module = optax.contrib if ".contrib." in case["source"] else optax
    rule = getattr(module, case["source"].split(".")[-1])(case["lr"][0], **case["config"])
    theta = jnp.array(case["theta0"], dtype=jnp.float64)
    state = rule.init(theta)
    thetas, evals = [], []
    for grad in case["grads"]:
        updates, state = rule.update(jnp.array(grad, dtype=jnp.float64), state, theta)
        theta = optax.apply_updates(theta, updates)
        thetas.append(theta.tolist())
        if "schedule_free" in case["rule"]:
            evals.append(optax.contrib.schedule_free_eval_params(state, theta).tolist())
    case["theta_f64"] = thetas
    if evals:
        case["eval_f64"] = evals


def run_keras(case):
    import keras

    keras.config.set_floatx("float64")
    rule = getattr(keras.optimizers, case["source"].split(".")[-1])
    optimizer = rule(learning_rate=case["lr"][0], **case["config"])
    theta = keras.Variable(case["theta0"], dtype="float64")
    optimizer.build([theta])
    thetas = []
    for grad in case["grads"]:
        optimizer.apply([keras.ops.convert_to_tensor(grad, dtype="float64")])
        thetas.append(keras.ops.convert_to_numpy(theta.value).tolist())
    case["theta_f64"] = thetas


RUNS = {"pytorch": run_pytorch, "schedulefree": run_schedulefree, "optax": run_optax, "keras": run_keras}
for library in sys.argv[1:]:
    path = pathlib.Path(__file__).with_name(f"rules_{library}.json")
    cases = json.loads(path.read_text())
    for case in cases:
        RUNS[library](case)
    path.write_text(json.dumps(cases))
