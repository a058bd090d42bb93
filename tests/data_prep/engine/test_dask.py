"""The Dask engine on real clusters of this machine."""

from __future__ import annotations

import pytest

from data_prep.errors import UsageError
from data_prep.sources.decathlon import Decathlon
from tests.data_prep.factories import convert_tree, decathlon_tree, tree_bytes

distributed = pytest.importorskip("dask.distributed")


@pytest.mark.parametrize("kind", ["own", "by address"])
def test_dask_result_equals_that_of_one_process(tmp_path, kind):
    root = decathlon_tree(tmp_path)
    convert_tree(Decathlon(), root, tmp_path / "a" / "toy")
    out = tmp_path / "b" / "toy"
    if kind == "own":
        assert convert_tree(Decathlon(), root, out, engine="dask", workers=2) == 0
    else:
        options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
        with distributed.LocalCluster(protocol="tcp", **options) as cluster:
            code = convert_tree(Decathlon(), root, out, engine="dask", scheduler=cluster.scheduler_address)
        assert code == 0
    assert tree_bytes(tmp_path / "a" / "toy") == tree_bytes(out)


def test_dask_scheduler_that_does_not_answer_is_one_error(tmp_path, monkeypatch):
    import data_prep.engine.run as run

    monkeypatch.setattr(run, "SCHEDULER_SECONDS", 1)
    with pytest.raises(UsageError, match="no Dask scheduler"):
        convert_tree(
            Decathlon(), decathlon_tree(tmp_path), tmp_path / "out", engine="dask", scheduler="tcp://127.0.0.1:9"
        )
