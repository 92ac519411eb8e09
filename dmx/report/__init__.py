"""One HTML page of a training run: curves, clusters, rankings, distances, timings, settings."""
