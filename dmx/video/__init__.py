"""Crops of people out of videos: decoding, detectors, boxes of trackers, and what of it is kept."""
