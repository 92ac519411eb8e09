"""Features in, pseudo-labels out.

>>> import numpy as np
>>> from dmx.cluster import pseudo_labels
>>> rng = np.random.default_rng(0)
>>> people = np.repeat(rng.standard_normal((3, 64)), 20, axis=0)
>>> found = pseudo_labels((people + 0.3 * rng.standard_normal(people.shape)).astype(np.float32))
>>> found.num_identities
3
"""

from dmx.cluster.graph import jaccard_distance, jaccard_graph
from dmx.cluster.labels import PseudoLabels, pseudo_labels

__all__ = ["PseudoLabels", "jaccard_distance", "jaccard_graph", "pseudo_labels"]
