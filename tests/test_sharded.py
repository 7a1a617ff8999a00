"""DTensor parameters: every way of sharding has the bits of the whole model, at the price of ordinary tensors."""

from __future__ import annotations

import pytest
import ranks
from sharded import BUILD, KINDS, Whole, make, shard, train

OPTIONS = {
    "adamw": {"amsgrad": True, "weight_decay": 0.1},
    "sgdw": {"momentum": 0.9, "weight_decay": 0.1},
    "adagradw": {"weight_decay": 0.1},
}


def trains(kind: str, rule: str) -> None:
    model = make()
    options = {"lr": 0.01, **OPTIONS[rule]}
    shard(model, kind)
    opt, whole = BUILD[rule](model.parameters(), **options), Whole(model, lambda p: BUILD[rule](p, **options))
    train(model, opt, range(4), whole)
    whole.compare(model, opt)


@pytest.mark.parametrize(
    ("world", "kind"), [(world, kind) for world in (1, 2, 4) for kind, least in KINDS.items() if least <= world]
)
def test_bits(world: int, kind: str) -> None:
    for rule in OPTIONS:
        ranks.run(world, trains, kind, rule)
