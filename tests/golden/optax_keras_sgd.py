"""Regenerates optax_keras_sgd.json: runs optax and Keras over the inputs that the file holds.

    pip install jax optax keras
    KERAS_BACKEND=jax python tests/golden/optax_keras_sgd.py

Reads each case's config, start and gradients, and writes back what these versions make of them in single
precision.
"""

import json
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import optax

PATH = pathlib.Path(__file__).with_name("optax_keras_sgd.json")


def numbers(array):
    return [float(x) for x in array]


def run_optax(case):
    """`sgd` keeps a trace, `ema` a moving average; both are the one array of the shape of theta."""
    config = case["config"]
    if "alpha" in config:
        rule = optax.chain(optax.ema(config["alpha"], debias=False), optax.scale(-config["beta"]))
    else:
        rule = optax.sgd(config["lr"], momentum=config["momentum"], nesterov=config["nesterov"])
    theta = jnp.array(case["theta0"], dtype=jnp.float32)
    state = rule.init(theta)
    thetas, states = [], []
    for grad in case["grads"]:
        updates, state = rule.update(jnp.array(grad, dtype=jnp.float32), state, theta)
        theta = optax.apply_updates(theta, updates)
        kept = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == theta.shape]
        thetas.append(numbers(theta))
        states.append(numbers(kept[0]))
    return f"optax {optax.__version__} (jax {jax.__version__}, f32)", thetas, states


def run_keras(case):
    config = case["config"]
    optimizer = keras.optimizers.SGD(
        learning_rate=config["lr"],
        momentum=config["momentum"],
        nesterov=config["nesterov"],
        weight_decay=config["weight_decay"],
    )
    theta = keras.Variable(jnp.array(case["theta0"], dtype=jnp.float32))
    optimizer.build([theta])
    thetas, states = [], []
    for grad in case["grads"]:
        optimizer.apply([jnp.array(grad, dtype=jnp.float32)])
        thetas.append(numbers(theta.value))
        states.append(numbers(optimizer.momentums[0].value) if config["momentum"] else None)
    source = f"keras {keras.__version__} keras.optimizers.SGD (jax {jax.__version__}, f32)"
    return source, thetas, states


cases = json.loads(PATH.read_text())
for case in cases:
    run = run_keras if case["source"].startswith("keras") else run_optax
    case["source"], case["theta_f32"], case["state_f32"] = run(case)
PATH.write_text(json.dumps(cases))
