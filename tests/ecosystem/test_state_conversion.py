"""States that the libraries themselves have made: read, gone on with, written, and gone on with by theirs.

Each is compared with its own optimizer, that has never stopped.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import BATCHES, new_model
from torch import Tensor, nn

import wd_kernels
from wd_kernels import convert_state
from wd_kernels.__main__ import main

BETAS, EPS, LR, DECAY = (0.8, 0.95), 1e-6, 0.02, 0.3
N = 5000  # of the first parameter: enough to be quantised


def params_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((N,), (7, 3))]


def copies(params: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def train(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], first: int, last: int) -> None:
    """Gradients that depend on the step and the parameter alone."""
    for t in range(first, last):
        for k, p in enumerate(params):
            g = torch.arange(p.numel(), dtype=torch.float32).mul(0.37 * (k + 1)).add(t).sin() * (1 + t % 3)
            p.grad = g.view(p.shape).to(p.dtype)
        optimizer.step()


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(
        float((p.detach().double() - q.detach().double()).abs().max()) for p, q in zip(ours, theirs, strict=True)
    )


Make = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def there_and_back(
    make: Make, source: Any, ours: Callable[..., torch.optim.Optimizer], tolerance: float, **options: Any
) -> None:
    """Theirs for 6 steps and for 14; ours goes on from the 6th, and theirs again from what is ours at the 10th."""
    whole = params_of()
    theirs = make(whole)
    train(theirs, whole, 0, 6)
    before, saved = copies(whole), copy.deepcopy(theirs.state_dict())
    found = convert_state(saved, source=source)
    assert convert_state(saved, source="auto")["param_groups"] == found["param_groups"]
    params = copies(whole)
    own = ours(params, lr=0.5, **options)
    own.load_state_dict(found)
    train(own, params, 6, 10)
    train(theirs, whole, 6, 10)
    assert distance(params, whole) <= tolerance
    assert distance(before, whole) > 100 * tolerance  # and none of this is a state that does nothing

    again = make(back := copies(params))
    again.load_state_dict(convert_state(copy.deepcopy(own.state_dict()), target=source, groups=again.param_groups))
    train(again, back, 10, 14)
    train(theirs, whole, 10, 14)
    train(own, params, 10, 14)
    assert distance(back, whole) <= 2 * tolerance
    assert distance(back, params) <= 2 * tolerance


# optimi ---------------------------------------------------------------------------------------------------------------


@pytest.mark.works("torch-optimi", "states: of Adam, AdamW and SGD, in every decay mode of theirs, to and from ours")
@pytest.mark.parametrize(
    ("words", "decay", "strength"),
    [({}, "l2", 0.3), ({"decouple_wd": True}, "lr_scaled", 0.3), ({"decouple_lr": True}, "independent", 3e-3)],
)
@pytest.mark.parametrize("name", ["Adam", "SGD", "SGD with dampening"])
def test_optimi(name: str, words: dict[str, Any], decay: Any, strength: float) -> None:
    import optimi

    def make(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        common = {"lr": LR, "weight_decay": strength, **words}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name == "Adam":
                return optimi.Adam(params, betas=BETAS, eps=EPS, **common)
            return optimi.SGD(params, momentum=0.8, dampening="dampening" in name, **common)

    if name == "Adam":
        there_and_back(make, "optimi", wd_kernels.AdamW, 2e-6, decay=decay, weight_decay=0.9)
    else:
        there_and_back(make, "optimi", wd_kernels.SGDW, 2e-6, decay=decay, weight_decay=0.9, momentum=0.1)


@pytest.mark.works("torch-optimi", "states: Kahan's compensations as float32 masters, and back")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_optimi_s_compensations(dtype: torch.dtype) -> None:
    """bfloat16 parameters of theirs and their float32 masters of ours stay together as bfloat16 alone would not."""
    import optimi

    lr = 1e-3
    whole = params_of(dtype)
    theirs = optimi.AdamW(whole, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)
    train(theirs, whole, 0, 6)
    saved = copy.deepcopy(theirs.state_dict())
    assert all(bool(own["kahan_comp"].any()) for own in saved["state"].values())
    with pytest.raises(ValueError, match="has a compensation: give the parameters"):
        convert_state(saved, source="optimi")
    params = copies(whole)
    found = convert_state(saved, source="optimi", params=params)
    for k, p in enumerate(params):
        exact = p.detach().double() + saved["state"][k]["kahan_comp"].double()
        master = found["state"][k]["master_param"]
        assert master.dtype == torch.float32
        assert bool(((master.double() - exact).abs() <= 2.0**-24 * exact.abs()).all())
        assert float((p.detach().double() - exact).abs().max()) > 0
    own = wd_kernels.AdamW(params, lr=0.5, master_weights="float32")
    own.load_state_dict(found)

    back = convert_state(own.state_dict(), target="optimi", params=params)
    for k in range(2):
        before, after = saved["state"][k]["kahan_comp"], back["state"][k]["kahan_comp"]
        assert after.dtype == dtype
        lost = (before.double() - after.double()).abs()
        # That of the master, float32's, and of the compensation, which is 2**-8 of it in bfloat16.
        bound = params[k].detach().double().abs() * 2.0**-24 + before.double().abs() * 2.0**-8 + 2.0**-25
        assert bool((lost <= bound).all())
        torch.testing.assert_close(back["state"][k]["exp_avg"].to(dtype), saved["state"][k]["exp_avg"])
    assert back["param_groups"][0]["kahan_sum"] is True
    again = optimi.AdamW(copies(params), lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)
    again.load_state_dict(back)

    # Three that go on: theirs, ours, and theirs from ours; and one that has lost its compensation.
    train(theirs, whole, 6, 12)
    train(own, params, 6, 12)
    train(again, again.param_groups[0]["params"], 6, 12)
    # A last place of 16-bit weights between 2 and 4 (theirs has moments in 16 bits, ours had them from there in 32).
    ulp = 2.0**-6 if dtype == torch.bfloat16 else 2.0**-9
    assert distance(params, whole) <= ulp
    assert distance(again.param_groups[0]["params"], whole) <= ulp
    drift = [(p.detach().double() - q.detach().double()).mean().abs() for p, q in zip(params, whole, strict=True)]
    moved = [(p.detach().double() - q.double()).mean().abs() for p, q in zip(params, params_of(dtype), strict=True)]
    assert max(map(float, drift)) < 0.2 * max(map(float, moved))


@pytest.mark.works("torch-optimi", "states: those of its other optimizers are refused by name")
def test_what_optimi_has_beside() -> None:
    import optimi

    for name, rule in (("StableAdamW", "StableAdamW"), ("Adan", "Adan"), ("Ranger", "Ranger"), ("Lion", "AdamW")):
        params = params_of()
        theirs = getattr(optimi, name)(params, lr=1e-3, triton=False)
        train(theirs, params, 0, 2)
        with pytest.raises(ValueError, match=rf"{rule}"):
            convert_state(theirs.state_dict(), source="optimi")


# DeepSpeed ------------------------------------------------------------------------------------------------------------


class Op:
    """What DeepSpeed's compiled operators do, in float64, so that its classes run without a compiler."""

    adamw = True

    def create_adam(self, *arguments: Any) -> None:
        Op.adamw = bool(arguments[6])

    def destroy_adam(self, *arguments: Any) -> None:
        pass

    def adam_update(
        self, _: int, t: int, lr: float, beta1: float, beta2: float, eps: float, decay: float, __: bool,
        p: Tensor, g: Tensor, m: Tensor, v: Tensor,
    ) -> None:  # fmt: skip
        theta, grad = p.double(), g.double()
        grad = grad if self.adamw else grad + decay * theta
        first = beta1 * m.double() + (1 - beta1) * grad
        second = beta2 * v.double() + (1 - beta2) * grad * grad
        m.copy_(first), v.copy_(second)
        update = first / (1 - beta1**t) / ((second / (1 - beta2**t)).sqrt() + eps)
        p.copy_(theta - lr * update - (lr * decay * theta if self.adamw else 0))

    def multi_tensor_adam(
        self, _: int, __: Tensor, lists: Any, lr: float, beta1: float, beta2: float, eps: float, t: int, mode: int,
        ___: int, decay: float,
    ) -> None:  # fmt: skip
        self.adamw = bool(mode)
        for g, p, m, v in zip(*lists, strict=True):
            self.adam_update(0, t, lr, beta1, beta2, eps, decay, True, p, g, m, v)


