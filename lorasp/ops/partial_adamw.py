"""partial_adamw: one AdamW step over the active entries of a list of parameters, in place, in one pass over them.

    m = b1 m + (1 - b1) g         v = b2 v + (1 - b2) g^2
    p = (1 - lr wd) p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)          t: the entry's own active steps

params, grads, exp_avgs, exp_avg_sqs: any shapes, one dtype each (float64 in the reference only); computed in fp32,
rounded once. actives[i]: bool (P, Q), (P, 1), (1, Q) or (1, 1) beside a parameter (P, Q); None: every entry of a
parameter of any shape. steps[i]: int32 of active's shape, one element for None; counted up where active. Where active
is False nothing changes, to the bit, whatever the gradient holds.
"""

from lorasp.ops import registry
from lorasp.reference import partial_adamw as reference

SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor?[] actives, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()"
)


def _fake(params, grads, exp_avgs, exp_avg_sqs, steps, actives, lr, beta1, beta2, eps, weight_decay):
    return None


def _reference(params, grads, exp_avgs, exp_avg_sqs, steps, actives, lr, beta1, beta2, eps, weight_decay):
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, steps, actives, strict=True):
        reference.step_(*tensors, lr, beta1, beta2, eps, weight_decay)


def _triton(params, grads, exp_avgs, exp_avg_sqs, steps, actives, lr, beta1, beta2, eps, weight_decay):
    kernels = registry.triton_kernels("partial_adamw")
    kernels.step_(params, grads, exp_avgs, exp_avg_sqs, steps, actives, lr, beta1, beta2, eps, weight_decay)


step_ops = registry.declare("partial_adamw", SCHEMA, _fake, {"reference": _reference, "triton": _triton})
