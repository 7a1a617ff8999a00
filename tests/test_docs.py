"""The documentation: its Python runs, its links lead somewhere, and what it says of itself is so.

Blocks of a page run one after another, in one namespace, which begins with what PREAMBLE makes. Pages of docs/recipes are
not here: they want the libraries that they are about, and tests/ecosystem/test_recipes.py runs them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in [ROOT / "README.md", *DOCS.rglob("*.md")] if DOCS / "recipes" not in path.parents)
RECIPES = sorted((DOCS / "recipes").glob("*.md"))
#: A block of Python, and what has to be there for it.
BLOCK = re.compile(r"(?:^<!-- needs: (?P<needs>\w+) -->\s*)?^```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)

#: What a reader has already: a model, batches, parameters, numbers.
PREAMBLE = """
import math, torch, wd_kernels
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 1))
batches = [torch.randn(4, 8) for _ in range(3)]
optimizer = wd_kernels.AdamW(model.parameters(), lr=1e-3)
params, lr, betas, eps, weight_decay, wd = list(model.parameters()), 1e-3, (0.9, 0.999), 1e-8, 0.01, 1e-4
momentum, dampening, nesterov, lr_decay, initial_accumulator_value = 0.9, 0, False, 0.1, 0.1
log = evaluate = lambda *what: None
"""
#: And more of it, where a page speaks of more.
PREAMBLES = {
    "features/accumulation.md": "batches = [torch.randn(2, 4, 8, dtype=torch.bfloat16) for _ in range(3)]\n"
    "model = nn.Linear(8, 1)\n_model = model.forward\nmodel.forward = lambda x: _model(x).mean()",
    "features/averages.md": "model(batches[0]).mean().backward()",
    "features/clipping.md": "model = nn.Sequential(model, nn.AdaptiveAvgPool1d(1))",
}
