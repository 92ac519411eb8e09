"""`dmx embed`: any number of images to Parquet, on all machines of a Ray cluster."""