@pytest.mark.works(
    "deepspeed", "states: of DeepSpeedCPUAdam and FusedAdam, to and from ours (its own classes, in float64)"
)
@pytest.mark.parametrize("adamw", [True, False])
@pytest.mark.parametrize("name", ["DeepSpeedCPUAdam", "FusedAdam"])
def test_deepspeed(name: str, adamw: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops import adam

    module = {"DeepSpeedCPUAdam": "cpu_adam", "FusedAdam": "fused_adam"}[name]
    builder = {"DeepSpeedCPUAdam": "CPUAdamBuilder", "FusedAdam": "FusedAdamBuilder"}[name]
    monkeypatch.setattr(getattr(getattr(adam, module), builder), "load", lambda self, *_: Op())

    def make(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        word = "adamw_mode" if name == "DeepSpeedCPUAdam" else "adam_w_mode"
        return getattr(adam, name)(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **{word: adamw})

    there_and_back(make, "deepspeed", wd_kernels.AdamW, 2e-6, decay="lr_scaled" if adamw else "l2", weight_decay=DECAY)


# bitsandbytes and torchao ---------------------------------------------------------------------------------------------


@pytest.mark.works("bitsandbytes", "states: of AdamW and SGD in 32 bits, to and from ours")
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_bitsandbytes(name: str) -> None:
    import bitsandbytes

    def make(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        if name == "AdamW":
            return bitsandbytes.optim.AdamW32bit(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
        return bitsandbytes.optim.SGD32bit(params, lr=LR, momentum=0.8, weight_decay=DECAY)

    if name == "AdamW":
        there_and_back(make, "bitsandbytes", wd_kernels.AdamW, 1e-5, weight_decay=0.9)
    else:
        there_and_back(make, "bitsandbytes", wd_kernels.SGDW, 1e-5, decay="l2", weight_decay=0.9, momentum=0.1)


@pytest.mark.works("bitsandbytes", "states: 8 bits of AdamW to ours")
def test_bitsandbytes_in_8_bits(tmp_path: Path) -> None:
    import bitsandbytes

    whole = params_of()
    theirs = bitsandbytes.optim.AdamW8bit(whole, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    train(theirs, whole, 0, 6)
    torch.save(theirs.state_dict(), tmp_path / "optimizer.pt")
    found = convert_state(torch.load(tmp_path / "optimizer.pt", weights_only=True), source="auto")
    assert theirs.state[whole[0]]["state1"].dtype == torch.uint8
    params = copies(whole)
    own = wd_kernels.AdamW(params, lr=0.5)
    own.load_state_dict(found)
    assert own.param_groups[0]["weight_decay"] == DECAY
    train(theirs, whole, 6, 7)
    train(own, params, 6, 7)
    assert distance(params, whole) <= 1e-5  # the step is taken before it is rounded to 8 bits again


@pytest.mark.works("torchao", "states: of AdamW8bit and AdamW4bit, to and from ours")
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_torchao(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchao

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # 20 s, for nothing that this is about
    whole = [nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(4)))]
    make = getattr(torchao.optim, name)
    theirs = make(whole, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    train(theirs, whole, 0, 6)
    params = copies(whole)
    own = wd_kernels.AdamW(params, lr=0.5)
    own.load_state_dict(convert_state(theirs.state_dict(), source="auto"))
    train(theirs, whole, 6, 7)
    train(own, params, 6, 7)
    assert distance(params, whole) <= 1e-5
    again = make(back := copies(params), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    again.load_state_dict(convert_state(copy.deepcopy(own.state_dict()), target="torchao"))
    train(again, back, 7, 8)
    train(own, params, 7, 8)
    assert distance(back, params) <= 1e-5


# Transformers and accelerate ------------------------------------------------------------------------------------------


@pytest.mark.works(
    "transformers", "states: optimizer.pt of its names of AdamW is known by its keys; Adafactor is refused"
)
def test_what_transformers_saves(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments
    from transformers.optimization import Adafactor

    model = nn.Linear(80, 80)
    expected = {"adamw_torch": "torch", "adamw_torch_fused": "torch", "adamw_8bit": "bitsandbytes"}
    for word, library in expected.items():
        arguments = TrainingArguments(str(tmp_path), optim=word, use_cpu=True, report_to=[])
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        params = copies(model.parameters())
        theirs = kind(params, **options)
        train(theirs, params, 0, 3)
        torch.save(theirs.state_dict(), tmp_path / "optimizer.pt")
        saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
        own = wd_kernels.AdamW(copies(params))
        own.load_state_dict(convert_state(saved, source="auto"))
        assert wd_kernels.state_conversion.identified(saved) == library
        assert float(own.state[own.param_groups[0]["params"][0]]["step"]) == 3
    params = copies(model.parameters())
    theirs = Adafactor(params, lr=1e-3, relative_step=False)
    train(theirs, params, 0, 2)
    with pytest.raises(ValueError, match="has 'exp_avg_sq_row': it is Adafactor's"):
        convert_state(theirs.state_dict(), source="auto")


def command(*words: object) -> int:
    return main(["convert", *map(str, words)])


@pytest.mark.works("accelerate", "states: the folder of save_state, by `python -m wd_kernels convert`")
def test_what_accelerate_saves(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model = nn.Linear(5, 3)
    accelerator = Accelerator(cpu=True)
    model, theirs = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY))
    train(theirs, list(model.parameters()), 0, 4)
    accelerator.save_state(str(tmp_path / "saved"))
    assert command(tmp_path / "saved", tmp_path / "ours.pt") == 0
    params = copies(list(model.parameters()))
    own = wd_kernels.AdamW(params, lr=0.5)
    own.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    train(theirs, list(model.parameters()), 4, 8)
    train(own, params, 4, 8)
    assert distance(params, list(model.parameters())) <= 2e-6


@pytest.mark.works("lightning", "states: the optimizer in a .ckpt, by `python -m wd_kernels convert`")
def test_what_lightning_saves(tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = new_model()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return nn.functional.mse_loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=DECAY)

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, **quiet
    )
    trainer.fit(module, torch.utils.data.DataLoader([(x, y) for x, y in BATCHES], batch_size=None))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert command(tmp_path / "saved.ckpt", tmp_path / "ours.ckpt", "--from", "torch") == 0
    found = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    assert found["global_step"] == len(BATCHES)
    params, whole = copies(list(module.parameters())), list(module.parameters())
    theirs = trainer.optimizers[0]
    own = wd_kernels.AdamW(params, lr=0.5)
    own.load_state_dict(found["optimizer_states"][0])
    with torch.enable_grad():
        train(theirs, whole, 0, 4)
        train(own, params, 0, 4)
    assert distance(params, whole) <= 2e-6
