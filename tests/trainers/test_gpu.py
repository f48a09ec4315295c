"""What only a GPU can show. Without one these tests are skipped, and say so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from scalestudy.cluster.rank import Rank
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Trial

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: what only a GPU can show is not shown"),
]


@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 0.0, 1e-6), ("tf32", 1e-5, 1e-2)])
def test_tf32_is_off_in_fp32(
    make_trial: Callable[..., Trial], precision: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 keeps 10 bits of mantissa: a product of 2^-11 off per input where fp32 is 2^-24 off."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    rank = Rank(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, host="here")
    trainer: Any = TRAINERS["torch-ddp"].load()(make_trial(device="gpu", precision=precision), rank)
    try:
        left, right = torch.rand(2, 512, 512, device="cuda").unbind()
        exact = left.double() @ right.double()
        off = ((left @ right).double() - exact).abs().max() / exact.abs().max()
        assert least <= off <= most
    finally:
        trainer.close()
