"""The first complete path: a data set through nnU-Net's own plan, training and prediction to a report.

`dataset` reads, checks and converts data; `pipeline` runs nnU-Net and can be resumed; `evaluation` scores the cases
that were not trained on; `report` writes ``report.html`` and ``metrics.json``.
"""
