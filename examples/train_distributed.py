"""Fine-tune a small decoder with LoRA in several processes, on a CPU (gloo) or one GPU each (nccl):

    torchrun --nproc-per-node 2 examples/train_distributed.py --strategy fsdp --steps 20

fsdp: torch's fully_shard: every process holds a part of the frozen weights and of the adapter. ddp: every process holds
all of it. The text is CPython's own documentation, the model a byte-level Llama with random weights.
"""

import argparse
import copy
import pydoc_data.topics
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import lorasp

CONTEXT, BATCH = 64, 4  # bytes per sequence, sequences per process and step


def make_model() -> nn.Module:
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def wrap(model: nn.Module, strategy: str) -> nn.Module:
    if strategy == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=("fsdp", "ddp"), default="fsdp")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", help="folder for the adapter, one that all processes see (default: a temporary one)")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    text = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    # One seed in all processes gives them one model and one adapter; the check says so where it did not.
    torch.manual_seed(0)
    base = make_model().to(device)
    model = copy.deepcopy(base)
    report = lorasp.inject(model, lorasp.LoRAConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"))
    lorasp.check_processes(model)
    model = wrap(model, arguments.strategy)
    if rank == 0:
        print(report, f"{dist.get_world_size()} processes, {arguments.strategy}", sep="\n")

    # From here on they differ: other batches, other dropout.
    torch.manual_seed(1 + rank)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    for step in range(arguments.steps):
        starts = torch.randint(len(data) - CONTEXT, (BATCH,)).tolist()
        rows = torch.stack([data[start : start + CONTEXT + 1] for start in starts]).to(device)
        loss = loss_of(model, rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}: loss {mean.item():.4f}")

    folder = [arguments.out or (tempfile.mkdtemp() if rank == 0 else None)]
    dist.broadcast_object_list(folder)
    if arguments.strategy == "fsdp" or rank == 0:
        lorasp.save_adapter(model, folder[0])  # of shards: all processes together, rank 0 writes
    with torch.no_grad():
        trained = model.eval()(input_ids=data[None, :CONTEXT].to(device)).logits
    if rank == 0:
        lorasp.load_adapter(base, folder[0])
        with torch.no_grad():
            loaded = base.eval()(input_ids=data[None, :CONTEXT].to(device)).logits
        torch.testing.assert_close(loaded, trained)
        print(f"the adapter in {folder[0]} gives one process the same logits")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
