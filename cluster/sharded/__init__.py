"""The same pseudo-labels from several workers, each with its rows: `sharded_pseudo_labels`."""

from dmx.cluster.sharded.group import Group, WorkerLostError
from dmx.cluster.sharded.labels import ShardedPseudoLabels, sharded_centroids, sharded_pseudo_labels

__all__ = ["Group", "ShardedPseudoLabels", "WorkerLostError", "sharded_centroids", "sharded_pseudo_labels"]
