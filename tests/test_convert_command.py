"""`python -m wd_kernels convert`: files in, files out, what is said, and what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import bf16
from safetensors.torch import save_file
from torch import nn

import wd_kernels
from wd_kernels.__main__ import main

PEERS: dict[str, Any] = torch.load(Path(__file__).parent / "checkpoints" / "peers.pt", weights_only=True)


def command(*words: object) -> int:
    return main(["convert", *map(str, words)])


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def trained(params: list[nn.Parameter] | list[tuple[str, nn.Parameter]], **options: Any) -> wd_kernels.AdamW:
    opt = wd_kernels.AdamW(params, lr=0.01, **options)
    for t in range(3):
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.linspace(-1, 2, p.numel()).roll(t).view(p.shape).to(p.dtype)
        opt.step()
    return opt


def test_bitsandbytes_beside_other_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = PEERS["bitsandbytes adamw"]
    weights = {"w": torch.arange(3.0)}
    torch.save({"model": weights, "optimizer": saved["state"], "epoch": 7}, tmp_path / "in.pt")
    before = (tmp_path / "in.pt").read_bytes()
    assert command(tmp_path / "in.pt", tmp_path / "out.pt", "--from", "bitsandbytes", "--to", "wd_kernels") == 0
    found = load(tmp_path / "out.pt")
    assert found["epoch"] == 7
    assert torch.equal(found["model"]["w"], weights["w"])
    for name, exact in zip(("exp_avg", "exp_avg_sq"), saved["exact"], strict=True):
        assert_same_bits(found["optimizer"]["state"][0][name], exact)
    params = [nn.Parameter(p.clone()) for p in saved["params"]]
    opt = wd_kernels.AdamW(params, lr=1.0, weight_decay=0.5)
    opt.load_state_dict(found["optimizer"])
    assert opt.param_groups[0]["weight_decay"] == saved["state"]["param_groups"][0]["weight_decay"] > 0

    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("out.pt: bitsandbytes -> wd_kernels")
    assert said[1] == "at optimizer"
    cells = [line.split() for line in said]
    n = saved["params"][0].numel()
    assert ["bitsandbytes", "state1", "1", "uint8", str(n)] in cells
    assert ["wd_kernels", "exp_avg", "2", "float32", str(4 * sum(p.numel() for p in params))] in cells
    assert ["0", "2", "0.01", f"{opt.param_groups[0]['weight_decay']:g}", "lr_scaled"] in cells
    assert (tmp_path / "in.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt", "out.pt"]  # and no temporary file


def test_there_and_back_is_what_it_was(tmp_path: Path) -> None:
    params = [nn.Parameter(torch.linspace(-1, 1, 300)), nn.Parameter(torch.ones(7))]
    own = trained(params, weight_decay=0.1).state_dict()
    torch.save(own, tmp_path / "0.pt")
    for k, (source, target) in enumerate([("wd_kernels", "deepspeed"), ("auto", "optimi"), ("optimi", "wd_kernels")]):
        assert command(tmp_path / f"{k}.pt", tmp_path / f"{k + 1}.pt", "--from", source, "--to", target) == 0
    found = load(tmp_path / "3.pt")
    for k in range(2):
        assert float(found["state"][k]["step"]) == 3
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(found["state"][k][name], own["state"][k][name], rtol=3e-7, atol=0)
    assert found["param_groups"][0]["betas"] == own["param_groups"][0]["betas"]


def test_a_folder_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p = nn.Parameter(torch.ones(3))
    theirs = torch.optim.AdamW([p], weight_decay=0.1)
    p.grad = torch.ones(3)
    theirs.step()
    torch.save(theirs.state_dict(), tmp_path / "optimizer.pt")
    assert command(tmp_path, tmp_path / "ours.pt") == 0
    assert "optimizer.pt -> " in capsys.readouterr().out
    opt = wd_kernels.AdamW([p])
    opt.load_state_dict(load(tmp_path / "ours.pt"))
    assert opt.param_groups[0]["weight_decay"] == 0.1


def test_lightnings_list_of_states_and_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two optimizers, of which one is to be named; the other stays."""
    own = trained([nn.Parameter(torch.ones(40))]).state_dict()
    lightning = {"epoch": 1, "state_dict": {}, "optimizer_states": [own, PEERS["bitsandbytes adamw"]["state"]]}
    torch.save(lightning, tmp_path / "in.ckpt")
    assert command(tmp_path / "in.ckpt", tmp_path / "out.ckpt") == 2
    message = capsys.readouterr().err
    assert "has 2 states of optimizers, at optimizer_states.0, optimizer_states.1: --key says which" in message
    assert command(tmp_path / "in.ckpt", tmp_path / "out.ckpt", "--key", "optimizer_states.7") == 2
    assert "--key=optimizer_states.7 is none of them" in capsys.readouterr().err
    assert command(tmp_path / "in.ckpt", tmp_path / "out.ckpt", "--key", "optimizer_states.1") == 0
    found = load(tmp_path / "out.ckpt")
    assert_same_bits(found["optimizer_states"][0]["state"][0]["exp_avg"], own["state"][0]["exp_avg"])
    assert "exp_avg" in found["optimizer_states"][1]["state"][0]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_compensations_take_a_model(
    suffix: str, named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """optimi's, of a bfloat16 model whose names sort otherwise than they stand."""
    model = nn.ModuleDict({"z": nn.Linear(40, 3), "a": nn.Linear(3, 2)}).to(bf16)
    params: Any = list(model.named_parameters()) if named else list(model.parameters())
    opt = trained(params, master_weights="float32")
    masters = list(opt.get_master_weights().values())
    weights = [p.detach().clone() for p in model.parameters()]
    torch.save(opt.state_dict(), tmp_path / "ours.pt")
    file = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save({"model": model.state_dict()}, file)
    else:
        save_file(model.state_dict(), file)
    assert command(tmp_path / "ours.pt", tmp_path / "theirs.pt", "--to", "optimi") == 2
    assert "params=[...]; --model FILE gives them" in capsys.readouterr().err
    words = (tmp_path / "ours.pt", tmp_path / "theirs.pt", "--to", "optimi", "--model", file)
    if not named and suffix == ".safetensors":
        assert command(*words) == 2
        assert "no 'param_names', and" in capsys.readouterr().err
        return
    assert command(*words) == 0
    found = load(tmp_path / "theirs.pt")
    for k, (master, p) in enumerate(zip(masters, weights, strict=True)):
        rest = found["state"][k]["kahan_comp"]
        assert rest.dtype == bf16
        assert bool(((p.double() + rest.double() - master.double()).abs() <= rest.double().abs() * 2**-8).all())
        assert bool(rest.any())


def test_a_decay_that_is_carried_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = trained([nn.Parameter(torch.ones(40))], decay="independent", weight_decay=1e-3).state_dict()
    torch.save(own, tmp_path / "in.pt")
    assert command(tmp_path / "in.pt", tmp_path / "out.pt", "--to", "torch") == 2
    assert "has decay='independent', weight_decay=0.001" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
    assert command(tmp_path / "in.pt", tmp_path / "out.pt", "--to", "torch", "--decay", "lr_scaled") == 0
    said = capsys.readouterr().out
    assert "group 0: weight decay 0.001 (independent) is 0.1 (lr_scaled) at lr=0.01, exact" in said
    group = load(tmp_path / "out.pt")["param_groups"][0]
    assert group["weight_decay"] == pytest.approx(1e-3 / 0.01)
    theirs = torch.optim.AdamW([nn.Parameter(torch.ones(40))])
    theirs.load_state_dict(load(tmp_path / "out.pt"))


def test_a_decay_of_ours_that_is_carried_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = trained([nn.Parameter(torch.ones(40))], decay="independent", weight_decay=1e-3).state_dict()
    torch.save(own, tmp_path / "in.pt")
    long = tmp_path / f"{'o' * 240}.pt"
    assert command(tmp_path / "in.pt", long) == 2
    assert "has the layout of wd_kernels already" in capsys.readouterr().err
    assert command(tmp_path / "in.pt", long, "--decay", "lr_scaled") == 0
    assert "weight decay 0.001 (independent) is 0.1 (lr_scaled) at lr=0.01" in capsys.readouterr().out
    opt = wd_kernels.AdamW([nn.Parameter(torch.ones(40))], lr=1.0)
    opt.load_state_dict(load(long))
    assert opt.param_groups[0]["weight_decay"] == pytest.approx(0.1)
    assert torch.equal(opt.state_dict()["state"][0]["exp_avg"], own["state"][0]["exp_avg"])
    with_norms = wd_kernels.NormalizedDecay(wd_kernels.schedules.Cosine(8))
    own = trained([nn.Parameter(torch.ones(40))], decay="lr_scaled", weight_decay=0.1, schedule=with_norms).state_dict()
    torch.save(own, tmp_path / "in.pt")
    assert command(tmp_path / "in.pt", long, "--decay", "l2", "--force") == 2
    assert "schedule=NormalizedDecay(" in capsys.readouterr().err


def test_a_model_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(trained([nn.Parameter(torch.ones(4))]).state_dict(), tmp_path / "in.pt")
    torch.save([torch.ones(4)], tmp_path / "model.pt")
    words = (tmp_path / "in.pt", tmp_path / "out.pt", "--to", "optimi", "--model", tmp_path / "model.pt")
    assert command(*words) == 2
    assert "model.pt has no model: expected its state_dict()" in capsys.readouterr().err


def test_groups_like_another_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sgd = wd_kernels.SGDW([p := nn.Parameter(torch.ones(300))], lr=0.1, momentum=0.9, decay="l2")
    p.grad = torch.ones(300)
    sgd.step()
    torch.save(sgd.state_dict(), tmp_path / "in.pt")
    like = dict(PEERS["bitsandbytes sgdw"]["state"])
    like["param_groups"] = [{**like["param_groups"][0], "params": [0]}]
    torch.save(like, tmp_path / "like.pt")
    words = (tmp_path / "in.pt", tmp_path / "out.pt", "--from", "wd_kernels", "--to", "bitsandbytes")
    assert command(*words) == 2
    assert "a group has no betas, which bitsandbytes' have" in capsys.readouterr().err
    assert command(*words, "--like", tmp_path / "like.pt") == 0
    assert load(tmp_path / "out.pt")["param_groups"][0]["betas"][0] == 0.9


def test_a_distributed_checkpoint(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = nn.Linear(4, 3)
    theirs = torch.optim.AdamW(model.parameters(), weight_decay=0.2)
    model(torch.ones(4)).sum().backward()
    theirs.step()
    weights, own = get_state_dict(model, theirs)
    dcp.save({"model": weights, "optimizer": own}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert command(tmp_path / "dcp", tmp_path / "out.pt", "--to", "deepspeed", "--from", "torch") == 0
    found = load(tmp_path / "out.pt")["optimizer"]
    assert found["state"]["weight"]["step"] == 1
    assert torch.equal(found["state"]["bias"]["exp_avg"], theirs.state[model.bias]["exp_avg"])
    assert found["param_groups"][0]["weight_decay"] == 0.2


def test_nothing_is_overwritten_or_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(PEERS["bitsandbytes adamw"]["state"], tmp_path / "in.pt")
    (tmp_path / "out.pt").write_text("mine")
    assert command(tmp_path / "in.pt", tmp_path / "out.pt") == 2
    assert "out.pt is there: --force overwrites it" in capsys.readouterr().err
    assert (tmp_path / "out.pt").read_text() == "mine"

    for error in (OSError("the disk is full"), RuntimeError("of torch.save: the disk is full")):

        def fails(*_: Any, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(torch, "save", fails)
            assert command(tmp_path / "in.pt", tmp_path / "out.pt", "--force") == 2
        assert "the disk is full" in capsys.readouterr().err
        assert (tmp_path / "out.pt").read_text() == "mine"
    os.chmod(tmp_path / "out.pt", 0o640)
    assert command(tmp_path / "in.pt", tmp_path / "out.pt", "--force") == 0
    assert "exp_avg" in load(tmp_path / "out.pt")["state"][0]
    assert (tmp_path / "out.pt").stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt", "out.pt"]


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Path))
    (tmp_path / "bytes.pt").touch()
    (tmp_path / "memo.pt").write_text("hello\n")  # of which the unpickler makes a KeyError
    (tmp_path / "bytes.safetensors").write_bytes(bytes(range(100)))
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_text("no metadata")
    torch.save({"state": [1], "param_groups": [{"params": [0], "foreach": None, "maximize": False}]}, tmp_path / "l.pt")
    torch.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
    adafactor = {"state": {0: {"exp_avg_sq_row": torch.ones(3)}}, "param_groups": [{"lr": 1, "params": [0]}]}
    torch.save(adafactor, tmp_path / "adafactor.pt")
    zero = {"optimizer_state_dict": {"base_optimizer_state": {}, "zero_stage": 1}}
    torch.save(zero, tmp_path / "zero.pt")
    apex = {"exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)}
    torch.save({"state": {0: apex}, "param_groups": [{"params": [0], "step": 1}]}, tmp_path / "apex.pt")
    said = {
        "nothing.pt": "is not there",
        "empty": r"is a folder: read are those with optimizer.pt or optimizer.bin, and torch's DCP",
        "zero": "zero_pp_rank_0_mp_rank_00_optim_states.pt is a rank's part of DeepSpeed's ZeRO",
        "zero/zero_pp_rank_0_mp_rank_00_optim_states.pt": "is a rank's part of DeepSpeed's ZeRO, with all parameters",
        "text.pt": "is no file of torch.save",
        "code.pt": "is no file of torch.save, or holds more than tensors",
        "bytes.pt": "bytes.pt is no file of torch.save",
        "memo.pt": "memo.pt is no file of torch.save",
        "bytes.safetensors": "bytes.safetensors is no .safetensors file",
        "dcp": "dcp is no DCP that torch reads",
        "l.pt": "'state' of state_dict is a list",
        "model.pt": "has no state of an optimizer; its keys are weight",
        "adafactor.pt": "has 'exp_avg_sq_row': it is Adafactor's",
        "zero.pt": "one rank's part of DeepSpeed's ZeRO 1",
        "apex.pt": "may be of 'transformer_engine' or 'apex'",
    }
    for name, message in said.items():
        assert command(tmp_path / name, tmp_path / "out.pt") == 2
        assert message in capsys.readouterr().err, name
    assert command(tmp_path / "apex.pt", tmp_path / "out.pt", "--from", "apex", "--to", "apex") == 2
    assert "has the layout of apex already" in capsys.readouterr().err
    assert command(tmp_path / "apex.pt", tmp_path / "no" / "out.pt", "--from", "apex") == 2
    assert "cannot be written: it is a folder, or is in one that is not there" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
