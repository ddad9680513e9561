from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm_text.cli import main
from hrm_text.model.config import PRESETS, RECURRENCE, preset
from hrm_text.settings import from_mapping, read_yaml
from hrm_text.train.config import TrainConfig

FOLDER = Path(__file__).parents[1] / "configs"
SFT = FOLDER / "sft.yaml"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if path != SFT)
"""Those that name a size; tests/recipes/test_fine_tuning.py trains by the other one."""
PARAMETERS = {"B": 0.30e9, "L": 0.69e9, "XL": 1.18e9}
"""By the paper's table of sizes, rounded to two digits after the point."""
GLOBAL_BATCH = {"B": 172_032, "L": 172_032, "XL": 196_608}
PEAK = {"B": 2.5e-4, "L": 2.5e-4, "XL": 2.2e-4}


def read(path: Path) -> TrainConfig:
    return from_mapping(TrainConfig, read_yaml(path), str(path))


def named(path: Path) -> tuple[str, str]:
    """Size and architecture that a file's name promises."""
    size, _, architecture = path.stem.partition("_")
    return size, architecture or "hrm"


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of 60 samples of random ids."""
    folder = tmp_path_factory.mktemp("sampled")
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 12, (60, 2))
    starts = (lengths.ravel().cumsum() - lengths.ravel()).reshape(60, 2)
    (folder / "epoch_0").mkdir()
    for column, part in enumerate(("inst", "resp")):
        np.save(folder / "epoch_0" / f"{part}_start.npy", starts[:, column])
        np.save(folder / "epoch_0" / f"{part}_len.npy", lengths[:, column])
    np.save(folder / "tokens.npy", rng.integers(0, 200, lengths.sum()).astype(np.uint16))
    metadata: dict[str, Any] = {"tokenizer_info": {"vocab_size": 200}, "vocab_size": None, "max_seq_len": 33}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def test_every_run_worth_naming_is_there() -> None:
    assert {path.stem for path in CONFIGS} >= {"tiny", *PARAMETERS}
    assert {named(path)[1] for path in CONFIGS} >= {"hrm", "transformer", "looped", "rins", "trm"}
    assert len({read(path).run for path in CONFIGS}) == len(CONFIGS)  # no two share a folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_what_its_name_says(path: Path) -> None:
    config, (size, architecture) = read(path), named(path)
    assert path.read_text().startswith("# ")
    assert "# Cost" in path.read_text()
    assert architecture in RECURRENCE and config.model.architecture == architecture
    # The vocabulary and the context come from the data; all else is the named size.
    assert config.model == preset(size, architecture=architecture, vocab_size=0, max_position_embeddings=0)
    assert size in PRESETS
    if size in PARAMETERS:
        parameters = preset(size, architecture=architecture).num_parameters
        assert round(parameters / 1e9, 2) * 1e9 == pytest.approx(PARAMETERS[size])
        assert config.data.tokens_per_batch * config.data.micro_batches == GLOBAL_BATCH[size]
        assert config.optimizer.lr.peak == PEAK[size]
        assert (config.optimizer.lr.warmup_steps, config.optimizer.lr.decay) == (2000, "constant")
        assert (config.optimizer.weight_decay, config.optimizer.ema_decay) == (0.1, 0.9999)
        assert config.data.tokens_per_batch >= 4096  # the longest sample fits


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_once_it_is_small(path: Path, sampled: Path, tmp_path: Path) -> None:
    small = "--model.hidden_size 32 --model.num_layers 2 --model.num_heads 2 --model.head_dim 16"
    batch = "--data.tokens_per_batch 128 --data.micro_batches 2 --validation.sampled null --max_steps 2"
    here = f"--device cpu --data.sampled {sampled} --run {tmp_path / 'run'} --logging.tensorboard false"
    assert main(["train", str(path), *small.split(), *batch.split(), *here.split()]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert all(0 < record["loss"] < 20 for record in records)
    assert (tmp_path / "run" / "checkpoints" / "step_00000002" / "manifest.json").exists()


def test_fine_tuning_is_by_the_preset() -> None:
    """Spec, section 3: batch 32,768, 5 epochs, lr 3e-5 cosine to 0.1, no warm-up, EMA 0.999, K_max from the start."""
    config = from_mapping(
        TrainConfig, read_yaml(SFT) | {"model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2}}, ""
    )
    assert (config.data.tokens_per_batch * config.data.micro_batches, config.data.epochs) == (32_768, 5)
    assert config.data.tokens_per_batch >= 4096
    lr = config.optimizer.lr
    assert (lr.peak, lr.warmup_steps, lr.decay, lr.floor) == (3e-5, 0, "cosine", 0.1)
    assert (config.optimizer.weight_decay, config.optimizer.ema_decay) == (0.1, 0.999)
    assert [config.credit.at(step, 100, 5) for step in (0, 99)] == [5, 5]
    assert config.init is not None and config.data.records is not None and not config.lora.rank
    assert "# Cost" in SFT.read_text()
    assert config.run not in {read(path).run for path in CONFIGS}
