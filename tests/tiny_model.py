"""The decoder-like model of the inject and checkpoint tests."""

import torch
from torch import nn

WIDTH = 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return self.o_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm, self.up = Attention(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.up(self.norm(self.attention(x)))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(16, WIDTH), nn.ModuleList(Block() for _ in range(3))

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    """A small decoder-like model; lm_head is tied to the embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.lm_head, self.score = Body(), nn.Linear(WIDTH, 16, bias=False), nn.Linear(WIDTH, 2)
        self.lm_head.weight = self.model.embed.weight

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, tokens):
        x = self.model(tokens)
        return self.lm_head(x), self.score(x)


TOKENS = torch.arange(10).reshape(2, 5)
