"""torch.compile over whole injected models and over their layers: one graph, the same step, no compile per size."""

import pytest
import torch
from hf_models import assert_meets_rule, batch, build, llama, loss_and_gradients, precisions
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lorasp
from lorasp import LoRAConfig, LoRALinear, PartialConfig

VARIANTS = {
    "LoRA": {},
    "LoRA-FA with dropout": {"freeze_A": True, "lora_dropout": 0.1},
    "LoRA-SP with dropout": {"partial": PartialConfig(), "lora_dropout": 0.1},
}
K, N, R = 24, 20, 4
LINEARS = 7  # of one layer of a Llama


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def injected(**config) -> nn.Module:
    # A traced group's layers draw a seed each, so eager layers that are to drop the same run apart too.
    config = {"share_input": not config.get("lora_dropout")} | config
    model = build(llama, num_hidden_layers=1)
    torch.manual_seed(1)
    lorasp.inject(model, LoRAConfig(r=R, target_modules="all-linear", init_lora_weights=False, **config))
    return model.train()


def check(model: nn.Module, backend: str, **options) -> tuple[CompileCounterWithBackend, nn.Module]:
    """Compile the model in one graph, which holds every adapted layer, and compare a step with the eager one's."""
    expected = precisions(model, llama)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, **options)
    found = loss_and_gradients(compiled, batch(llama))
    assert_meets_rule({name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}, expected)
    nodes = counter.graphs[-1].graph.nodes
    assert sum("autograd_function_apply" in str(node.target) for node in nodes) == LINEARS
    return counter, compiled


@pytest.mark.parametrize("variant", list(VARIANTS)[1:])
def test_a_llama_is_one_graph_and_the_same_step(variant):
    check(injected(**VARIANTS[variant]), "aot_eager")


def test_a_llama_takes_other_batches_without_compiling_again():
    counter, compiled = check(injected(), "eager", dynamic=True)
    count = counter.frame_count
    for rows, length in ((5, 12), (4, 7)):
        compiled(**batch(llama, rows, length)).loss.backward()
    assert counter.frame_count == count


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_layers_take_any_number_of_rows_without_compiling_again(variant):
    layer = LoRALinear(K, N, r=R, init_lora_weights=False, **variant)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for M in (8, 2, 33):
        x, found = torch.randn(M, K, requires_grad=True), []
        for run in (compiled, layer):
            torch.manual_seed(M)
            found.append(torch.autograd.grad(run(x).square().sum(), [x, *trained]))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3
