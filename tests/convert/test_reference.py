from __future__ import annotations

import io
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

import hrm_text
from hrm_text.contracts import UserError
from hrm_text.convert.reference import SafeUnpickler, import_reference, renamed
from hrm_text.model.config import preset
from hrm_text.model.recurrence import RecurrentLM, build
from hrm_text.model.weights import read_model

SETTINGS = {"arch": {"name": "hrm", "H_cycles": 2, "L_cycles": 3, "num_heads": 2}, "lr": 2.2e-4}


def reference_name(name: str) -> str:
    """The name in the reference's model of a tensor of ours, from the table of the specification."""
    table = {
        "model.embed_tokens.weight": "embed_tokens.embedding_weight",
        "lm_head.weight": "lm_head.weight",
        "model.z_L_init": "model.zL_init",
    }
    for stack in "LH":
        name = name.replace(f"model.{stack}_module.layers.", f"model.{stack}_level.core.layers.")
    return table.get(name, name)


def write_reference(
    run: Path, epoch: int, *, prefix: str = "", optimiser: Any = "state", settings: Any = SETTINGS, seed: int = 1
) -> tuple[RecurrentLM, RecurrentLM]:
    """A synthetic checkpoint of the reference's layout; returns the models of its raw and its averaged weights."""
    config = preset("tiny", vocab_size=512, max_position_embeddings=128)
    raw, average = build(config, seed=seed), build(config, seed=seed + 1)
    average.model.z_L_init.copy_(raw.model.z_L_init)  # it is frozen, so the optimiser has none
    weights = {prefix + reference_name(name): tensor for name, tensor in raw.state_dict().items()}
    state = {
        prefix + reference_name(name): {"m": torch.zeros_like(p), "param_ema": p.detach(), "step": torch.tensor(3.0)}
        for name, p in average.named_parameters()
    }
    groups = [{"lr": 1e-3, "params": list(state)}]
    optim = {
        "state": {"state": state, "param_groups": groups},
        "by kind": {kind: {name: s[kind] for name, s in state.items()} for kind in ("m", "param_ema")},
        "numbered": {"state": {str(i): s for i, s in enumerate(state.values())}},
        "plain": {"state": {name: {"m": s["m"]} for name, s in state.items()}},
    }[optimiser]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = {"model": weights, "optim": optim, "epoch": epoch}
        save(content, checkpoint_id=run / f"fsdp2_epoch_{epoch}", no_dist=True)
    if settings is not None:
        (run / "all_config.yaml").write_text(yaml.safe_dump(settings))
    (run / "train_metadata.yaml").write_text(yaml.safe_dump({"vocab_size": 310, "max_seq_len": 129}))
    return raw, average


def logits(model: RecurrentLM) -> Tensor:
    ids = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))
    return model.logits(ids, torch.tensor([5, 0]))


