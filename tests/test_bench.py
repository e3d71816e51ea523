"""tools/bench.py: the textbook's steps, which it times, are ours. (test_cuda.py runs the whole script.)"""

import pytest

import train_pgdat
import train_trades
from tools import bench


@pytest.mark.parametrize("bn_mode", ["train", "eval"])
@pytest.mark.parametrize("script", [train_pgdat, train_trades])
def test_the_textbook_takes_our_steps_and_no_others(script, bn_mode):
    args = script.parse_args(["--bn-mode", bn_mode])
    assert bench.largest_difference(script, args) < bench.TOLERANCE
    if script is train_pgdat:
        args.bn_clean_passes = 0
        assert bench.largest_difference(script, args) > 1e-3
