from __future__ import annotations

import math
import os

import pytest

from monai_mamba.quickstart.training_log import LogParser, read_training_logs


def _epoch(number: int, loss: float, dice: str = "np.float32(0.5), np.float32(0.25)", finished: bool = True) -> str:
    stamp = "2026-11-21 09:00:00.123456: "
    text = f"{stamp}\n{stamp}Epoch {number}\n{stamp}Current learning rate: 0.002\n{stamp}train_loss {loss}\n"
    text += f"{stamp}val_loss {loss / 2}\n{stamp}Pseudo dice [{dice}]\n"
    return text + (f"{stamp}Epoch time: 12.5 s\n" if finished else "")


def test_epoch_is_returned_when_it_is_complete():
    parser = LogParser()
    returned = [epoch for line in _epoch(4, -0.5).splitlines() if (epoch := parser.feed(line))]
    assert len(returned) == 1
    assert (returned[0].number, returned[0].train_loss, returned[0].val_loss) == (4, -0.5, -0.25)
    assert (returned[0].dice, returned[0].seconds) == ([0.5, 0.25], 12.5)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("np.float32(0.8123), np.float32(0.0)", [0.8123, 0.0]),
        ("np.float64(1e-04)", [1e-4]),
        ("0.81, 0.79", [0.81, 0.79]),
    ],
    ids=["numpy2", "exponent", "numpy1"],
)
def test_dice_is_read_as_either_numpy_prints_it(text, values):
    parser = LogParser()
    for line in _epoch(0, 0.1, text).splitlines():
        parser.feed(line)
    assert parser.epochs[0].dice == values


def test_dice_of_a_structure_that_was_not_sampled_is_nan():
    parser = LogParser()
    for line in _epoch(0, 0.1, "np.float32(0.5), nan").splitlines():
        parser.feed(line)
    assert parser.epochs[0].dice[0] == 0.5 and math.isnan(parser.epochs[0].dice[1])


def test_resumed_training_has_every_epoch_once_and_the_last_word_counts(tmp_path):
    first, second = tmp_path / "training_log_2026_9.txt", tmp_path / "training_log_2026_10.txt"
    first.write_text(_epoch(0, 0.9) + _epoch(1, 0.8) + _epoch(2, 0.7, finished=False))
    second.write_text(_epoch(1, 0.75) + _epoch(2, 0.6))
    os.utime(first, (1, 1))
    epochs = read_training_logs(tmp_path)
    assert [e.number for e in epochs] == [0, 1, 2]
    assert [e.train_loss for e in epochs] == [0.9, 0.75, 0.6]


def test_lines_of_other_programs_are_ignored():
    parser = LogParser()
    for line in ("train_loss 5", "Epoch time: 3 s", "some Epoch 5 of nothing", ""):
        assert parser.feed(line) is None
    assert parser.epochs == {}
