#!/usr/bin/env bash
# kmeans1d 0.5.0: "globally optimal" one-dimensional k-means is not, where the values' offset is large beside their spread.
# Expected: the clusters of x and of x + c are the same. Seen: 200 normal values in 8 clusters; their squared error (of the
# labels found, on the values without the offset) is 1.0 of the optimum up to an offset of 1e5, 1.002 at 1e6, 1.53 at
# 1e7, 20 at 1e8: sums of squares are taken of the values as they come, in double precision. Take the mean away first.
# And with more clusters than different values a centroid 0.0 is returned that no value has.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "kmeans1d==0.5.0" "numpy==2.4.6"
"$work/venv/bin/python" - <<'PY'
import kmeans1d
import numpy as np

x = np.sort(np.random.default_rng(0).normal(size=200))


def error(labels):
    labels = np.asarray(labels)
    return sum(((x[labels == i] - x[labels == i].mean()) ** 2).sum() for i in np.unique(labels))


best = error(kmeans1d.cluster(x, 8).clusters)
ratios = {f"{c:.0e}": error(kmeans1d.cluster(x + c, 8).clusters) / best for c in (1e5, 1e6, 1e7, 1e8)}
print("kmeans1d 0.5.0, error over the optimum's by offset:", {k: round(v, 3) for k, v in ratios.items()})
assert abs(ratios["1e+05"] - 1) < 1e-9 and ratios["1e+06"] > 1.001 and ratios["1e+07"] > 1.3 and ratios["1e+08"] > 5
few = kmeans1d.cluster([1.0, 1.0, 2.0], 3)
print("three clusters of 1, 1, 2:", few)
assert few.centroids == [0.0, 1.0, 2.0] and 0 not in few.clusters
PY
