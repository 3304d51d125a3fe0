"""Only the kernels, in a plain PyTorch loop around a model of your own: no BTokModel, no trainer.

    python examples/kernels_in_your_trainer.py [STEPS]

A toy: a document is its query's words in another alphabet. Queries `[x ; B ; T]`, whose target T is
the document, and documents `[x ; B]` are packed into one row. `condensed_attention` hides x from T;
`contrastive_loss` brings the two embeddings, means over the bottleneck rows B, together. First all
gradients are compared with those of dense attention and dense logits.
"""

import random
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btok.kernels import CondensedLayout, condensed_attention, contrastive_loss

K, WIDTH, HEADS, LETTERS, LONGEST = 2, 64, 4, 20, 12
BTOKS = [2 * LETTERS + i for i in range(K)]  # ids of the bottleneck tokens
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Model(nn.Module):
    """Packed ids [T] become hidden states [T, WIDTH]; one layer, to be short."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(2 * LETTERS + K, WIDTH), nn.Embedding(40, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 2 * LETTERS)

    def forward(self, ids: Tensor, places: Tensor, layout: CondensedLayout, impl: str) -> Tensor:
        x = self.words(ids) + self.places(places)
        q, k, v = self.qkv(self.norm(x)).unflatten(1, (3, HEADS, -1)).unbind(1)  # [T, H, D]
        x = x + self.out(condensed_attention(q, k, v, layout, impl=impl).flatten(1))
        return x + self.down(F.gelu(self.up(self.norm(x))))


def losses(model: Model, pairs: int, rng: random.Random, impl: str = "auto") -> list[Tensor]:
    """Contrastive and generative loss of a drawn batch."""
    queries = [rng.choices(range(LETTERS), k=rng.randint(4, LONGEST)) for _ in range(pairs)]
    documents = [[word + LETTERS for word in query] for query in queries]
    sources, targets = queries + documents, [*documents, *[[]] * pairs]
    ids, places = list[int](), list[int]()
    btok_rows, predicting = list[int](), list[int]()
    for source, target in zip(sources, targets, strict=True):
        border = len(ids) + len(source) + K
        btok_rows += range(border - K, border)
        predicting += range(border - 1, border - 1 + len(target))  # each the next word
        ids += [*source, *BTOKS, *target]
        places += range(len(source) + K + len(target))
    layout = CondensedLayout.from_lengths(list(map(len, sources)), list(map(len, targets)), K)
    packed = (torch.tensor(x, device=DEVICE) for x in (ids, places))
    hidden = model(*packed, layout.to(DEVICE), impl)
    z = F.normalize(hidden[btok_rows].unflatten(0, (-1, K)).mean(1), dim=1)  # [2 pairs, WIDTH]
    labels = torch.tensor([word for target in targets for word in target], device=DEVICE)
    generative = F.cross_entropy(model.head(hidden[predicting]), labels)
    return [contrastive_loss(z[:pairs], z[pairs:], temperature=0.05, impl=impl), generative]


def main(steps: int = 300) -> None:
    """Compare gradients, train, and print what falls."""
    torch.manual_seed(0)
    model = Model().to(DEVICE)
    own, dense = (
        torch.autograd.grad(losses(model, 16, random.Random(0), impl), [*model.parameters()])
        for impl in ("auto", "reference")
    )
    flat_own, flat_dense = (torch.cat([g.flatten() for g in grads]) for grads in (own, dense))
    apart = float((flat_own - flat_dense).norm() / flat_dense.norm())
    print(f"gradients are within {apart:.1e} of dense attention's and dense logits'")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = random.Random(1)
    for step in range(steps + 1):
        contrastive, generative = losses(model, 32, rng)
        if step % 50 == 0:
            print(f"step {step}: contrastive {contrastive:.3f}, generative {generative:.3f}")
        (contrastive + 0.5 * generative).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