@pytest.mark.parametrize("optimiser", ["state", "by kind"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_averaged_and_raw_weights_give_the_reference_models_logits(optimiser: str, prefix: str, tmp_path: Path) -> None:
    raw, average = write_reference(tmp_path / "run", 3, prefix=prefix, optimiser=optimiser)
    for chosen in (average, raw):
        options: dict[str, Any] = {"dtype": "float32", "raw": chosen is raw}
        out = import_reference(tmp_path / "run/fsdp2_epoch_3", tmp_path / "weights", **options)
        read = read_model(out)
        assert read.config.num_layers == 2
        assert (read.config.num_heads, read.config.max_position_embeddings) == (2, 128)
        torch.testing.assert_close(logits(read), logits(chosen), rtol=0, atol=0)


def test_the_parent_means_its_newest_whole_epoch(tmp_path: Path) -> None:
    for epoch in (2, 10):
        _, average = write_reference(tmp_path / "run", epoch, seed=epoch)
    (tmp_path / "run/fsdp2_epoch_11").mkdir()  # begun, not finished
    read = read_model(import_reference(tmp_path / "run", tmp_path / "weights", dtype="float32"))
    assert torch.equal(read.lm_head.weight, average.lm_head.weight)
    card = (tmp_path / "weights/README.md").read_text()
    assert "checkpoint of the reference trainer, fsdp2_epoch_10." in card
    assert "license" not in card.split("---")[1]


def test_with_its_tokenizer_the_folder_answers(tokenizer_dir: Path, tmp_path: Path) -> None:
    write_reference(tmp_path / "run", 1)
    out = import_reference(tmp_path / "run", tmp_path / "weights", tokenizer=tokenizer_dir)
    assert len(hrm_text.load(out).generate(["What is 1 + 1?"], max_new_tokens=4)) == 1
    bare = import_reference(tmp_path / "run", tmp_path / "bare")
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        hrm_text.load(bare)


def test_what_the_configuration_does_not_say_is_assumed_aloud(tmp_path: Path) -> None:
    write_reference(tmp_path / "run", 1, settings={"arch": {"num_heads": 2}})
    (tmp_path / "run/train_metadata.yaml").unlink()
    said: list[str] = []
    read = read_model(import_reference(tmp_path / "run", tmp_path / "weights", warn=said.append))
    assert (read.config.H_cycles, read.config.L_cycles, read.config.max_position_embeddings) == (2, 3, 4096)
    assert [text.split(": no ")[1] for text in said] == [
        f"{key} in all_config.yaml or train_metadata.yaml; assuming {number}"
        for key, number in (("H_cycles", 2), ("L_cycles", 3), ("max_position_embeddings", 4096))
    ]


def test_cycles_of_the_configuration_are_taken(tmp_path: Path) -> None:
    write_reference(tmp_path / "run", 1, settings={"arch": {"H_cycles": 1, "L_cycles": 2, "head_dim": 16}})
    config = read_model(import_reference(tmp_path / "run", tmp_path / "weights")).config
    assert (config.H_cycles, config.L_cycles, config.num_heads, config.bp_steps) == (1, 2, 4, 3)
    (tmp_path / "run/all_config.yaml").write_text("a: {H_cycles: 1}\nb: {H_cycles: 2}\n")
    with pytest.raises(UserError, match="H_cycles has several values: 1, 2"):
        import_reference(tmp_path / "run", tmp_path / "weights")


@pytest.mark.parametrize(
    ("optimiser", "seen"),
    [
        ("numbered", r"its 10 keys with param_ema are like optim\.state\.0\.param_ema"),
        ("plain", r"no key has param_ema; keys outside the model are like optim\.state"),
    ],
)
def test_a_moving_average_that_is_not_found_is_reported(optimiser: str, seen: str, tmp_path: Path) -> None:
    write_reference(tmp_path / "run", 1, optimiser=optimiser)
    with pytest.raises(UserError, match=f"no moving average was found for 10 of 11 tensors.*{seen}.*--raw") as error:
        import_reference(tmp_path / "run", tmp_path / "weights")
    assert "fsdp2_epoch_1" in str(error.value)
    import_reference(tmp_path / "run", tmp_path / "weights", raw=True)


def test_a_model_of_another_kind_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    raw, _ = write_reference(run, 1)
    weights = {reference_name(name): tensor for name, tensor in raw.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({"model": weights | {"extra.bias": torch.ones(2)}}, checkpoint_id=run / "fsdp2_epoch_2", no_dist=True)
        save({"model": {"wte.weight": torch.ones(2)}}, checkpoint_id=run / "fsdp2_epoch_3", no_dist=True)
    with pytest.raises(UserError, match=r"1 tensors do not belong, such as model\.extra\.bias"):
        import_reference(run / "fsdp2_epoch_2", tmp_path / "weights", raw=True)
    with pytest.raises(UserError, match=r"not an HRM of the reference trainer.*found model\.wte\.weight"):
        import_reference(run / "fsdp2_epoch_3", tmp_path / "weights", raw=True)


def test_missing_and_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder; expected a checkpoint of the reference trainer"):
        import_reference(tmp_path / "nowhere", tmp_path / "weights")
    with pytest.raises(UserError, match="no .metadata in"):
        import_reference(tmp_path, tmp_path / "weights")
    write_reference(tmp_path / "run", 1)
    folder = tmp_path / "run/fsdp2_epoch_1"
    [shard] = folder.glob("*.distcp")
    content = shard.read_bytes()
    shard.write_bytes(content[:1000])
    with pytest.raises(UserError, match="fsdp2_epoch_1: its shards cannot be read"):
        import_reference(folder, tmp_path / "weights")
    shard.unlink()
    with pytest.raises(UserError, match="fsdp2_epoch_1: its shards cannot be read"):
        import_reference(folder, tmp_path / "weights")
    for damaged in (b"", b"not a pickle", (folder / ".metadata").read_bytes()[:200], pickle.dumps([1, 2])):
        (folder / ".metadata").write_bytes(damaged)
        with pytest.raises(UserError, match=r"\.metadata: not an index of a torch DCP checkpoint"):
            import_reference(folder, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


class Malicious:
    """A pickle that runs a command when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_an_index_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_reference(tmp_path / "run", 1)
    folder, trace = tmp_path / "run/fsdp2_epoch_1", tmp_path / "ran"
    (folder / ".metadata").write_bytes(pickle.dumps(Malicious(trace)))
    with pytest.raises(UserError, match=r"\.metadata: not an index .*names (posix|nt)\.system"):
        import_reference(folder, tmp_path / "weights")
    assert not trace.exists()
    pickle.loads((folder / ".metadata").read_bytes())  # the attack is real
    assert trace.exists()


def test_a_shard_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_reference(tmp_path / "run", 1)
    folder, trace = tmp_path / "run/fsdp2_epoch_1", tmp_path / "ran"
    [shard] = folder.glob("*.distcp")
    evil = io.BytesIO()
    torch.save(Malicious(trace), evil)
    length = len(shard.read_bytes())
    shard.write_bytes(evil.getvalue().ljust(length, b"\0"))
    with pytest.raises(UserError, match="its shards cannot be read"):
        import_reference(folder, tmp_path / "weights")
    assert not trace.exists()


@pytest.mark.parametrize(
    "payload", [b"cbuiltins\neval\n.", b"cbuiltins\n__import__\n.", b"ctorch\nload\n.", b"cos\nsystem\n."]
)
def test_only_names_of_an_index_may_be_named(payload: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="no use for"):
        SafeUnpickler(io.BytesIO(payload)).load()


def test_names_are_those_of_the_specification() -> None:
    assert renamed("model.model.H_level.core.layers.12.attn.gqkv_proj.weight") == (
        "model.H_module.layers.12.attn.gqkv_proj.weight"
    )
    assert renamed("model._orig_mod.model.zL_init") == "model.z_L_init"
    assert renamed("model.something.else") == "model.something.else"
